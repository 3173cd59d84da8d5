"""Measures what it costs a training to keep its answers, beside the same training without.

    .venv/bin/python -m benchmarks.rollouts --steps 10
    .venv/bin/python -m benchmarks.rollouts --made-up 1024     # only the writing: a step of so many completions

The benchmark trains the base model of the local application on the sample `counting`, with and without rollouts in turns,
from the same seed. It prints the time of a step of both, and the time spent in the code that keeps answers, which a
difference of two noisy times cannot show: writing the parts, and the means of the loss's log-probabilities. All times are
the processor's, because other work of the machine would stretch the clock's. `--made-up` writes rollouts of a GPU's size.
"""

import argparse
import functools
import logging
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from transformers import TrainerControl, TrainerState
from transformers.utils import logging as transformers_logging

from trainer import checkpoints, dataset, models, train
from trainer.latest_rollout import Rollout
from trainer.rollouts import Rollouts
from tunedrop.config.parse import parse_run_config
from tunedrop.rewards import build_rewards

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "tunedrop_cli/sample"
MADE_UP_STEPS, CHARACTERS, GROUP = 20, 1000, 8


class Stopwatch:
    """Adds up the processor's time that functions take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its time counted."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - began

        return wrapped


def run(steps: int, folder: Path, watch: Stopwatch, *, keeps: bool) -> float:
    """Train and return the seconds of the processor for a step."""
    values = yaml.safe_load((SAMPLE / "counting.yaml").read_text())
    values["grpo"] |= {"max_steps": steps, "logging_steps": 1}
    config = parse_run_config(values)
    location = str(ROOT / ".tunedrop/models" / config.model)
    tokenizer = models.load_tokenizer(location)
    rewards = build_rewards(config.rewards)
    rows = dataset.fit_prompts(dataset.load_rows(SAMPLE / "counting.jsonl", config, None), tokenizer, config).rows
    trainer = train.build_trainer(
        config, location, tokenizer, rows, rewards, checkpoints.identity(config, rows), checkpoints.Record()
    )
    if keeps:
        rollouts = Rollouts(folder, config.rollouts.max_mb, trainer, rows)
        rollouts.on_log = watch.timed(rollouts.on_log)  # type: ignore[method-assign]
        trainer.add_callback(rollouts)
    began = time.process_time()
    trainer.train()
    return (time.process_time() - began) / steps


def train_with_and_without(steps: int, turns: int) -> None:
    """Print the time of a step with and without rollouts, and the time of the code that keeps them."""
    watch = Stopwatch()
    Rollout.note_log_probs = watch.timed(Rollout.note_log_probs)  # type: ignore[method-assign]
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(turns):
        for keeps in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                times[keeps].append(run(steps, Path(folder), watch, keeps=keeps))
                if keeps:
                    size = sum(path.stat().st_size for path in Path(folder).iterdir())
    for keeps, name in ((False, "without rollouts"), (True, "with rollouts")):
        print(f"{name:18} {statistics.fmean(times[keeps]):6.3f} s a step, over {turns} times {steps} steps")
    spent = watch.seconds / (turns * steps)
    share = spent / statistics.fmean(times[False])
    print(f"{'kept':18} {size / 1000:.1f} KB in {steps} steps, {spent * 1000:.2f} ms a step: {share:.2%} of it")


def made_up(completions: int, max_mb: float) -> None:
    """Print the time that a step's part takes, for rollouts of so many completions."""
    lots = random.Random(0)
    words = [f"{lots.choice('bcdfgklmnprst')}{lots.choice('aeiou')}{lots.choice('bdglmnrst')}" for _ in range(400)]
    rows = [
        {"id": f"r{n}", "prompt": [{"role": "user", "content": "?"}], "answer": "!"} for n in range(completions // GROUP)
    ]
    trainer: Any = SimpleNamespace(
        record=SimpleNamespace(alerts=[]), reward_weights=torch.ones(2), num_generations=GROUP, rollout=None
    )
    state = TrainerState(max_steps=MADE_UP_STEPS, is_world_process_zero=True)
    for limit in (0.0, max_mb):
        with tempfile.TemporaryDirectory() as folder:
            rollouts = Rollouts(Path(folder), limit, trainer, rows)
            rollouts.on_train_begin(None, state, TrainerControl())
            times = []
            for state.global_step in range(1, MADE_UP_STEPS + 1):
                trainer.rollout = Rollout(
                    rows=[row for row in range(len(rows)) for _ in range(GROUP)],
                    texts=[" ".join(lots.choices(words, k=CHARACTERS // 4)) for _ in range(completions)],
                    tokens=[CHARACTERS // 4] * completions,
                    cut=[False] * completions,
                    rewards={name: [lots.random() for _ in range(completions)] for name in "ab"},
                    advantages=[lots.gauss(0, 1) for _ in range(completions)],
                    sampler_log_probs=[-0.5] * completions,
                    trainer_log_probs=torch.full((completions,), -0.5),
                )
                began = time.process_time()
                rollouts.on_log(None, state, TrainerControl(), {"reward": 0.0})
                times.append(time.process_time() - began)
            size = sum(path.stat().st_size for path in Path(folder).iterdir())
            print(
                f"max_mb {limit:4g}: {completions} completions of {CHARACTERS} characters, "
                f"{statistics.median(times) * 1000:6.1f} ms a step, {size / 1e6:.1f} MB in {MADE_UP_STEPS} steps"
            )


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--turns", type=int, default=2, help="trainings with and without rollouts")
    parser.add_argument("--made-up", type=int, help="measure only the writing, of steps of so many completions")
    parser.add_argument("--max-mb", type=float, default=50.0, help="limit of the made-up rollouts")
    flags = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if flags.made_up:
        made_up(flags.made_up, flags.max_mb)
    else:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            train_with_and_without(flags.steps, flags.turns)


if __name__ == "__main__":
    main()
