"""Adapters of rewards: the reward Lambda, verl, and the rewards `lambda`, `http`, `judge`, `python` and `openai_grader`.

Clients are real ones (botocore, the SageMaker SDK's verifier) that talk to a server in this process.
"""

import json
import time
from types import SimpleNamespace

import pytest
from answering_server import converse_reply

from tunedrop.rewards import Reward, RewardError, RewardPermissions, RewardSpec, build_rewards, endpoint, score
from tunedrop.rewards.serve import LambdaReward, from_openai_grader, lambda_handler_for, verl_compute_score

ARN = "arn:aws:lambda:us-east-1:123456789012:function:MySageMakerReward"


@pytest.fixture(params=["lambda", "http"])
def client(request, clients, server) -> Reward:
    """The two clients of the contract. Both send and refuse the same messages."""
    if request.param == "lambda":
        return LambdaReward(ARN, clients("lambda"))
    return http(server, timeout=0.3)


def http(server, **given):
    return Reward(RewardSpec(type="http", url=server.url, **given), RewardPermissions(hosts=("127.0.0.1",)))


def ask(reward, count=2, **columns):
    prompts = [[{"role": "user", "content": f"q{i}"}] for i in range(count)]
    completions = [[{"role": "assistant", "content": f"a{i}"}] for i in range(count)]
    return reward(prompts, completions, answer=columns.pop("answer", ["x"] * count), **columns)


def result(sample, score=None, **extra):
    return {
        "id": sample["id"],
        "aggregate_reward_score": float(sample["messages"][-1]["content"][1:]) if score is None else score,
    } | extra


def envelope(results, **given):
    return {"statusCode": 200, "headers": {}, "body": json.dumps(results)} | given


ACCEPTED = {
    "bare list": lambda samples: [result(sample) for sample in samples],
    "reordered": lambda samples: [result(sample) for sample in samples[::-1]],
    "envelope": lambda samples: envelope([result(sample) for sample in samples]),
    "envelope, parsed body": lambda samples: envelope([], body=[result(sample) for sample in samples]),
    "body alone": lambda samples: {"body": json.dumps([result(sample) for sample in samples])},
    "extra keys": lambda samples: envelope(
        [result(sample, why="so", metrics_list=[]) for sample in samples], isBase64Encoded=False
    ),
    "integers": lambda samples: [result(sample, int(sample["messages"][-1]["content"][1:])) for sample in samples],
}


@pytest.mark.parametrize("make", ACCEPTED.values(), ids=ACCEPTED)
def test_results_are_matched_by_id(client, server, make):
    server.results(make)
    assert ask(client, 3, id=["r", "s", "t"]) == [0.0, 1.0, 2.0]
    assert [sample["id"] for sample in server.asked[0]] == ["r", "s", "t"]


def test_null_abstains(client, server):
    server.results(lambda samples: [{"id": samples[0]["id"], "aggregate_reward_score": None}, result(samples[1])])
    assert ask(client) == [None, 1.0]


def test_numeric_ids_are_accepted(client, server):
    server.results(lambda samples: [result(sample) | {"id": int(sample["id"])} for sample in samples])
    assert ask(client, id=[7, 8]) == [0.0, 1.0]


