"""What a stack lets rewards do and what it pays, from its launch plan to the receipt and into the jobs."""

import json

import boto3
import pytest
from answering_server import answering_server
from fake_stack import ARTIFACTS, PLAN

from pipeline.runs.states import RunState
from tunedrop.config.model import RunConfig
from tunedrop.rewards import RewardError, build_rewards, reward_permissions

ALLOWED = {
    "REWARD_FUNCTION_ARNS": "arn:aws:lambda:us-east-1:123456789012:function:score",
    "REWARD_JUDGE_MODEL": "amazon.nova-lite-v1:0",
    "REWARD_HTTP_HOSTS": "rewards.example.com",
    "ALLOW_CODE_REWARDS": "true",
    "ALLOW_PYTHON_REWARDS": "true",
}
PRICES = {"dated": "2026-11-24", "region": "us-east-1", "on_demand": {"ml.g6e.4xlarge": 5.0, "ml.g5.4xlarge": 2.0}}
OWN = b"""def reward(completions, answer, **_):
    return [float(completion[-1]["content"] == expected) for completion, expected in zip(completions, answer)]
"""
PYTHON = b"rewards: [{type: python, file: own.py}]\n"


def release(world, environment=None, prices=None):
    """Change the launch plan, as a release of a stack with these parameters does."""
    plan = world.read_json(f"launch_plans/{PLAN}.json") | {"prices": prices}
    for kind in ("train", "test"):
        plan[kind]["Environment"] = environment or {}
    world.aws.s3.put_object(Bucket=ARTIFACTS, Key=f"launch_plans/{PLAN}.json", Body=json.dumps(plan).encode())


def drop(world, config, **files):
    for name, content in files.items():
        world.put(f"training_data/{name}.py", content)
    world.put("training_data/cars.yaml", b"model: org/thing-1B@" + b"a" * 40 + b"\n" + config)
    run = world.drop()
    return run, world.read_json(f"runs/{run.run_id}/validation.json")


def test_the_rewards_are_tried_and_the_cost_is_estimated(world):
    release(world, prices=PRICES)
    run, receipt = drop(world, b"rewards: [{type: numeric}]")
    assert run.state == RunState.VALIDATED
    assert ["only 3 different held-out questions" in warning for warning in receipt["warnings"]] == [True]
    assert {each["kind"]: each["mean"] for each in receipt["rewards"]["answers"]}["gold"] == 1.0
    assert [each["instance_type"] for each in receipt["cost"]["instances"]] == ["ml.g6e.4xlarge", "ml.g5.4xlarge"]
    assert receipt["cost"]["prices"] == {"dated": "2026-11-24", "region": "us-east-1"}
    assert receipt["cost"]["instances"][1]["usd"][0] > 0


def test_rewards_that_do_not_prefer_the_answers_reject_the_run(world):
    run, receipt = drop(world, b"rewards: [{type: math, clip: [0, 0.5]}, {type: exact_match, weight: -1}]")
    assert run.state == RunState.REJECTED
    assert receipt["error_counts"] == {"REWARD_PAYS_WRONG": 4}
    assert "on average the dataset's answers score -0.5, and an empty answer scores 0" in receipt["errors"][0]["message"]


@pytest.mark.parametrize(
    ("limit", "config"), [("0.01", b""), ("0", b"compute: {max_cost_usd: 0.01}"), ("50", b"compute: {max_cost_usd: 0.01}")]
)
def test_a_run_that_cannot_stay_below_a_limit_is_refused(world, monkeypatch, limit, config):
    release(world, prices=PRICES)
    monkeypatch.setenv("MAX_RUN_COST_USD", limit)
    run, receipt = drop(world, config)
    assert run.state == RunState.REJECTED
    assert receipt["error_counts"] == {"COST_LIMIT": 1}


def test_a_python_reward_travels_with_its_run_where_it_is_allowed(world):
    release(world, ALLOWED)
    run, receipt = drop(world, PYTHON, own=OWN)
    assert run.state == RunState.VALIDATED, receipt
    assert world.aws.read(ARTIFACTS, f"runs/{run.run_id}/input/rewards/own.py") == OWN
    world.trained(run)
    for request in world.job_requests:
        channels = {each["ChannelName"]: each["DataSource"]["S3DataSource"]["S3Uri"] for each in request["InputDataConfig"]}
        assert channels["rewards"] == f"s3://{ARTIFACTS}/runs/{run.run_id}/input/rewards/"
    # Another function is another run.
    other, _ = drop(world, PYTHON, own=OWN + b"# changed\n")
    assert other.run_id != run.run_id


def test_a_python_reward_without_its_file_or_leave_is_refused_and_not_run(world):
    release(world, ALLOWED)
    run, receipt = drop(world, PYTHON)
    assert run.state == RunState.REJECTED
    assert receipt["errors"][0]["code"] == "REWARD_FILE"
    assert "s3://data-bucket/training_data/own.py, is missing" in receipt["errors"][0]["message"]
    release(world)
    _, receipt = drop(world, PYTHON, own=b"raise SystemExit('it was run')\n")
    assert receipt["error_counts"] == {"REWARD_NOT_ALLOWED": 1}


