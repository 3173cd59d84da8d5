"""What a job's log lines say of its progress. The jobs print figures as `name=value` pairs, one line a step."""

import re
from typing import NamedTuple

_STEP = re.compile(r"(?:\bphase=(\w+) )?\bstep=(\d+) max_steps=(\d+)\b")
_TESTED = re.compile(r"\btested=(\d+) total=(\d+) model=(\w+)")
_FIGURE = re.compile(r"\b(reward|loss|completion_length)=(\S+)")
_ETA = re.compile(r"\beta_seconds=(\d+)")
_NOTE = re.compile(r"\bnote=(.+)")
_ALERT = re.compile(r"\balert=(\w+) step=(\d+) (.*)")


class Progress(NamedTuple):
    """A job's progress: `done` of `total` training steps, or of the answers of a `model` to the tests.

    `figures` are a step's figures as the job printed them. `eta` is in seconds. `phase` is `sft` in supervised fine-tuning.
    """

    done: int
    total: int
    model: str | None
    figures: dict[str, str]
    eta: int | None
    phase: str | None = None

    @property
    def label(self) -> str:
        """What `done` counts: steps, or the answers of the model with this name."""
        return self.model or ("step" if self.phase is None else f"{self.phase} step")

    @property
    def left(self) -> str:
        """The time left, such as `1:12 left`; empty if unknown."""
        return "" if self.eta is None else f"{self.eta // 60}:{self.eta % 60:02d} left"


class Note(NamedTuple):
    """What a training does or has found beside its steps, in words."""

    text: str


class Alert(NamedTuple):
    """An alert of a training: its code, its step and its message."""

    code: str
    step: int
    message: str


def read_line(line: str) -> Progress | Note | Alert | None:
    """Return what a log line says of progress; None for any other line."""
    eta = _ETA.search(line)
    seconds, figures = int(eta[1]) if eta else None, dict(_FIGURE.findall(line))
    if match := _STEP.search(line):
        return Progress(int(match[2]), int(match[3]), None, figures, seconds, match[1])
    if match := _TESTED.search(line):
        return Progress(int(match[1]), int(match[2]), match[3], figures, seconds)
    if match := _NOTE.search(line):
        return Note(match[1])
    if match := _ALERT.search(line):
        return Alert(match[1], int(match[2]), match[3])
    return None
