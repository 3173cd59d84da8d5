"""Launch plan + run → the CreateTrainingJob request.

A plan holds the two requests that ModelTrainer would send, captured at release time by release/release.py, with everything
that does not depend on a run: image, entry point, code, role, network, metrics. Here the run is filled in. User text never
becomes a hyperparameter or an environment value: it travels in the config channel alone.
"""

from typing import Any

import msgspec

from pipeline.aws import Aws
from pipeline.runs.table import Run
from tunedrop import object_keys
from tunedrop.config.instances import has_local_disk
from tunedrop.config.model import Compute, ResolvedCompute, ResolvedConfig
from tunedrop.object_keys import JobName

MOST_PREFERENCES = 5  # of ResourceConfig.InstancePreferences
# 28 days: the most that a job may run, and so wait (https://docs.aws.amazon.com/general/latest/gr/sagemaker.html).
MOST_SECONDS = 28 * 86400
# What SageMaker itself broke ("InternalServerError") runs again; no other failure does.
RETRIES = {"MaximumRetryAttempts": 2}


class NoLaunchPlanError(Exception):
    """Nothing was released into the artifact bucket yet: an operator's task, not a user's mistake."""


def current_digest(aws: Aws, artifact_bucket: str) -> str:
    """Return the digest of the released trainer. Raises NoLaunchPlanError if there is none."""
    raw = aws.read(artifact_bucket, object_keys.CURRENT_PLAN)
    if raw is None:
        raise NoLaunchPlanError(f"s3://{artifact_bucket}/{object_keys.CURRENT_PLAN} is missing: run python -m release")
    digest: str = msgspec.json.decode(raw)["digest"]
    return digest


def load_plan(aws: Aws, artifact_bucket: str, digest: str) -> dict[str, Any]:
    """Return a released plan: `{"digest", "train": {request}, "test": {request}}`."""
    raw = aws.read(artifact_bucket, f"{object_keys.LAUNCH_PLANS}{digest}.json")
    if raw is None:
        raise NoLaunchPlanError(f"s3://{artifact_bucket}/{object_keys.LAUNCH_PLANS}{digest}.json is missing")
    plan: dict[str, Any] = msgspec.json.decode(raw)
    return plan


def _channel(name: str, uri: str) -> dict[str, Any]:
    source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}, "CompressionType": "None"}


def instance_choices(compute: ResolvedCompute) -> list[list[dict[str, Any]]]:
    """Return what a job may run on: choices for the attempts of a run to walk, each the parts of ResourceConfig to try.

    With spot, SageMaker takes one type, and each type is a choice. On demand there is one choice: a list of which
    SageMaker takes the first type that has capacity. But each type's quota must cover the job, "even when the types ahead
    of it would have succeeded": after a refusal each type is tried alone
    (https://docs.aws.amazon.com/sagemaker/latest/dg/train-instance-preferences.html).
    """
    types = list(dict.fromkeys(compute.instance_type))
    alone: list[dict[str, Any]] = [{"InstanceType": name} for name in types]
    if compute.spot or len(types) == 1:
        return [[each] for each in alone]
    return [[{"InstancePreferences": alone[:MOST_PREFERENCES]}, *alone]]


def time_limit(compute: Compute, instances: dict[str, Any], plan: dict[str, Any]) -> int:
    """Return how many seconds a training job may live: `max_runtime`, or less if that costs more than `max_cost_usd`.

    At on-demand prices, above which spot never is; of several types, the dearest. Without a price nothing is known.
    """
    on_demand = (plan.get("prices") or {}).get("on_demand", {})
    prices = [on_demand[name] for name in _types(instances) if name in on_demand]
    if compute.max_cost_usd is None or not prices:
        return compute.max_runtime
    paid = compute.max_cost_usd / (max(prices) * compute.instance_count) * 3600
    return min(compute.max_runtime, max(1, int(paid)))


def _types(instances: dict[str, Any]) -> list[str]:
    return [each["InstanceType"] for each in instances.get("InstancePreferences", [instances])]


def instance_type_of(resources: dict[str, Any]) -> str:
    """Return the instance type that a job runs on, from DescribeTrainingJob's ResourceConfig: the one that was selected."""
    choices = [each["InstanceType"] for each in resources.get("InstancePreferences", [])]
    return resources.get("SelectedInstanceType") or resources.get("InstanceType") or " or ".join(choices)


def job_request(
    plan: dict[str, Any],
    kind: str,
    run: Run,
    config: ResolvedConfig,
    *,
    prefix: str,
    data_bucket: str,
    artifact_bucket: str,
    instances: dict[str, Any],
) -> dict[str, Any]:
    """Return the CreateTrainingJob request of a run's `train` or `test` job on `instances`, a part of ResourceConfig.

    Spot jobs may wait as long again as they may run, 28 days in all.
    """
    folder = f"s3://{artifact_bucket}/{object_keys.run_key(run.run_id)}"
    channels = [
        _channel("run", f"{folder}input/config.json"),
        _channel("inference_testing", f"{folder}input/inference_tests.json"),
    ]
    if "/" not in config.model:  # a hub id is fetched by the job itself
        models = _channel("models", f"s3://{data_bucket}/{object_keys.model_prefix(config.model)}")
        channels.append(models | {"InputMode": "FastFile"})  # read as it is needed: the job starts before it is all there
    if any(spec.type == "python" for spec in config.rewards):
        channels.append(_channel("rewards", f"{folder}input/rewards/"))
    if kind == "train":
        channels.insert(0, _channel("training", f"{folder}input/"))
    else:
        assert run.artifacts is not None  # set with the move to TRAINED
        channels.append(_channel("tuned", run.artifacts.rstrip("/") + "/"))
    compute = config.compute
    seconds = time_limit(compute, instances, plan) if kind == "train" else compute.max_runtime
    limits = {"MaxRuntimeInSeconds": seconds}
    if compute.spot:
        limits["MaxWaitTimeInSeconds"] = min(2 * seconds, MOST_SECONDS)
    request: dict[str, Any] = plan[kind]
    filled = request | {
        "TrainingJobName": str(JobName(prefix, kind, run.run_id, run.attempt)),
        "HyperParameters": {"run-id": run.run_id} | ({"max-runtime": str(seconds)} if kind == "train" else {}),
        "InputDataConfig": request["InputDataConfig"] + channels,
        "OutputDataConfig": request["OutputDataConfig"]
        | {"S3OutputPath": f"{folder}{'training' if kind == 'train' else 'inference'}/"},
        "ResourceConfig": {name: value for name, value in request["ResourceConfig"].items() if name != "InstanceType"}
        | instances
        | {
            "InstanceCount": compute.instance_count if kind == "train" else 1,
            "VolumeSizeInGB": compute.volume_size_gb,
        },
        "StoppingCondition": limits,
        "EnableManagedSpotTraining": compute.spot,
        "RetryStrategy": RETRIES,
        "Tags": [
            {"Key": "tunedrop:run-id", "Value": run.run_id},
            {"Key": "tunedrop:prefix", "Value": prefix},
        ],
    }
    key = request["OutputDataConfig"].get("KmsKeyId")
    if key and not any(map(has_local_disk, _types(instances))):
        filled["ResourceConfig"]["VolumeKmsKeyId"] = key
    if compute.keep_alive and not compute.spot:  # a spot instance cannot stay
        filled["ResourceConfig"]["KeepAlivePeriodInSeconds"] = compute.keep_alive
    if kind == "train":
        filled["CheckpointConfig"] = {"LocalPath": "/opt/ml/checkpoints", "S3Uri": f"{folder}checkpoints/"}
    return filled
