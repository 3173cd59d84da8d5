import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tunedrop.rewards import (
    REWARDS,
    Reward,
    RewardError,
    RewardPermissions,
    RewardSpec,
    build_rewards,
    reward_permissions,
    score,
)
from tunedrop.rewards.base import Sample, final_answer

XML = "<reasoning>\n2 and 2\n</reasoning>\n<answer>\n4\n</answer>"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
CALL = {"name": "weather", "arguments": {"city": "Rome", "days": 2}}
CHECK = {"type": "string_check", "name": "c", "input": "{{sample.output_text}}", "reference": "{{item.reference_answer}}"}
SIMILAR = {"type": "text_similarity", "name": "s", "input": "{{ sample.output_text }}", "reference": "{{ item.answer }}"}


def grader(**given):
    return {"grader": (CHECK if "operation" in given else SIMILAR) | given}


CASES = [
    # type, parameters, completion, answer, score
    ("exact_match", {}, "Paris", "paris", 1.0),
    ("exact_match", {}, "  **Paris.** ", "Paris", 1.0),
    ("exact_match", {}, XML, "4", 1.0),
    ("exact_match", {}, "<think>5</think> 4", "4", 1.0),
    ("exact_match", {}, "The answer is 4", "4", 0.0),
    ("exact_match", {}, "ﬁne", "fine", 1.0),
    ("exact_match", {"normalize": False}, "paris", "Paris", 0.0),
    ("numeric", {}, "2 + 2 is 4.", "4", 1.0),
    ("numeric", {}, "It costs 1,234.50 dollars", "1234.5", 1.0),
    ("numeric", {}, "about -3", "-3.0", 1.0),
    ("numeric", {}, "none", "4", 0.0),
    ("numeric", {"tolerance": 0.1}, "3.05", "3", 1.0),
    ("numeric", {"relative": 0.1}, "105", "100", 1.0),
    ("numeric", {"relative": 0.1}, "111", "100", 0.0),
    ("numeric", {}, "4", "four", None),
    ("math", {}, r"So it is \boxed{\frac{1}{2}}", "0.5", 1.0),
    ("math", {}, "<answer>1/2</answer>", r"\frac{1}{2}", 1.0),
    ("math", {}, "$2x + x$", "$3x$", 1.0),
    ("math", {}, r"\boxed{\{2, 1\}}", r"\{1, 2\}", 1.0),
    ("math", {}, r"\boxed{3}", "0.5", 0.0),
    ("math", {}, "no idea", "0.5", 0.0),
    ("math", {}, "4", "", None),
    ("multiple_choice", {}, "B", "b", 1.0),
    ("multiple_choice", {}, "The answer is (C).", "C", 1.0),
    ("multiple_choice", {}, "Answer: B\nNo wait, the answer is D", "D", 1.0),
    ("multiple_choice", {}, r"\boxed{\text{B}}", "B. Paris", 1.0),
    ("multiple_choice", {}, "<answer>A) Rome</answer>", "(A)", 1.0),
    ("multiple_choice", {}, "A cat sat on the mat", "A", 0.0),
    ("multiple_choice", {}, "So the answer is a cat", "A", 0.0),
    ("multiple_choice", {}, "so the answer is a.", "A", 1.0),
    ("multiple_choice", {}, "E", "E", None),
    ("multiple_choice", {"choices": "ABCDE"}, "E", "E", 1.0),
    ("multiple_choice", {}, "B", "Paris", None),
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
    ("xml_format", {"mode": "soft"}, f"Sure. {XML} Done.", "", 1.0),
    ("xml_format", {"mode": "soft"}, "<answer>4</answer><reasoning>a</reasoning>", "", 0.0),
    ("xml_format", {"mode": "soft"}, "<reasoning>a</reasoning> so <answer> </answer>", "", 0.0),
    ("xml_format", {"mode": "partial"}, "<reasoning>a</reasoning> 4", "", 0.5),
    ("xml_format", {"mode": "partial"}, XML, "", 1.0),
    ("xml_format", {"mode": "partial"}, XML + "<answer>", "", 0.75),
    ("xml_format", {"tags": ["plan"]}, "<plan>x</plan>", "", 1.0),
    ("think_format", {}, "<think>hm</think>\n4", "", 1.0),
    ("think_format", {}, "<think>hm</think>", "", 0.0),
    ("think_format", {}, "<think>a<think>b</think> 4", "", 0.0),
    ("think_format", {}, "hm</think> 4", "", 0.0),
    ("think_format", {}, "4", "", 0.0),
    ("think_format", {"mode": "soft"}, "hm</think> 4", "", 1.0),
    ("think_format", {"mode": "soft"}, "a <think>hm</think> 4", "", 0.0),
    ("think_format", {"mode": "partial"}, "<think>hm</think>", "", 2 / 3),
    ("think_format", {"mode": "partial"}, "4", "", 0.0),
    ("length", {"maximum": 4}, "one two three", "", 1.0),
    ("length", {"maximum": 2}, "one two three", "", 0.5),
    ("length", {"maximum": 1}, "one two three", "", 0.0),
    ("length", {"minimum": 4}, "one two", "", 0.5),
    ("length", {"maximum": 3, "unit": "characters"}, "abc", "", 1.0),
    ("overlong_penalty", {"maximum": 4, "buffer": 2}, "one two", "", 0.0),
    ("overlong_penalty", {"maximum": 4, "buffer": 2}, "one two three", "", -0.5),
    ("overlong_penalty", {"maximum": 4, "buffer": 2}, "a b c d e f g", "", -1.0),
    ("repetition_penalty", {}, "one two three four", "", 0.0),
    ("repetition_penalty", {"ngram": 2}, "a a a a a", "", -0.75),  # the example of TRL's own reward
    ("repetition_penalty", {"ngram": 1, "max_penalty": -2.0}, "ha ha", "", -1.0),
    ("repetition_penalty", {}, "", "", 0.0),
    ("similarity", {}, "Paris", "paris", 1.0),
    ("similarity", {}, "kitten", "sitting", 2 * 4 / 13),
    ("similarity", {"method": "token_sort"}, "world hello", "hello world", 1.0),
    ("similarity", {"method": "token_set"}, "hello big world", "hello world", 1.0),
    ("similarity", {"method": "partial"}, "well, Paris it is", "paris", 1.0),
    ("similarity", {"method": "weighted"}, "", "paris", 0.0),
    ("rouge", {}, "the cat sat", "the cat sat", 1.0),
    ("rouge", {}, "police kill the gunman", "police killed the gunman", 0.75),  # Lin (2004), section 3.1
    ("rouge", {}, "the gunman kill police", "police killed the gunman", 0.5),
    ("rouge", {"variant": "1"}, "b a", "a b c d", 2 / 3),
    ("rouge", {"variant": "2", "measure": "recall"}, "a b c", "a b x c", 1 / 3),
    ("rouge", {"measure": "precision"}, "a b", "a b c d", 1.0),
    ("rouge", {}, "", "a", 0.0),
    ("relevance", {}, "red cars are fast", "red cars", 1.0),
    ("relevance", {}, "blue", "red cars", 0.0),
    ("relevance", {}, "red", "red cars", 0.5),
    ("relevance", {}, "anything", "the of", None),
    ("keywords", {"terms": ["red", "c++"]}, "Red, and C++.", "", 1.0),
    ("keywords", {"terms": ["car", "red"]}, "red cars", "", 0.5),
    ("keywords", {"terms": []}, "red cars", "", None),
    ("citations", {}, "So it is [1].", "", 1.0),
    ("citations", {"minimum": 4}, "So [1, 2].", "", 0.5),
    ("citations", {}, "So it is.", "", 0.0),
    ("quotes", {"minimum_words": 2}, 'As asked: "how many cars", yes', "", 1.0),
    ("quotes", {"minimum_words": 2}, '"how many cars" and “never said so”', "", 0.5),
    ("quotes", {}, "nothing", "", 0.0),
    ("json_valid", {}, '```json\n{"a": 1}\n```', "", 1.0),
    ("json_valid", {}, "null", "", 1.0),
    ("json_valid", {}, '{"a": NaN}', "", 0.0),
    ("json_valid", {}, "[" * 100_000, "", 0.0),
    ("json_valid", {}, '{"a": 1} and more', "", 0.0),
    ("json_valid", {"kind": "object"}, "[1]", "", 0.0),
    ("json_schema", {"schema": PERSON}, '{"name": "Ada", "age": 36}', "", 1.0),
    ("json_schema", {"schema": PERSON}, '{"name": "Ada"}', "", 0.0),
    ("json_schema", {"schema": PERSON, "partial": True}, '{"name": "Ada"}', "", 0.5),
    ("json_schema", {"schema": PERSON, "partial": True}, "[]", "", 0.2),
    ("json_schema", {"schema": PERSON, "partial": True}, "Ada", "", 0.0),
    ("json_schema", {}, '{"name": "Ada", "age": 36}', json.dumps(PERSON), 1.0),
    ("tool_call", {}, json.dumps(CALL), json.dumps(CALL), 1.0),
    ("tool_call", {}, f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>", json.dumps([CALL]), 1.0),
    ("tool_call", {}, json.dumps(CALL | {"arguments": {"city": "Rome"}}), json.dumps(CALL), 0.75),
    ("tool_call", {"partial": False}, json.dumps(CALL | {"arguments": {"city": "Rome"}}), json.dumps(CALL), 0.0),
    ("tool_call", {}, json.dumps([CALL, CALL]), json.dumps(CALL), 0.5),
    ("tool_call", {}, json.dumps({"function": {"name": "weather", "arguments": "{}"}}), json.dumps(CALL), 0.5),
    ("tool_call", {}, json.dumps({"name": "news", "arguments": {}}), json.dumps(CALL), 0.0),
    ("tool_call", {}, "I would look out of the window", json.dumps(CALL), 0.0),
    ("openai_grader", grader(operation="eq"), "yes", "yes", 1.0),
    ("openai_grader", grader(operation="ne"), "yes", "yes", 0.0),
    ("openai_grader", grader(operation="like"), "oh Yes", "yes", 0.0),
    ("openai_grader", grader(operation="ilike"), "oh Yes", "yes", 1.0),
    ("openai_grader", grader(operation="eq", input="{{sample.output_json.a.b}}"), '{"a": {"b": 3}}', "3", 1.0),
    ("openai_grader", grader(evaluation_metric="fuzzy_match"), "paris", "paris", 1.0),
    ("openai_grader", grader(evaluation_metric="rouge_2"), "a b c", "a b d", 0.5),
    ("openai_grader", grader(evaluation_metric="rouge_l"), "a b c", "a b c", 1.0),
    ("openai_grader", grader(evaluation_metric="gleu"), "a b", "a b c d", 3 / 10),
    (
        "openai_grader",
        {
            "grader": {
                "type": "multi",
                "graders": {"a": CHECK | {"operation": "eq"}, "b": SIMILAR | {"evaluation_metric": "rouge_1"}},
                "calculate_output": "min(1, 0.5 * a + b ^ 2) / 2",
            }
        },
        "x",
        "x",
        0.5,
    ),
]
# They run programs or call others, and have tests of their own.
ELSEWHERE = {"code_tests", "http", "judge", "python", "lambda"}


@pytest.mark.parametrize(("kind", "parameters", "completion", "answer", "expected"), CASES)
def test_scores(kind, parameters, completion, answer, expected):
    (reward,) = build_rewards([RewardSpec(type=kind, **parameters)])
    prompt = "Tell me: how many cars are there?" if kind == "quotes" else ""
    assert reward([prompt], [completion], answer=[answer]) == [pytest.approx(expected) if expected is not None else None]


def test_every_reward_is_documented():
    documentation = (Path(__file__).parents[2] / "docs/rewards.md").read_text()
    assert [name for name in REWARDS if f"| `{name}` |" not in documentation] == []


def test_every_reward_has_a_case():
    assert {case[0] for case in CASES} == set(REWARDS) - ELSEWHERE


TEXT_REWARDS = [RewardSpec(type=case[0], **case[1]) for case in {case[0]: case for case in reversed(CASES)}.values()]


@given(st.text(), st.text())
def test_whatever_a_model_writes_scores_between_the_bounds(completion, answer):
    # What the dataset must hold (a schema, a tool call) is not the model's, and mathematics is slow.
    specs = [spec for spec in TEXT_REWARDS if spec.type not in {"tool_call", "math"}]
    for value in score(build_rewards(specs), [answer], [completion], {"answer": [answer]})[0]["rewards"].values():
        assert value is None or -1.0 <= value <= 1.0


@given(st.text(min_size=1).filter(lambda text: text.strip() and "<" not in text))
def test_the_gold_answer_gets_full_marks(answer):
    rewards = build_rewards([RewardSpec(type=kind) for kind in ("exact_match", "contains", "numeric", "relevance")])
    (scored,) = score(rewards, [answer], [f"<answer>{answer}</answer>"], {"answer": [answer]})
    assert all(value is None or value == pytest.approx(1.0) for value in scored["rewards"].values())


def test_rewards_that_read_columns():
    columns = {
        "answer": ["", ""],
        "terms": [["red"], ["blue"]],
        "sources": [["a", "b"], ["a"]],
        "text": ["", "we are all one"],
    }
    scored = score(
        build_rewards(
            [
                RewardSpec(type="keywords", column="terms"),
                RewardSpec(type="citations", column="sources"),
                RewardSpec(type="quotes", column="text"),
            ]
        ),
        ["", ""],
        ["red [2]", 'it says "we are all one" [1][9]'],
        columns,
    )
    assert [each["rewards"] for each in scored] == [
        {"keywords": 1.0, "citations": 1.0, "quotes": 0.0},
        {"keywords": 0.0, "citations": 0.5, "quotes": 1.0},
    ]
    (reward,) = build_rewards([RewardSpec(type="keywords", column="missing")])
    with pytest.raises(RewardError, match=r"'r7' asking 'Why'.* no column 'missing' .columns: id, terms"):
        reward(["Why"], ["x"], answer=[""], id=["r7"], terms=[[]])


def test_tool_calls_of_messages_count():
    (reward,) = build_rewards([RewardSpec(type="tool_call")])
    turn = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]}
    assert reward([""], [[turn]], answer=[json.dumps(CALL)]) == [1.0]


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


