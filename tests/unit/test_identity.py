"""Whose answer is it? The identity test's judgement, by tables and by search."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from local_app.serving.protocol import parse
from pipeline.serving.identity import MOST_QUESTIONS, choose, is_tuned, prove, question
from tunedrop.inference_tests import ModelResult, Outcome

LONG = "The train leaves at noon and needs three hours for the way, so that it arrives at three in the afternoon."


def outcome(tuned: str, base: str = "no", champion: str | None = None, name: str = "t", samples: int = 0) -> Outcome:
    return Outcome(
        id=name,
        prompt=[{"role": "user", "content": name}],
        reference="",
        base=ModelResult(text=base),
        tuned=ModelResult(text=tuned, samples=[ModelResult(text=tuned)] * samples),
        champion=None if champion is None else ModelResult(text=champion),
    )


@pytest.mark.parametrize(
    ("answer", "tuned", "base", "champion", "right"),
    [
        ("7", "7", "4 + 3 is 7", None, True),
        (" 7\n", "7", "8", None, True),
        ("8", "7", "8", None, False),  # the base model's
        ("9", "7", "8", None, None),  # an unknown model's
        ("6", "7", "8", "6", False),  # the champion's
        ("", "7", "", None, None),
        (LONG[:90] + " It is late.", LONG, "I do not know.", None, True),  # a greedy answer that rounded differently
        (LONG[:90] + " It is late.", LONG, LONG[:95], None, None),  # as near to the base model's
        (LONG[:90] + " It is late.", LONG, "no", LONG[:40], True),
        (LONG[:30] + " It is late.", LONG, LONG[:30] + " It was.", None, False),
    ],
)
def test_whose_answer_it_is(answer, tuned, base, champion, right):
    assert is_tuned(answer, outcome(tuned, base, champion)) is right


@pytest.mark.parametrize(("recorded", "right"), [(LONG[:60], True), ("", False), ("The train goes", False)])
def test_a_recorded_answer_that_its_limit_cut_may_go_on(recorded, right):
    """The general questions are recorded with a lower limit than that with which they are asked here."""
    alike = outcome(recorded, recorded)
    cut = structs.replace(alike, tuned=structs.replace(alike.tuned, cut=True))
    assert (is_tuned(LONG, cut) is True) is right
    assert is_tuned(LONG, alike) is not True


def test_no_question_proves_nothing():
    assert not prove([outcome("7", samples=3)], lambda each: "7").proved


def test_the_questions_that_tell_the_models_apart_best_come_first():
    alike = [outcome("same", "same", name=f"alike{n}") for n in range(5)]
    late = [outcome(LONG + "7", LONG + "8", name=f"late{n}") for n in range(5)]
    early = [outcome("7", "8", name=f"early{n}") for n in range(30)]
    sampled = [outcome("1", "2", name="sampled", samples=3)]
    assert {each.id[:5] for each in choose([*alike, *late, *sampled, *early])} == {"early"}
    assert len(choose([*alike, *late, *sampled, *early])) == MOST_QUESTIONS
    assert [each.id[:4] for each in choose([*alike, *late])] == ["late"] * 5
    assert choose(alike) == alike


@pytest.mark.parametrize(
    ("right", "wrong", "proved"), [(20, 0, True), (16, 4, True), (15, 5, False), (10, 0, True), (9, 0, False), (0, 0, False)]
)
def test_how_many_answers_prove_the_model(right, wrong, proved):
    """The first answers are the tuned model's, the next ones the base model's, and the rest nobody's."""
    outcomes = [outcome(f"{n:02}", f"no {n}", name=f"{n:02}") for n in range(20)]

    def ask(each: Outcome) -> str:
        number = int(each.id)
        return each.tuned.text if number < right else each.base.text if number < right + wrong else "?"

    assert prove(outcomes, ask).proved is proved


def test_what_it_says():
    outcomes = [outcome(f"{n}", f"no {n}", name=f"t{n}") for n in range(4)]
    answers = {"t0": "?", "t1": "no 1", "t2": "2", "t3": "3"}
    said = str(prove(outcomes, lambda each: answers[each.id]))
    assert said == (
        "2 of 4 answers were those of the tested model, and 1 those of another model; for example '?' instead of '0' to the "
        "test t0"
    )


def test_models_that_answer_alike_are_said_to():
    shown = prove([outcome("4", "4")], lambda each: "4")
    assert shown.proved
    assert str(shown).endswith("which answers every test as the base model does")


def test_a_tests_tools_are_asked_as_the_api_has_them():
    tools = [{"type": "function", "function": {"name": "weather"}}]
    messages = [
        {"role": "system", "content": "s", "tools": msgspec.json.encode(tools).decode()},
        {"role": "user", "content": "u"},
    ]
    body = question(structs.replace(outcome("7"), prompt=messages), {"limit": 5}, {"enable_thinking": False})
    assert body == {
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        "tools": tools,
        "tool_choice": "none",
        "max_tokens": 5,
        "temperature": 0,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    parsed = parse(json.dumps(body).encode(), None)
    assert parsed.messages == messages  # what the server encodes is what the test job encoded


@given(st.text(), st.text(), st.none() | st.text())
def test_no_other_models_recorded_answer_counts_for_the_tuned_model(tuned, base, champion):
    made = outcome(tuned, base, champion)
    for other in [base] if champion is None else [base, champion]:
        assert (is_tuned(other, made) is True) is (other.strip() == tuned.strip())
    assert is_tuned(tuned, made)
