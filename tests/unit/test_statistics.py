"""The statistics against scipy's, the gate by a table of cases, and how often it approves where nothing improved."""

import random
from functools import cache
from itertools import count
from math import comb
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from pipeline.publish import statistics
from pipeline.publish.comparison import FEW_TESTS, Pair, compare, interval, needed
from pipeline.publish.gate import evaluate
from tunedrop.config.parse import parse_run_config
from tunedrop.inference_tests import ModelResult, Outcome
from tunedrop.sign_test import sign_test

NUMBERS = count()  # each test asks another question


def config(rewards=({"type": "exact_match"},), **gate):
    return parse_run_config({"model": "m", "rewards": list(rewards), "gate": gate})


def outcomes(*scores: tuple[float | None, float | None], **more: Any) -> list[Outcome]:
    """Tests by (base score, tuned score); None is a test that could not be scored."""

    def answer(score: float | None) -> ModelResult:
        if score is None:
            return ModelResult(error="reward 'exact_match' failed")
        return ModelResult(text=str(score), score=score, rewards={"exact_match": score}, passed=score >= 1)

    def prompt() -> list[dict[str, str]]:
        return [{"role": "user", "content": f"question {next(NUMBERS)}"}]

    results = [{"base": answer(base), "tuned": answer(tuned)} for base, tuned in scores]
    return [Outcome(**{"id": f"t{n}", "prompt": prompt(), "reference": "!"} | each | more) for n, each in enumerate(results)]


# --- the figures ---


@given(st.integers(0, 300), st.integers(0, 300))
def test_the_sign_test_is_scipys(wins, losses):
    ours = sign_test(wins, losses)
    theirs = scipy.stats.binomtest(wins, wins + losses, 0.5).pvalue if wins + losses else 1.0
    assert ours == pytest.approx(theirs, rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=20, max_size=60), st.floats(0.6, 0.99))
def test_the_interval_is_scipys_bootstrap_with_one_more_test(scores, confidence):
    lifts = np.array([after - before for before, after in scores], float)
    low, high = interval(lifts.tolist(), [1.0] * len(lifts), confidence, 4.0)
    generator, tail = np.random.default_rng(0), (1 - confidence) / 2
    for value, one_more, side in ((low, -4.0, 1), (high, 4.0, -1)):
        theirs = scipy.stats.bootstrap(
            ([*lifts, one_more],), np.mean, method="percentile", n_resamples=4000, rng=generator
        ).bootstrap_distribution
        # The bound is their quantile, up to what chance does to 2000 and 4000 resamples. Means have few values here, so that
        # what is compared is how many lie beyond it.
        beyond = side * (theirs - value)
        assert np.mean(beyond < -1e-9) - 0.06 <= tail <= np.mean(beyond <= 1e-9) + 0.06


def test_weights_and_ties_count():
    comparison = compare([Pair(0, 1, 3.0), Pair(0, 0), Pair(1, 0.5, 0.5)])
    assert (comparison.wins, comparison.ties, comparison.losses) == (1, 1, 1)
    assert comparison.lift == pytest.approx((3 - 0.25) / 4.5)
    assert comparison.base_score == pytest.approx(0.5 / 4.5)
    assert comparison.tuned_score == pytest.approx(3.25 / 4.5)
    assert comparison.lift_low < comparison.lift < comparison.lift_high


def test_tests_of_one_question_count_once_in_the_interval():
    """Thirty tests that repeat ten questions are as much evidence as ten tests."""
    generator = random.Random(0)
    lifts = [generator.choice([0.0, 1.0]) for _ in range(10)]
    once = compare([Pair(0, lift) for lift in lifts])
    thrice = compare([Pair(0, lift, question=f"{n}") for n, lift in enumerate(lifts) for _ in range(3)])
    assert (thrice.tests, thrice.questions, thrice.wins) == (30, 10, 3 * once.wins)
    for figure in ("lift", "lift_low", "lift_high", "p_value", "needed"):
        assert getattr(thrice, figure) == pytest.approx(getattr(once, figure))
    apart = compare([Pair(0, lift) for lift in lifts for _ in range(3)])
    assert apart.questions == 30
    assert apart.lift_low > thrice.lift_low