def test_a_dataset_may_have_columns_of_any_name():
    columns = {
        "answer": ["4"],
        "prompts": ["p"],
        "completions": ["c"],
        "self": ["s"],
        "completion_ids": [[1]],
        "sample": [1],
    }
    assert score(build_rewards([RewardSpec(type="exact_match")]), ["q"], ["4"], columns)[0]["score"] == 1.0


def test_clip_bounds_a_score_and_leaves_abstentions():
    (reward,) = build_rewards([RewardSpec(type="numeric", clip=(0.2, 0.8))])
    assert reward(["", "", ""], ["4", "5", "4"], answer=["4", "4", "four"]) == [0.8, 0.2, None]


def test_only_if_pays_where_the_other_reward_was_reached():
    rewards = build_rewards(
        [
            RewardSpec(type="xml_format", mode="partial", weight=0.0, name="format"),
            RewardSpec(type="exact_match", only_if="format"),
            RewardSpec(type="contains", only_if={"reward": "format", "at_least": 0.75}),
            RewardSpec(type="numeric", name="chained", only_if="contains"),
        ]
    )
    completions = [XML, "<reasoning>a</reasoning><answer>4", "4"]
    scored = score(rewards, [""] * 3, completions, {"answer": ["4"] * 3})
    assert [list(each["rewards"].values()) for each in scored] == [
        [1.0, 1.0, 1.0, 1.0],
        [0.75, 0.0, 1.0, 1.0],
        [0.0, 0.0, 0.0, 0.0],
    ]
    assert [each["score"] for each in scored] == [3.0, 2.0, 0.0]