REFUSED = {
    # what it answers, what the error says
    "wrong id": (
        lambda samples: [result(samples[0]), result(samples[1]) | {"id": "z"}],
        "unknown ids: .*'z'.*missing ids: .*'1'",
    ),
    "missing": (lambda samples: [result(samples[0])], "1 results for 2 samples, missing ids"),
    "none": (lambda samples: [], "0 results for 2 samples"),
    "one too many": (
        lambda samples: [*map(result, samples), {"id": "z", "aggregate_reward_score": 1}],
        "unknown ids: .*'z'",
    ),
    "twice": (lambda samples: [result(samples[0])] * 2, "two results for the id '0'"),
    "NaN": (lambda samples: [result(sample, float("nan")) for sample in samples], "the score of '0' is nan"),
    "infinite": (lambda samples: [result(sample, float("-inf")) for sample in samples], "is -inf, not a finite"),
    "text": (lambda samples: [result(sample, "1.0") for sample in samples], "is '1.0', not a finite number"),
    "true": (lambda samples: [result(sample, True) for sample in samples], "is True, not a finite number"),
    "a list": (lambda samples: [result(sample, [1.0]) for sample in samples], r"is \[1.0\], not a finite number"),
    "no id but null": (lambda samples: [result(sample) | {"id": None} for sample in samples[:1]], "unknown ids: .*'None'"),
    "no score": (lambda samples: [{"id": sample["id"]} for sample in samples], "expected a result"),
    "no id": (lambda samples: [{"aggregate_reward_score": 1} for _ in samples], "expected a result"),
    "numbers only": (lambda samples: [1.0, 2.0], "expected a result .* got 1.0"),
    "an object": (lambda samples: {"scores": [1, 2]}, "expected a list of results"),
    "null": (lambda samples: None, "expected a list of results"),
    "broken body": (lambda samples: envelope([], body="[oops"), "body is not JSON"),
    "error envelope": (lambda samples: envelope([], statusCode=500, body="boom"), "the response has status 500: 'boom'"),
    "error object": (lambda samples: {"errorType": "KeyError", "errorMessage": "x"}, "KeyError: x"),
    "error in an envelope": (lambda samples: envelope([], body='{"error": "x"}'), "expected a list of results"),
    "not JSON": (lambda samples: b"<html>", "the response of .* is not JSON"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_responses_fail_and_name_a_row(client, server, make, message):
    server.results(make)
    with pytest.raises(RewardError, match=message) as caught:
        ask(client)
    assert "'q0'" in str(caught.value)


def test_a_timeout_fails(client, server, monkeypatch):
    monkeypatch.setattr(endpoint, "ATTEMPTS", 1)

    def late(body):
        time.sleep(0.6)
        return 200, {}, []

    server.reply = late
    with pytest.raises(RewardError, match=r"cannot be called: .*tim(ed|e)"):
        ask(client)


def test_a_lambda_that_raises_fails_with_its_message(server, clients):
    server.reply = lambda body: (
        200,
        {"X-Amz-Function-Error": "Unhandled"},
        {"errorMessage": "Task timed out after 3.00 seconds"},
    )
    with pytest.raises(RewardError, match=f"the Lambda {ARN} failed: Task timed out"):
        ask(LambdaReward(ARN, clients("lambda")))


def test_a_lambda_without_permission_fails(server, clients):
    server.reply = lambda body: (403, {"X-Amzn-Errortype": "AccessDeniedException"}, {"Message": "no"})
    with pytest.raises(RewardError, match=r"cannot be called: .*AccessDenied"):
        ask(LambdaReward(ARN, clients("lambda")))


@pytest.mark.parametrize(("status", "attempts"), [(503, 3), (429, 3), (400, 1), (302, 1)])
def test_only_temporary_errors_are_retried(server, monkeypatch, status, attempts):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    server.reply = lambda body: (status, {"Location": f"{server.url}/elsewhere"}, {"why": "not now"})
    with pytest.raises(RewardError, match=f"cannot be called: status {status}: .*not now"):
        ask(http(server))
    assert len(server.asked) == attempts


def test_an_endpoint_may_recover(server, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    server.reply = lambda body: (200, {}, list(map(result, body))) if len(server.asked) == 2 else (502, {}, {})
    assert ask(http(server)) == [0.0, 1.0]


def test_the_request_holds_row_and_completion(client, server):
    server.results(lambda samples: [result(sample) for sample in samples])
    ask(
        client,
        answer=["Paris", '{"city": "Rome"}'],
        id=["r", "r"],  # one row, two completions
        extra_info=[{"split": "train"}] * 2,
        completion_ids=[[1], [2]],  # TRL's, not the dataset's
        trainer_state=SimpleNamespace(),
    )
    assert server.asked[0] == [
        {
            "id": "r:0",
            "messages": [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0"}],
            "reference_answer": "Paris",
            "metadata": {"reference_answer": "Paris"},
            "extra_info": {"split": "train"},
        },
        {
            "id": "r:1",
            "messages": [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}],
            "reference_answer": {"city": "Rome"},
            "metadata": {"reference_answer": {"city": "Rome"}},
            "extra_info": {"split": "train"},
        },
    ]


@pytest.mark.parametrize(
    ("shape", "read"),
    [("list", lambda b: b), ("body", lambda b: json.loads(b["body"])), ("batch", lambda b: json.loads(b["body"])["batch"])],
)
def test_every_request_format_is_sent_in_batches(server, clients, shape, read):
    server.results(lambda body: [result(sample) for sample in read(body)])
    reward = LambdaReward(ARN, clients("lambda"), request=shape, batch_size=2, name="mine", weight=0.5)
    assert ask(reward, 5) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert sorted(len(read(body)) for body in server.asked) == [1, 2, 2]
    assert (reward.__name__, reward.weight) == ("mine", 0.5)


# --- served ---

SAMPLE = {
    "id": "s1",
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]},
        {"role": "nova_assistant", "content": [{"type": "text", "text": "4"}]},
    ],
    "reference_answer": "4",
}
WRONG = {
    "id": 2,
    "messages": [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "3"}],
    "metadata": {"reference_answer": 4},
}


