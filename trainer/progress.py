"""What a training run says while it runs: metrics, alerts, and where people look at them."""

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Collection, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.alerts import Alert, find
from trainer.checkpoints import Record

if TYPE_CHECKING:
    from trl import GRPOTrainer as _Base
else:
    _Base = object

log = logging.getLogger("trainer")

# Our names for what TRL logs: one line of metrics.jsonl, one `name=value` on stdout, one SageMaker metric.
METRICS = {
    "reward": "reward",
    "reward_std": "reward_std",
    "reward_best": "reward_best",
    "reward_truncated": "reward_truncated",
    "reward_finished": "reward_finished",
    "heldout_reward": "heldout_reward",
    "frac_reward_zero_std": "frac_reward_zero_std",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "completion_length",
    "completions/clipped_ratio": "clipped_ratio",
    "learning_rate": "learning_rate",
    "answers": "answers",
    "memory_gb": "memory_gb",
    "step_time": "seconds",
}
SAMPLES, SAMPLE_CHARACTERS = 3, 500
# An adapter's weights are below 1. From here on their products overflow, and sampling fails on scores that are no numbers.
LARGEST_WEIGHT = 1e4


def metrics(entry: dict[str, Any], max_steps: int) -> dict[str, Any]:
    """Return a line of metrics.jsonl for an entry of the trainer's log."""
    rewards = {
        name.removeprefix("rewards/").removesuffix("/mean"): value
        for name, value in entry.items()
        if name.startswith("rewards/") and name.endswith("/mean")
    }
    named = {ours: entry[theirs] for theirs, ours in METRICS.items() if theirs in entry}
    return {"step": entry["step"], "max_steps": max_steps, "epoch": entry["epoch"], **named, "rewards": rewards}


def history(state: TrainerState) -> list[dict[str, Any]]:
    """Return the points logged so far that are about a fresh rollout."""
    return [metrics(entry, state.max_steps) for entry in state.log_history if "reward" in entry]


def line(values: dict[str, Any], eta_seconds: float) -> str:
    """Return the log line of a step: plain `name=value` pairs, which SageMaker's metric definitions look for."""
    shown = {name: value for name, value in values.items() if name not in {"rewards", "epoch", "seconds"}}
    shown |= {"step_seconds": values["seconds"], "eta_seconds": eta_seconds}
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in shown.items()
    )


def as_json(values: Any) -> str:
    """Return values as JSON, which has no number that is not finite: null stands for it."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    return json.dumps(finite)


class Observed(_Base):  # type: ignore[misc] # TRL is untyped here
    """Adds to a GRPO trainer's metrics what the alerts need: the rewards of cut and of finished answers, and the best.

    To be put before a `GRPOTrainer` in a class's bases.
    """

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: list[list[int]]) -> Any:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        cut = torch.tensor([not ids or ids[-1] not in ends for ids in completion_ids_list], device=rewards.device)
        cut = self.accelerator.gather(cut)
        totals = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        self._log_metric("answers", float(len(totals)))
        self._log_metric("reward_best", float(totals.max()))
        for name, chosen in (("reward_truncated", totals[cut]), ("reward_finished", totals[~cut])):
            if len(chosen):
                self._log_metric(name, float(chosen.mean()))
        self._log_metric("memory_gb", memory_gb())
        return rewards


def memory_gb() -> float:
    """Return the most memory that was in use so far: the GPU's, without one the process's."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated() / 1e9)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Board(Protocol):
    """Where numbers are shown by step: TensorBoard's SummaryWriter."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Add a number."""

    def close(self) -> None:
        """Have the file hold what was added; nothing is added any more."""


