import io
import json
import math
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import reward_cases
from answering_server import ranking
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from reward_cases import CALL, CHECK, XML, grader

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
from tunedrop.rewards.sample import Sample, final_answer

CASES_BY_ID = {
    f"{kind}-{index}": (kind, *case) for kind, cases in reward_cases.CASES.items() for index, case in enumerate(cases)
}
MODEL = {"type": "score_model", "input": [{"role": "user", "content": "{{sample.output_text}}"}]}
OWN = """
def reward(completions, answer, **_):
    return [float(turns[-1]["content"] == right) for turns, right in zip(completions, answer)]

def half(completions, **_):
    return [0.5 for _ in completions]
"""


class Service:
    """A Lambda function, an HTTP endpoint and a model that give 1 to a completion that equals the answer, else 0."""

    def invoke(self, FunctionName, Payload):  # noqa: N803 - boto3's parameters
        return {"Payload": self.open(SimpleNamespace(data=Payload))}

    def open(self, request, timeout=None):
        payload = json.loads(request.data)
        samples = json.loads(payload["body"])["batch"] if isinstance(payload, dict) else payload
        scores = [float(sample["messages"][-1]["content"] == sample["reference_answer"]) for sample in samples]
        results = [
            {"id": sample["id"], "aggregate_reward_score": score} for sample, score in zip(samples, scores, strict=True)
        ]
        return io.BytesIO(json.dumps(results).encode())

    def converse(self, messages, **_):
        text = messages[0]["content"][0]["text"]
        right = "\nParis\n</answer " in text
        ranked = json.dumps({"ranking": ranking(text, lambda answer: answer == "Paris")})
        return {"output": {"message": {"content": [{"text": f"<score>{10 * right}</score> {ranked}"}]}}}


@pytest.fixture
def everything_allowed(tmp_path, monkeypatch):
    """Permissions for every reward; no reward reaches the network."""
    service = Service()
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", lambda _, *request, **given: service.open(*request, **given))
    (tmp_path / "own.py").write_text(OWN)
    return RewardPermissions(
        lambda _: service, ("score",), "grader", ("rewards.example.com",), allow_code=True, python_folder=tmp_path
    )


@pytest.mark.parametrize(("kind", "parameters", "completion", "answer", "expected"), CASES_BY_ID.values(), ids=CASES_BY_ID)
def test_scores(kind, parameters, completion, answer, expected, everything_allowed):
    (reward,) = build_rewards([RewardSpec(type=kind, **parameters)], everything_allowed)
    prompt = "Tell me: how many cars are there?" if kind == "quotes" else ""
    assert reward([prompt], [completion], answer=[answer]) == [pytest.approx(expected) if expected is not None else None]


def test_every_reward_has_cases_and_is_documented():
    documentation = (Path(__file__).parents[2] / "docs/rewards.md").read_text()
    assert set(reward_cases.CASES) == set(REWARDS)
    for name, reward in REWARDS.items():
        measures = reward.measures if isinstance(reward.measures, str) else "answer"
        assert f"| `{name}` | {measures} |" in documentation


PURE = [name for name, reward in REWARDS.items() if not reward.per_batch]  # rewards that compute from the sample alone
TEXT_REWARDS = [RewardSpec(type=name, **reward_cases.CASES[name][0][0]) for name in PURE]


@given(st.text(), st.text())
def test_any_completion_scores_from_minus_1_to_1_or_abstains(completion, answer):
    # What the dataset must hold (a schema, a tool call) is not the model's, and mathematics is slow.
    specs = [spec for spec in TEXT_REWARDS if spec.type not in {"tool_call", "math"}]
    for value in score(build_rewards(specs), [answer], [completion], {"answer": [answer]})[0]["rewards"].values():
        assert value is None or -1.0 <= value <= 1.0


@given(st.text(min_size=1).filter(lambda text: text.strip() and "<" not in text))
def test_the_rows_answer_scores_1(answer):
    rewards = build_rewards([RewardSpec(type=kind) for kind in ("exact_match", "contains", "numeric", "relevance")])
    (scored,) = score(rewards, [answer], [f"<answer>{answer}</answer>"], {"answer": [answer]})
    assert all(value is None or value == pytest.approx(1.0) for value in scored["rewards"].values())


def test_rewards_that_read_columns():
    columns: dict[str, list[Any]] = {
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


def test_tool_calls_in_messages_are_scored():
    (reward,) = build_rewards([RewardSpec(type="tool_call")])
    turn = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]}
    assert reward([""], [[turn]], answer=[json.dumps(CALL)]) == [1.0]


def test_relevance_weights_question_and_reference():
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


def test_a_dataset_may_have_any_column_name():
    columns: dict[str, list[Any]] = {
        "answer": ["4"],
        "prompts": ["p"],
        "completions": ["c"],
        "self": ["s"],
        "completion_ids": [[1]],
        "sample": [1],
    }
    assert score(build_rewards([RewardSpec(type="exact_match")]), ["q"], ["4"], columns)[0]["score"] == 1.0


def test_clip_bounds_scores_and_keeps_abstentions():
    (reward,) = build_rewards([RewardSpec(type="numeric", clip=(0.2, 0.8))])
    assert reward(["", "", ""], ["4", "5", "4"], answer=["4", "4", "four"]) == [0.8, 0.2, None]


def test_only_if_pays_where_the_gate_reaches_its_threshold():
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