def test_repeating_the_tests_that_were_won_shows_nothing():
    """Without an improvement, some of twenty questions are won by chance. Asking them again is no evidence."""
    generator, cases = random.Random(1), 200
    approved = 0
    for _ in range(cases):
        lifts = [generator.choice([-1.0, 1.0]) for _ in range(20)]
        pairs = [
            Pair(0.5, 0.5 + lift / 2, question=str(n)) for n, lift in enumerate(lifts) for _ in range(6 if lift > 0 else 5)
        ]
        approved += compare(pairs, samples=300).lift_low > 0
    assert approved / cases <= 0.06


def test_the_span_is_at_least_what_the_scores_show():
    pairs = [Pair(0, 10)] * 30
    assert compare(pairs, span=1).lift_low == compare(pairs, span=10).lift_low < compare(pairs, span=0.1).lift


def test_as_many_tests_as_needed_are_enough_four_times_in_five():
    generator = random.Random(1)
    lift, losses = 0.2, 0.1  # 30 % won, 10 % lost
    tests = needed(lift, 0.4 - 0.2**2, 0.95, 1.0, 0.0)
    assert tests is not None
    enough = sum(
        interval(generator.choices([1.0, -1.0, 0.0], [lift + losses, losses, 0.6], k=tests), [1.0] * tests, 0.95, 1.0, 200)[
            0
        ]
        > 0
        for _ in range(300)
    )
    assert 0.72 < enough / 300 < 0.88
    assert needed(0.0, 0.4, 0.95, 1.0, 0.0) is None
    assert needed(0.2, 0.4, 0.95, 1.0, 0.3) is None
    assert needed(1.0, 0.0, 0.95, 1.0, 0.0) == FEW_TESTS


# --- how often the gate is wrong ---


@cache
def approves(kinds: tuple[tuple[float, float], ...], counts: tuple[int, ...]) -> bool:
    """Whether the gate approves a model with so many tests of each kind (base score, tuned score)."""
    tests = [pair for pair, count in zip(kinds, counts, strict=True) for pair in [pair] * count]
    return evaluate(outcomes(*tests), config()).verdict.status == "APPROVED"


def approval_rate(kinds: dict[tuple[float, float], float], tests: int) -> float:
    """The exact chance that the gate approves, when a test is of each kind with the given probability."""
    (_, *rest), probabilities = list(kinds), list(kinds.values())

    def chance(counts: tuple[int, ...]) -> float:
        product, left = 1.0, tests
        for number, probability in zip(counts, probabilities, strict=True):
            product *= comb(left, number) * probability**number
            left -= number
        return product

    def tables(left: int, kinds: int) -> list[tuple[int, ...]]:
        if kinds == 0:
            return [(left,)]
        return [(count, *others) for count in range(left + 1) for others in tables(left - count, kinds - 1)]

    likely = [(counts, p) for counts in tables(tests, len(rest)) if (p := chance(counts)) > 1e-4]
    return sum(p for counts, p in likely if approves(tuple(kinds), counts)) + (1 - sum(p for _, p in likely))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(statistics, "BOOTSTRAP_SAMPLES", 300)


@pytest.mark.parametrize("tests", [20, 40])
@pytest.mark.parametrize("loss", [0.03, 0.07, 0.12, 0.2])
def test_many_small_gains_and_a_rare_disaster_are_not_an_improvement(quick, loss, tests):
    """Where the mean stays the same, a plain bootstrap approves up to a third: it has seen no disaster in the sample."""
    kinds = {(0.5, 0.5 + 0.5 * loss / (1 - loss)): 1 - loss, (0.5, 0.0): loss, (1.0, 1.0): 0.0}
    assert approval_rate({pair: p for pair, p in kinds.items() if p}, tests) <= 0.05


@pytest.mark.parametrize(("changed", "tests"), [(0.1, 20), (0.1, 30), (0.6, 20), (1.0, 20), (1.0, 40)])
def test_a_model_that_wins_as_often_as_it_loses_is_not_an_improvement(quick, changed, tests):
    kinds = {(0.0, 1.0): changed / 2, (1.0, 0.0): changed / 2, (1.0, 1.0): 1 - changed}
    assert approval_rate({pair: p for pair, p in kinds.items() if p}, tests) <= 0.05


