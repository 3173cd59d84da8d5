"""Is the tuned model better than its base? Paired statistics over the inference tests, and the gate's decision.

The statistics are paired: each test contributes the difference of the two models' scores. The interval of the mean
difference is a bootstrap interval with one extra test, which gets the worst possible difference for the lower bound and the
best possible for the upper bound. A plain percentile interval is too narrow for few tests, and a sample without losses
gives it no losses to draw: it would approve up to a third of unimproved models (`benchmarks/gate.py`). The exact interval of
a rare event adds one event in the same way: Garwood's interval counts k + 1 events where k were seen, and zero events in n
tests allow a rate up to 3/n, the "rule of three". The effect of the extra test fades as 1/n.

Tests that ask the same question (`tunedrop.questions`) are one piece of evidence: the bootstrap resamples questions, each
with all its tests (a cluster bootstrap: Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8).
"""

import random
from collections.abc import Callable, Iterator, Sequence
from math import sqrt
from statistics import NormalDist
from typing import Literal, NamedTuple

import msgspec

from tunedrop.config.model import Gate, RunConfig
from tunedrop.inference_tests import Outcome
from tunedrop.questions import prompt_text, question

BOOTSTRAP_SAMPLES = 2000
# Fewer tests than this are not enough evidence about other prompts.
FEW_TESTS = 20
# The probability of approval that `needed` aims at.
POWER = 0.8
MOST_NEEDED = 100_000
NO_JUDGE = "they repeat rows of the dataset, or their `judges` is false"


class Pair(NamedTuple):
    """One test's score with the base and with the tuned model, and what it asks; None: no other test asks it."""

    base: float
    tuned: float
    weight: float = 1.0
    question: str | None = None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Base against tuned over some tests: weighted mean scores, their paired difference `lift` and its interval.

    `questions` is the number of different questions. Interval, `p_value` and `needed` count a question once. `p_value` is
    that of the exact two-sided sign test (McNemar's exact test for pass-or-fail scores). `needed` is the number of questions
    like these that would show the lift, None if no number would.
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


class Verdict(msgspec.Struct, frozen=True):
    """The gate's decision and its reasons."""

    status: Literal["APPROVED", "PENDING", "REJECTED"]
    reasons: list[str]


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """The comparison over the inference tests that judge, by tag and by reward; `failed` counts tests without a score.

    `cut` counts the tests with an answer that the limit of tokens cut, by model. `ended` is the comparison over the tests
    where both models' answers ended by themselves, None if there is no such test.
    """

    comparison: Comparison
    ended: Comparison | None
    by_tag: dict[str, Comparison]
    by_reward: dict[str, Comparison]
    passed: dict[str, int]
    cut: dict[str, int]
    failed: int
    verdict: Verdict


def compare(pairs: Sequence[Pair], *, confidence: float = 0.95, span: float = 1.0, min_lift: float = 0.0) -> Comparison:
    """Compare two models' scores, paired by test. `span` is the possible distance between two scores of a test."""
    weights = [pair.weight for pair in pairs]
    lifts = [pair.tuned - pair.base for pair in pairs]
    scores = [score for pair in pairs for score in pair[:2]]
    span = max(span, max(scores) - min(scores))
    lift = _mean(lifts, weights)
    by_question, question_weights = _by_question(pairs)
    low, high = interval(by_question, question_weights, confidence, span)
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
        needed=needed(lift, variance, confidence, span, min_lift),
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
    values: Sequence[float], weights: Sequence[float], confidence: float, span: float, samples: int = BOOTSTRAP_SAMPLES
) -> tuple[float, float]:
    """Return the bootstrap interval of a weighted mean with one extra test, as the module's docstring describes.

    The extra test has the mean weight, and the value `-span` for the lower bound and `span` for the upper bound. A fixed
    seed makes the interval reproducible.
    """
    extra = len(values)  # the extra test's index
    mean_weight = sum(weights) / extra
    heavy = [*weights, mean_weight]
    weighted = [*(value * weight for value, weight in zip(values, weights, strict=True)), 0.0]
    generator, everything = random.Random(0), range(extra + 1)
    lows, highs = [], []
    for _ in range(samples):
        chosen = generator.choices(everything, k=extra + 1)
        total, weight = sum(map(weighted.__getitem__, chosen)), sum(map(heavy.__getitem__, chosen))
        shift = chosen.count(extra) * mean_weight * span
        lows.append((total - shift) / weight)
        highs.append((total + shift) / weight)
    tail = max(1, int((1 - confidence) / 2 * samples))
    return sorted(lows)[tail - 1], sorted(highs)[-tail]


def sign_test(wins: int, losses: int) -> float:
    """Return the exact two-sided p-value of equally likely wins and losses; ties do not count.

    For pass-or-fail scores this is McNemar's exact test.
    """
    decided = wins + losses
    as_few, ways = 0, 1
    for k in range(min(wins, losses) + 1):
        as_few += ways
        ways = ways * (decided - k) // (k + 1)  # the next binomial coefficient
    return min(1.0, 2 * as_few / (1 << decided))


