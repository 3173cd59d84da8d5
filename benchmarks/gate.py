"""Measures the gate's error rates: the share of approved models, among models without and with an improvement.

    .venv/bin/python benchmarks/gate.py [--runs 2000] [--samples 400]

Each line shows the gate beside the same gate with a plain percentile bootstrap interval, with a fixed seed. `--samples` is
the number of resamples per interval (the gate uses 2,000).
"""

import argparse
import random
from collections.abc import Callable
from functools import cache

from pipeline.publish.statistics import FEW_TESTS, interval

Draw = Callable[[random.Random], float]
COUNTS = (20, 50, 100, 200)


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


if __name__ == "__main__":
    main()