def test_a_reward_abstains_where_its_gate_abstains():
    rewards = build_rewards([RewardSpec(type="numeric"), RewardSpec(type="contains", only_if="numeric")])
    assert score(rewards, [""], ["four"], {"answer": ["four"]})[0]["rewards"] == {"numeric": None, "contains": None}


def test_a_gate_runs_once_per_batch_and_its_reward_only_on_passing_completions(monkeypatch):
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


def test_equal_completions_of_one_row_are_scored_once(monkeypatch):
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
def test_a_score_that_is_not_a_finite_number_fails_with_the_row(monkeypatch, value):
    (reward,) = build_rewards([RewardSpec(type="contains")])
    monkeypatch.setattr(reward, "_function", lambda sample, **_: value)
    with pytest.raises(RewardError, match=r"'contains' returned .* for the row 'r1' asking 'How many'"):
        reward([[{"role": "user", "content": "How many"}]], ["x"], answer=["y"], id=["r1"])


def test_an_exception_in_a_reward_names_the_row_and_keeps_its_traceback(monkeypatch):
    (reward,) = build_rewards([RewardSpec(type="contains")])

    def broken(sample: Sample, **_: object) -> float:
        return 1 / len(sample.completion)

    monkeypatch.setattr(reward, "_function", broken)
    with pytest.raises(RewardError, match="failed on the row asking 'b': ZeroDivisionError: ") as caught:
        reward(["a", "b"], ["x", ""], answer=["y", "y"])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("scores", [[], [1.0], [1.0] * 3, 1.0, None])
def test_a_wrong_number_of_scores_fails(monkeypatch, scores):
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
        ({"type": "judge", "model": "m", "scale": [10, 0]}, "must rise, but goes from 10 to 0"),
        ({"type": "lambda", "function_arn": "not an arn"}, "pattern"),
        ({"type": "openai_grader", "grader": {"type": "python"}}, "'python' cannot be imported: use string_check"),
        ({"type": "openai_grader", "grader": {"type": "score_model"}}, "score_model needs 'input'"),
        ({"type": "openai_grader", "grader": MODEL | {"range": [1, 0]}}, "two rising numbers"),
        ({"type": "openai_grader", "grader": MODEL | {"type": "label_model", "labels": ["a"]}}, "needs 'labels'"),
        ({"type": "openai_grader", **grader(operation="eq", input="{{sample.text}}")}, "one of output_text, output_json"),
        ({"type": "openai_grader", **grader(operation="like2")}, "did you mean 'like'"),
        ({"type": "openai_grader", **grader(evaluation_metric="meteor")}, "no evaluation_metric 'meteor': valid keys"),
        ({"type": "openai_grader", **grader(operation="eq", input="{{env.X}}")}, "must begin with item or sample"),
        (
            {
                "type": "openai_grader",
                "grader": {"type": "multi", "graders": {"a": CHECK | {"operation": "eq"}}, "calculate_output": "b"},
            },
            "unknown name 'b'",
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
            "which is not allowed in a formula",
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
        ([{"type": "contains", "only_if": "contains"}], "no reward listed above it has that name: it is the first reward"),
        ([{"type": "contains"}, {"type": "regex", "pattern": "a", "only_if": "contain"}], "did you mean 'contains'"),
    ],
)
def test_wrong_names_of_rewards_are_refused(specs, message):
    with pytest.raises(ValueError, match=message):
        build_rewards([RewardSpec(**spec) for spec in specs])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "code_tests"}, "programs that a model wrote, which is not allowed"),
        ({"type": "python", "file": "a.py"}, "a Python file, which is not allowed"),
        ({"type": "lambda", "function_arn": "f"}, "a function that is not in the allowed list .*RewardFunctionArns"),
        ({"type": "judge", "model": "m"}, "asks a model that is not the allowed model.*RewardJudgeModel"),
        ({"type": "http", "url": "https://x/y"}, "a host that is not in the allowed list .*RewardHttpHosts"),
    ],
)
def test_a_reward_without_permission_is_not_built(spec, message):
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
def test_the_jobs_environment_allows_only_the_named_resources(allowed, refused):
    permissions = reward_permissions(ENVIRONMENT)
    Reward(RewardSpec(**allowed), permissions)
    with pytest.raises(RewardError, match="not"):
        Reward(RewardSpec(**refused), permissions)
    with pytest.raises(RewardError, match="not"):
        Reward(RewardSpec(**allowed), reward_permissions({}))


@pytest.mark.parametrize("value", ["false", "", "1"])
def test_only_the_value_true_allows_programs_and_files(value, tmp_path):
    specs = [RewardSpec(type="code_tests"), RewardSpec(type="python", file="a.py")]
    build_rewards(specs, reward_permissions(ENVIRONMENT, python_folder=tmp_path))
    forbidden = reward_permissions(
        ENVIRONMENT | {"ALLOW_CODE_REWARDS": value, "ALLOW_PYTHON_REWARDS": value}, python_folder=tmp_path
    )
    for spec in specs:
        with pytest.raises(RewardError, match="which is not allowed here"):
            Reward(spec, forbidden)


def test_the_package_imports_without_the_libraries_of_its_rewards():
    """Lambda functions and readers of configs lack these libraries."""
    heavy = ["math_verify", "rapidfuzz", "jsonschema", "boto3", "botocore", "sympy"]
    program = (
        f"import sys\nfor name in {heavy}: sys.modules[name] = None\n"
        "from tunedrop.config.parse import parse_run_config\n"
        "import tunedrop.rewards.serve\n"
        "parse_run_config({'model': 'm', 'rewards': [{'type': 'math'}, {'type': 'json_schema', 'schema': {}}]})"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
