"""What a job's log lines say of its progress. The jobs print figures as `name=value` pairs, one line a step."""

import re
from typing import NamedTuple

_STEP = re.compile(r"\bstep=(\d+) max_steps=(\d+)\b")
_TESTED = re.compile(r"\btested=(\d+) total=(\d+) model=(\w+)")
_FIGURE = re.compile(r"\b(reward|loss|completion_length)=(\S+)")
_ETA = re.compile(r"\beta_seconds=(\d+)")
_ALERT = re.compile(r"\balert=(\w+) step=(\d+) (.*)")


class Progress(NamedTuple):
    """A job's progress: `done` of `total` training steps, or of the answers of a `model` to the tests.

    `figures` are a step's figures as the job printed them. `eta` is in seconds.
    """

    done: int
    total: int
    model: str | None
    figures: dict[str, str]
    eta: int | None

    @property
    def left(self) -> str:
        """The time left, such as `1:12 left`; empty if unknown."""
        return "" if self.eta is None else f"{self.eta // 60}:{self.eta % 60:02d} left"


class Alert(NamedTuple):
    """An alert of a training: its code, its step and its message."""

    code: str
    step: int
    message: str


def read_line(line: str) -> Progress | Alert | None:
    """Return what a log line says of progress; None for any other line."""
    if match := _STEP.search(line) or _TESTED.search(line):
        model = match[3] if match.re is _TESTED else None
        eta = _ETA.search(line)
        return Progress(int(match[1]), int(match[2]), model, dict(_FIGURE.findall(line)), int(eta[1]) if eta else None)
    if match := _ALERT.search(line):
        return Alert(match[1], int(match[2]), match[3])
    return None