@pytest.mark.parametrize("tests", [20, 60])
def test_graded_scores_that_only_scatter_are_not_an_improvement(quick, tests):
    generator = random.Random(tests)
    cases = 150
    approved = sum(
        evaluate(outcomes(*[(generator.random(), generator.random()) for _ in range(tests)]), config()).verdict.status
        == "APPROVED"
        for _ in range(cases)
    )
    assert approved / cases <= 0.05


def test_real_lifts_are_seen(quick):
    """A large lift is nearly always seen with 28 tests; smaller ones need more."""
    better = {(0.0, 1.0): 0.62, (1.0, 1.0): 0.38}
    assert approval_rate(better, 28) > 0.99
    some = {(0.0, 1.0): 0.25, (1.0, 0.0): 0.05, (1.0, 1.0): 0.7}
    assert approval_rate(some, 20) < approval_rate(some, 40) < approval_rate({(0.0, 1.0): 0.4, (1.0, 1.0): 0.6}, 40)


# --- the gate ---

WON, LOST, TIED = (0, 1), (1, 0), (1, 1)
ASKED = [{"role": "user", "content": "asked before"}]


@pytest.mark.parametrize(
    ("tests", "gate", "status", "words"),
    [
        (outcomes(*[WON] * 30), {}, "APPROVED", "a lift of +1.000 over 30 tests (95% interval +0.806 to +1.000)"),
        (outcomes(*[WON] * 17, *[TIED] * 11), {}, "APPROVED", "The tuned model is better"),
        (outcomes(*[WON] * 5), {}, "PENDING", "5 tests are not enough evidence to decide: give at least 20."),
        (outcomes(*[WON, LOST] * 15), {}, "PENDING", "more tests like these would not show it"),
        (outcomes(*[WON] * 8, *[LOST] * 4, *[TIED] * 18), {}, "PENDING", "about 188 tests like these would show"),
        (outcomes(*[TIED] * 30), {}, "REJECTED", "scores the same as the base model in each of the 30 tests"),
        (outcomes(*[TIED] * 4), {}, "PENDING", "4 tests are not enough evidence"),
        (outcomes(*[LOST] * 30), {}, "REJECTED", "The tuned model is not better: a lift of -1.000"),
        (outcomes(*[LOST] * 6), {}, "REJECTED", "The tuned model is not better"),
        (outcomes(*[WON] * 30), {"min_lift": 1.0}, "REJECTED", "the gate requires more than +1.000"),
        (
            outcomes(*[WON] * 30) + outcomes(LOST, must_pass=True),
            {},
            "REJECTED",
            "The must-pass test 't0' failed: it scores 0.00, not full marks.",
        ),
        (outcomes(*[WON] * 30) + outcomes((0, 0.5), must_pass=True), {}, "REJECTED", "must-pass test"),
        (outcomes(*[WON] * 30) + outcomes(TIED, must_pass=True), {}, "APPROVED", "All 1 must-pass tests passed."),
        (
            outcomes(*[WON] * 30) + outcomes(LOST, TIED, tags=["math"]),
            {"must_not_regress": ["math"]},
            "REJECTED",
            "The tests tagged 'math' must not regress, but score 0.500 lower",
        ),
        (outcomes(*[WON] * 30) + outcomes(LOST, tags=["math"]), {}, "APPROVED", "better"),
        (
            outcomes(*[WON] * 30) + outcomes(TIED, tags=["math"]),
            {"must_not_regress": ["math"]},
            "APPROVED",
            "The tests tagged 'math' did not regress.",
        ),
        (outcomes(*[WON] * 30), {"must_not_regress": ["safety"]}, "PENDING", "No inference test has the tag 'safety'"),
        (outcomes(*[WON] * 30, prompt=ASKED), {}, "PENDING", "1 different questions are not enough evidence to decide"),
        (
            outcomes(*[WON] * 30) + outcomes(*[WON] * 5, prompt=ASKED),
            {},
            "APPROVED",
            "a lift of +1.000 over 35 tests of 31 different questions (",
        ),
        (outcomes(*[WON] * 30, judges=False) + outcomes(*[TIED] * 30), {}, "REJECTED", "the same as the base model"),
        (
            outcomes(*[WON] * 30) + outcomes(*[LOST] * 30, judges=False),
            {},
            "APPROVED",
            "30 of 60 tests do not judge the model",
        ),
        (outcomes(*[WON] * 30, judges=False), {}, "PENDING", "None of the 30 tests judges the model"),
        (
            outcomes(*[WON] * 30) + outcomes(LOST, judges=False, must_pass=True),
            {},
            "REJECTED",
            "must-pass test",
        ),
        (outcomes(*[WON] * 30, (0, None)), {}, "PENDING", "1 of 31 tests could not be scored ('t30')"),
        (outcomes(*[WON] * 30, (None, 0), (0, None)), {}, "PENDING", "2 of 32 tests could not be scored"),
    ],
)
def test_the_gate(tests, gate, status, words):
    evaluation = evaluate(tests, config(**gate))
    assert evaluation.verdict.status == status
    assert words in " ".join(evaluation.verdict.reasons)


