"""Measures the gate's error rates: the share of approved models, among models without and with an improvement.

    .venv/bin/python -m benchmarks.gate [--part PART] [--runs 2000] [--samples 400] [--quick]

`interval` shows the gate beside the same gate with a plain percentile bootstrap interval. `--samples` is the number of
resamples per interval in this part and the next (the gate uses 2,000).

`selection` simulates the whole procedure of a run without a test file: checkpoints that did not improve, the choice of the
best one on held-out rows, and the gate. It shows Tunedrop's division of the held-out rows beside one set of rows that
chooses and judges. A third of the rows repeat the question of another row.

`line` simulates a line whose tests judge up to ten models since the last champion: how often at least one of them is
approved that is no better than the champion, or that has lost skills of the suite. `disasters` computes it for scores with
many small gains and rare large losses. `power` shows how often a better model is approved.

All parts have fixed seeds. `--quick` simulates little, to see that everything runs.
"""

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import product
from math import comb, prod, sqrt
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.publish.comparison import (
    BOOTSTRAP_SAMPLES,
    FEW_TESTS,
    MOST_TRIES,
    Comparison,
    Pair,
    at_try,
    compare,
    extra_tests,
    interval,
)
from pipeline.validation.split import divide
from trainer.checkpoints import Checkpoint, Record, best
from tunedrop.dataset.rows import Row
from tunedrop.questions import prompt_text, question

PARTS = ("interval", "selection", "line", "disasters", "power")
Draw = Callable[[random.Random], float]
COUNTS = (20, 50, 100, 200)
CHECKPOINTS = (1, 5, 10, 20)
HELD_OUT = (40, 64, 256)
SUITES = (0, 100, 400)
MAX_LOSS = 0.02  # the default of gate.champion.max_loss
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


def run_is_approved(draw: Draw, checkpoints: int, rows: Procedure, generator: random.Random, samples: int) -> bool:
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
    return compare(pairs, samples=samples).lift_low > 0


def print_selection(runs: int, samples: int) -> None:
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
                    given = NULLS[name], checkpoints, rows, generator, samples
                    share = sum(run_is_approved(*given) for _ in range(runs)) / runs
                    worst[divided][checkpoints] = max(worst[divided][checkpoints], share)
                    line += f"{share:>8.1%} /" if divided else f"{share:>6.1%}"
            print(line, flush=True)
    for divided, title in ((True, "divided"), (False, "one set")):
        rates = ", ".join(f"best of {checkpoints} {each:.1%}" for checkpoints, each in worst[divided].items())
        print(f"highest error rate, {title}: {rates}")


# --- a line ---

Counts = npt.NDArray[np.int64]
Shares = npt.NDArray[np.float64]


@cache
def lower_bound(won: int, lost: int, tests: int, tries: int) -> float:
    """Return the gate's lower bound for pass-or-fail scores."""
    return low((won, lost, tests - won - lost), (1.0, -1.0, 0.0), tries, extra_tests(tries))


def low(counts: Sequence[int], lifts: Sequence[float], tries: int, extra: int) -> float:
    """Return the gate's lower bound for so many tests of each lift, at the try of this number.

    The bootstrap of `interval` draws all tests and the extra ones with equal chances: how many it draws of each kind is
    multinomial, and numpy draws that at once.
    """
    samples = BOOTSTRAP_SAMPLES * tries
    kinds = np.array([*counts, extra])
    means = np.random.default_rng(0).multinomial(kinds.sum(), kinds / kinds.sum(), samples) @ np.array([*lifts, -1.0])
    tail = max(1, int((1 - at_try(0.95, tries)) / 2 * samples))
    return float(np.partition(means, tail - 1)[tail - 1] / kinds.sum())


def exceeds(limit: float, won: int, lost: int, tests: int, tries: int) -> bool:
    """Return whether the lower bound is above a limit. The bound is not computed where it is clearly below."""
    everything, losses = tests + extra_tests(tries), lost + extra_tests(tries)
    mean = (won - losses) / everything
    deviation = sqrt(((won + losses) / everything - mean**2) / everything)
    clear = 0.6 * Comparison.deviations(at_try(0.95, tries)) / 2
    return mean - clear * deviation > limit and lower_bound(won, lost, tests, tries) > limit