def needed(lift: float, variance: float, confidence: float, span: float, min_lift: float) -> int | None:
    """Return the number of tests like these that four times in five show a lift above `min_lift`; None if no number does."""
    bound, power = NormalDist().inv_cdf((1 + confidence) / 2), NormalDist().inv_cdf(POWER)

    def enough(tests: int) -> bool:
        drop = (lift + span) / (tests + 1)  # the extra test's effect on the mean
        width = bound * sqrt((variance + drop * (lift + span)) / tests) + power * sqrt(variance / tests)
        return lift - drop - min_lift > width

    low, high = FEW_TESTS - 1, MOST_NEEDED
    if not enough(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def evaluate(tests: Sequence[Outcome], config: RunConfig, suite: Sequence[Outcome] = (), tries: int = 1) -> Evaluation:
    """Compare the two models over a run's inference tests and decide. Raises ValueError if no test has a score.

    If no scored test judges, the comparison is over all scored tests, and the verdict is not APPROVED.
    """
    judging = _judging(tests)
    if not judging:
        raise ValueError(f"none of the {len(tests)} inference tests could be scored")
    gate = config.gate
    # A reward is 0 to 1, a penalty -1 to 0. `compare` widens the span to the measured scores.
    weights = {reward.label: abs(reward.weight) for reward in config.rewards}

    def compared(
        tests: Sequence[Outcome], score: Callable[[Outcome], tuple[float | None, float | None]], span: float
    ) -> Comparison:
        pairs = [
            Pair(base, tuned, test.weight, question(prompt_text(test.prompt)))
            for test in tests
            for base, tuned in [score(test)]
            if base is not None and tuned is not None
        ]
        return compare(pairs, confidence=gate.confidence, span=span, min_lift=gate.min_lift)

    def total(test: Outcome) -> tuple[float | None, float | None]:
        return test.base.score, test.tuned.score

    def reward(name: str) -> Callable[[Outcome], tuple[float | None, float | None]]:
        return lambda test: (test.base.rewards.get(name), test.tuned.rewards.get(name))

    span = sum(weights.values())
    comparison = compared(judging, total, span)
    uncut = [test for test in judging if not test.cut]
    ended = compared(uncut, total, span) if uncut else None
    by_tag = {
        tag: compared([test for test in judging if tag in test.tags], total, span)
        for tag in sorted({tag for test in judging for tag in test.tags})
    }
    names = [name for name in weights if any(None not in reward(name)(test) for test in judging)]
    return Evaluation(
        comparison=comparison,
        ended=ended,
        by_tag=by_tag,
        by_reward={name: compared(judging, reward(name), 1.0) for name in names},
        passed={
            "base": sum(test.base.passed is True for test in tests),
            "tuned": sum(test.tuned.passed is True for test in tests),
        },
        cut={"base": sum(test.base.cut for test in tests), "tuned": sum(test.tuned.cut for test in tests)},
        failed=sum(test.outcome == "failed" for test in tests),
        verdict=decide(tests, comparison, ended, by_tag, config),
    )


def _judging(tests: Sequence[Outcome]) -> list[Outcome]:
    """Return the scored tests that judge, or all scored tests if none of them judges."""
    scored = [test for test in tests if test.base.score is not None and test.tuned.score is not None]
    return [test for test in scored if test.judges] or scored


def _lift(test: Outcome) -> float:
    assert test.base.score is not None
    assert test.tuned.score is not None
    return test.tuned.score - test.base.score


def decide(
    tests: Sequence[Outcome],
    comparison: Comparison,
    ended: Comparison | None,
    by_tag: dict[str, Comparison],
    config: RunConfig,
) -> Verdict:
    """Decide whether the tuned model may be used. The arguments are as in `Evaluation`.

    `REJECTED`: a must-pass test failed, a protected tag regressed, or the lift is not above `min_lift`. `PENDING`: there is
    not enough evidence to decide, or only with the answers that the limit of tokens cut. `APPROVED`: the lower bound of the
    lift is above `min_lift`, with these answers and without them.
    """
    gate = config.gate
    repeats = f" of {comparison.questions} different questions" if comparison.questions < comparison.tests else ""
    lift = f"a lift of {comparison.lift:+.3f} over {comparison.tests} tests{repeats} ({_bounds(comparison, gate)})"
    cut = list(_on_cut_answers(tests, comparison, ended, gate))
    against = [
        *_failed_must_pass_tests(tests),
        *_regressed_tags(gate.must_not_regress, by_tag),
        *_against_lift(comparison, gate.min_lift, lift),
    ]
    missing = [
        *(
            f"No inference test has the tag '{tag}', which must not regress: add tests with this tag."
            for tag in gate.must_not_regress
            if tag not in by_tag
        ),
        *_unscored_tests(tests),
        *_no_judges(tests),
        *_too_little_evidence(comparison, gate.min_lift, lift),
        *_made_by_the_limit(comparison, ended, gate.min_lift),
    ]
    if against:
        return Verdict("REJECTED", [*against, *cut])
    if missing:
        return Verdict("PENDING", [*missing, *cut])
    return Verdict("APPROVED", [f"The tuned model is better: {lift}.", *cut, *_kept(tests, gate.must_not_regress)])


def _bounds(comparison: Comparison, gate: Gate) -> str:
    return f"{gate.confidence:.0%} interval {comparison.lift_low:+.3f} to {comparison.lift_high:+.3f}"


def _on_cut_answers(tests: Sequence[Outcome], comparison: Comparison, ended: Comparison | None, gate: Gate) -> Iterator[str]:
    """Say how much of the lift stands on the tests where the limit of tokens cut an answer."""
    judging = _judging(tests)
    cut = [test for test in judging if test.cut]
    if not cut:
        return
    part = sum(_lift(test) * test.weight for test in cut) / sum(test.weight for test in judging)
    base, tuned = sum(test.base.cut for test in cut), sum(test.tuned.cut for test in cut)
    rest = "No test has two answers that ended by themselves."
    if ended:
        rest = f"Over the other {ended.tests} tests, the lift is {ended.lift:+.3f} ({_bounds(ended, gate)})."
    yield (
        f"{part:+.3f} of the lift of {comparison.lift:+.3f} stands on {len(cut)} of {len(judging)} tests where the limit of "
        f"tokens cut an answer ({base} of the base model, {tuned} of the tuned model). {rest}"
    )


def _made_by_the_limit(comparison: Comparison, ended: Comparison | None, min_lift: float) -> Iterator[str]:
    if comparison.lift_low > min_lift and (ended is None or ended.lift_low <= min_lift):
        left = "No lift" if ended is None or ended.lift <= min_lift else "Too little evidence of a lift"
        yield (
            f"{left} is left without the tests where the limit of tokens cut an answer: raise tests.max_completion_length, "
            "so that both models can finish."
        )


def _failed_must_pass_tests(tests: Sequence[Outcome]) -> Iterator[str]:
    for test in tests:
        if test.must_pass and test.tuned.error is None and not test.tuned.passed:
            why = "; ".join(test.tuned.unmet) or f"it scores {test.tuned.score:.2f}, not full marks"
            why += "; the limit of tokens cut its answer" if test.tuned.cut else ""
            yield f"The must-pass test '{test.id}' failed: {why}."


def _regressed_tags(tags: Sequence[str], by_tag: dict[str, Comparison]) -> Iterator[str]:
    for tag in tags:
        if tag in by_tag and (change := by_tag[tag].lift) < 0:
            yield f"The tests tagged '{tag}' must not regress, but score {-change:.3f} lower than with the base model."


def _unscored_tests(tests: Sequence[Outcome]) -> Iterator[str]:
    failed = [test.id for test in tests if test.base.error or test.tuned.error]
    if failed:
        names = ", ".join(f"'{name}'" for name in failed[:5]) + (" and others" if len(failed) > 5 else "")
        yield f"{len(failed)} of {len(tests)} tests could not be scored ({names}): see the report for the reasons."


def _no_judges(tests: Sequence[Outcome]) -> Iterator[str]:
    if not any(test.judges for test in tests):
        yield f"None of the {len(tests)} tests judges the model: {NO_JUDGE}. Add other tests."


def _against_lift(comparison: Comparison, min_lift: float, lift: str) -> Iterator[str]:
    if comparison.questions >= FEW_TESTS and comparison.ties == comparison.tests:
        yield f"The tuned model scores the same as the base model in each of the {comparison.tests} tests."
    if comparison.lift_high <= min_lift:
        yield f"The tuned model is not better: {lift}; the gate requires more than {min_lift:+.3f}."


def _too_little_evidence(comparison: Comparison, min_lift: float, lift: str) -> Iterator[str]:
    noun = "tests" if comparison.questions == comparison.tests else "different questions"
    if comparison.questions < FEW_TESTS:
        yield f"{comparison.questions} {noun} are not enough evidence to decide: give at least {FEW_TESTS}."
    elif comparison.lift_low <= min_lift < comparison.lift_high:
        more = (
            f"about {comparison.needed} {noun} like these would show a lift of this size"
            if comparison.needed
            else "more tests like these would not show it"
        )
        yield f"Not enough evidence to decide: {lift}; the true lift may be {min_lift:+.3f} or less; {more}."


def _kept(tests: Sequence[Outcome], tags: Sequence[str]) -> list[str]:
    """Return the gate's other requirements that the tuned model meets, and how many tests do not judge."""
    musts, others = sum(test.must_pass for test in tests), sum(not test.judges for test in tests)
    reasons = [f"All {musts} must-pass tests passed."] if musts else []
    if others:
        reasons.append(f"{others} of {len(tests)} tests do not judge the model: {NO_JUDGE}.")
    return [*reasons, *(f"The tests tagged '{tag}' did not regress." for tag in tags)]
