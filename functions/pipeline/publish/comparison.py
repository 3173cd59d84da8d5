"""Two models' scores over the same tests: mean difference, its interval, and how many tests would show it.

The statistics are paired: each test contributes the difference of the two models' scores. The interval of the mean
difference is a bootstrap interval with one extra test, which gets the worst possible difference for the lower bound and the
best possible for the upper bound. A plain percentile interval is too narrow for few tests, and a sample without losses
gives it no losses to draw: it would approve up to a third of unimproved models (`benchmarks/gate.py`). The exact interval of
a rare event adds one event in the same way: Garwood's interval counts k + 1 events where k were seen, and zero events in n
tests allow a rate up to 3/n, the "rule of three". The effect of the extra test fades as 1/n.

Tests that judge several models get less certain each time: `at_try` makes the intervals of later models wider.

Tests that ask the same question (`tunedrop.questions`) are one piece of evidence: the bootstrap resamples questions, each
with all its tests (a cluster bootstrap: Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8).
"""

import random
from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist
from typing import NamedTuple

import msgspec

from tunedrop.sign_test import sign_test

BOOTSTRAP_SAMPLES = 2000
# Fewer tests than this are not enough evidence about other prompts.
FEW_TESTS = 20
# The probability of approval that `needed` aims at.
POWER = 0.8
MOST_NEEDED = 100_000
# The most models that the same tests may judge: the bounds of further ones would need too many samples.
MOST_TRIES = 10


class Pair(NamedTuple):
    """One test's score with the base and with the tuned model, and what it asks; None: no other test asks it.

    Against a champion, `base` is the champion's score.
    """

    base: float
    tuned: float
    weight: float = 1.0
    question: str | None = None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Base against tuned over some tests: weighted mean scores, their paired difference `lift` and its interval.

    Against a champion, `base_score` is the champion's score. `questions` is the number of different questions. Interval,
    `p_value` and `needed` count a question once. `p_value` is that of the exact two-sided sign test (McNemar's exact test
    for pass-or-fail scores). `needed` is the number of questions like these that would show the lift, None if no number
    would.
    """

    tests: int
    questions: int
    base_score: float
    tuned_score: float
    lift: float
    lift_low: float
    lift_high: float
    wins: int
    ties: int
    losses: int
    p_value: float
    needed: int | None

    @staticmethod
    def deviations(confidence: float) -> float:
        """Return the width of an interval in standard deviations of the mean."""
        width: float = 2 * NormalDist().inv_cdf((1 + confidence) / 2)
        return width


def at_try(confidence: float, tries: int) -> float:
    """Return the confidence of the intervals that judge the model number `tries` on the same tests.

    Its bounds may be wrong with a probability of (1 - `confidence`) / (k (k + 1)) per side at try k. These errors add up to
    1 - `confidence` over all tries, and Boole's inequality makes their sum a limit for the chance of one wrong approval. The
    first try has the interval of `confidence` itself.
    """
    return 1 - 2 * (1 - confidence) / (tries * (tries + 1))


def extra_tests(tries: int) -> int:
    """Return the number of extra tests in the intervals that judge the model number `tries` on the same tests.

    Far out in its tails, a bootstrap of many small gains and rare large losses is too narrow with one extra test: one of
    ten such models without an improvement would be approved in up to 7.1 % of the cases (`benchmarks/gate.py`).
    """
    return 1 if tries == 1 else 2


def percent(confidence: float) -> str:
    """Return a confidence as text, with two digits of its error: `0.95` → `95`, `0.98333` → `98.3`."""
    return f"{100 - float(f'{100 * (1 - confidence):.2g}'):.8g}"


def compare(
    pairs: Sequence[Pair],
    *,
    confidence: float = 0.95,
    span: float = 1.0,
    min_lift: float = 0.0,
    samples: int = BOOTSTRAP_SAMPLES,
    extra: int = 1,
) -> Comparison:
    """Compare two models' scores, paired by test. `span` is the possible distance between two scores of a test.

    `samples` is the number of resamples for the interval, `extra` that of its extra tests.
    """
    weights = [pair.weight for pair in pairs]
    lifts = [pair.tuned - pair.base for pair in pairs]
    scores = [score for pair in pairs for score in pair[:2]]
    span = max(span, max(scores) - min(scores))
    lift = _mean(lifts, weights)
    by_question, question_weights = _by_question(pairs)
    low, high = interval(by_question, question_weights, confidence, span, samples, extra)
    variance = _mean([(each - lift) ** 2 for each in by_question], question_weights)
    return Comparison(
        tests=len(pairs),
        questions=len(by_question),
        base_score=_mean([pair.base for pair in pairs], weights),
        tuned_score=_mean([pair.tuned for pair in pairs], weights),
        lift=lift,
        lift_low=low,
        lift_high=high,
        wins=sum(each > 0 for each in lifts),
        ties=sum(each == 0 for each in lifts),
        losses=sum(each < 0 for each in lifts),
        p_value=sign_test(sum(each > 0 for each in by_question), sum(each < 0 for each in by_question)),
        needed=needed(lift, variance, confidence, span, min_lift, extra),
    )


def _by_question(pairs: Sequence[Pair]) -> tuple[list[float], list[float]]:
    """Return the mean lift and the summed weight of each question."""
    groups: dict[str | int, list[Pair]] = {}
    for number, pair in enumerate(pairs):
        groups.setdefault(number if pair.question is None else pair.question, []).append(pair)
    weights = [[pair.weight for pair in group] for group in groups.values()]
    lifts = [[pair.tuned - pair.base for pair in group] for group in groups.values()]
    return list(map(_mean, lifts, weights)), list(map(sum, weights))


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def interval(
    values: Sequence[float],
    weights: Sequence[float],
    confidence: float,
    span: float,
    samples: int = BOOTSTRAP_SAMPLES,
    extra: int = 1,
) -> tuple[float, float]:
    """Return the bootstrap interval of a weighted mean with `extra` more tests, as the module's docstring describes.

    An extra test has the mean weight, and the value `-span` for the lower bound and `span` for the upper bound. A fixed seed
    makes the interval reproducible.
    """
    mean_weight, everything = sum(weights) / len(values), range(len(values) + extra)
    extras = everything[len(values) :]
    heavy = [*weights, *[mean_weight] * extra]
    weighted = [*(value * weight for value, weight in zip(values, weights, strict=True)), *[0.0] * extra]
    generator = random.Random(0)
    lows, highs = [], []
    for _ in range(samples):
        chosen = generator.choices(everything, k=len(everything))
        total, weight = sum(map(weighted.__getitem__, chosen)), sum(map(heavy.__getitem__, chosen))
        shift = sum(map(chosen.count, extras)) * mean_weight * span
        lows.append((total - shift) / weight)
        highs.append((total + shift) / weight)
    tail = max(1, int((1 - confidence) / 2 * samples))
    return sorted(lows)[tail - 1], sorted(highs)[-tail]


def needed(lift: float, variance: float, confidence: float, span: float, min_lift: float, extra: int = 1) -> int | None:
    """Return the number of tests like these that four times in five show a lift above `min_lift`; None if no number does."""
    bound, power = NormalDist().inv_cdf((1 + confidence) / 2), NormalDist().inv_cdf(POWER)

    def enough(tests: int) -> bool:
        drop = extra * (lift + span) / (tests + extra)  # the extra tests' effect on the mean
        width = bound * sqrt((variance + drop * (lift + span)) / tests) + power * sqrt(variance / tests)
        return lift - drop - min_lift > width

    low, high = FEW_TESTS - 1, MOST_NEEDED
    if not enough(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
