"""The gate in a line: the champion, the suite, and how often the same tests may judge. By a table, and by exact chances."""

from itertools import count, pairwise
from math import comb
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from benchmarks.gate import lower_bound
from pipeline.publish import statistics
from pipeline.publish.comparison import MOST_TRIES, at_try, compare, extra_tests, interval, percent
from pipeline.publish.gate import Evaluation, evaluate
from pipeline.publish.statistics import ChampionFigures
from tunedrop.config.parse import parse_run_config
from tunedrop.inference_tests import ModelResult, Outcome

NUMBERS = count()  # each test asks another question
Score = float | None


def config(gate: dict[str, Any] | None = None, most: int = 400):
    rewards = [{"type": "exact_match"}]
    return parse_run_config({"model": "m", "rewards": rewards, "gate": gate or {}, "suite": {"max": most}})


def answer(score: Score) -> ModelResult:
    if score is None:
        return ModelResult(error="reward 'exact_match' failed")
    return ModelResult(text=str(score), score=score, rewards={"exact_match": score}, passed=score >= 1)


def outcomes(base: Score, champion: Score, tuned: Score, tests: int = 1, **more: Any) -> list[Outcome]:
    """Tests with these scores."""

    def test(number: int) -> Outcome:
        prompt = [{"role": "user", "content": f"question {next(NUMBERS)}"}]
        models: dict[str, Any] = {"base": answer(base), "champion": answer(champion), "tuned": answer(tuned)}
        return Outcome(id=f"t{number}", prompt=prompt, reference="!", **models, **more)

    return [test(number) for number in range(tests)]


def suite(champion: Score, tuned: Score, tests: int = 1, run_id: str = "old-1", **more: Any) -> list[Outcome]:
    """Tests of the suite. The base's scores do not matter there."""
    return outcomes(None, champion, tuned, tests, run_id=run_id, **more)


def alone(tests: list[Outcome]) -> list[Outcome]:
    """The tests without a champion."""
    return [structs.replace(test, champion=None) for test in tests]


def said(evaluation: Evaluation) -> str:
    return " ".join(evaluation.verdict.reasons)


