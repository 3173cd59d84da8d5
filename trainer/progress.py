"""Reports a training while it runs: metrics, alerts, TensorBoard files, log lines and a progress bar."""

import json
import logging
import math
import resource
import shutil
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.alerts import Alert, find
from trainer.checkpoints import Record

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

log = logging.getLogger("trainer")

# TRL's metrics and our names for them, in metrics.jsonl, in the log (`name=value`) and as SageMaker metrics.
METRICS = {
    "reward": "reward",
    "reward_std": "reward_std",
    "reward_best": "reward_best",
    "reward_truncated": "reward_truncated",
    "reward_finished": "reward_finished",
    "heldout_reward": "heldout_reward",
    "probe_score": "probe_score",
    "probe_lost": "probe_lost",
    "probe_gained": "probe_gained",
    "heldout_loss": "heldout_loss",
    "mean_token_accuracy": "token_accuracy",
    "frac_reward_zero_std": "frac_reward_zero_std",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "completion_length",
    "completions/clipped_ratio": "clipped_ratio",
    "learning_rate": "learning_rate",
    "answers": "answers",
    "abstained": "abstained",
    "mismatch": "mismatch",
    "mismatch_p99": "mismatch_p99",
    "mismatch_clipped": "mismatch_clipped",
    "memory_gb": "memory_gb",
    "step_time": "seconds",
}
SAMPLES, SAMPLE_CHARACTERS = 3, 500
# An adapter's weights are below 1. Products of weights above this limit overflow, and sampling fails on the scores.
LARGEST_WEIGHT = 1e4


def metrics(entry: dict[str, Any], max_steps: int) -> dict[str, Any]:
    """Return a line of metrics.jsonl for an entry of the trainer's log. A line without rewards is of phase `sft`."""
    rewards = {
        name.removeprefix("rewards/").removesuffix("/mean"): value
        for name, value in entry.items()
        if name.startswith("rewards/") and name.endswith("/mean")
    }
    named = {ours: entry[theirs] for theirs, ours in METRICS.items() if theirs in entry}
    phase = {} if "reward" in entry else {"phase": "sft"}
    return {**phase, "step": entry["step"], "max_steps": max_steps, "epoch": entry["epoch"], **named, "rewards": rewards}


# The metric that marks a point of the log, by method. Only steps of GRPO with a new rollout have rewards.
POINTS = {"grpo": "reward", "sft": "loss"}


def history(state: TrainerState, method: str = "grpo") -> list[dict[str, Any]]:
    """Return the logged points of a training by this method."""
    return [metrics(entry, state.max_steps) for entry in state.log_history if POINTS[method] in entry]


def line(values: dict[str, Any], eta_seconds: float) -> str:
    """Return the log line of a step: plain `name=value` pairs, as SageMaker's metric definitions expect."""
    shown = {name: value for name, value in values.items() if name not in {"rewards", "epoch", "seconds"}}
    shown |= {"step_seconds": values["seconds"], "eta_seconds": eta_seconds}
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in shown.items()
    )


def as_json(values: Any) -> str:
    """Return values as JSON. JSON has no NaN and no infinity: both become null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    return json.dumps(finite)


def memory_gb() -> float:
    """Return the peak memory so far in GB: the GPU's, or the process's on a machine without a GPU."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated() / 1e9)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def ordered_samples(
    prompts: Sequence[Any], completions: Sequence[Any], rewards: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    """Return completions (messages) without duplicates, the lowest reward first. `rewards` are by function.

    Each is `{"prompt", "completion", "rewards"}`, texts cut to SAMPLE_CHARACTERS, rewards None if they are not finite.
    """
    by_completion = [dict(zip(rewards, values, strict=True)) for values in zip(*rewards.values(), strict=True)]
    samples = {}
    for prompt, completion, scores in zip(prompts, completions, by_completion, strict=True):
        texts = [str(messages[-1]["content"])[:SAMPLE_CHARACTERS] for messages in (prompt, completion)]
        finite = {name: value if math.isfinite(value) else None for name, value in scores.items()}
        samples[tuple(texts)] = {"prompt": texts[0], "completion": texts[1], "rewards": finite}
    return sorted(samples.values(), key=lambda each: sum(value or 0.0 for value in each["rewards"].values()))