def test_where_the_gate_abstains_so_does_what_it_gates():
    rewards = build_rewards([RewardSpec(type="numeric"), RewardSpec(type="contains", only_if="numeric")])
    assert score(rewards, [""], ["four"], {"answer": ["four"]})[0]["rewards"] == {"numeric": None, "contains": None}


def test_a_gate_is_asked_once_per_batch_and_the_gated_only_where_it_opens(monkeypatch):
    asked = []

    def slow(samples, permissions):
        asked.append(len(samples))
        return [float(sample.completion == "a") for sample in samples]

    specs = [
        RewardSpec(type="judge", model="m", name="gate"),
        RewardSpec(type="judge", model="m", name="gated", only_if="gate"),
    ]
    rewards = build_rewards(specs, RewardPermissions(judge_model="m"))
    for reward in rewards:
        monkeypatch.setattr(reward, "_function", slow)
        monkeypatch.setattr(reward, "parameters", {})
    for _ in range(2):
        score(rewards, [""] * 3, ["a", "b", "c"], {"answer": [""] * 3})
    assert asked == [3, 1, 3, 1]


def test_equal_answers_are_scored_once_and_different_rows_apart(monkeypatch):
    (reward,) = build_rewards([RewardSpec(type="contains")])
    scored = []

    def counted(sample: Sample, **_: object) -> float:
        scored.append((sample.completion, sample.columns["level"]))
        return float(len(scored))

    monkeypatch.setattr(reward, "_function", counted)
    level = [{"n": 1}, {"n": 1}, {"n": 2}, {"n": 1}]
    assert reward(["q"] * 4, ["a", "a", "a", "b"], answer=["x"] * 4, level=level) == [1.0, 1.0, 2.0, 3.0]
    assert scored == [("a", {"n": 1}), ("a", {"n": 2}), ("b", {"n": 1})]