WON = outcomes(0, 0, 1, 30)
KEPT = suite(1, 1, 200)
LINES = [
    # tests, suite, gate, verdict, and what it says
    (WON, KEPT, {}, "APPROVED", "It is better than the champion: a lift of +1.000 over 30 tests (95% interval +0.806 to "),
    (WON, KEPT, {}, "APPROVED", "It keeps the line's suite: a difference of +0.000 over 200 suite tests (95% interval -0.0"),
    (WON, KEPT, {}, "APPROVED", "the gate allows a loss of less than 0.020."),
    (WON, [], {}, "APPROVED", "It is better than the champion"),
    (outcomes(0, 1, 1, 30), KEPT, {}, "REJECTED", "scores the same as the champion in each of the 30 tests."),
    (outcomes(0, 1, 0.5, 30), KEPT, {}, "REJECTED", "The tuned model is not better than the champion: a lift of -0.500"),
    (
        outcomes(0, 0, 1, 8) + outcomes(0, 1, 0.5, 4) + outcomes(0, 1, 1, 18),
        KEPT,
        {},
        "PENDING",
        "Not enough evidence that the tuned model is better than the champion: a lift of +0.200 over 30 tests (95% interval",
    ),
    (outcomes(1, 0, 1, 30), KEPT, {}, "REJECTED", "The tuned model scores the same as the base model in each"),
    (WON, KEPT, {"champion": {"min_lift": 1.0}}, "REJECTED", "than the champion: a lift of +1.000 over 30 tests (95% inter"),
    (
        WON,
        KEPT,
        {"champion": {"min_lift": 0.9}},
        "PENDING",
        "the true lift may be +0.900 or less; about 59 tests like these",
    ),
    # what the suite shows
    (
        WON,
        suite(1, 1, 100),
        {},
        "PENDING",
        "Not enough evidence that the line's suite is kept: a difference of +0.000 over 100",
    ),
    (
        WON,
        suite(1, 1, 100),
        {},
        "PENDING",
        "the true loss may be 0.020 or more; about 148 tests like these would show that it",
    ),
    (WON, suite(1, 1, 100), {"champion": {"max_loss": 0.1}}, "APPROVED", "a loss of less than 0.100"),
    (WON, suite(1, 0, 4) + suite(1, 1, 396), {}, "PENDING", "(suite.max is 400)."),
    (WON, suite(1, 0, 10) + suite(1, 1, 390), {}, "PENDING", "more tests like these would not show it."),
    (
        WON,
        suite(1, 0, 20) + suite(0, 1, 2, "old-2") + suite(1, 1, 100, "old-2"),
        {},
        "REJECTED",
        "The 20 tests of run old-1 lose the most: -1.000.",
    ),
    (
        WON,
        suite(1, 0, 20) + suite(1, 1, 100),
        {},
        "REJECTED",
        "worse than the champion on the line's suite: a difference of -0",
    ),
    (WON, KEPT + suite(0, 1, 20), {}, "APPROVED", "It keeps the line's suite: a difference of +0.091"),
    (WON, suite(1, 0, 50, judges=False) + KEPT, {}, "APPROVED", "over 200 suite tests"),
    (WON, suite(1, 1, 200, judges=False), {}, "PENDING", "None of the 200 suite tests judges the model, because this run's"),
    (WON, [*KEPT, *KEPT], {}, "APPROVED", "over 400 suite tests of 200 different questions ("),
    # must-pass tests
    (
        WON,
        KEPT + suite(0, 0, must_pass=True),
        {},
        "REJECTED",
        "The must-pass test 't0' of run old-1 failed: it scores 0.00,",
    ),
    (WON, KEPT + suite(1, 0, must_pass=True, judges=False), {}, "REJECTED", "The must-pass test 't0' of run old-1 failed"),
    (WON, KEPT + suite(0, 1, must_pass=True), {}, "APPROVED", "keeps"),
    # what could not be scored
    (WON + outcomes(0, None, 1), KEPT, {}, "PENDING", "1 of 31 tests could not be scored ('t0')"),
    (WON + alone(outcomes(0, 1, 1)), KEPT, {}, "PENDING", "1 of 31 tests could not be scored"),
    (WON, KEPT + suite(None, 1), {}, "PENDING", "1 of 201 suite tests could not be scored ('t0')"),
    (WON, KEPT + suite(1, None, must_pass=True), {}, "PENDING", "1 of 201 suite tests could not be scored"),
    (WON, suite(None, None, 3), {}, "PENDING", "3 of 3 suite tests could not be scored"),
    # few tests
    (outcomes(0, 0, 1, 5), KEPT, {}, "PENDING", "5 tests are not enough evidence to decide: give at least 20."),
    (outcomes(0, 1, 0, 5), KEPT, {}, "REJECTED", "not better than the champion"),
    # without a champion nobody compares the suite
    (alone(outcomes(0, 1, 1, 30)), suite(1, 0, 90, must_pass=True), {}, "APPROVED", "The tuned model is better"),
]


@pytest.mark.parametrize(("tests", "suite", "gate", "status", "words"), LINES)
def test_the_gate_of_a_line(tests, suite, gate, status, words):
    evaluation = evaluate(tests, config(gate), suite)
    assert (evaluation.verdict.status, words in said(evaluation)) == (status, True), evaluation.verdict


def test_the_champions_figures():
    tests = outcomes(0, 0.25, 1, 20, tags=["new"]) + outcomes(0, 1, 0.5, 5, tags=["old"])
    brought = suite(0.5, 1, 4) + suite(1, 0, 2, "old-2", must_pass=True) + suite(1, 0, 9, "old-2", judges=False)
    champion = evaluate(tests, config(), brought).champion
    assert champion is not None
    comparison = champion.comparison
    assert (comparison.base_score, comparison.tuned_score) == pytest.approx((0.4, 0.9))
    assert (comparison.wins, comparison.losses) == (20, 5)
    assert champion.ended == comparison
    assert {tag: each.lift for tag, each in champion.by_tag.items()} == {"new": 0.75, "old": -0.5}
    assert champion.suite is not None
    assert champion.suite.tests == 6
    assert champion.suite.lift == pytest.approx(0)
    assert {run_id: each.lift for run_id, each in champion.suite_by_run.items()} == {"old-1": 0.5, "old-2": -1.0}
    assert champion.suite_failed == {"old-2": ["t0", "t1"]}
    figures = evaluate(tests, config(), brought)
    assert figures.passed == {"base": 0, "tuned": 20, "champion": 5}
    assert figures.cut == {"base": 0, "tuned": 0, "champion": 0}
    assert evaluate(tests + outcomes(1, None, 1), config()).failed == 1