class Progress(TrainerCallback):  # type: ignore[misc] # transformers is untyped here
    """Writes `metrics.jsonl` and `tensorboard/` into a folder and logs each logging step, or shows a bar on a terminal.

    `earlier` are the points of a phase before this training.
    """

    def __init__(self, folder: Path, method: str = "grpo", earlier: Sequence[dict[str, Any]] = ()):
        self._method, self._earlier = method, earlier
        self._path, self._tensorboard = folder / "metrics.jsonl", folder / "tensorboard"
        self._writer: SummaryWriter | None = None
        self._began = 0.0
        self._first = 0
        self._bar: tqdm[Any] | None = None

    def on_train_begin(self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Write the points that a resumed run logged up to its checkpoint."""
        from tensorboardX import SummaryWriter

        self._began, self._first = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text("")
            shutil.rmtree(self._tensorboard, ignore_errors=True)  # a resumed run writes its points again
            self._writer = SummaryWriter(str(self._tensorboard))
            for values in [*self._earlier, *history(state, self._method)]:
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
        """Write the figures of a step, which are the last entry of the trainer's log history."""
        if not state.is_world_process_zero or POINTS[self._method] not in logs:
            return
        values = metrics(state.log_history[-1], state.max_steps)
        self._write(values)
        if self._bar is not None:
            self._bar.set_postfix({name: values.get(name) for name in (POINTS[self._method], "entropy")})
            self._bar.update(state.global_step - self._bar.n)
        else:
            per_step = (time.monotonic() - self._began) / (state.global_step - self._first)
            log.info(line(values, round(per_step * (state.max_steps - state.global_step))))

    def on_train_end(self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Close the files and the bar."""
        if self._writer is not None:
            self._writer.close()
        if self._bar is not None:
            self._bar.close()

    def _write(self, values: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(as_json(values) + "\n")
        assert self._writer is not None  # `on_train_begin` made it
        rewards = {f"rewards/{name}": value for name, value in values["rewards"].items()}
        folder = f"{values['phase']}/" if "phase" in values else ""
        for name, value in (values | rewards).items():
            if isinstance(value, float):
                self._writer.add_scalar(folder + name, value, values["step"])


class Watch(TrainerCallback):  # type: ignore[misc] # transformers is untyped here
    """Raises each alert once: writes it to `alerts.jsonl` and to the log, and passes it to `announce`.

    `formats` and `mean_rises` are parameters of `trainer.alerts.find`.
    `samples` returns the latest completions, the lowest reward first, and `telling` the prompt ids of the latest groups that
    show an alert best, by its code. `stop_for` is the alert that should end the training, None as long as there is none.
    `broken`: the adapter's weights are not finite, so the training must end.
    """

    def __init__(
        self,
        path: Path,
        record: Record,
        *,
        formats: Collection[str],
        stop_on: Collection[str],
        samples: Callable[[], Sequence[dict[str, Any]]],
        telling: Callable[[str], Sequence[str]],
        announce: Callable[[dict[str, Any]], None],
        mean_rises: bool,
    ):
        self._path, self._record, self._formats, self._stop_on = path, record, formats, stop_on
        self._mean_rises = mean_rises
        self._samples, self._telling, self._announce = samples, telling, announce
        self.stop_for: str | None = None
        self.broken = False

    def on_train_begin(self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Write the alerts that a resumed run raised up to its checkpoint."""
        if state.is_world_process_zero:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text("".join(json.dumps(alert) + "\n" for alert in self._record.alerts))

    def on_step_end(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, model: torch.nn.Module, **_: Any
    ) -> None:
        """Raise NON_FINITE if a weight is not finite. The trainer's log does not show it: it filters such losses out."""
        if not all(bool((each.abs() < LARGEST_WEIGHT).all()) for each in model.parameters() if each.requires_grad):
            self.broken, self.stop_for = True, "NON_FINITE"
            message = (
                "the adapter's weights are not finite, or too large to compute with: lower learning_rate or max_grad_norm"
            )
            self.raise_alert(Alert("NON_FINITE", state.global_step, message, {}), state)

    def on_log(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        """Raise the alerts that the step's figures show."""
        if "reward" not in logs:
            return
        for alert in find(history(state), self._formats, mean_rises=self._mean_rises):
            self.raise_alert(alert, state, self._telling(alert.code))
            if alert.code in self._stop_on and self.stop_for is None:
                self.stop_for = alert.code

    def raise_alert(self, alert: Alert, state: TrainerState, prompts: Sequence[str] = ()) -> None:
        """Write and announce an alert, unless the run has raised it before. `prompts` are the ids of groups of its step."""
        if alert.code in {earlier["code"] for earlier in self._record.alerts}:
            return
        links = [{"step": alert.step, "prompt_id": prompt} for prompt in prompts]
        raised = alert._asdict() | {"samples": list(islice(self._samples(), SAMPLES)), "rollouts": links}
        self._record.alerts.append(raised)
        if state.is_world_process_zero:
            with self._path.open("a") as file:
                file.write(json.dumps(raised) + "\n")
            log.warning("alert=%s step=%d %s", alert.code, alert.step, alert.message)
            self._announce(raised)
