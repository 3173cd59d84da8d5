"""Logs a training where a team looks: in the tracker that the job's environment names.

    MLFLOW_TRACKING_URI    →  MLflow, `trainer.mlflow_run`

A thread makes all calls, so that a slow tracker does not slow the training. A tracker that is down or refuses costs one log
line and an `error` in training.json, and never the training. It gets what it missed at the next logging step.
"""

import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer import folders
from trainer.packages import import_all
from trainer.progress import POINTS, history, metrics
from trainer.tracker_page import Facts, Page, Point, Status, facts, figures
from tunedrop.config.model import RunConfig
from tunedrop.plain import one_line

log = logging.getLogger("trainer")

FINISH_SECONDS = 60.0  # the most that the job waits for its trackers at the end of the run
STOP_SECONDS = 10.0  # the same after SIGTERM, which leaves two minutes
ERROR_CHARACTERS = 300


def services() -> dict[str, Callable[[Facts], Page]]:
    """Return the trackers that the environment names. Raises PackageError if the container cannot import one's package."""
    found: dict[str, Callable[[Facts], Page]] = {}
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        from trainer.mlflow_run import PLUGIN, SETTINGS, MlflowRun

        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        import_all(["mlflow", PLUGIN] if uri.startswith("arn:") else ["mlflow"])
        found["MLflow"] = MlflowRun
    return found


class Tracker(TrainerCallback):  # type: ignore[misc] # transformers is untyped here
    """Sends a training's figures and files to a tracker, in a thread of its own.

    `method` is the run's, and `earlier` has the points of the phase before its training.
    """

    def __init__(self, name: str, opens: Callable[[Facts], Page], facts: Facts, method: str):
        self._name, self._opens, self._facts, self._method = name, opens, facts, method
        self.earlier: Sequence[Point] = ()
        self._page: Page | None = None
        self._pending: list[Point] = []
        self._error: str | None = None
        self._inbox: queue.SimpleQueue[list[Point] | tuple[Status, Path | None]] = queue.SimpleQueue()
        self._inbox.put([])  # opens the page
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def on_train_begin(self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Send the points that a resumed run logged up to its checkpoint, of which the page may have some."""
        self._inbox.put([*self.earlier, *history(state, self._method)])

    def on_log(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        """Send the figures of a logging step."""
        if POINTS[self._method] in logs:
            self._inbox.put([metrics(state.log_history[-1], state.max_steps)])

    def finish(self, status: Status, folder: Path | None, seconds: float) -> dict[str, str | None]:
        """End the page, with the files of a folder if there is one. Wait at most so many seconds, and return its facts."""
        self._inbox.put((status, folder))
        self._thread.join(seconds)
        error = f"no answer in {seconds:.0f} seconds" if self._thread.is_alive() else self._error
        if self._thread.is_alive():
            log.warning("%s did not end the run: %s", self._name, error)
        return {"name": self._name, "url": None} | (self._page.about if self._page else {}) | {"error": error}

    def _work(self) -> None:
        end = None
        while end is None:
            messages = [self._inbox.get()]
            while not self._inbox.empty():
                messages.append(self._inbox.get())
            for message in messages:
                if isinstance(message, tuple):
                    end = message
                else:
                    self._pending += message
            self._send(end)
        if self._error:
            self._send(end)

    def _send(self, end: tuple[Status, Path | None] | None) -> None:
        """Send what the tracker lacks, and end the page if it is time. A failure is logged once until a success."""
        try:
            if self._page is None:
                self._page = self._opens(self._facts)
            for point in self._pending:
                prefix = f"{point['phase']}/" if "phase" in point else ""
                if point["step"] > self._page.steps.get(prefix, -1):
                    self._page.write(figures(point, prefix), point["step"])
                    self._page.steps[prefix] = point["step"]
            self._pending.clear()
            self._page.flush()
            if end:
                self._page.close(*end)
            self._error = None
        except Exception as error:  # noqa: BLE001 - the error of any library that talks to a server
            if self._error is None:
                log.warning("%s did not get all of the run: %s", self._name, _reason(error))
            self._error = _reason(error)


def _reason(error: BaseException) -> str:
    """Return the message of an error's first cause: libraries wrap it in long ones."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return f"{type(error).__name__}: {one_line(str(error))}"[:ERROR_CHARACTERS]


class Trackers(list[Tracker]):
    """The trackers of a run, none without a variable in the environment."""

    def finish(self, ended: str | None) -> list[dict[str, str | None]]:
        """End all pages, and return their facts. `ended` is the record's: None for a run that SIGTERM stopped."""
        if ended is None:
            return [each.finish("KILLED", None, STOP_SECONDS) for each in self]
        return [each.finish("FINISHED", folders.model_dir(), FINISH_SECONDS) for each in self]


@contextmanager
def tracked(config: RunConfig, run_id: str) -> Iterator[Trackers]:
    """Open the pages of a run. An error in the block ends them as failed. Only the first rank has trackers."""
    first = os.environ.get("RANK", "0") == "0"
    known = facts(config, run_id)
    trackers = Trackers(Tracker(name, opens, known, config.method) for name, opens in (services() if first else {}).items())
    try:
        yield trackers
    except BaseException:
        for each in trackers:
            each.finish("FAILED", None, STOP_SECONDS)
        raise