def cut(tests: list[Outcome], model: str = "base") -> list[Outcome]:
    """The tests with one model's answers cut by the limit."""
    return [structs.replace(test, **{model: structs.replace(getattr(test, model), cut=True)}) for test in tests]


CUT = [
    # tests, the verdict, and what it says
    (
        cut(outcomes(*[WON] * 16)) + outcomes(*[TIED] * 12),
        "PENDING",
        "No lift is left without the tests where the limit of tokens cut an answer: raise tests.max_completion_length, so",
    ),
    (
        cut(outcomes(*[WON] * 16)) + outcomes(*[TIED] * 12),
        "PENDING",
        "+0.571 of the lift of +0.571 stands on 16 of 28 tests",
    ),
    (
        cut(outcomes(*[WON] * 16)) + outcomes(*[TIED] * 12),
        "PENDING",
        "0 of the tuned model). Over the other 12 tests, the lift is +0.000 (95% interval ",
    ),
    (
        cut(outcomes(*[WON] * 30)),
        "PENDING",
        "(30 of the base model, 0 of the tuned model). No test has two answers that ended by themselves.",
    ),
    (
        cut(outcomes(*[WON] * 20)) + outcomes(*[WON] * 2, *[LOST] * 1, *[TIED] * 20),
        "PENDING",
        "Too little evidence of a lift is left without the tests",
    ),
    (
        cut(outcomes(*[WON] * 5)) + outcomes(*[WON] * 25),
        "APPROVED",
        "+0.167 of the lift of +1.000 stands on 5 of 30 tests where the limit of tokens cut an answer (5 of the base model",
    ),
    (
        cut(outcomes(*[LOST] * 3), "tuned") + outcomes(*[WON] * 30),
        "APPROVED",
        "-0.091 of the lift of +0.818 stands on 3 of 33 tests where the limit of tokens cut an answer (0 of the base model",
    ),
    (cut(outcomes(*[LOST] * 30), "tuned"), "REJECTED", "-1.000 of the lift of -1.000 stands on 30 of 30 tests"),
    (cut(outcomes(*[WON] * 4)) + outcomes(*[TIED] * 30), "PENDING", "+0.118 of the lift of +0.118 stands on 4 of 34 tests"),
    (
        cut(outcomes(*[WON] * 20), "tuned") + outcomes(*[WON] * 20, weight=3.0),
        "APPROVED",
        "+0.250 of the lift of +1.000 stands on 20 of 40 tests",
    ),
    (cut(outcomes(*[WON] * 30, judges=False)) + outcomes(*[WON] * 30), "APPROVED", "30 of 60 tests do not judge"),
]


@pytest.mark.parametrize(("tests", "status", "words"), CUT)
def test_a_lift_is_not_made_by_a_limit(tests, status, words):
    evaluation = evaluate(tests, config())
    said = " ".join(evaluation.verdict.reasons)
    assert evaluation.verdict.status == status
    assert words in said
    assert said.count("stands on") == any(test.cut and test.judges for test in tests)
    assert evaluation.cut == {"base": sum(t.base.cut for t in tests), "tuned": sum(t.tuned.cut for t in tests)}


def test_without_cut_answers_nothing_is_said_of_a_limit():
    evaluation = evaluate(outcomes(*[WON] * 17, *[TIED] * 11), config())
    assert "limit of tokens" not in " ".join(evaluation.verdict.reasons)
    assert evaluation.ended == evaluation.comparison