def served(contract="auto"):
    rewards = build_rewards([RewardSpec(type="exact_match", weight=2.0), RewardSpec(type="numeric", name="number")])
    return lambda_handler_for(rewards, contract)


EXPECTED = [
    {
        "id": "s1",
        "aggregate_reward_score": 3.0,
        "metrics_list": [
            {"name": "exact_match", "value": 1.0, "type": "Reward"},
            {"name": "number", "value": 1.0, "type": "Reward"},
        ],
    },
    {
        "id": 2,
        "aggregate_reward_score": 0.0,
        "metrics_list": [
            {"name": "exact_match", "value": 0.0, "type": "Reward"},
            {"name": "number", "value": 0.0, "type": "Reward"},
        ],
    },
]
REQUESTS = {
    "list": [SAMPLE, WRONG],
    "batch in a body": {"body": json.dumps({"batch": [SAMPLE, WRONG]})},
    "list in a body": {"body": json.dumps([SAMPLE, WRONG])},
    "parsed body": {"body": [SAMPLE, WRONG]},
    "batch": {"batch": [SAMPLE, WRONG]},
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_every_request_format_gets_its_response_format(request_):
    answers = {contract: served(contract)(request_, None) for contract in ("auto", "nova", "rlvr")}
    assert answers["nova"] == EXPECTED
    assert answers["rlvr"]["statusCode"] == 200
    assert json.loads(answers["rlvr"]["body"]) == EXPECTED
    assert answers["auto"] == answers["rlvr" if isinstance(request_, dict) and "body" in request_ else "nova"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("text", "Expecting value"),
        ({"Records": []}, "expected an object with 'messages'"),
        ([{"id": 1}], "sample 0: expected an object with 'messages'"),
        ([SAMPLE | {"messages": []}], r"sample 0 \(id 's1'\): the last message must have the role assistant"),
        ([SAMPLE | {"messages": SAMPLE["messages"][:2]}], "the last message must have the role assistant"),
        ({"body": 3}, "expected a list of samples, but got int"),
    ],
)
def test_unreadable_requests_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        served()(given, None)


@pytest.mark.parametrize(
    "place", [{"answer": "4"}, {"ground_truth": "4"}, {"reward_model": {"style": "rule", "ground_truth": "4"}}]
)
def test_the_reference_answer_is_found(place):
    (given,) = served()([{key: value for key, value in SAMPLE.items() if key != "reference_answer"} | place], None)
    assert given["aggregate_reward_score"] == 3.0


def test_an_abstention_gives_no_metric_and_extra_info_is_a_column():
    reward = build_rewards([RewardSpec(type="numeric"), RewardSpec(type="keywords", column="terms")])
    sample = SAMPLE | {"reference_answer": "four", "metadata": {"terms": ["4"]}}
    assert lambda_handler_for(reward)([sample], None) == [
        {"id": "s1", "aggregate_reward_score": 1.0, "metrics_list": [{"name": "keywords", "value": 1.0, "type": "Reward"}]}
    ]


def test_a_failing_reward_fails_the_lambda():
    (reward,) = build_rewards([RewardSpec(type="keywords", column="terms")])
    with pytest.raises(RewardError, match="no column 'terms'"):
        lambda_handler_for(reward)([SAMPLE], None)


@pytest.mark.parametrize("contract", ["nova", "rlvr"])
def test_the_lambda_reward_reads_the_responses_of_the_handler(server, clients, contract):
    handler = served(contract)
    server.results(lambda body: handler(body, None))
    assert ask(LambdaReward(ARN, clients("lambda")), answer=["a0", "a9"]) == [3.0, 0.0]