NOT_SCORES = [math.nan, math.inf, -math.inf, "1", [1.0], 1j]


@pytest.mark.parametrize("value", NOT_SCORES)
def test_a_score_that_is_no_number_fails_and_names_the_row(monkeypatch, value):
    (reward,) = build_rewards([RewardSpec(type="contains")])
    monkeypatch.setattr(reward, "_function", lambda sample, **_: value)
    with pytest.raises(RewardError, match=r"'contains' returned .* for the row 'r1' asking 'How many'"):
        reward([[{"role": "user", "content": "How many"}]], ["x"], answer=["y"], id=["r1"])


def test_what_a_reward_raises_names_the_row_and_keeps_its_traceback(monkeypatch):
    (reward,) = build_rewards([RewardSpec(type="contains")])

    def broken(sample: Sample, **_: object) -> float:
        return 1 / len(sample.completion)

    monkeypatch.setattr(reward, "_function", broken)
    with pytest.raises(RewardError, match="failed on the row asking 'b': ZeroDivisionError: ") as caught:
        reward(["a", "b"], ["x", ""], answer=["y", "y"])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("scores", [[], [1.0], [1.0] * 3, 1.0, None])
def test_a_batch_with_the_wrong_count_of_scores_fails(monkeypatch, scores):
    (reward,) = build_rewards([RewardSpec(type="http", url="https://x")], RewardPermissions(hosts=("x",)))
    monkeypatch.setattr(reward, "_function", lambda samples, permissions, **_: scores)
    with pytest.raises(RewardError, match=r"'http' returned .* for 2 completions, the first of the row asking 'a'"):
        reward(["a", "b"], ["x", "y"], answer=["", ""])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"type": "exact"}, "did you mean 'exact_match'"),
        ({"type": "numeric", "tolerence": 1}, "did you mean 'tolerance'"),
        ({"type": "numeric", "tolerance": -1}, "greater than or equal to 0"),
        ({"type": "regex"}, "pattern\n.*required"),
        ({"type": "regex", "pattern": "("}, "regular expression"),
        ({"type": "length", "unit": "pages"}, "'words' or 'characters'"),
        ({"type": "contains", "weight": math.inf}, "finite"),
        ({"type": "contains", "name": "a b"}, "pattern"),
        ({"type": "contains", "clip": [1, 0]}, "lower bound 1 must be below"),
        ({"type": "contains", "clip": [0]}, "clip"),
        ({"type": "json_schema", "schema": {"type": "objekt"}}, "not a valid JSON Schema: 'objekt'"),
        ({"type": "http", "url": "http://169.254.169.254/latest"}, "must be https"),
        ({"type": "http", "url": "file:///etc/passwd"}, "must be https"),
        ({"type": "python", "file": "../x.py"}, "pattern"),
        ({"type": "judge", "model": "m", "scale": [10, 0]}, "must go up"),
        ({"type": "lambda", "function_arn": "not an arn"}, "pattern"),
        ({"type": "openai_grader", "grader": {"type": "score_model"}}, "'score_model' cannot be imported"),
        ({"type": "openai_grader", **grader(operation="like2")}, "did you mean 'like'"),
        ({"type": "openai_grader", **grader(evaluation_metric="meteor")}, "no evaluation_metric 'meteor' here"),
        ({"type": "openai_grader", **grader(operation="eq", input="{{env.X}}")}, "neither of item nor of sample"),
        (
            {
                "type": "openai_grader",
                "grader": {"type": "multi", "graders": {"a": CHECK | {"operation": "eq"}}, "calculate_output": "b"},
            },
            "names 'b'",
        ),
        (
            {
                "type": "openai_grader",
                "grader": {
                    "type": "multi",
                    "graders": {"a": CHECK | {"operation": "eq"}},
                    "calculate_output": "a.__class__",
                },
            },
            "which no grader formula may have",
        ),
    ],
)
def test_wrong_specs_are_refused(given, message):
    with pytest.raises(ValidationError, match=message):
        RewardSpec(**given)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([{"type": "contains"}, {"type": "contains"}], "two rewards are called 'contains'"),
        ([{"type": "contains", "only_if": "contains"}], "no reward listed above it: there is none"),
        ([{"type": "contains"}, {"type": "regex", "pattern": "a", "only_if": "contain"}], "did you mean 'contains'"),
    ],
)
def test_names_that_do_not_fit_are_refused(specs, message):
    with pytest.raises(ValueError, match=message):
        build_rewards([RewardSpec(**spec) for spec in specs])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "code_tests"}, "programs that a model wrote, which is not allowed"),
        ({"type": "python", "file": "a.py"}, "a Python file, which is not allowed"),
        ({"type": "lambda", "function_arn": "f"}, "a function that is not among those allowed .*RewardFunctionArns"),
        ({"type": "judge", "model": "m"}, "a model that is not the one allowed .*RewardJudgeModel"),
        ({"type": "http", "url": "https://x/y"}, "a host that is not among those allowed .*RewardHttpHosts"),
    ],
)
def test_what_a_deployment_does_not_allow_is_not_built(spec, message):
    with pytest.raises(RewardError, match=f"reward 'mine' .*{message}"):
        Reward(RewardSpec(name="mine", **spec))