def test_a_must_pass_test_that_failed_because_it_was_cut_says_so():
    tests = outcomes(*[WON] * 30) + cut(outcomes(LOST, must_pass=True), "tuned")
    (reason, _) = evaluate(tests, config()).verdict.reasons
    assert reason == "The must-pass test 't0' failed: it scores 0.00, not full marks; the limit of tokens cut its answer."


def test_a_check_that_is_not_met_says_so():
    answer = ModelResult(text="", score=1.0, passed=False, unmet=["contains 0.00, at least 1.00 was asked for"])
    musts = [Outcome(id="m", prompt=[], reference="", base=answer, tuned=answer, must_pass=True)]
    (reason,) = evaluate(outcomes(*[WON] * 30) + musts, config()).verdict.reasons
    assert reason == "The must-pass test 'm' failed: contains 0.00, at least 1.00 was asked for."


def test_by_tag_and_by_reward():
    tests = outcomes(*[WON] * 20, tags=["easy"]) + outcomes(*[LOST] * 3, tags=["hard", "long"])
    evaluation = evaluate(tests, config(({"type": "exact_match"}, {"type": "length", "weight": 0.1})))
    assert {tag: each.lift for tag, each in evaluation.by_tag.items()} == {"easy": 1.0, "hard": -1.0, "long": -1.0}
    assert list(evaluation.by_reward) == ["exact_match"]  # the other one was not measured here
    assert evaluation.by_reward["exact_match"].lift == evaluation.comparison.lift
    assert evaluation.passed == {"base": 3, "tuned": 20}


def test_no_test_that_could_be_scored_is_an_error():
    with pytest.raises(ValueError, match="none of the 2 inference tests"):
        evaluate(outcomes((0, None), (None, 1)), config())


# --- the general questions ---


def probed(kept: int, lost: int, gained: int = 0) -> list[Outcome]:
    """General questions of which the tuned model kept, lost and gained so many; neither model knows the rest of 24."""
    pairs = [TIED] * kept + [LOST] * lost + [WON] * gained
    return outcomes(*pairs, *[(0, 0)] * (24 - len(pairs)))


PROBES = [
    # kept, lost, gained; gate.probe_max_loss; the verdict, and words of its reasons
    ((15, 0), None, "APPROVED", "The tuned model is better"),
    ((0, 15), None, "APPROVED", "The tuned model is better"),
    ((15, 0), 0.13, "APPROVED", "It keeps the general questions: a difference of +0.000 over 24 general questions ("),
    ((15, 0), 0.1, "PENDING", "Not enough evidence that the general questions are kept"),
    ((14, 1), 0.2, "PENDING", "the true loss may be 0.200 or more (gate.probe_max_loss)"),
    ((14, 1), 0.25, "APPROVED", "It keeps the general questions"),
    ((4, 11), 0.15, "REJECTED", "The tuned model has lost general questions: a difference of -0.458"),
    ((0, 15), 1.0, "APPROVED", "It keeps the general questions: a difference of -0.625"),
    ((10, 0, 9), 0.05, "APPROVED", "a difference of +0.375"),
]


@pytest.mark.parametrize(("questions", "max_loss", "status", "words"), PROBES)
def test_the_general_questions_decide_where_the_config_says_so(questions, max_loss, status, words):
    gate = {} if max_loss is None else {"probe_max_loss": max_loss}
    evaluation = evaluate(outcomes(*[WON] * 30), config(**gate), probe=probed(*questions))
    assert evaluation.verdict.status == status
    assert words in " ".join(evaluation.verdict.reasons)
    assert evaluation.probe
    assert (evaluation.probe.tests, evaluation.probe.losses) == (24, questions[1])


def test_questions_without_an_answer_do_not_count():
    unanswered = outcomes((None, 1), (1, None))
    assert evaluate(outcomes(*[WON] * 30), config(), probe=unanswered).probe is None
    verdict = evaluate(outcomes(*[WON] * 30), config(probe_max_loss=0.5), probe=unanswered).verdict
    assert (verdict.status, "No general question could be answered" in verdict.reasons[0]) == ("PENDING", True)
    probe = evaluate(outcomes(*[WON] * 30), config(), probe=unanswered + probed(20, 0)).probe
    assert probe
    assert probe.tests == 24