@pytest.mark.parametrize("is_nova", [True, False])
def test_the_sagemaker_sdk_verifies_the_handler(server, monkeypatch, tmp_path, is_nova):
    from sagemaker.train.common_utils.rlvr_reward_verifier import verify_reward_function

    contract = "nova" if is_nova else "rlvr"
    handler = served(contract)
    server.results(lambda body: handler(body, None))
    monkeypatch.setenv("AWS_ENDPOINT_URL_LAMBDA", server.url)
    file = tmp_path / "reward.py"
    file.write_text(
        "from tunedrop.rewards import RewardSpec, build_rewards\n"
        "from tunedrop.rewards.serve import lambda_handler_for\n"
        f"lambda_handler = lambda_handler_for(build_rewards([RewardSpec(type='exact_match')]), {contract!r})\n"
    )
    for function in (ARN, str(file)):
        verified = verify_reward_function(function, [SAMPLE, WRONG], is_nova=is_nova)
        assert (verified["success"], verified["successful_samples"]) == (True, 2)
        assert verified["results"][0]["output"]["aggregate_reward_score"] > 0
    with pytest.raises(ValueError, match="the last message must have the role assistant"):
        verify_reward_function(str(file), [SAMPLE | {"messages": []}], is_nova=is_nova)


def test_verl_calls_a_reward():
    compute_score = verl_compute_score(build_rewards([RewardSpec(type="numeric", weight=2.0), RewardSpec(type="relevance")]))
    assert compute_score(data_source="cars", solution_str="4 cars", ground_truth="4") == pytest.approx(3.0)
    extra = {"index": 3, "question": "How many cars?", "answer": "not this"}
    assert compute_score("cars", "4", 4, extra, sandbox_url=None) == pytest.approx(2.0 + 0.7)
    assert verl_compute_score(build_rewards([RewardSpec(type="numeric")]))("cars", "4", "four") == 0.0


def test_openai_graders_score():
    multi = {
        "type": "multi",
        "graders": {
            "city": {
                "type": "string_check",
                "name": "city",
                "operation": "ilike",
                "input": "{{sample.output_text}}",
                "reference": "{{item.city.name}}",
            },
            "near": {
                "type": "text_similarity",
                "name": "near",
                "evaluation_metric": "fuzzy_match",
                "input": "{{sample.output_text}}",
                "reference": "{{item.reference_answer}}",
                "pass_threshold": 0.8,
            },
        },
        "calculate_output": "0.25 * city + 0.75 * near",
    }
    for given in (multi, json.dumps(multi)):
        assert from_openai_grader(given)([""], ["in Paris"], answer=["in Paris"], city=[{"name": "paris"}]) == [1.0]
    with pytest.raises(RewardError, match=r"the row has no value for \{\{item.city.name\}\}"):
        from_openai_grader(multi)(["q"], ["x"], answer=["x"])


