"""Measures the gate's error rates: the share of approved models, among models without and with an improvement.

    .venv/bin/python benchmarks/gate.py [--runs 2000] [--samples 400]

Each line shows the gate beside the same gate with a plain percentile bootstrap interval, with a fixed seed. `--samples` is
the number of resamples per interval (the gate uses 2,000).

The last part simulates the whole procedure of a run without a test file: checkpoints that did not improve, the choice of the
best one on held-out rows, and the gate. It shows Tunedrop's division of the held-out rows beside one set of rows that
chooses and judges. A third of the rows repeat the question of another row.
"""

import argparse
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from pipeline.publish import statistics
from pipeline.publish.statistics import FEW_TESTS, Pair, compare, interval
from pipeline.validation.split import divide
from trainer.checkpoints import Checkpoint, Record, best
from tunedrop.dataset.rows import Row
from tunedrop.questions import prompt_text, question

Draw = Callable[[random.Random], float]
COUNTS = (20, 50, 100, 200)
CHECKPOINTS = (1, 5, 10, 20)
HELD_OUT = (40, 64, 256)
SELECTED = ("pass/fail, a third changes", "pass/fail, all change", "graded, uniform", "rare disasters, 10 %")


def flips(won: float, lost: float) -> Draw:
    """Pass-or-fail scores: a share of the tests is won, a share lost."""

    def draw(generator: random.Random) -> float:
        roll = generator.random()
        return 1.0 if roll < won else -1.0 if roll > 1 - lost else 0.0

    return draw


def disasters(share: float) -> Draw:
    """Small gains and rare total losses, whose mean is zero."""
    return lambda generator: -1.0 if generator.random() < share else share / (1 - share)


NULLS: dict[str, Draw] = {
    "pass/fail, 10 % change": flips(0.05, 0.05),
    "pass/fail, a third changes": flips(1 / 6, 1 / 6),
    "pass/fail, all change": flips(0.5, 0.5),
    "graded, uniform": lambda generator: generator.random() - generator.random(),
    "graded, little scatter": lambda generator: max(-1.0, min(1.0, generator.gauss(0, 0.05))),
    "rare disasters, 5 %": disasters(0.05),
    "rare disasters, 10 %": disasters(0.1),
    "rare disasters, 15 %": disasters(0.15),
}
LIFTS: dict[str, Draw] = {
    "+0.05 (10 % won, 5 % lost)": flips(0.10, 0.05),
    "+0.10 (15 % won, 5 % lost)": flips(0.15, 0.05),
    "+0.20 (25 % won, 5 % lost)": flips(0.25, 0.05),
    "+0.30 (40 % won, 10 % lost)": flips(0.40, 0.10),
    "+0.60 (60 % won, none lost)": flips(0.60, 0.0),
}


@cache
def approved(lifts: tuple[float, ...], samples: int, span: float) -> bool:
    """Return whether the lower bound is above 0. A span of 0 gives the plain percentile bootstrap interval."""
    return interval(lifts, [1.0] * len(lifts), 0.95, span, samples)[0] > 0


def rate(draw: Draw, tests: int, runs: int, samples: int, span: float) -> float:
    """Return the share of simulated runs that are approved."""
    generator = random.Random(f"{tests}")
    return sum(approved(tuple(sorted(draw(generator) for _ in range(tests))), samples, span) for _ in range(runs)) / runs


# --- the whole procedure ---


class Procedure(NamedTuple):
    """The held-out questions of a run by task. A question that two rows ask stands twice."""

    choosing: list[str]
    judging: list[str]


def procedure(held_out: int, *, divided: bool) -> Procedure:
    """Divide held-out rows as validation does, or let all of them choose and judge."""
    numbers = [number if number % 3 else number // 2 for number in range(held_out)]
    texts = [f"{number}{'  ' if number % 2 else ' '}+ 1?" for number in numbers]
    rows: list[Row] = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
    parts = divide(rows) if divided else (rows, rows)
    return Procedure(*([question(prompt_text(row["prompt"])) for row in part] for part in parts))


def run_is_approved(draw: Draw, checkpoints: int, rows: Procedure, generator: random.Random) -> bool:
    """Return whether a run is approved. Each checkpoint changes the score of each question by a draw whose mean is 0."""
    changes = [{each: draw(generator) for each in {*rows.choosing, *rows.judging}} for _ in range(checkpoints)]
    # The base model's reward is the same for all checkpoints.
    rewards = [fmean(change[each] for each in rows.choosing) if rows.choosing else None for change in changes]
    tuned = [Checkpoint(Path(), step, {}, Record(heldout_reward=reward)) for step, reward in enumerate(rewards)]
    chosen = changes[best(tuned).step]
    lifts = [chosen[each] for each in rows.judging]
    if sum(lifts) <= 1 or len(set(rows.judging)) < FEW_TESTS:  # the lower bound is below the mean with the extra test
        return False
    pairs = [Pair(max(0, -lift), max(0, lift), question=each) for lift, each in zip(lifts, rows.judging, strict=True)]
    return compare(pairs).lift_low > 0


def print_selection(runs: int) -> None:
    """Print the false approvals of the whole procedure by number of checkpoints and of held-out rows."""
    worst = {divided: dict.fromkeys(CHECKPOINTS, 0.0) for divided in (True, False)}
    title = "approved without an improvement"
    print(f"{title:40}" + "".join(f"{f'{rows} held out':>16}" for rows in HELD_OUT) + "      (divided / one set)")
    for name in SELECTED:
        for checkpoints in CHECKPOINTS:
            line = f"  {f'{name}, best of {checkpoints}':38}"
            for held_out in HELD_OUT:
                for divided in (True, False):
                    rows, generator = procedure(held_out, divided=divided), random.Random(f"{checkpoints} {held_out}")
                    share = sum(run_is_approved(NULLS[name], checkpoints, rows, generator) for _ in range(runs)) / runs
                    worst[divided][checkpoints] = max(worst[divided][checkpoints], share)
                    line += f"{share:>8.1%} /" if divided else f"{share:>6.1%}"
            print(line, flush=True)
    for divided, title in ((True, "divided"), (False, "one set")):
        rates = ", ".join(f"best of {checkpoints} {each:.1%}" for checkpoints, each in worst[divided].items())
        print(f"highest error rate, {title}: {rates}")


def main() -> None:
    """Print the shares of approved models by number of tests."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=400)
    options = parser.parse_args()
    worst = {"gate": 0.0, "plain": 0.0}
    for title, cases in (("approved without an improvement", NULLS), ("approved with an improvement", LIFTS)):
        print(f"{title:32}" + "".join(f"{f'{tests} tests':>16}" for tests in COUNTS) + "      (gate / plain bootstrap)")
        for name, draw in cases.items():
            rates = [[rate(draw, tests, options.runs, options.samples, span) for span in (1.0, 0.0)] for tests in COUNTS]
            print(f"  {name:30}" + "".join(f"{gate:>8.1%} /{plain:>6.1%}" for gate, plain in rates))
            if cases is NULLS:
                worst = {name: max(worst[name], *(each[side] for each in rates)) for side, name in enumerate(worst)}
    print(f"highest error rate: gate {worst['gate']:.1%}, plain bootstrap {worst['plain']:.1%}")
    print(f"with fewer than {FEW_TESTS} tests, no model is approved")
    statistics.interval.__defaults__ = (options.samples,)  # `compare` calls it without a number of samples
    print_selection(options.runs // 2)


if __name__ == "__main__":
    main()
