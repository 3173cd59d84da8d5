"""Ends a training that hangs: in a reward's service, in a reward's own code, or in the connection between GPUs.

A thread looks how long ago the training last did something. If that is too long (`trainer.alerts.stalled`), it writes the
stacks of all threads to the log and interrupts the main thread with `StalledError`. Then the job saves its model and ends.
If the main thread does not react, because it hangs in code of CUDA or NCCL, the process ends with the reason.
"""

import faulthandler
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.alerts import Alert, stalled
from trainer.job import JobError, report
from trainer.progress import history

if TYPE_CHECKING:
    from trainer.progress import Watch
    from trainer.run_trainer import RunTrainer

log = logging.getLogger("trainer")

LOOK_SECONDS = 5.0  # between two looks
GRACE_SECONDS = 60.0  # for the main thread to react


class StalledError(BaseException):
    """The training hangs. Not an Exception: libraries and rewards catch these."""

    def __init__(self, alert: Alert):
        super().__init__(alert.message)
        self.alert = alert


class Watchdog(TrainerCallback):  # type: ignore[misc] # transformers is untyped here
    """A context with a training in it. Raises StalledError in the main thread if the training does nothing for too long.

    `evaluation_steps`: how many steps' work an evaluation is.
    """

    def __init__(self, trainer: "RunTrainer", evaluation_steps: float):
        self._state: TrainerState = trainer.state
        self._evaluation_steps = evaluation_steps
        self._ended = threading.Event()
        self._last = time.monotonic()
        self._alert: Alert | None = None
        trainer.add_callback(self)

    def __enter__(self) -> Self:
        self._seen()
        self._handler = signal.signal(signal.SIGUSR1, self._interrupt)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        signal.signal(signal.SIGUSR1, self._handler)

    def on_train_begin(self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Take the state of this training, which a checkpoint may have replaced."""
        self._state = state
        self._seen()

    def _seen(self, *_args: Any, **_: Any) -> None:
        self._last = time.monotonic()

    on_step_begin = on_step_end = on_substep_end = on_log = on_save = _seen

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            waited = time.monotonic() - self._last
            if alert := stalled(history(self._state), waited, self._evaluation_steps):
                self._alert = alert
                log.warning("the stacks of all threads follow: %s", alert.message)
                faulthandler.dump_traceback(2, all_threads=True)  # stderr's descriptor: pytest replaces sys.stderr
                self._seen()
                os.kill(os.getpid(), signal.SIGUSR1)
                if not self._ended.wait(GRACE_SECONDS):
                    report(f"The job stalled: {alert.message}.")
                    os._exit(1)
                return

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        if self._alert and not self._ended.is_set():
            self._ended.set()
            raise StalledError(self._alert)


def train_watched(trainer: "RunTrainer", watch: "Watch", evaluation_steps: float, train: Callable[[], object]) -> None:
    """Call `train`. If it hangs, raise the alert and save the weights of the last step.

    `evaluation_steps`: how many steps' work an evaluation is.

    Raises JobError if no step has ended, or with several GPUs: their ranks write a checkpoint together, and some of them
    hang. Another attempt goes on from the newest checkpoint then.
    """
    try:
        with Watchdog(trainer, evaluation_steps):
            train()
    except StalledError as error:
        alert = error.alert
        watch.raise_alert(alert, trainer.state)
        if trainer.accelerator.num_processes > 1 or trainer.state.global_step == 0:
            raise JobError(f"The job stalled after step {trainer.state.global_step}: {alert.message}.") from None
        trainer.record.ended = alert.code
        trainer.save_now()
