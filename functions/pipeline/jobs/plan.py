"""Launch plan + run → the CreateTrainingJob request.

`python -m release` captures two requests from ModelTrainer and stores them as a launch plan: image, entry point, code, role,
network, metrics. This module adds what belongs to a run. User text never becomes a hyperparameter or an environment value:
the config channel alone carries it.
"""

from typing import TYPE_CHECKING, Any

import msgspec

from pipeline.aws import Aws
from pipeline.jobs.price import on_demand_prices
from pipeline.runs.states import Run
from pipeline.settings import Settings
from tunedrop import object_keys
from tunedrop.config.instances import has_local_disk
from tunedrop.object_keys import JobName

if TYPE_CHECKING:  # pydantic builds the config models at import, and most invocations create no job
    from pipeline.jobs.answers import Opponents
    from tunedrop.config.model import Compute, ResolvedCompute, ResolvedConfig

MOST_PREFERENCES = 5  # of ResourceConfig.InstancePreferences
# 28 days: a job's longest run time, and its longest wait (https://docs.aws.amazon.com/general/latest/gr/sagemaker.html).
MOST_SECONDS = 28 * 86400
# SageMaker retries a job after an InternalServerError, its own fault; no other failure has a retry.
RETRIES = {"MaximumRetryAttempts": 2}


class NoLaunchPlanError(Exception):
    """The artifact bucket has no launch plan: an operator must release one. Not a user's mistake."""


def current_digest(aws: Aws, artifact_bucket: str) -> str:
    """Return the digest of the current launch plan. Raises NoLaunchPlanError without one."""
    raw = aws.read(artifact_bucket, object_keys.CURRENT_PLAN)
    if raw is None:
        raise NoLaunchPlanError(f"s3://{artifact_bucket}/{object_keys.CURRENT_PLAN} is missing: run python -m release")
    digest: str = msgspec.json.decode(raw)["digest"]
    return digest


def load_plan(aws: Aws, artifact_bucket: str, digest: str) -> dict[str, Any]:
    """Return a launch plan: `{"digest", "train": {request}, "test": {request}, "prices", "inference_image"}`."""
    raw = aws.read(artifact_bucket, f"{object_keys.LAUNCH_PLANS}{digest}.json")
    if raw is None:
        raise NoLaunchPlanError(f"s3://{artifact_bucket}/{object_keys.LAUNCH_PLANS}{digest}.json is missing")
    plan: dict[str, Any] = msgspec.json.decode(raw)
    return plan


def _channel(name: str, uri: str) -> dict[str, Any]:
    source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}, "CompressionType": "None"}


def instance_choices(compute: "ResolvedCompute") -> list[list[dict[str, Any]]]:
    """Return the instance choices of a run's attempts; each choice lists parts of ResourceConfig to try in order.

    A spot job has one instance type: each type is a choice. An on-demand job has one choice: a preference list, from which
    SageMaker takes the first type with capacity. The quota of every type in the list must cover the job, "even when the
    types ahead of it would have succeeded": each type alone follows the list
    (https://docs.aws.amazon.com/sagemaker/latest/dg/train-instance-preferences.html).
    """
    types = list(dict.fromkeys(compute.instance_type))
    alone: list[dict[str, Any]] = [{"InstanceType": name} for name in types]
    if compute.spot or len(types) == 1:
        return [[each] for each in alone]
    return [[{"InstancePreferences": alone[:MOST_PREFERENCES]}, *alone]]


def time_limit(compute: "Compute", instances: dict[str, Any], plan: dict[str, Any]) -> int:
    """Return the longest run time of a training job in seconds: `max_runtime`, or less where `max_cost_usd` allows less.

    The on-demand price counts, which a spot price never exceeds; of several types, the highest price. Without a price,
    `max_cost_usd` limits nothing.
    """
    on_demand = on_demand_prices(plan)
    prices = [on_demand[name] for name in _types(instances) if name in on_demand]
    if compute.max_cost_usd is None or not prices:
        return compute.max_runtime
    affordable = compute.max_cost_usd / (max(prices) * compute.instance_count) * 3600
    return min(compute.max_runtime, max(1, int(affordable)))


def _types(instances: dict[str, Any]) -> list[str]:
    return [each["InstanceType"] for each in instances.get("InstancePreferences", [instances])]


def job_request(
    plan: dict[str, Any],
    kind: str,
    run: Run,
    config: "ResolvedConfig",
    settings: Settings,
    *,
    instances: dict[str, Any],
    opponents: "Opponents | None" = None,
) -> dict[str, Any]:
    """Return the CreateTrainingJob request of a run's `train` or `test` job on `instances`, a part of ResourceConfig.

    A test job has `opponents`, which it compares the tuned model with. A spot job may wait as long as it may run; both
    together at most 28 days.
    """
    folder = f"s3://{settings.artifact_bucket}/{object_keys.run_key(run.run_id)}"
    channels = [
        _channel("run", f"{folder}input/config.json"),
        _channel("inference_testing", f"{folder}input/inference_tests.json"),
    ]
    if "/" not in config.model:  # the job itself downloads a hub id
        models = _channel("models", f"s3://{settings.data_bucket}/{object_keys.model_prefix(config.model)}")
        # FastFile streams files on access: the job starts before the download ends.
        channels.append(models | {"InputMode": "FastFile"})
    if any(spec.reward_file for spec in config.rewards):
        channels.append(_channel("rewards", f"{folder}input/rewards/"))
    hyperparameters = {"run-id": run.run_id}
    if kind == "train":
        channels.insert(0, _channel("training", f"{folder}input/"))
        if run.start:
            start = f"s3://{settings.artifact_bucket}/{object_keys.run_key(run.run_id, 'start/')}"
            channels.append(_channel("start", start))
    else:
        assert run.artifacts is not None  # set with the move to TRAINED
        assert opponents is not None
        channels.append(_channel("tuned", run.artifacts.rstrip("/") + "/"))
        channels += [_channel(name, f"s3://{settings.artifact_bucket}/{key}") for name, key in opponents.channels.items()]
        hyperparameters |= opponents.hyperparameters
    compute = config.compute
    seconds = time_limit(compute, instances, plan) if kind == "train" else compute.max_runtime
    limits = {"MaxRuntimeInSeconds": seconds}
    if compute.spot:
        limits["MaxWaitTimeInSeconds"] = min(2 * seconds, MOST_SECONDS)
    request: dict[str, Any] = plan[kind]
    filled_request = request | {
        "TrainingJobName": str(JobName(settings.job_prefix, kind, run.run_id, run.attempt)),
        "HyperParameters": hyperparameters | ({"max-runtime": str(seconds)} if kind == "train" else {}),
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
            {"Key": "tunedrop:prefix", "Value": settings.job_prefix},
        ],
    }
    key = request["OutputDataConfig"].get("KmsKeyId")
    if key and not any(map(has_local_disk, _types(instances))):
        filled_request["ResourceConfig"]["VolumeKmsKeyId"] = key
    if compute.keep_alive and not compute.spot:  # warm pools have no spot instances
        filled_request["ResourceConfig"]["KeepAlivePeriodInSeconds"] = compute.keep_alive
    if kind == "train":
        filled_request["CheckpointConfig"] = {"LocalPath": "/opt/ml/checkpoints", "S3Uri": f"{folder}checkpoints/"}
    return filled_request
