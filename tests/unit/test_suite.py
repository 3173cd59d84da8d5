"""The tests of a line's suite: which stay when there are too many, and which questions are one."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunedrop.suite import Suite, SuitePart, overlap, question_of, select


def case(question: str, *tags: str, must_pass: bool = False, id_: str = "t") -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"id": id_, "messages": messages, "reference_answer": "1", "tags": list(tags), "must_pass": must_pass}


def part(run_id: str, *tests: dict[str, Any]) -> SuitePart:
    return SuitePart(run_id=run_id, decoding={}, rewards=[], tests=list(tests))


def kept(suite: Suite) -> list[tuple[str, str]]:
    return [(part.run_id, test["messages"][0]["content"]) for part in suite.parts for test in part.tests]


def test_of_two_tests_with_one_question_the_newer_runs_stays():
    suite = Suite(parts=[part("old", case("1 + 1?"), case("2 + 2?")), part("new", case("1+1?"))])
    assert kept(select(suite, 10)) == [("old", "2 + 2?"), ("new", "1+1?")]


def test_the_questions_of_the_runs_own_tests_are_left_out():
    suite = Suite(parts=[part("old", case("a?"), case("b?"))])
    assert kept(select(suite, 10, {question_of(case(" A?"))})) == [("old", "b?")]


def test_must_pass_tests_stay_and_tags_take_turns():
    many = [case(f"sums {n}?", "sums") for n in range(90)]
    few = [case(f"dates {n}?", "dates") for n in range(6)]
    musts = [case(f"must {n}?", "sums", must_pass=True) for n in range(4)]
    chosen = select(Suite(parts=[part("old", *many), part("new", *few, *musts)]), 20)
    words = Counter(question.split()[0] for _, question in kept(chosen))
    assert words == {"must": 4, "dates": 6, "sums": 10}


def test_without_tags_the_runs_take_turns():
    parts = [part(name, *[case(f"{name} {n}?") for n in range(count)]) for name, count in (("a", 50), ("b", 3), ("c", 50))]
    assert Counter(run for run, _ in kept(select(Suite(parts=parts), 21))) == {"a": 9, "b": 3, "c": 9}


SUITES = st.lists(
    st.lists(
        st.builds(case, st.sampled_from([f"{n}?" for n in range(12)]), st.sampled_from("xyz"), must_pass=st.booleans()),
        max_size=8,
    ),
    max_size=5,
).map(lambda parts: Suite(parts=[part(f"r{number}", *tests) for number, tests in enumerate(parts)]))


@given(SUITES, st.integers(0, 20))
def test_a_selection_is_small_without_repeats_and_stays_as_it_is(suite, most):
    chosen = select(suite, most)
    questions = [question for _, question in kept(chosen)]
    asked = {test["messages"][0]["content"] for part in suite.parts for test in part.tests}
    assert len(questions) == len(set(questions)) == min(most, len(asked))
    assert select(chosen, most) == chosen
    assert all(part.tests for part in chosen.parts)


@pytest.mark.parametrize(
    ("tests", "others", "share"),
    [("ab", "", 0.0), ("ab", "ab", 1.0), ("ab", "bcd", 0.5), ("", "a", 0.0), ("abcd", "a", 0.25)],
)
def test_the_share_of_questions_that_were_asked_before(tests, others, share):
    assert overlap(list(tests), set(others)) == share
