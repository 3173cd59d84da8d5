"""A run whose every name and number is as long as may be: the strict model of conftest.py checks each request it makes."""

import json
from typing import Any

import fake_stack
import pytest
import strict_model
import world as world_module
from botocore.session import get_session
from template import load_template

from local_app.sagemaker.constraints import violations
from pipeline.runs.states import RunState
from pipeline.runs.table import RUN
from tunedrop.object_keys import JobName
from tunedrop.rewards import REWARD_ENVIRONMENT

PREFIX = "p" * 16
ATTEMPT = 9999
# S3 keys have 1,024 bytes at most.
KEYS = ["training_data/" + "long/" * 200 + "cars.jsonl", "training_data/" + "ü" * 500 + ".jsonl"]
CONFIG = b"compute: {max_runtime: 672h, volume_size_gb: 16384, instance_count: 16, keep_alive: 1h}\nmax_seq_length: 100000\n"


@pytest.fixture
def longest(world, monkeypatch):
    """The stack with the longest prefix, and with a plan whose environment is as long as the template lets it be."""
    monkeypatch.setenv("JOB_PREFIX", PREFIX)
    monkeypatch.setattr(world_module, "PREFIX", PREFIX)
    parameters = load_template()["Parameters"]
    long = {variable for variable, name in REWARD_ENVIRONMENT.items() if "MaxLength" in parameters[name]}
    assert long == {"REWARD_FUNCTION_ARNS", "REWARD_HTTP_HOSTS", "REWARD_HTTP_SECRET_ARN"}
    environment = {"EVENT_BUS": "b" * 256} | dict.fromkeys(REWARD_ENVIRONMENT, "false")
    environment |= {variable: "x" * parameters[REWARD_ENVIRONMENT[variable]]["MaxLength"] for variable in long}
    plan = world.read_json(f"launch_plans/{fake_stack.PLAN}.json")
    for kind in ("train", "test"):
        plan[kind]["Environment"] = environment
    world.write(f"launch_plans/{fake_stack.PLAN}.json", json.dumps(plan).encode())
    return world


@pytest.mark.parametrize("key", KEYS, ids=["deep", "wide"])
@pytest.mark.parametrize("spot", [b"true", b"false"])
def test_a_run_at_every_maximum(longest, key, spot):
    world = longest
    world.put(f"{key.removesuffix('.jsonl')}.yaml", CONFIG.replace(b"{max_runtime", b"{spot: " + spot + b", max_runtime"))
    before = strict_model.calls.total()
    run = world.drop(key)
    assert run.state == RunState.VALIDATED, world.read_json(f"runs/{run.run_id}/validation.json")["errors"]
    world.aws.runs._table.update_item(
        Key={"id": RUN + run.run_id},
        UpdateExpression="SET attempt = :attempt",
        ExpressionAttributeValues={":attempt": ATTEMPT},
    )
    run = world.tested(world.trained(world.run(run.run_id)))
    assert run.state == RunState.PUBLISHED
    assert len(run.train_job) == len(str(JobName(PREFIX, "train", run.run_id, ATTEMPT))) <= 63
    limits = world.job_requests[0]["StoppingCondition"]
    assert limits == {"MaxRuntimeInSeconds": 2419200} | ({"MaxWaitTimeInSeconds": 2419200} if spot == b"true" else {})
    assert strict_model.calls.total() - before > 30
    assert strict_model.broken == []


def test_the_model_tells_what_is_too_long():
    """The checker itself: a list of seven reward functions would have been 580 characters."""
    shape = get_session().get_service_model("sagemaker").operation_model("CreateTrainingJob").input_shape
    request = {"TrainingJobName": "j" * 64, "Environment": {"REWARD_FUNCTION_ARNS": "a" * 580}, "RoleArn": "no role"}
    found = "; ".join(violations(shape, request))
    assert "'trainingJobName' failed to satisfy constraint: Member must have length less than or equal to 63" in found
    assert "'environment.REWARD_FUNCTION_ARNS' failed to satisfy constraint: Member must have length" in found
    assert "at 'roleArn' failed to satisfy constraint: Member must satisfy regular expression pattern" in found


def test_the_functions_environments_are_within_lambdas_limit():
    """4 KB for all variables of a function (https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html)."""
    template = load_template()
    variables = template["Globals"]["Function"]["Environment"]["Variables"]
    for function in (r for r in template["Resources"].values() if r["Type"] == "AWS::Serverless::Function"):
        names = variables | function["Properties"]["Environment"]["Variables"]
        # Buckets have 63 characters, the table's, bus's and topic's names 255 or an ARN's, lists of types 5 of 24 each.
        sizes = {name: 10 if _is_number(value, template) else 300 for name, value in names.items()}
        there = [name for name, value in names.items() if not _is_local(value)]
        assert sum(len(name) + sizes[name] for name in there) < 4096 + 2048, function["Properties"]["Handler"]


def _is_number(value: Any, template: Any) -> bool:
    """Return whether a variable is a parameter that is a number."""
    parameter = template["Parameters"].get(value.get("Ref"), {}) if isinstance(value, dict) else {}
    return parameter.get("Type") == "Number"


def _is_local(value: Any) -> bool:
    """Return whether a variable is for the local app alone, and absent on AWS."""
    return isinstance(value, dict) and (
        value.get("Ref") == "AWS::NoValue" or value.get("Fn::If", [""])[0] == "HasSageMakerEndpoint"
    )
