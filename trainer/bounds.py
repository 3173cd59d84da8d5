"""Ends a training in time: within the run's limit, after SIGTERM, or after an alert that should stop it.

`Bounds` measures the time of a step, an evaluation and a checkpoint. It schedules checkpoints and evaluations, and ends the
training while there is time to save and prove the model. SageMaker stops a job at its limit, and then there is no model.
"""

import logging
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.checkpoints import Checkpoint, Record
from trainer.job import JobError

if TYPE_CHECKING:
    from trainer.progress import Watch

log = logging.getLogger("trainer")

MARGIN = 0.03  # of the limit, for unmeasured parts: the start of the container, the end of its log
LOST_AT_MOST = 300.0  # seconds of training that are lost if the job is killed
SAVING_SHARE = 0.02  # largest share of the time for such checkpoints
SLOWER = 1.25  # allowance for the next step, times the slowest of the last LAST_STEPS steps
LAST_STEPS = 10
GRACE = 120.0  # seconds between SageMaker's SIGTERM and its SIGKILL
LIMITS = ("max_runtime", "max_cost_usd")


class Limit(NamedTuple):
    """The seconds that a run may take, and the config key that limits them: `max_runtime` or `max_cost_usd`."""

    seconds: float
    name: str


class Costs(NamedTuple):
    """The seconds of a step, an evaluation and a checkpoint. `finish`: of merging, saving and proving the model."""

    step: float = 0.0
    evaluation: float = 0.0
    save: float = 0.0
    finish: float = 0.0


def enough_time(spent: float, limit: float, costs: Costs) -> bool:
    """Return whether another step fits into the limit, with an evaluation, a checkpoint and the finish after it."""
    needed = SLOWER * costs.step + costs.evaluation + costs.save + costs.finish
    return spent + needed <= (1 - MARGIN) * limit


def save_due(since_last: float, costs: Costs) -> bool:
    """Return whether a checkpoint is due, to bound the training that is lost if the job is killed."""
    return since_last + costs.step > max(LOST_AT_MOST, costs.save / SAVING_SHARE)


class Bounds(TrainerCallback):  # type: ignore[misc] # transformers is untyped here
    """Decides after each step whether to evaluate, to save and to stop. All ranks make the same decision.

    `evaluate` returns measures of the weights by name, none without held-out rows; it is called every `every` steps and at
    the end. `enough` returns why the training ends after these evaluations, None if it goes on. `at_end` is called with the
    final weights, before their checkpoint. `began`: the start of the process (the container) in seconds since 1970.
    """

    def __init__(
        self,
        record: Record,
        limit: Limit,
        watch: "Watch",
        evaluate: Callable[[], dict[str, float]],
        every: int,
        *,
        began: float,
        finish_seconds: float,
        enough: Callable[[list[dict[str, float]]], str | None] = lambda _evaluations: None,
        at_end: Callable[[], None] = lambda: None,
    ):
        self._record, self._limit, self._watch = record, limit, watch
        self._evaluate, self._every, self._enough, self._at_end = evaluate, every, enough, at_end
        self._before, self._began = record.seconds, began
        self._costs = Costs(**record.costs)._replace(finish=finish_seconds)
        self._steps: list[float] = []
        self._measured = -1  # the step of the last evaluation
        self._stop = False
        self._step_began = self._saved = self._deciding = self._now()

    def spent(self) -> float:
        """Return the seconds that the run has taken, including the processes before this one."""
        return self._before + self._now() - self._began

    def fits(self) -> bool:
        """Return whether there is time for a step."""
        return enough_time(self.spent(), self._limit.seconds, self._costs)

    def go_on(self, checkpoint: Checkpoint | None) -> bool:
        """Return whether the training should continue from a checkpoint. Raises JobError without checkpoint and time."""
        record = self._record
        over = record.ended is not None and record.ended not in LIMITS
        if not over and self.fits():
            record.ended = None
            return True
        if checkpoint is None:
            raise JobError(
                f"{self._limit.name} leaves {self._limit.seconds:.0f} s, too few for a single step: "
                f"raise {self._limit.name}."
            )
        record.ended = record.ended if over else self._limit.name
        return False

    def _now(self) -> float:
        """Return the time of the first rank's clock, which all ranks use."""
        now: float = gather_object([time.time()])[0]
        return now

    def on_train_begin(self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Handle SIGTERM from the first step on. Before it there is nothing to save."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self._saved = self._now()

    def _on_sigterm(self, _number: int, _frame: FrameType | None) -> None:
        self._stop = True

    def _any_rank_stops(self) -> bool:
        """Return whether any rank got SIGTERM: all ranks must stop after the same step."""
        return any(gather_object([self._stop]))

    def on_step_begin(self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Record the time."""
        self._step_began = self._now()

    def on_step_end(self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluate, save or stop after this step."""
        now = self._now()
        self._steps = [*self._steps, now - self._step_began][-LAST_STEPS:]
        self._costs = self._costs._replace(step=max(self._steps))
        self._record.heldout_reward = None
        due = state.global_step % self._every == 0
        if self._watch.broken:
            self._end("NON_FINITE", state, control)
        elif state.global_step >= state.max_steps:
            self._end("complete", state, control)
        elif self._any_rank_stops():
            log.info("stopping after step %d: SIGTERM", state.global_step)
            if due and self._costs.evaluation + self._costs.save < GRACE / 2:
                self._measure(state)
            control.should_save = control.should_training_stop = True
        elif not self.fits():
            log.info("stopping after step %d: %s leaves no time for another step", state.global_step, self._limit.name)
            self._end(self._limit.name, state, control)
        elif self._watch.stop_for:
            self._end(self._watch.stop_for, state, control)
        elif due:
            self._measure(state)
            if reason := self._enough(self._record.evaluations):
                self._end(reason, state, control)
            control.should_save = True
            control.should_training_stop |= self._any_rank_stops()  # SIGTERM may arrive in the evaluation
        elif save_due(now - self._saved, self._costs):
            control.should_save = True
        self._deciding = self._now()
        self._record.seconds, self._record.costs = self.spent(), self._costs._asdict()

    def on_log(self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop if the step's metrics raised an alert that should end the training."""
        if self._watch.stop_for and not control.should_training_stop:
            self._end(self._watch.stop_for, state, control)

    def on_save(self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Record the time that the checkpoint took."""
        self._saved = self._now()
        self._costs = self._costs._replace(save=self._saved - self._deciding)

    def _end(self, reason: str, state: TrainerState, control: TrainerControl) -> None:
        """End the training after this step. Weights that are not finite are neither evaluated nor saved."""
        control.should_training_stop = True
        self._record.ended = reason
        if self._watch.broken:
            control.should_save = False
        else:
            if self._measured != state.global_step:
                self._measure(state)
            self._at_end()
            control.should_save = True

    def _measure(self, state: TrainerState) -> None:
        """Evaluate the current weights."""
        began, self._measured = self._now(), state.global_step
        measures = self._evaluate()
        self._record.heldout_reward = measures.get("heldout_reward")
        if measures:
            self._record.evaluations.append({"step": state.global_step} | measures)
        self._costs = self._costs._replace(evaluation=self._now() - began)
