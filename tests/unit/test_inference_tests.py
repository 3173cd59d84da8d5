import json

import pytest

from tunedrop.inference_tests import compare, dump_tests, judge, parse_tests
from tunedrop.problems import RejectedError
from tunedrop.run_config import Gate, parse_run_config

CONFIG = parse_run_config({"model": "m", "system_prompt": "Be brief."})


def parse(*cases):
    return parse_tests(json.dumps({"evaluations": cases}).encode(), CONFIG)


def test_the_plain_format():
    (test,) = parse({"id": "a", "prompt": "2+2?", "description": "4"})
    assert test.reference == "4"
    assert test.prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]


def test_tests_survive_the_way_to_the_job():
    tests = parse(
        {"id": 1, "prompt": "a", "description": "b", "tags": ["x"], "weight": 2, "must_pass": True, "columns": {"k": [1]}},
        {"messages": [{"role": "user", "content": "c"}], "reference_answer": "d"},
    )
    assert [test.id for test in tests] == ["1", "test-2"]
    assert parse_tests(dump_tests(tests), CONFIG) == tests


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"id": "a", "prompt": "x"}, "needs 'description'"),
        ({"id": "a", "description": "x"}, "needs 'prompt'"),
        ({"id": "a", "prompt": "x", "description": "y", "wieght": 1}, "unknown field `wieght`"),
        ({"id": "a", "prompt": 3, "description": "y"}, "Expected `str | null`, got `int`"),
        ({"id": "a", "prompt": "x", "description": "y", "weight": 0}, "above 0"),
        ({"id": "a", "messages": [{"role": "x", "content": "y"}], "description": "y"}, "needs 'prompt'"),
    ],
)
def test_a_broken_case_is_named(case, words):
    with pytest.raises(RejectedError, match="inference test 2: ") as caught:
        parse({"id": "ok", "prompt": "x", "description": "y"}, case)
    assert words in str(caught.value)


def test_duplicate_ids_no_tests_and_no_json_are_refused():
    case = {"id": "a", "prompt": "x", "description": "y"}
    with pytest.raises(RejectedError, match="used twice"):
        parse(case, case)
    with pytest.raises(RejectedError, match="no evaluations"):
        parse()
    with pytest.raises(RejectedError, match="cannot be read"):
        parse_tests(b"{", CONFIG)


def outcomes(*scores, **more):
    return [
        {"id": f"t{n}", "tags": [], "weight": 1.0, "must_pass": False, "base": {"score": a}, "tuned": {"score": b}} | more
        for n, (a, b) in enumerate(scores)
    ]


def test_comparison_counts_and_means():
    comparison = compare(outcomes((0, 1), (1, 1), (1, 0), (0, 1)), 0.95)
    assert (comparison.wins, comparison.ties, comparison.losses) == (2, 1, 1)
    assert (comparison.base_score, comparison.tuned_score, comparison.lift) == (0.5, 0.75, 0.25)
    assert comparison.lift_low < comparison.lift < comparison.lift_high


def test_the_interval_is_the_bootstrap_of_the_mean():
    """For n equal-weight differences the interval is close to the normal one: mean ± 1.96 · sd / √n."""
    scores = [(0, 1)] * 60 + [(1, 0)] * 20 + [(1, 1)] * 20
    comparison = compare(outcomes(*scores), 0.95)
    mean, variance = 0.4, 0.8 - 0.4**2
    half = 1.96 * (variance / 100) ** 0.5
    assert comparison.lift_low == pytest.approx(mean - half, abs=0.02)
    assert comparison.lift_high == pytest.approx(mean + half, abs=0.02)


def test_weights_count():
    cases = outcomes((0, 1), (0, 0))
    cases[0]["weight"] = 3.0
    assert compare(cases, 0.95).lift == 0.75


@pytest.mark.parametrize(
    ("cases", "gate", "status"),
    [
        (outcomes(*[(0, 1)] * 30), Gate(), "APPROVED"),
        (outcomes(*[(0, 1)] * 5), Gate(), "PENDING"),
        (outcomes(*[(0, 1), (1, 0)] * 15), Gate(), "PENDING"),
        (outcomes(*[(1, 1)] * 30), Gate(), "REJECTED"),
        (outcomes(*[(1, 0)] * 30), Gate(), "REJECTED"),
        (outcomes(*[(0, 1)] * 30), Gate(min_lift=1.0), "REJECTED"),
        (outcomes(*[(0, 1)] * 30) + outcomes((1, 0), must_pass=True), Gate(), "REJECTED"),
        (outcomes(*[(0, 1)] * 30) + outcomes((1, 0), tags=["math"]), Gate(must_not_regress=["math"]), "REJECTED"),
        (outcomes(*[(0, 1)] * 30) + outcomes((1, 0), tags=["math"]), Gate(), "APPROVED"),
    ],
)
def test_the_gate(cases, gate, status):
    verdict = judge(cases, compare(cases, gate.confidence), gate)
    assert verdict.status == status
    assert verdict.reasons
