"""What a training run says while it runs, and how it stops when it is told to."""

import json
import logging
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

log = logging.getLogger("trainer")

# Our names for what TRL logs: one line of metrics.jsonl, one `name=value` on stdout, one SageMaker metric.
METRICS = {
    "reward": "reward",
    "reward_std": "reward_std",
    "frac_reward_zero_std": "frac_reward_zero_std",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "completion_length",
    "completions/clipped_ratio": "clipped_ratio",
    "learning_rate": "learning_rate",
    "step_time": "seconds",
}


def metrics(entry: dict[str, Any], max_steps: int) -> dict[str, Any]:
    """Return a line of metrics.jsonl for an entry of the trainer's log."""
    rewards = {
        name.removeprefix("rewards/").removesuffix("/mean"): value
        for name, value in entry.items()
        if name.startswith("rewards/") and name.endswith("/mean")
    }
    named = {ours: entry[theirs] for theirs, ours in METRICS.items() if theirs in entry}
    return {"step": entry["step"], "max_steps": max_steps, "epoch": entry["epoch"], **named, "rewards": rewards}


def line(values: dict[str, Any], eta_seconds: float) -> str:
    """Return the log line of a step: plain `name=value` pairs, which SageMaker's metric definitions look for."""
    shown = {name: value for name, value in values.items() if name not in {"rewards", "epoch", "seconds"}}
    shown |= {"step_seconds": values["seconds"], "eta_seconds": eta_seconds}
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in shown.items()
    )


class Progress(TrainerCallback):  # type: ignore[misc] # transformers is untyped here
    """Writes metrics.jsonl and a log line per logging step."""

    def __init__(self, path: Path):
        self._path = path
        self._began = 0.0
        self._first = 0

    def on_train_begin(self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Write again what a resumed run had logged up to its checkpoint."""
        self._began, self._first = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            kept = [json.dumps(metrics(entry, state.max_steps)) + "\n" for entry in state.log_history if "reward" in entry]
            self._path.write_text("".join(kept))
            log.info("training steps=%d from_step=%d", state.max_steps, state.global_step)

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
        with self._path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        per_step = (time.monotonic() - self._began) / (state.global_step - self._first)
        log.info(line(values, round(per_step * (state.max_steps - state.global_step))))


class StopOnSignal(TrainerCallback):  # type: ignore[misc] # transformers is untyped here
    """On SIGTERM (a spot interruption, or a stop) finishes the step, saves a checkpoint and ends the training."""

    def __init__(self) -> None:
        self._stop = False

    def on_train_begin(self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Listen from the first step on; before it there is nothing to save."""
        signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        self._stop = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop after this step if the signal came to any rank: all must stop after the same one."""
        if args.world_size > 1:
            any_rank = torch.tensor(int(self._stop), device=args.device)
            torch.distributed.all_reduce(any_rank, torch.distributed.ReduceOp.MAX)
            self._stop = bool(any_rank)
        if self._stop:
            log.info("stopping after step %d", state.global_step)
            control.should_save = control.should_training_stop = True
