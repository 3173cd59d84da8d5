"""Measures how much sooner a second drop reaches a held-out reward from a first run's adapter than from the base model.

    .venv/bin/python -m benchmarks.line
    .venv/bin/python -m benchmarks.line --target 0.95 --seeds 5

The task is the sample `additions`. Every second sum is in the first drop, the others are in the second, of which every fifth
row is held out. A first run trains on the first drop. Then the second drop is trained twice with the same seed: from a new
adapter, and from the first run's (`start_from`). Before the first step and after each step, the model completes the held-out
rows greedily. This time is not counted.
"""

import argparse
import logging
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import yaml
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from benchmarks.time_to_reward import ROOT, SAMPLE
from trainer import dataset, models, start, train
from trainer.checkpoints import Record
from trainer.run_trainer import RunTrainer
from trainer.sampling import sample_completions
from tunedrop.config.parse import parse_run_config
from tunedrop.dataset.rows import Row
from tunedrop.rewards import build_rewards

FIRST_RUN = "first-000000000000"
WORDINGS = 3  # rows with the same sum, which follow each other in the sample


class ToTarget(TrainerCallback):  # type: ignore[misc] # transformers is untyped here
    """Ends the training when the held-out rows reach a mean reward; `seconds` and `steps` are those of the training."""

    def __init__(self, trainer: RunTrainer, heldout: list[Row], target: float):
        self._trainer, self._heldout, self._target = trainer, heldout, target
        self.seconds, self.steps, self.reached = 0.0, 0, False

    def score(self) -> None:
        """Complete and score the held-out rows."""
        rewards = build_rewards(parse_run_config(sample_config()).rewards)
        scores = [each.score for (each,) in sample_completions(self._trainer, rewards, self._heldout, 1, greedy=True)]
        print(f" {statistics.fmean(scores):.2f}", end="", flush=True)
        self.reached = statistics.fmean(scores) >= self._target

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        """Stop the clock, and the training at the target."""
        self.seconds += time.perf_counter() - self._began
        self.steps += 1
        self.score()
        control.should_training_stop |= self.reached


def sample_config() -> dict[str, Any]:
    """Return the sample's run config."""
    values: dict[str, Any] = yaml.safe_load((SAMPLE / "additions.yaml").read_text())
    return values


def build(rows: list[Row], seed: int, steps: int, start_from: str) -> RunTrainer:
    """Return the trainer of a run, as a training job makes it. The channel `start` has the adapter to start from."""
    values = sample_config() | {"start_from": start_from}
    values["grpo"] |= {"seed": seed, "max_steps": steps}
    config = parse_run_config(values)
    location = str(ROOT / ".tunedrop/models" / config.model)
    tokenizer, rewards = models.load_tokenizer(location), build_rewards(config.rewards)
    trainer = train.build_trainer(config, location, tokenizer, rows, rewards, {}, Record(), start.read(config))
    trainer.remove_callback(PrinterCallback)
    return trainer


def save_adapter(trainer: RunTrainer, folder: Path) -> None:
    """Save an adapter as a run does: with the name of its base model."""
    trainer.model.peft_config["default"].base_model_name_or_path = sample_config()["model"]
    trainer.model.save_pretrained(folder)
    os.environ["SM_CHANNEL_START"] = str(folder)


def to_target(rows: list[Row], heldout: list[Row], seed: int, steps: int, start_from: str, target: float) -> ToTarget:
    """Train until the target or for at most `steps` steps, and print the held-out rewards."""
    print(f"  seed {seed}, from {start_from}:", end="", flush=True)
    trainer = build(rows, seed, steps, start_from)
    watch = ToTarget(trainer, heldout, target)
    watch.score()
    if not watch.reached:
        trainer.add_callback(watch)
        trainer.train()
    if not watch.reached:
        watch.seconds = float("inf")
    print(f"  {watch.seconds:.1f} s, {watch.steps} steps", flush=True)
    return watch


def main() -> None:
    """Print the seconds and steps of both ways to the target, and the ratios of their means."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", type=float, default=0.9, help="mean held-out reward to reach")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-steps", type=int, default=4, help="steps of the first run")
    parser.add_argument("--max-steps", type=int, default=25, help="most steps to the target")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    rows = dataset.load_rows(SAMPLE / "additions.jsonl", parse_run_config(sample_config()), None)
    first, second = ([row for at, row in enumerate(rows) if at // WORDINGS % 2 == drop] for drop in (0, 1))
    learn, heldout = [row for at, row in enumerate(second) if at % 5], second[::5]
    print(f"first drop: {len(first)} rows; second drop: {len(learn)} rows, {len(heldout)} held out")
    found: dict[str, list[ToTarget]] = {"base": [], FIRST_RUN: []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            trainer = build(first, seed, arguments.first_steps, "base")
            trainer.train()
            save_adapter(trainer, Path(folder, str(seed)))
            for start_from, watches in found.items():
                watches.append(to_target(learn, heldout, seed, arguments.max_steps, start_from, arguments.target))
    base, started = (
        [statistics.fmean(each) for each in ([watch.seconds for watch in of], [watch.steps for watch in of])]
        for of in found.values()
    )
    ratio = f"{base[0] / started[0]:.1f} times sooner" if started[0] else "at once"
    print(f"mean to {arguments.target:g}: base {base[0]:.1f} s, {base[1]:.1f} steps")
    print(f"first run's adapter {started[0]:.1f} s, {started[1]:.1f} steps: {ratio}")


if __name__ == "__main__":
    main()
