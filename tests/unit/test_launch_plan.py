"""A run's job request: only its own data, under the customer's key and in the customer's network."""

from typing import Any

import pytest
from botocore.session import get_session
from botocore.validate import validate_parameters
from fake_stack import ARTIFACTS, DATA, SETTINGS, TRAINED_RUN, plan_request

from pipeline.jobs.answers import Opponents
from pipeline.jobs.plan import instance_choices, job_request
from pipeline.jobs.price import instance_type_of
from tunedrop.config.model import ResolvedCompute, ResolvedConfig

LIST = [{"InstanceType": "ml.g6e.xlarge"}, {"InstanceType": "ml.g5.xlarge"}]
ONE, OTHER = {"InstanceType": "ml.a.xl"}, {"InstanceType": "ml.b.xl"}
KEY = "arn:aws:kms:us-east-1:123456789012:key/k"


NOBODY = Opponents({}, {"line-version": "0"})


def request(kind: str, instance: str = "ml.g5.4xlarge", model: str = "base", spot: bool = True, compute=None, **changes):
    plan = {kind: plan_request(kind) | changes}
    config = ResolvedConfig(model=model, compute={"instance_type": [instance], "spot": spot} | (compute or {}))
    instances = {"InstanceType": instance}
    return job_request(plan, kind, TRAINED_RUN, config, SETTINGS, instances=instances, opponents=NOBODY)


@pytest.mark.parametrize(
    ("compute", "spot", "seconds"),
    [({"keep_alive": "30m"}, False, 1800), ({"keep_alive": "30m"}, True, None), ({}, False, None)],
)
@pytest.mark.parametrize("kind", ["train", "test"])
def test_instances_stay_for_the_next_job_if_they_are_told_to_and_can(kind, compute, spot, seconds):
    made = request(kind, compute=compute, spot=spot)
    assert made["ResourceConfig"].get("KeepAlivePeriodInSeconds") == seconds
    valid(made)


@pytest.mark.parametrize("kind", ["train", "test"])
def test_what_sagemaker_itself_broke_runs_again(kind):
    made = request(kind)
    assert made["RetryStrategy"] == {"MaximumRetryAttempts": 2}
    valid(made)


@pytest.mark.parametrize(
    ("resources", "name"),
    [
        ({"InstanceType": "ml.g5.xlarge"}, "ml.g5.xlarge"),
        ({"InstancePreferences": LIST, "SelectedInstanceType": "ml.g5.xlarge"}, "ml.g5.xlarge"),
        ({"InstancePreferences": LIST}, "ml.g6e.xlarge or ml.g5.xlarge"),  # none was selected yet
    ],
)
def test_a_job_is_paid_for_by_the_type_that_was_selected(resources, name):
    assert instance_type_of(resources) == name


@pytest.mark.parametrize(
    ("spot", "types", "expected"),
    [
        (True, ["ml.a.xl", "ml.b.xl"], [[ONE], [OTHER]]),
        (False, ["ml.a.xl"], [[ONE]]),
        (False, ["ml.a.xl", "ml.b.xl", "ml.a.xl"], [[{"InstancePreferences": [ONE, OTHER]}, ONE, OTHER]]),
    ],
)
def test_what_an_attempt_tries(spot, types, expected):
    assert instance_choices(ResolvedCompute(instance_type=types, spot=spot)) == expected


@pytest.mark.parametrize("kind", ["train", "test"])
def test_the_base_model_is_streamed(kind):
    made = request(kind)
    modes = {channel["ChannelName"]: channel.get("InputMode", "File") for channel in made["InputDataConfig"]}
    assert modes.pop("models") == "FastFile"
    assert set(modes.values()) == {"File"}
    valid(made)


def valid(made):
    """Raise botocore's error if the request is none."""
    shape = get_session().get_service_model("sagemaker").operation_model("CreateTrainingJob").input_shape
    validate_parameters(made, shape)