def test_without_a_champion_nothing_is_said_of_one():
    tests = alone(outcomes(0, None, 1, 30))
    evaluation = evaluate(tests, config())
    assert (evaluation.champion, evaluation.tries, evaluation.confidence) == (None, 1, 0.95)
    assert evaluation.passed.keys() == {"base", "tuned"}
    assert "champion" not in said(evaluation)
    assert "suite" not in said(evaluation)


def test_a_champion_without_any_score_is_an_error():
    with pytest.raises(ValueError, match="none of the 3 inference tests has a score of the champion"):
        evaluate(outcomes(0, None, 1, 3), config())


@pytest.mark.parametrize(
    ("cut_tests", "status", "words"),
    [
        (30, "PENDING", "No lift over the champion is left without the tests where the limit of tokens cut an answer"),
        (12, "PENDING", "Too little evidence of a lift over the champion is left without"),
        (0, "APPROVED", "It is better than the champion"),
    ],
)
def test_a_lift_over_the_champion_is_not_made_by_a_limit(cut_tests, status, words):
    tests, champions = outcomes(0, 0, 1, 16) + outcomes(0, 1, 1, 24), [0.0] * 16 + [1.0] * 24
    cut = [
        structs.replace(test, champion=ModelResult(score=score, cut=number < cut_tests))
        for number, (test, score) in enumerate(zip(tests, champions, strict=True))
    ]
    evaluation = evaluate(cut, config())
    assert (evaluation.verdict.status, words in said(evaluation)) == (status, True), evaluation.verdict
    assert evaluation.cut["champion"] == cut_tests


# --- asking the same tests again ---


@given(st.floats(0.5, 1, exclude_min=True, exclude_max=True), st.integers(1, 1000))
def test_the_errors_of_all_tries_add_up_to_what_the_gate_may_spend(confidence, tries):
    assert at_try(confidence, 1) == confidence
    spent = sum((1 - at_try(confidence, k)) / 2 for k in range(1, tries + 1))
    assert spent == pytest.approx((1 - confidence) * tries / (tries + 1), abs=1e-12)


@pytest.mark.parametrize(
    ("confidence", "text"),
    [(0.95, "95"), (0.9, "90"), (0.99, "99"), (0.975, "97.5"), (at_try(0.95, 2), "98.3"), (at_try(0.99, 10), "99.982")],
)
def test_a_confidence_as_text(confidence, text):
    assert percent(confidence) == text


def test_the_bounds_move_outwards_from_try_to_try():
    tests = outcomes(0, 0, 1, 12) + outcomes(1, 1, 0, 6) + outcomes(1, 1, 1, 12)
    figures = [evaluate(tests, config(), suite(1, 1, 60) + suite(1, 0, 3), tries) for tries in (1, 2, 5, MOST_TRIES)]

    def compared(evaluation: Evaluation):
        champion = evaluation.champion
        assert isinstance(champion, ChampionFigures)
        return evaluation.comparison, champion.comparison, champion.suite

    for before, after in pairwise(map(compared, figures)):
        for one, other in zip(before, after, strict=True):
            assert one is not None
            assert other is not None
            assert other.lift_low <= one.lift_low < one.lift_high <= other.lift_high
            assert (other.lift_low, other.lift_high) != (one.lift_low, one.lift_high) or after == compared(figures[-1])


