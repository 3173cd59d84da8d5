"""Measures how well the learnability gate predicts the share of groups with a gradient in training.

    .venv/bin/python -m benchmarks.learnability
    .venv/bin/python -m benchmarks.learnability --seeds 20 --steps 8
    .venv/bin/python -m benchmarks.learnability --simulate 1000     # how often it stops a task that is merely hard

The benchmark uses the task and config of the sample `additions`. For each seed, the gate samples the base model with
different numbers of prompts and of completions per prompt. Then the trainer takes some steps with a learning rate of nearly
0, because the model must not change: the trainer's groups then come from the same model as the gate's. The benchmark
compares each gate's prediction with the measured share.

`--simulate` needs no model. It runs the gate's own procedure on tasks whose share of groups with a gradient is known: either
all prompts have the same small chance of a right answer ("same"), or few prompts have an even chance and the others none
("few").
"""

import argparse
import logging
import math
import os
import random
import statistics
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import yaml
from transformers.utils import logging as transformers_logging

from trainer import checkpoints, dataset, learnability, learnability_gate, models, sampling, train
from trainer.progress import history
from tunedrop.config.parse import parse_run_config
from tunedrop.config.schedule import most_gate_prompts
from tunedrop.rewards import build_rewards

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "tunedrop_cli/sample"
# Prompts, and completions of each. The gate samples 16 x 8 in most runs.
GATES = [(24, 2), (24, 4), (8, 8), (16, 8), (24, 8)]
WITHIN = 10  # points
NEARLY_ZERO = 1e-12


def run(seed: int, steps: int) -> tuple[list[float], float]:
    """Return the prediction of each gate, and the share that training measures."""
    values = yaml.safe_load((SAMPLE / "additions.yaml").read_text())
    values["grpo"] |= {"seed": seed, "max_steps": steps, "learning_rate": NEARLY_ZERO, "logging_steps": 1}
    config = parse_run_config(values)
    location = str(ROOT / ".tunedrop/models" / config.model)
    tokenizer = models.load_tokenizer(location)
    rewards = build_rewards(config.rewards)
    rows = dataset.fit_prompts(dataset.load_rows(SAMPLE / "additions.jsonl", config, None), tokenizer, config).rows
    run_identity = checkpoints.identity(config, rows)
    trainer = train.build_trainer(config, location, tokenizer, rows, rewards, run_identity, checkpoints.Record())
    most_prompts, most_samples = (max(each) for each in zip(*GATES, strict=True))
    asked = [rows[index] for index in trainer.row_order()[:most_prompts]]
    scores = [
        [answer.score for answer in each] for each in sampling.sample_completions(trainer, rewards, asked, most_samples)
    ]
    expected = [
        learnability.estimate([each[:samples] for each in scores[:prompts]], trainer.num_generations).expected_nonzero_groups
        for prompts, samples in GATES
    ]
    trainer.train()
    measured = 1 - statistics.fmean(point["frac_reward_zero_std"] for point in history(trainer.state))
    return expected, measured


GROUP = 8
FIXED = 24  # prompts of a gate that does not end early


def chances(kind: str, share: float, rows: int, lots: random.Random) -> list[float]:
    """Return each row's chance of a right answer, so that this share of groups of GROUP answers has a gradient."""
    if kind == "few":
        return [0.5 * (lots.random() < share / (1 - 2 * 0.5**GROUP)) for _ in range(rows)]
    low, high = 0.0, 0.5
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - middle**GROUP - (1 - middle) ** GROUP < share else (low, middle)
    return [low] * rows


class Simulation(NamedTuple):
    """How one simulated gate ended: stopped or not, the prompts that it asked, its forecast, and that of FIXED prompts."""

    stopped: bool
    prompts: int
    forecast: float
    fixed: float


def simulated(kind: str, share: float, groups: int, lots: random.Random) -> Simulation:
    """Return how the gate ends on a run of this many groups, of whose groups this share has a gradient."""
    by_row = chances(kind, share, groups, lots)
    asked = 0

    def sample(rows: list[int], _seed: int) -> list[list[sampling.ScoredCompletion]]:
        nonlocal asked
        asked += len(rows)
        return [
            [sampling.ScoredCompletion("", float(lots.random() < by_row[row]), {}, cut=False) for _ in range(GROUP)]
            for row in rows
        ]

    most = most_gate_prompts(groups * GROUP, GROUP)
    judge = partial(learnability_gate.estimate_of, group=GROUP)
    _, estimate = learnability_gate.ask(sample, range(groups), most, judge, 0.0)
    prompts = asked
    _, fixed = learnability_gate.ask(sample, range(groups), FIXED, judge, None)
    return Simulation(not estimate.has_gradient, prompts, estimate.expected_nonzero_groups, fixed.expected_nonzero_groups)


def simulate(runs: int) -> None:
    """Print how often the gate stops tasks that are hard, how much it asks, and how far its forecast is off."""
    print(f"task  groups  with a gradient  stopped  asked of the run's answers  forecast  from {FIXED} prompts")
    for groups in (60, 240, 600, 3000):
        for share in (0.0, max(30 / groups, 0.01), 0.1, 0.3):
            for kind in ("same", "few") if share else ("same",):
                lots = random.Random(f"{kind} {groups} {share}")
                ends = [simulated(kind, share, groups, lots) for _ in range(runs)]
                stopped, prompts, forecast, fixed = (statistics.fmean(each) for each in zip(*ends, strict=True))
                print(
                    f"{kind}  {groups:6}  {share:15.3f}  {stopped:7.1%}  {prompts / groups:26.1%}  {forecast:8.3f}  "
                    f"{fixed:15.3f}",
                    flush=True,
                )


def main() -> None:
    """Print the predicted and measured shares for each seed, and the error of each gate."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--simulate", type=int, metavar="RUNS", help="simulate this many runs of each task, without a model")
    arguments = parser.parse_args()
    if arguments.simulate:
        simulate(arguments.simulate)
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    print("groups with a gradient: predicted from (prompts x completions), and measured")
    print("seed  " + "".join(f"{prompts:>6} x {samples}" for prompts, samples in GATES) + "  measured")
    runs = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)  # the trainer's output folder is relative
            runs.append(run(seed, arguments.steps))
        expected, measured = runs[-1]
        print(f"{seed:4}  " + "".join(f"{share:>10.2f}" for share in expected) + f"{measured:>10.2f}", flush=True)
    truth = statistics.fmean(measured for _, measured in runs)
    error = statistics.stdev(measured for _, measured in runs) / math.sqrt(len(runs))
    print(f"measured over all seeds: {truth:.3f}, standard error {error:.3f}")
    for number, (prompts, samples) in enumerate(GATES):
        own = [100 * (expected[number] - measured) for expected, measured in runs]
        off = [100 * (expected[number] - truth) for expected, _ in runs]
        print(
            f"{prompts} x {samples}: mean error {statistics.fmean(off):+.1f} points, "
            f"standard deviation {statistics.stdev(off):.1f}; "
            f"within {WITHIN} points of all seeds: {sum(abs(each) <= WITHIN for each in off)} of {len(off)}, "
            f"of its own seed: {sum(abs(each) <= WITHIN for each in own)}"
        )


if __name__ == "__main__":
    main()