ARN = "arn:aws:lambda:eu-central-1:123456789012:function:score"
ENVIRONMENT = {
    "REWARD_FUNCTION_ARNS": f"{ARN},{ARN}:live",
    "REWARD_JUDGE_MODEL": "amazon.nova-lite-v1:0",
    "REWARD_HTTP_HOSTS": "rewards.example.com,127.0.0.1:8080",
    "ALLOW_CODE_REWARDS": "true",
    "ALLOW_PYTHON_REWARDS": "true",
}
ALLOWED = [
    # a reward, and one of its type that is as far from what the environment allows as can be
    ({"type": "lambda", "function_arn": ARN}, {"type": "lambda", "function_arn": f"{ARN}2"}),
    ({"type": "lambda", "function_arn": "score"}, {"type": "lambda", "function_arn": "scor"}),
    ({"type": "lambda", "function_arn": f"{ARN}:live"}, {"type": "lambda", "function_arn": f"{ARN}:old"}),
    ({"type": "judge", "model": "amazon.nova-lite-v1:0"}, {"type": "judge", "model": "amazon.nova-pro-v1:0"}),
    ({"type": "http", "url": "https://rewards.example.com/a"}, {"type": "http", "url": "https://example.com/a"}),
    ({"type": "http", "url": "http://127.0.0.1:8080/"}, {"type": "http", "url": "http://127.0.0.1:9001/"}),
    (
        {"type": "http", "url": "https://rewards.example.com:8443"},
        {"type": "http", "url": "https://rewards.example.com@x.org"},
    ),
]