class Tests(NamedTuple):
    """The same tests for all challengers of a line.

    The champion passes each with the chance `rate`. A challenger answers a share `anew` of them in its own way and passes
    them with the chance `rate + gain`. It answers the others as the champion does.
    """

    number: int
    rate: float
    anew: float
    gain: float = 0.0

    def flips(self, passed: Counts, failed: Counts, share: float, generator: np.random.Generator) -> tuple[Counts, Counts]:
        """Answer a share of the tests again; return how many failed ones pass now, and how many passed ones fail."""
        rate = self.rate + self.gain
        return generator.binomial(failed, share * rate), generator.binomial(passed, share * (1 - rate))

    def challengers(self, champion: Counts, same: bool, generator: np.random.Generator) -> Iterator[tuple[Counts, Counts]]:
        """Yield how many tests each challenger wins and loses against the champion's answers, by run.

        With `same`, all challengers are one model, and decoding changes a tenth of its answers.
        """
        won, lost = self.flips(champion, self.number - champion, self.anew, generator)
        for _ in range(MOST_TRIES):
            if same:
                back, gone = self.flips(champion - lost, lost, 0.1, generator)
                more, fewer = self.flips(won, self.number - champion - won, 0.1, generator)
                yield won + more - fewer, lost + gone - back
            else:
                yield self.flips(champion, self.number - champion, self.anew, generator)


def line(
    tests: Tests,
    suite: Tests | None,
    runs: int,
    *,
    base: float = 0.0,
    same: bool = False,
    tries: int = MOST_TRIES,
    spending: bool = True,
) -> Shares:
    """Return the share of lines with an approval by the first, second, … challenger of the same tests.

    The base passes each test with the chance `base`; with 0 it is no obstacle. Without `spending`, each challenger is judged
    as the first one.
    """
    generator = np.random.default_rng(0)
    champion = generator.binomial(tests.number, tests.rate, runs)
    challengers = tests.challengers(champion, same, generator)
    kept = suite and suite.challengers(generator.binomial(suite.number, suite.rate, runs), same, generator)
    approved = np.zeros((runs, tries), bool)
    for number in range(tries):
        level = number + 1 if spending else 1
        won, lost = next(challengers)
        passed = champion + won - lost
        conditions = [
            (0.0, tests.number, won, lost),
            (0.0, tests.number, generator.binomial(passed, 1 - base), generator.binomial(tests.number - passed, base)),
        ]
        if suite and kept:
            conditions.append((-MAX_LOSS, suite.number, *next(kept)))
        for run in range(runs):
            approved[run, number] = all(
                exceeds(limit, int(won[run]), int(lost[run]), size, level) for limit, size, won, lost in conditions
            )
    shares: Shares = np.maximum.accumulate(approved, axis=1).mean(axis=0)
    return shares


def print_line(runs: int) -> None:
    """Print how often a line approves a model that is not better than its champion, or that lost skills of the suite."""
    heads = ["each as the first", *(f"{suite} in suite" if suite else "no suite" for suite in SUITES)]
    worst = [0.0] * len(heads)
    print(f"{'approved although not better':46}" + "".join(f"{head:>23}" for head in heads))
    print(f"{'':46}" + f"{'1 / 3 / 10 tries':>23}" * len(heads))
    for rate, anew, number, same in product((0.5, 0.8, 0.95), (0.2, 1.0), (50, 200), (False, True)):
        tests = Tests(number, rate, anew)
        suites = [Tests(suite, rate, anew / 10) if suite else None for suite in SUITES]
        shares = [line(tests, None, runs, same=same, spending=False)]
        shares += [line(tests, suite, runs, same=same) for suite in suites]
        worst = [max(before, float(each[-1])) for before, each in zip(worst, shares, strict=True)]
        text = f"  {number} tests, {rate:.0%} passed, {anew:.0%} anew, {'one model' if same else 'new models'}"
        print(f"{text:46}" + "".join(f"{_tries(each):>23}" for each in shares), flush=True)
    print(f"{'highest rate':46}" + "".join(f"{each:>23.1%}" for each in worst))
    print_losses(runs)


def print_losses(runs: int) -> None:
    """Print how often a line approves a model that is better on the tests, but lost skills of the suite."""
    worst = 0.0
    print(f"{'better on the tests, worse on the suite':46}{'1 / 3 / 10 tries':>23}")
    for loss, number, anew in product((MAX_LOSS, 2 * MAX_LOSS), (100, 400, 2000), (0.1, 0.5)):
        shares = line(Tests(200, 0.5, 1.0, 0.3), Tests(number, 0.8, anew, -loss / anew), runs)
        worst = max(worst, float(shares[-1]))
        print(f"{f'  -{loss:.2f} on {number} of the suite, {anew:.0%} anew':46}{_tries(shares):>23}", flush=True)
    print(f"highest rate: {worst:.1%}")