EXTRACT = {
    "type": "multi",
    "graders": {
        "kind": {
            "type": "string_check",
            "operation": "eq",
            "input": "{{sample.output_json.kind}}",
            "reference": "{{item.kinds[0]}}",
        },
        "text": {
            "type": "text_similarity",
            "evaluation_metric": "fuzzy_match",
            "input": "{{ sample.output_json.parts.0 }}",
            "reference": "{{item.text}}",
        },
    },
    "calculate_output": "0.5 * kind + 0.5 * text",
}


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ('{"kind": "a", "parts": ["hello"]}', 1.0),
        ('{"kind": "b", "parts": ["hello"]}', 0.5),
        ('{"kind": "a"}', 0.5),
        ('{"kind": "a", "parts": []}', 0.5),
        ('["a", "hello"]', 0.0),
        ("3", 0.0),
        ("null", 0.0),
        ("The kind is a.", 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_a_completion_lacks_for_a_template_scores_0(completion, score):
    assert from_openai_grader(EXTRACT)([""], [completion], answer=["x"], kinds=[["a"]], text=["hello"]) == [score]


SCORE = {
    "type": "score_model",
    "name": "s",
    "model": "gpt-4o",
    "range": [0, 4],
    "input": [
        {"role": "developer", "content": "Be strict."},
        {"role": "user", "content": "Is {{sample.output_text}} as good as {{item.city}}?"},
    ],
}
LABEL = {
    "type": "label_model",
    "model": "gpt-4o",
    "labels": ["good", "bad"],
    "passing_labels": ["good"],
    "input": [{"role": "user", "content": [{"type": "input_text", "text": "Judge {{sample.output_json.city}}"}]}],
}
CITY = {"type": "string_check", "operation": "eq", "input": "{{sample.output_text}}", "reference": "{{item.city}}"}


def say(server, *texts):
    """Let the server reply with these texts, one after another."""
    left = list(texts)
    server.reply = lambda body: converse_reply(left.pop(0))


def graded(clients, grader, **given):
    spec = RewardSpec(type="openai_grader", grader=grader, **given)
    return build_rewards([spec], RewardPermissions(clients, judge_model="amazon.nova-lite-v1:0"))[0]


def test_a_score_models_prompt_and_range_are_the_graders(server, clients):
    say(server, "Close. <score>3</score>", "no grade", "<score>9</score>", "<score>0</score>")
    reward = graded(clients, SCORE, concurrency=1)
    assert reward(["q"] * 3, ["Rome", "<score>4</score>", "x"], answer=[""] * 3, city=["Paris"] * 3) == [3.0, None, 0.0]
    first, second = server.asked[:2]
    assert first["system"] == [{"text": "Be strict."}]
    text = first["messages"][0]["content"][0]["text"]
    assert text.startswith("Is Rome as good as Paris?")
    assert "from 0 to 4 as <score>" in text
    assert (
        "Is &lt;score>4&lt;/score> as good as Paris?" in second["messages"][0]["content"][0]["text"]
    )  # a completion brings no grade


def test_a_label_model_passes_by_its_labels(server, clients):
    say(server, "<label>Good</label>", "<label>bad</label>")
    reward = graded(clients, LABEL, concurrency=1)
    completions = ['{"city": "Rome"}', '{"city": "x"}', "no JSON"]
    assert reward([""] * 3, completions, answer=[""] * 3) == [1.0, 0.0, 0.0]
    assert len(server.asked) == 2  # no model is asked about an answer that lacks what it should judge


def test_a_multi_grader_may_ask_a_model(server, clients):
    say(server, "<score>4</score>", "-", "-")
    multi = {"type": "multi", "graders": {"s": SCORE, "c": CITY}, "calculate_output": "(s / 4 + c) / 2"}
    reward = graded(clients, multi, concurrency=1)
    assert reward([""] * 2, ["Paris", "x"], answer=[""] * 2, city=["Paris"] * 2) == [1.0, None]
    say(server, "-", "-")
    with pytest.raises(RewardError, match="none of 1 replies of the judge"):
        reward([""], ["y"], answer=[""], city=["Paris"])


def test_a_grader_that_asks_a_model_has_a_judges_traits():
    for grader, asks in ((SCORE, True), (LABEL, True), (CITY, False), (EXTRACT, False)):
        kind = RewardSpec(type="openai_grader", grader=grader).reward_type
        assert (kind.waits, kind.per_batch, not kind.repeatable, kind.needs is not None) == (asks,) * 4
    with pytest.raises(RewardError, match=r"no model is allowed here \(stack parameter RewardJudgeModel\)"):
        build_rewards([RewardSpec(type="openai_grader", grader=SCORE)])


# --- files ---


def test_a_python_file_is_called_as_trl_calls_rewards(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import math\n"
        "def reward(prompts, completions, answer, level, **columns):\n"
        "    return [math.floor(n) * 0 + len(p[0]['content']) + n if c[0]['content'] == a else None\n"
        "            for p, c, a, n in zip(prompts, completions, answer, level)]\n"
        "def short(prompts, **columns):\n    return [1.0]\n"
    )
    allowed = RewardPermissions(python_folder=tmp_path)
    (reward,) = build_rewards([RewardSpec(type="python", file="mine.py")], allowed)
    assert ask(reward, answer=["a0", "x"], level=[1, 2]) == [3.0, None]
    assert score([reward], ["q"], ["a"], {"answer": ["a"], "level": [0.5]})[0]["score"] == 1.5
    with pytest.raises(RewardError, match="failed on the row asking 'q1': TypeError"):  # not only "one of these two"
        ask(reward, answer=["a0", "a1"], level=[1, None])
    for given, message in [
        ({"file": "mine.py", "function": "short"}, "returned 1 scores for 2"),
        ({"file": "mine.py", "function": "none"}, "no function 'none'"),
        ({"file": "other.py"}, "no file 'other.py'"),
    ]:
        with pytest.raises(RewardError, match=message):
            ask(build_rewards([RewardSpec(type="python", **given)], allowed)[0], level=[1, 2])
