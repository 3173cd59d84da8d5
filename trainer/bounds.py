"""Ends a training in time: within the run's limit, after a SIGTERM, or when an alert says that there is no use in going on.

It measures what a step, an evaluation and a checkpoint take, plans checkpoints and evaluations, and ends the training while
there is time left for what follows. A run that is cut has nothing; one that ends early has a model.
"""

import logging
import math
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

MARGIN = 0.03  # of the limit: what nobody measures (the container's start, the end of its log)
LOST_AT_MOST = 300.0  # seconds of training that a kill may cost
SAVING_SHARE = 0.02  # of the time, at most, goes into checkpoints for that
EVALUATIONS = 10  # in a run, one of them at its end
EVALUATION_SHARE = 0.1  # of the answers that training samples, at most, are an evaluation's
SLOWER = 1.25  # the next step may be so much slower than the slowest of the last ones
LAST_STEPS = 10
GRACE = 120.0  # seconds between SageMaker's SIGTERM and its SIGKILL
LIMITS = ("max_runtime", "max_cost_usd")


class Limit(NamedTuple):
    """How long a run may live, and what says so: `max_runtime` or `max_cost_usd`."""

    seconds: float
    name: str


class Costs(NamedTuple):
    """Seconds that parts of a run take; `finish` is what follows the training: saving and merging."""

    step: float = 0.0
    evaluation: float = 0.0
    save: float = 0.0
    finish: float = 0.0


def enough_time(spent: float, limit: float, costs: Costs) -> bool:
    """Whether another step fits into the limit, with an evaluation, a checkpoint and the finish after it."""
    needed = SLOWER * costs.step + costs.evaluation + costs.save + costs.finish
    return spent + needed <= (1 - MARGIN) * limit


def save_due(since_last: float, costs: Costs) -> bool:
    """Whether it is time for a checkpoint, if only so that a kill costs little."""
    return since_last + costs.step > max(LOST_AT_MOST, costs.save / SAVING_SHARE)


def evaluation_steps(max_steps: int, answers_per_step: float, rows: int) -> int:
    """Return after how many steps each an evaluation of so many rows is due.

    It depends on nothing measured: a run that was interrupted chooses among the same checkpoints as one that was not.
    """
    return max(math.ceil(max_steps / EVALUATIONS), math.ceil(rows / (EVALUATION_SHARE * answers_per_step)))


class Bounds(TrainerCallback):  # type: ignore[misc] # transformers is untyped here
    """Decides after each step whether to evaluate, to save, and to stop; all ranks decide the same.

    `evaluate` returns the held-out reward, None where nothing is held out; it is asked every `every` steps and at the end.
    `began` is when the run's process (its container) started, in seconds since 1970.
    """

    def __init__(
        self,
        record: Record,
        limit: Limit,
        watch: "Watch",
        evaluate: Callable[[], float | None],
        every: int,
        *,
        began: float,
        finish_seconds: float,
    ):
        self._record, self._limit, self._watch = record, limit, watch
        self._evaluate, self._every = evaluate, every
        self._before, self._began = record.seconds, began
        self._costs = Costs(**record.costs)._replace(finish=finish_seconds)
        self._steps: list[float] = []
        self._stop = False
        self._step_began = self._saved = self._deciding = self._now()

    def spent(self) -> float:
        """How long the run has lived, the processes before this one included."""
        return self._before + self._now() - self._began

    def fits(self) -> bool:
        """Whether there is time for a step."""
        return enough_time(self.spent(), self._limit.seconds, self._costs)

    def go_on(self, checkpoint: Checkpoint | None) -> bool:
        """Whether there is training to do from a checkpoint on. Raises JobError if there is no time for any."""
        record = self._record
        over = record.ended is not None and record.ended not in LIMITS
        if not over and self.fits():
            record.ended = None
            return True
        if checkpoint is None:
            raise JobError(f"{self._limit.name} leaves {self._limit.seconds:.0f} s, too few for a single step: raise it.")
        record.ended = record.ended if over else self._limit.name
        return False

    def _now(self) -> float:
        """The time on the first rank's clock, so that all ranks see the same."""
        now: float = gather_object([time.time()])[0]
        return now

    def on_train_begin(self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Listen for SIGTERM from the first step on; before it there is nothing to save."""
        signal.signal(signal.SIGTERM, self._remember)
        self._saved = self._now()

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        self._stop = True

    def _told(self) -> bool:
        """Whether any rank got a SIGTERM: all must stop after the same step."""
        return any(gather_object([self._stop]))

    def on_step_begin(self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Note the time."""
        self._step_began = self._now()

    def on_step_end(self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Decide what follows this step."""
        now = self._now()
        self._steps = [*self._steps, now - self._step_began][-LAST_STEPS:]
        self._costs = self._costs._replace(step=max(self._steps))
        self._record.heldout_reward = None
        due = state.global_step % self._every == 0
        if self._watch.broken:
            self._end("NON_FINITE", state, control)
        elif state.global_step >= state.max_steps:
            self._end("complete", state, control)
        elif self._told():
            log.info("stopping after step %d: SIGTERM", state.global_step)
            if due and self._costs.evaluation + self._costs.save < GRACE / 2:
                self._judge(state)
            control.should_save = control.should_training_stop = True
        elif not self.fits():
            log.info("stopping after step %d: %s leaves no time for another", state.global_step, self._limit.name)
            self._end(self._limit.name, state, control)
        elif self._watch.stop_for:
            self._end(self._watch.stop_for, state, control)
        elif due:
            self._judge(state)
            control.should_save = True
            control.should_training_stop = self._told()  # while it evaluated
        elif save_due(now - self._saved, self._costs):
            control.should_save = True
        self._deciding = self._now()
        self._record.seconds, self._record.costs = self.spent(), self._costs._asdict()

    def on_log(self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop if the step's metrics brought an alert to stop for."""
        if self._watch.stop_for and not control.should_training_stop:
            self._end(self._watch.stop_for, state, control)

    def on_save(self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Note what the checkpoint took."""
        self._saved = self._now()
        self._costs = self._costs._replace(save=self._saved - self._deciding)

    def _end(self, reason: str, state: TrainerState, control: TrainerControl) -> None:
        """End the training after this step; weights that are no numbers are neither judged nor saved."""
        control.should_training_stop = True
        self._record.ended = reason
        if self._watch.broken:
            control.should_save = False
        else:
            if self._record.heldout_reward is None:
                self._judge(state)
            control.should_save = True

    def _judge(self, state: TrainerState) -> None:
        """Evaluate the weights as they are."""
        began = self._now()
        self._record.heldout_reward = self._evaluate()
        if self._record.heldout_reward is not None:
            self._record.evaluations.append({"step": state.global_step, "heldout_reward": self._record.heldout_reward})
        self._costs = self._costs._replace(evaluation=self._now() - began)