@pytest.mark.parametrize(
    ("tests", "tries", "status", "words"),
    [
        (WON, 1, "APPROVED", "95% interval"),
        (WON, 2, "APPROVED", "(98.3% interval "),
        (
            WON,
            2,
            "APPROVED",
            "judged 2 models since the last champion, this one included: it is judged at a confidence of 98.3 %.",
        ),
        (
            WON,
            10,
            "APPROVED",
            "10 models since the last champion, this one included: it is judged at a confidence of 99.909 %.",
        ),
        (WON, 11, "PENDING", "These tests are used up: they judge at most 10 models"),
        (WON, 1000, "PENDING", "Fresh tests are needed."),
        (outcomes(0, 1, 0, 30), 11, "REJECTED", "These tests have judged 11 models"),
        (alone(outcomes(0, 1, 1, 30)), 3, "APPROVED", "have judged 3 models of the line, which has no champion, this one"),
        # 16 of 60 won and 4 lost are enough for the first model, but not for the fifth
        (outcomes(0, 0, 1, 16) + outcomes(0, 1, 0, 4) + outcomes(0, 1, 1, 40), 1, "APPROVED", "better than the champion"),
        (outcomes(0, 0, 1, 16) + outcomes(0, 1, 0, 4) + outcomes(0, 1, 1, 40), 5, "PENDING", "better than the champion"),
    ],
)
def test_the_same_tests_judge_again(tests, tries, status, words):
    evaluation = evaluate(tests, config({"champion": {"max_loss": 0.1}}), suite(1, 1, 80), tries)
    assert (evaluation.verdict.status, words in said(evaluation)) == (status, True), evaluation.verdict
    assert ("These tests have judged" in said(evaluation)) == (tries > 1)
    assert evaluation.tries == tries


@pytest.mark.parametrize(("changed", "tests"), [(1.0, 40), (0.2, 20)])
def test_ten_models_like_the_champion_are_approved_in_5_percent_of_the_cases(changed, tests):
    """The exact chances of an approval at each of ten tries, added: Boole's limit for the chance of at least one."""
    chance = 0.0
    for tries in range(1, MOST_TRIES + 1):
        for won in range(tests + 1):
            for lost in range(tests - won + 1):
                tied = tests - won - lost
                p = comb(tests, won) * comb(tests - won, lost) * (changed / 2) ** (won + lost) * (1 - changed) ** tied
                if p > 1e-7 and won - lost > 1:  # the extra test makes the lower bound of a smaller lift negative
                    lifts = [1.0] * won + [-1.0] * lost + [0.0] * tied
                    chance += p * (
                        interval(lifts, [1.0] * tests, at_try(0.95, tries), 1.0, 200 * tries, extra_tests(tries))[0] > 0
                    )
    assert chance <= 0.05


@pytest.mark.parametrize("tries", [1, 2, 5])
@pytest.mark.parametrize(("won", "lost", "tied"), [(12, 3, 45), (0, 0, 60), (30, 30, 0), (1, 6, 13)])
def test_the_benchmark_simulates_the_gates_interval(won, lost, tied, tries):
    """`benchmarks/gate.py` draws numbers of tests instead of tests: its bounds are the gate's, up to chance."""
    lifts, tests = [1.0] * won + [-1.0] * lost + [0.0] * tied, won + lost + tied
    given = at_try(0.95, tries), 1.0, 2000 * tries, extra_tests(tries)
    assert lower_bound(won, lost, tests, tries) == pytest.approx(interval(lifts, [1.0] * tests, *given)[0], abs=2 / tests)


@pytest.mark.parametrize(("tests", "tries", "kept"), [(149, 1, False), (150, 1, True), (397, 10, False), (400, 10, True)])
def test_how_many_unchanged_answers_show_that_the_suite_is_kept(tests, tries, kept):
    """The default of `suite.max` is enough for every model that the same tests may judge."""
    assert (lower_bound(0, 0, tests, tries) > -0.02) == kept


def test_later_tries_get_more_samples(monkeypatch):
    """A bound needs several samples in its tail: with 2,000, the tenth try's would be the lowest of them."""
    asked: list[int] = []

    def spy(pairs, *, samples, **how):
        asked.append(samples)
        return compare(pairs, samples=50, **how)

    monkeypatch.setattr(statistics, "compare", spy)
    evaluate(outcomes(0, 0, 1, 20, tags=["a"]), config(), KEPT, 10)
    assert sorted(asked) == [2000] * 4 + [20_000] * 3  # tags, reward, the suite's run; base, champion, suite
    assert (1 - at_try(0.95, 10)) / 2 * 20_000 > 9