SPECS = [
    b"{type: lambda, function_arn: 'arn:aws:lambda:us-east-1:123456789012:function:score'}",
    b"{type: judge, model: 'amazon.nova-lite-v1:0'}",
    b"{type: http, url: 'https://rewards.example.com/score'}",
    b"{type: code_tests}",
    b"{type: python, file: own.py}",
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("allowed", [True, False])
def test_the_function_accepts_what_its_jobs_may_do_and_nothing_else(world, monkeypatch, tmp_path, spec, allowed):
    release(world, ALLOWED if allowed else {"REWARD_FUNCTION_ARNS": "arn:aws:lambda:us-east-1:123456789012:function:other"})
    # What a reward says is for other tests: these rows are no programs, and nobody is there to be called.
    config = b"preflight: {rows: 0}\nrewards: [" + spec + b"]\n"
    run, receipt = drop(world, config, own=OWN)
    assert (run.state == RunState.VALIDATED, receipt["error_counts"]) == (
        (True, {}) if allowed else (False, {"REWARD_NOT_ALLOWED": 1})
    )
    if not allowed:
        return
    world.trained(run)
    rewards = RunConfig.model_validate_json(world.aws.read(ARTIFACTS, f"runs/{run.run_id}/input/config.json")).rewards
    for request in world.job_requests:  # as trainer/deployment.py reads its environment
        build_rewards(rewards, reward_permissions(request["Environment"], python_folder=tmp_path))
    with pytest.raises(RewardError, match="not"):
        build_rewards(rewards, reward_permissions({}, python_folder=tmp_path))


def right_answers_win(samples):
    scores = {each["id"]: float(each["messages"][-1]["content"] == each["reference_answer"]) for each in samples}
    return 200, {}, [{"id": name, "aggregate_reward_score": score} for name, score in scores.items()]


@pytest.mark.parametrize(
    ("secret", "error"),
    [
        ('{"127.0.0.1": "CaNaRy-token"}', ""),
        ('{"127.0.0.1": "CaNaRy-wrong"}', "cannot be called: status 401: b'no: Bearer ***'"),
        (None, "the secret of RewardHttpSecretArn cannot be read: "),
    ],
)
def test_the_preflight_calls_a_host_with_its_token(world, caplog, capfd, secret, error):
    arn = "arn:aws:secretsmanager:us-east-1:123456789012:secret:judges-AbCdEf"
    if secret is not None:
        arn = boto3.client("secretsmanager").create_secret(Name="judges", SecretString=secret)["ARN"]
    release(world, {"REWARD_HTTP_HOSTS": "127.0.0.1", "REWARD_HTTP_SECRET_ARN": arn})
    with answering_server() as server:

        def reply(samples):
            given = server.authorized[-1]
            return right_answers_win(samples) if given == "Bearer CaNaRy-token" else (401, {}, f"no: {given}".encode())

        server.reply = reply
        run, receipt = drop(world, f"rewards: [{{type: http, url: '{server.url}'}}]".encode())
    if error:
        assert (run.state, receipt["error_counts"]) == (RunState.REJECTED, {"REWARD_FAILS": 1})
        assert error in receipt["errors"][0]["message"]
    else:
        assert world.start(run).state == RunState.TRAINING, receipt
    said = json.dumps([receipt, world.sent_events, world.notifications, world.job_requests], default=str)
    assert "CaNaRy" not in said + caplog.text + "".join(capfd.readouterr())
    stored = world.aws.s3.list_objects_v2(Bucket=ARTIFACTS)["Contents"]
    assert not any(b"CaNaRy" in world.aws.read(ARTIFACTS, each["Key"]) for each in stored)


def test_a_dataset_that_is_dropped_again_is_judged_by_the_stack_as_it_is_then(world, monkeypatch):
    release(world, prices=PRICES)
    ends = []
    for limit in ("0.01", "0.01", "0"):
        monkeypatch.setenv("MAX_RUN_COST_USD", limit)
        run, receipt = drop(world, b"")
        assert receipt["ok"] == (run.state == RunState.VALIDATED)
        ends.append((run.run_id, run.attempt, run.state, run.reason is None))
    refused = [(run.run_id, attempt, RunState.REJECTED, False) for attempt in (1, 2)]
    assert ends == [*refused, (run.run_id, 3, RunState.VALIDATED, True)]
    assert world.event_types == ["Dataset Rejected", "Dataset Rejected", "Dataset Validated"]
    # ... and so is one whose job failed.
    world.start(run)
    failed = world.job_event("test_model.train_failed", str(world.run(run.run_id).train_job))
    world.handle("test_model", failed)
    monkeypatch.setenv("MAX_RUN_COST_USD", "0.01")
    run, _ = drop(world, b"")
    assert (run.attempt, run.state, run.open) == (4, RunState.REJECTED, None)


def test_instances_that_cannot_run_the_plans_image_reject_the_run_before_a_job_starts(world):
    """The launch plan's image is made for CUDA 13; V100 GPUs are too old for that."""
    run, receipt = drop(world, b"compute: {instance_type: [ml.g5.xlarge, ml.p3.2xlarge]}")
    assert run.state == RunState.REJECTED
    (error,) = receipt["errors"]
    assert (error["code"], error["key"]) == ("CONFIG_INSTANCE", "compute.instance_type")
    assert error["message"].startswith("ml.p3.2xlarge cannot run the job: its GPUs are too old for CUDA 13")
