"""Whose answer is it? The identity test's judgement, by tables and by search."""

import json
from math import exp, log

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from local_app.serving.protocol import parse
from pipeline.serving.identity import MOST_QUESTIONS, Answer, answer_of, choose, is_tuned, measure, prove, question
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
    assert not prove([outcome("7", samples=3)], lambda each: Answer("7", {})).proved


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

    assert prove(outcomes, lambda each: Answer(ask(each), {})).proved is proved


def test_what_it_says():
    outcomes = [outcome(f"{n}", f"no {n}", name=f"t{n}") for n in range(4)]
    answers = {"t0": "?", "t1": "no 1", "t2": "2", "t3": "3"}
    said = str(prove(outcomes, lambda each: Answer(answers[each.id], {})))
    assert said == (
        "2 of 4 answers were those of the tested model, and 1 those of another model; for example '?' instead of '0' to the "
        "test t0"
    )


def test_models_that_answer_alike_are_said_to():
    shown = prove([outcome("4", "4")], lambda each: Answer("4", {}))
    assert shown.proved
    assert str(shown).endswith("which answers every test as the base model does")


def likely(*logits: float) -> dict[str, float]:
    """Return the log-probabilities of tokens with these logits."""
    total = log(sum(map(exp, logits)))
    return {f"token {n}": logit - total for n, logit in enumerate(logits)}


LOGITS = st.lists(st.floats(-3, 3), min_size=5, max_size=5)
CHANGES = st.lists(LOGITS, min_size=20, max_size=20).filter(lambda rows: any(abs(each) > 1 for row in rows for each in row))


def changed(base: list[list[float]], change: list[list[float]], scale: float = 1.0) -> list[dict[str, float]]:
    """Return first tokens of a model that changes the base model's logits."""
    return [likely(*(b + scale * c for b, c in zip(row, by, strict=True))) for row, by in zip(base, change, strict=True)]


def recorded(base, tuned, champion=()) -> list[Outcome]:
    """Return outcomes with these first tokens; the texts say nothing."""

    def result(first: dict[str, float]) -> ModelResult:
        return ModelResult(text="same", first_token=first)

    champions = map(result, champion) if champion else [None] * len(tuned)
    return [
        structs.replace(outcome("same", "same", name=f"t{n}"), base=result(b), tuned=result(t), champion=c)
        for n, (b, t, c) in enumerate(zip(base, tuned, champions, strict=True))
    ]


@given(LOGITS, CHANGES, st.sampled_from([0.1, 0.3, 1.0]), st.randoms())
def test_first_tokens_tell_a_model_that_was_tuned_a_little_from_all_others(start, change, scale, random):
    """Rounding moves every logit by some thousandths of the tuning's change at full scale; the texts are all alike."""
    starts = [[each + number % 3 for each in start] for number in range(20)]
    base, tuned = changed(starts, change, 0.0), changed(starts, change, scale)
    other = changed(starts, [random.sample(row, 5) for row in reversed(change)], scale)
    outcomes = recorded(base, tuned)
    rounding = [[random.uniform(-0.003, 0.003) for _ in range(5)] for _ in range(20)]
    rounded = [
        {token: value + by for (token, value), by in zip(each.items(), row, strict=True)}
        for each, row in zip(tuned, rounding, strict=True)
    ]
    effect = measure(list(zip(outcomes, rounded, strict=True)))
    if effect is None:  # the softmax took the change away: texts decide
        return
    assert effect.proved
    assert effect.share == pytest.approx(1, abs=0.3)
    unproved = measure(list(zip(outcomes, base, strict=True)))
    assert unproved is not None
    assert (unproved.share, unproved.error) == pytest.approx((0, 1))
    assert not unproved.proved
    if other != tuned:
        champion = measure(list(zip(recorded(base, tuned, other), other, strict=True)))
        assert champion is not None
        assert champion.champions
        assert not champion.proved


def test_a_stronger_model_of_the_same_kind_is_another_model():
    """As the next run's adapter is, in the place of this one's."""
    starts, change = [[0.0, 1.0, 2.0]] * 20, [[0.5, 0.0, -0.5]] * 20
    outcomes = recorded(changed(starts, change, 0), changed(starts, change))
    stronger = measure(list(zip(outcomes, changed(starts, change, 3), strict=True)))
    assert stronger is not None
    assert stronger.share > 1.5
    assert not stronger.proved
    assert "of the tuning's change" in str(stronger)


def test_log_probabilities_decide_where_there_are_some():
    starts, change = [[0.0, 1.0, 2.0]] * 20, [[0.5, 0.0, -0.5]] * 20
    base, tuned = changed(starts, change, 0), changed(starts, change)
    outcomes = recorded(base, tuned)
    first = {each.id: number for number, each in enumerate(outcomes)}
    assert prove(outcomes, lambda each: Answer("another text", tuned[first[each.id]])).proved
    assert not prove(outcomes, lambda each: Answer("same", base[first[each.id]])).proved
    assert prove(recorded(base, base), lambda each: Answer("same", base[0])).proved  # nothing changed: the texts decide


@pytest.mark.parametrize(
    ("logprobs", "first"),
    [
        (None, {}),
        ({"content": []}, {}),
        ({"content": None}, {}),
        ({"content": [{"token": "a", "logprob": -0.1, "top_logprobs": [{"token": "a", "logprob": -0.1}]}]}, {"a": -0.1}),
    ],
)
def test_an_answer_with_and_without_log_probabilities(logprobs, first):
    choice = {"message": {"content": "a"}, "logprobs": logprobs}
    assert answer_of(json.dumps({"choices": [choice]}).encode(), "c") == Answer("a", first)


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