@pytest.mark.parametrize(("allowed", "refused"), ALLOWED)
def test_the_jobs_environment_allows_what_it_names_and_nothing_else(allowed, refused):
    permissions = reward_permissions(ENVIRONMENT)
    Reward(RewardSpec(**allowed), permissions)
    with pytest.raises(RewardError, match="not"):
        Reward(RewardSpec(**refused), permissions)
    with pytest.raises(RewardError, match="not"):
        Reward(RewardSpec(**allowed), reward_permissions({}))


@pytest.mark.parametrize("value", ["false", "", "1"])
def test_programs_and_files_are_allowed_by_the_word_true(value, tmp_path):
    specs = [RewardSpec(type="code_tests"), RewardSpec(type="python", file="a.py")]
    build_rewards(specs, reward_permissions(ENVIRONMENT, python_folder=tmp_path))
    forbidden = reward_permissions(
        ENVIRONMENT | {"ALLOW_CODE_REWARDS": value, "ALLOW_PYTHON_REWARDS": value}, python_folder=tmp_path
    )
    for spec in specs:
        with pytest.raises(RewardError, match="which is not allowed here"):
            Reward(spec, forbidden)


def test_the_library_loads_without_the_packages_its_rewards_use():
    """Lambdas and the config's readers have none of them."""
    heavy = ["math_verify", "rapidfuzz", "jsonschema", "boto3", "botocore", "sympy"]
    program = (
        f"import sys\nfor name in {heavy}: sys.modules[name] = None\n"
        "from tunedrop.config.parse import parse_run_config\n"
        "import tunedrop.rewards.serve\n"
        "parse_run_config({'model': 'm', 'rewards': [{'type': 'math'}, {'type': 'json_schema', 'schema': {}}]})"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