@pytest.mark.parametrize(
    ("instance", "encrypted"),
    [("ml.g5.4xlarge", False), ("ml.g6e.4xlarge", False), ("ml.p4d.24xlarge", False), ("ml.p3.2xlarge", True)],
)
@pytest.mark.parametrize("kind", ["train", "test"])
def test_the_customers_key_encrypts_outputs_and_every_volume_that_a_key_can(kind, instance, encrypted):
    output = plan_request(kind)["OutputDataConfig"] | {"KmsKeyId": KEY}
    filled = request(kind, instance, OutputDataConfig=output)
    assert filled["OutputDataConfig"]["KmsKeyId"] == KEY
    assert ("VolumeKmsKeyId" in filled["ResourceConfig"]) == encrypted
    assert "VolumeKmsKeyId" not in request(kind, instance)["ResourceConfig"]
    valid(filled)


@pytest.mark.parametrize("kind", ["train", "test"])
def test_network_and_isolation_of_the_plan_stay(kind):
    network: dict[str, Any] = {
        "VpcConfig": {"Subnets": ["subnet-1"], "SecurityGroupIds": ["sg-1"]},
        "EnableNetworkIsolation": True,
        "EnableInterContainerTrafficEncryption": True,
    }
    assert network.items() <= request(kind, **network).items()


@pytest.mark.parametrize("kind", ["train", "test"])
def test_a_job_is_pointed_at_its_own_run_and_the_named_model_only(kind):
    filled = request(kind)
    read = [channel["DataSource"]["S3DataSource"]["S3Uri"] for channel in filled["InputDataConfig"]]
    own = f"s3://{ARTIFACTS}/runs/{TRAINED_RUN.run_id}/"
    assert all(uri.startswith((own, f"s3://{DATA}/models/base/")) for uri in read)
    written = [filled["OutputDataConfig"]["S3OutputPath"], filled.get("CheckpointConfig", {}).get("S3Uri", own)]
    assert all(uri.startswith(own) for uri in written)
    hub = [c["ChannelName"] for c in request(kind, model="org/model")["InputDataConfig"]]
    assert "models" not in hub


@pytest.mark.parametrize(
    ("compute", "instances", "seconds"),
    [
        ({}, ["ml.g5.xlarge"], 21600),
        ({"max_cost_usd": 1}, ["ml.g5.xlarge"], 3600),
        ({"max_cost_usd": 1, "instance_count": 2}, ["ml.g5.xlarge"], 1800),
        ({"max_cost_usd": 1}, ["ml.g5.xlarge", "ml.p4d.24xlarge"], 180),  # SageMaker chooses: the dearest counts
        ({"max_cost_usd": 100}, ["ml.g5.xlarge"], 21600),
        ({"max_cost_usd": 1}, ["ml.unknown.xlarge"], 21600),
        ({"max_cost_usd": 0.0001}, ["ml.g5.xlarge"], 1),
    ],
)
def test_a_budget_in_dollars_becomes_a_time_limit(compute, instances, seconds):
    prices = {"dated": "2026-01-01", "region": "us-east-1", "on_demand": {"ml.g5.xlarge": 1.0, "ml.p4d.24xlarge": 20.0}}
    plan = {kind: plan_request(kind) for kind in ("train", "test")} | {"prices": prices}
    config = ResolvedConfig(model="base", compute=compute | {"instance_type": instances, "spot": True})
    chosen = {"InstancePreferences": [{"InstanceType": name} for name in instances]}
    train, test = (
        job_request(plan, kind, TRAINED_RUN, config, SETTINGS, instances=chosen, opponents=NOBODY)
        for kind in ("train", "test")
    )
    assert train["StoppingCondition"] == {"MaxRuntimeInSeconds": seconds, "MaxWaitTimeInSeconds": 2 * seconds}
    assert train["HyperParameters"]["max-runtime"] == str(seconds)  # by which the trainer ends in time
    assert test["StoppingCondition"]["MaxRuntimeInSeconds"] == 21600
    without = job_request(plan | {"prices": None}, "train", TRAINED_RUN, config, SETTINGS, instances=chosen)
    assert without["StoppingCondition"]["MaxRuntimeInSeconds"] == 21600
