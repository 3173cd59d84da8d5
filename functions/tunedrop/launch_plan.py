"""Launch plan + run → the CreateTrainingJob request.

A plan holds the two requests that ModelTrainer would send, captured at release time by trainer/release.py, with everything
that does not depend on a run: image, entry point, code, role, network, metrics. Here the run is filled in. User text never
becomes a hyperparameter or an environment value: it travels in the config channel alone.
"""

from typing import Any

import msgspec

from tunedrop import layout
from tunedrop.aws import Aws
from tunedrop.layout import JobName
from tunedrop.run_config import Compute, RunConfig
from tunedrop.runs import Run


class NoLaunchPlanError(Exception):
    """Nothing was released into the artifact bucket yet: an operator's task, not a user's mistake."""


def current_digest(aws: Aws, artifact_bucket: str) -> str:
    """Return the digest of the released trainer. Raises NoLaunchPlanError if there is none."""
    raw = aws.read(artifact_bucket, layout.CURRENT_PLAN)
    if raw is None:
        raise NoLaunchPlanError(f"s3://{artifact_bucket}/{layout.CURRENT_PLAN} is missing: run python -m trainer.release")
    digest: str = msgspec.json.decode(raw)["digest"]
    return digest


def load_plan(aws: Aws, artifact_bucket: str, digest: str) -> dict[str, Any]:
    """Return a released plan: `{"digest", "train": {request}, "test": {request}}`."""
    raw = aws.read(artifact_bucket, f"{layout.LAUNCH_PLANS}{digest}.json")
    if raw is None:
        raise NoLaunchPlanError(f"s3://{artifact_bucket}/{layout.LAUNCH_PLANS}{digest}.json is missing")
    plan: dict[str, Any] = msgspec.json.decode(raw)
    return plan


def _channel(name: str, uri: str) -> dict[str, Any]:
    source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}, "CompressionType": "None"}


def job_request(
    plan: dict[str, Any],
    kind: str,
    run: Run,
    config: RunConfig,
    *,
    prefix: str,
    data_bucket: str,
    artifact_bucket: str,
    instance_types: list[str],
    spot: bool,
) -> dict[str, Any]:
    """Return the CreateTrainingJob request of a run's `train` or `test` job.

    Each attempt takes the next of `instance_types`. Spot jobs may wait as long again as they may run.
    """
    folder = f"s3://{artifact_bucket}/{layout.run_key(run.run_id)}"
    channels = [
        _channel("run", f"{folder}input/config.json"),
        _channel("inference_testing", f"{folder}input/inference_tests.json"),
    ]
    if "/" not in config.model:  # a hub id is fetched by the job itself
        channels.append(_channel("models", f"s3://{data_bucket}/{layout.model_prefix(config.model)}"))
    if kind == "train":
        channels.insert(0, _channel("training", f"{folder}input/"))
    else:
        assert run.artifacts is not None  # set with the move to TRAINED
        channels.append(_channel("tuned", run.artifacts.rstrip("/") + "/"))
    compute: Compute = config.compute
    types = compute.instance_type or instance_types
    limits = {"MaxRuntimeInSeconds": compute.max_runtime}
    if spot:
        limits["MaxWaitTimeInSeconds"] = 2 * compute.max_runtime
    request: dict[str, Any] = plan[kind]
    filled = request | {
        "TrainingJobName": str(JobName(prefix, kind, run.run_id, run.attempt)),
        "HyperParameters": {"run-id": run.run_id},
        "InputDataConfig": request["InputDataConfig"] + channels,
        "OutputDataConfig": request["OutputDataConfig"]
        | {"S3OutputPath": f"{folder}{'training' if kind == 'train' else 'inference'}/"},
        "ResourceConfig": request["ResourceConfig"]
        | {
            "InstanceType": types[(run.attempt - 1) % len(types)],
            "InstanceCount": compute.instance_count if kind == "train" else 1,
            "VolumeSizeInGB": compute.volume_size_gb,
        },
        "StoppingCondition": limits,
        "EnableManagedSpotTraining": spot,
        "Tags": [
            {"Key": "tunedrop:run-id", "Value": run.run_id},
            {"Key": "tunedrop:prefix", "Value": prefix},
        ],
    }
    if kind == "train":
        filled["CheckpointConfig"] = {"LocalPath": "/opt/ml/checkpoints", "S3Uri": f"{folder}checkpoints/"}
    return filled
