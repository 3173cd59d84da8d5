import math

import pytest
from pydantic import ValidationError

from tunedrop.rewards import REWARDS, RewardError, RewardSpec, build_rewards, score
from tunedrop.rewards.functions import Sample, final_answer

XML = "<reasoning>\n2 and 2\n</reasoning>\n<answer>\n4\n</answer>"

CASES = [
    # type, parameters, completion, answer, score
    ("exact_match", {}, "Paris", "paris", 1.0),
    ("exact_match", {}, "  **Paris.** ", "Paris", 1.0),
    ("exact_match", {}, XML, "4", 1.0),
    ("exact_match", {}, "<think>5</think> 4", "4", 1.0),
    ("exact_match", {}, "The answer is 4", "4", 0.0),
    ("exact_match", {"normalize": False}, "paris", "Paris", 0.0),
    ("contains", {}, "It is PARIS, of course", "Paris", 1.0),
    ("contains", {"ignore_case": False}, "It is PARIS", "Paris", 0.0),
    ("contains", {"text": "because"}, "Paris because I say so", "London", 1.0),
    ("regex", {"pattern": r"\d{2}"}, "I am 42", "", 1.0),
    ("regex", {"pattern": r"\d{2}", "full": True}, "I am 42", "", 0.0),
    ("xml_format", {}, XML, "", 1.0),
    ("xml_format", {}, "<reasoning>a</reasoning><answer></answer>", "", 0.0),
    ("xml_format", {}, XML + " and more", "", 0.0),
    ("xml_format", {}, "<answer>4</answer><reasoning>a</reasoning>", "", 0.0),
    ("xml_format", {}, "<reasoning>a<reasoning></reasoning><answer>4</answer>", "", 0.0),
    ("xml_format", {"mode": "soft"}, "<reasoning>a</reasoning> 4", "", 0.5),
    ("xml_format", {"mode": "soft"}, XML, "", 1.0),
    ("xml_format", {"mode": "soft"}, XML + "<answer>", "", 0.75),
    ("xml_format", {"tags": ["plan"]}, "<plan>x</plan>", "", 1.0),
    ("think_format", {}, "<think>hm</think>\n4", "", 1.0),
    ("think_format", {}, "<think>hm</think>", "", 0.0),
    ("think_format", {}, "<think>a<think>b</think> 4", "", 0.0),
    ("think_format", {}, "4", "", 0.0),
    ("numeric", {}, "2 + 2 is 4.", "4", 1.0),
    ("numeric", {}, "It costs 1,234.50 dollars", "1234.5", 1.0),
    ("numeric", {}, "about -3", "-3.0", 1.0),
    ("numeric", {}, "none", "4", 0.0),
    ("numeric", {"tolerance": 0.1}, "3.05", "3", 1.0),
    ("numeric", {}, "4", "four", None),
    ("length", {"maximum": 4}, "one two three", "", 1.0),
    ("length", {"maximum": 2}, "one two three", "", 0.5),
    ("length", {"maximum": 1}, "one two three", "", 0.0),
    ("length", {"minimum": 4}, "one two", "", 0.5),
    ("length", {"maximum": 3, "unit": "characters"}, "abc", "", 1.0),
    ("relevance", {}, "red cars are fast", "red cars", 1.0),
    ("relevance", {}, "blue", "red cars", 0.0),
    ("relevance", {}, "red", "red cars", 0.5),
    ("relevance", {}, "anything", "the of", None),
]


@pytest.mark.parametrize(("kind", "parameters", "completion", "answer", "expected"), CASES)
def test_scores(kind, parameters, completion, answer, expected):
    (reward,) = build_rewards([RewardSpec(type=kind, **parameters)])
    assert reward([""], [completion], answer=[answer]) == [pytest.approx(expected) if expected is not None else None]


def test_every_reward_has_a_case():
    assert {case[0] for case in CASES} == set(REWARDS)


def test_relevance_weighs_question_and_reference():
    (reward,) = build_rewards([RewardSpec(type="relevance", reference_weight=0.5)])
    prompt = [{"role": "user", "content": "fast trains?"}]
    assert reward([prompt], ["fast trains"], answer=["red cars"]) == [0.5]


def test_conversational_completions_score_like_texts():
    (reward,) = build_rewards([RewardSpec(type="exact_match")])
    assert reward([""], [[{"role": "assistant", "content": "4"}]], answer=["4"]) == [1.0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [("a", "a"), ("<answer>1</answer><answer> 2 </answer>", "2"), ("<think>x</think>\ny", "y"), ("", "")],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_score_is_the_weighted_sum_without_abstentions():
    rewards = build_rewards([RewardSpec(type="exact_match", weight=2.0), RewardSpec(type="numeric", weight=0.5)])
    scored = score(rewards, ["", ""], ["four", "4"], {"answer": ["four", "4"]})
    assert scored == [
        {"score": 2.0, "rewards": {"exact_match": 1.0, "numeric": None}},
        {"score": 2.5, "rewards": {"exact_match": 1.0, "numeric": 1.0}},
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_no_number_fails_and_names_the_row(monkeypatch, value):
    (reward,) = build_rewards([RewardSpec(type="contains")])
    monkeypatch.setattr(reward, "_function", lambda sample, **_: value)
    with pytest.raises(RewardError, match=r"'contains' returned .* for the row asking 'How many'"):
        reward([[{"role": "user", "content": "How many"}]], ["x"], answer=["y"])


def test_what_a_reward_raises_passes_through(monkeypatch):
    (reward,) = build_rewards([RewardSpec(type="contains")])

    def broken(sample: Sample, **_: object) -> float:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(reward, "_function", broken)
    with pytest.raises(ZeroDivisionError, match="boom"):
        reward([""], ["x"], answer=["y"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"type": "exact"}, "did you mean 'exact_match'"),
        ({"type": "numeric", "tolerence": 1}, "did you mean 'tolerance'"),
        ({"type": "regex"}, "pattern\n.*required"),
        ({"type": "regex", "pattern": "("}, "regular expression"),
        ({"type": "length", "unit": "pages"}, "'words' or 'characters'"),
        ({"type": "contains", "weight": math.inf}, "finite"),
        ({"type": "contains", "name": "a b"}, "pattern"),
    ],
)
def test_wrong_specs_are_refused(given, message):
    with pytest.raises(ValidationError, match=message):
        RewardSpec(**given)