class Progress(TrainerCallback):  # type: ignore[misc] # transformers is untyped here
    """Writes metrics.jsonl, the board, and a log line per logging step; on a terminal a bar instead of lines."""

    def __init__(self, path: Path, board: Callable[[], Board]):
        self._path, self._make_board = path, board
        self._board: Board | None = None
        self._began = 0.0
        self._first = 0
        self._bar: tqdm[Any] | None = None

    def on_train_begin(self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Write again what a resumed run had logged up to its checkpoint."""
        self._began, self._first = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text("")
            self._board = self._make_board()
            for values in history(state):
                self._write(values)
            log.info("training steps=%d from_step=%d", state.max_steps, state.global_step)
            if sys.stdout.isatty():
                self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", file=sys.stdout)

    def on_log(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        """Write a step's figures; the trainer has put them at the end of its log history."""
        if not state.is_world_process_zero or "reward" not in logs:
            return
        values = metrics(state.log_history[-1], state.max_steps)
        self._write(values)
        if self._bar is not None:
            self._bar.set_postfix(reward=values["reward"], entropy=values.get("entropy"))
            self._bar.update(state.global_step - self._bar.n)
        else:
            per_step = (time.monotonic() - self._began) / (state.global_step - self._first)
            log.info(line(values, round(per_step * (state.max_steps - state.global_step))))

    def on_train_end(self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Finish the files, and leave the terminal to others."""
        if self._board is not None:
            self._board.close()
        if self._bar is not None:
            self._bar.close()

    def _write(self, values: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(as_json(values) + "\n")
        assert self._board is not None  # made when the training began
        rewards = {f"rewards/{name}": value for name, value in values["rewards"].items()}
        for name, value in (values | rewards).items():
            if isinstance(value, float):
                self._board.add_scalar(name, value, values["step"])


class Watch(TrainerCallback):  # type: ignore[misc] # transformers is untyped here
    """Names what goes wrong, once each: in alerts.jsonl, in the log, and to whoever else is to be told.

    `stop_for` is the alert that the training should end for, if any. `broken` says that the adapter's weights are no
    numbers any more: there is nothing to go on with, whatever the policy.
    """

    def __init__(
        self,
        path: Path,
        record: Record,
        *,
        formats: Collection[str],
        stop_on: Collection[str],
        samples: Callable[[], Sequence[dict[str, Any]]],
        tell: Callable[[dict[str, Any]], None],
    ):
        self._path, self._record, self._formats, self._stop_on = path, record, formats, stop_on
        self._samples, self._tell = samples, tell
        self.stop_for: str | None = None
        self.broken = False

    def on_train_begin(self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Write again what a resumed run had named up to its checkpoint."""
        if state.is_world_process_zero:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text("".join(json.dumps(alert) + "\n" for alert in self._record.alerts))

    def on_step_end(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, model: torch.nn.Module, **_: Any
    ) -> None:
        """Look whether the weights are still numbers: a loss that is not, the trainer's log does not show."""
        if not all(bool((each.abs() < LARGEST_WEIGHT).all()) for each in model.parameters() if each.requires_grad):
            self.broken, self.stop_for = True, "NON_FINITE"
            message = "the adapter's weights are not finite, or as good as: lower learning_rate or max_grad_norm"
            self._name(Alert("NON_FINITE", state.global_step, message, {}), state)

    def on_log(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        """Name what the step's figures say."""
        if "reward" not in logs:
            return
        for alert in find(history(state), self._formats):
            self._name(alert, state)
            if alert.code in self._stop_on and self.stop_for is None:
                self.stop_for = alert.code

    def _name(self, alert: Alert, state: TrainerState) -> None:
        if alert.code in {named["code"] for named in self._record.alerts}:
            return
        named = alert._asdict() | {"samples": list(islice(self._samples(), SAMPLES))}
        self._record.alerts.append(named)
        if state.is_world_process_zero:
            with self._path.open("a") as file:
                file.write(json.dumps(named) + "\n")
            log.warning("alert=%s step=%d %s", alert.code, alert.step, alert.message)
            self._tell(named)


def latest_samples(trainer: "_Base") -> list[dict[str, Any]]:
    """Return the answers of the latest rollout, the worst first, each once: prompt, completion and rewards."""
    logs = trainer._logs
    rewards = [dict(zip(logs["rewards"], values, strict=True)) for values in zip(*logs["rewards"].values(), strict=True)]
    found = {}
    for prompt, completion, scores in zip(logs["prompt"], logs["completion"], rewards, strict=True):
        texts = [str(messages[-1]["content"])[:SAMPLE_CHARACTERS] for messages in (prompt, completion)]
        finite = {name: value if math.isfinite(value) else None for name, value in scores.items()}
        found[tuple(texts)] = {"prompt": texts[0], "completion": texts[1], "rewards": finite}
    return sorted(found.values(), key=lambda each: sum(value or 0.0 for value in each["rewards"].values()))