def print_disasters() -> None:
    """Print the exact chance that one of ten unimproved models is approved, for small gains and rare total losses."""
    worst, plain, counts = 0.0, 0.0, (20, 30, 50, 100, 200, 400)
    print(f"{'approved, rare disasters, 10 new models':46}" + "".join(f"{f'{tests} tests':>12}" for tests in counts))
    for share in (0.03, 0.05, 0.07, 0.1, 0.12, 0.15, 0.2, 0.3):
        chances = [one_of_ten(share, tests, extra_tests) for tests in counts]
        worst = max(worst, *chances)
        plain = max(plain, *(one_of_ten(share, tests, lambda _: 1) for tests in counts))
        text = f"  total loss in {share:.0%} of the tests"
        print(f"{text:46}" + "".join(f"{each:>12.1%}" for each in chances), flush=True)
    print(f"highest rate: {worst:.1%}; with one extra test for every model {plain:.1%}")


def one_of_ten(share: float, tests: int, extra: Callable[[int], int]) -> float:
    """Return the exact chance that one of ten models is approved. `extra` gives the number of extra tests by try."""
    return 1 - prod(1 - approval(share, tests, tries, extra(tries)) for tries in range(1, MOST_TRIES + 1))


def approval(share: float, tests: int, tries: int, extra: int) -> float:
    """Return the exact chance that a model is approved which loses a share of the tests and wins a little in the others.

    Fewer losses raise the lower bound, so that the sum ends at the first number of losses that is not approved.
    """
    gain, chance = share / (1 - share), 0.0
    for lost in range(tests + 1):
        if low((tests - lost, lost), (gain, -1.0), tries, extra) <= 0:
            return chance
        chance += comb(tests, lost) * share**lost * (1 - share) ** (tests - lost)
    return chance


def _tries(shares: Shares) -> str:
    return " / ".join(f"{shares[tries - 1]:.1%}" for tries in (1, 3, 10))


def print_power(runs: int) -> None:
    """Print how often the first challenger is approved that is better on the tests and as good on the suite."""
    numbers = (50, 100, 200, 400)
    print(f"{'approved, better than the champion':46}" + "".join(f"{f'{number} tests':>12}" for number in numbers))
    for lift in (0.05, 0.1, 0.2):
        for suite, changed in ((0, 0.0), (200, 0.0), (400, 0.0), (400, 0.02), (400, 0.1), (2000, 0.02), (2000, 0.1)):
            # Of the tests that a model answers anew, a share of 2 p (1 - p) changes.
            old = Tests(suite, 0.6, changed / 0.48) if suite else None
            rates = [line(Tests(number, 0.6, 0.5, lift / 0.5), old, runs, base=0.3, tries=1)[0] for number in numbers]
            text = f"{suite} in suite, {changed:.0%} of them change" if suite else "no suite"
            print(f"{f'  +{lift:.2f}, {text}':46}" + "".join(f"{rate:>12.1%}" for rate in rates), flush=True)


def print_interval(runs: int, samples: int) -> None:
    """Print the shares of approved models by number of tests, with the gate's interval and with a plain bootstrap's."""
    worst = {"gate": 0.0, "plain": 0.0}
    for title, cases in (("approved without an improvement", NULLS), ("approved with an improvement", LIFTS)):
        print(f"{title:32}" + "".join(f"{f'{tests} tests':>16}" for tests in COUNTS) + "      (gate / plain bootstrap)")
        for name, draw in cases.items():
            rates = [[rate(draw, tests, runs, samples, span) for span in (1.0, 0.0)] for tests in COUNTS]
            print(f"  {name:30}" + "".join(f"{gate:>8.1%} /{plain:>6.1%}" for gate, plain in rates))
            if cases is NULLS:
                worst = {name: max(worst[name], *(each[side] for each in rates)) for side, name in enumerate(worst)}
    print(f"highest error rate: gate {worst['gate']:.1%}, plain bootstrap {worst['plain']:.1%}")
    print(f"with fewer than {FEW_TESTS} tests, no model is approved")


def main() -> None:
    """Print the parts that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=PARTS, action="append", help="one part, may be repeated; default: all")
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--quick", action="store_true", help="20 runs")
    options = parser.parse_args()
    runs = 20 if options.quick else options.runs
    parts: dict[str, Callable[[], None]] = {
        "interval": lambda: print_interval(runs, options.samples),
        "selection": lambda: print_selection(runs // 2, options.samples),
        "line": lambda: print_line(runs),
        "disasters": print_disasters,
        "power": lambda: print_power(runs),
    }
    for part in options.part or parts:
        parts[part]()


if __name__ == "__main__":
    main()
