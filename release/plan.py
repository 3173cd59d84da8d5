"""Makes the launch plan: the CreateTrainingJob requests with which the Lambdas start jobs, by SageMaker's ModelTrainer.

The SageMaker SDK is too big for a Lambda. This module builds the requests once per release, and captures them before the SDK
sends them. A plan is content-addressed: code, drivers and requests hash to a digest, which is part of every key. A later
release does not change the runs of an earlier release.
"""

import hashlib
import json
import shutil
import tempfile
from contextlib import chdir
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import boto3
from sagemaker.core.helper.session_helper import Session
from sagemaker.core.shapes import OutputDataConfig
from sagemaker.core.training.configs import (
    CheckpointConfig,
    Compute,
    MetricDefinition,
    Networking,
    SourceCode,
    StoppingCondition,
)
from sagemaker.train import ModelTrainer

import trainer
import tunedrop
from release.prices import inference_image, instance_prices
from release.target import Target
from trainer.job import MODULES
from tunedrop.object_keys import CURRENT_PLAN, LAUNCH_PLANS

# The metrics that trainer/progress.py and trainer/test_model.py log. SageMaker allows 40.
METRIC_NAMES = (
    "reward reward_std reward_best reward_truncated reward_finished heldout_reward probe_score probe_lost probe_gained "
    "frac_reward_zero_std loss grad_norm kl entropy completion_length clipped_ratio learning_rate abstained mismatch "
    "mismatch_p99 mismatch_clipped memory_gb step_seconds eta_seconds base_score tuned_score"
).split()
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc")
# The image's own entry point loads NVIDIA's compatibility libraries if the driver is too old for the image's CUDA.
# ModelTrainer replaces that entry point. AWS's images have a script for the purpose, to be sourced:
# https://github.com/aws/deep-learning-containers/blob/main/scripts/docker/pytorch/start_cuda_compat.sh
CUDA_COMPAT = "/usr/local/bin/start_cuda_compat.sh"
# ModelTrainer needs an instance type and a limit. The Lambda replaces both with those of the run.
INSTANCE_TYPE = "ml.g5.4xlarge"
MAX_RUNTIME = 6 * 3600
NO_TELEMETRY = {"SchemaVersion": "1.0", "SageMaker": {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}}}


class ArtifactSession(Session):  # type: ignore[misc] # the SDK is untyped
    """A session whose default bucket is the artifact bucket. The SDK would look for a default bucket and create it."""

    def __init__(self, boto_session: boto3.Session, bucket: str):
        super().__init__(boto_session, sagemaker_config=NO_TELEMETRY, default_bucket_prefix="runs")
        self._artifact_bucket = bucket

    def default_bucket(self) -> str:
        """Return the artifact bucket."""
        return self._artifact_bucket


class _StagingSession(ArtifactSession):
    """Copies ModelTrainer's uploads to a local folder, under the channel's name, instead of S3."""

    def __init__(self, boto_session: boto3.Session, bucket: str, folder: Path):
        super().__init__(boto_session, bucket)
        self.folder = folder

    def upload_data(self, path: str, bucket: str | None = None, key_prefix: str = "data", **_: Any) -> str:
        shutil.copytree(path, self.folder / Path(key_prefix).name, ignore=IGNORED)
        return f"s3://{bucket}/{key_prefix}"


class _CapturedError(Exception):
    """Ends ModelTrainer.train() before it sends its request."""


def stage(folder: Path) -> None:
    """Copy the code of a job into `folder`, in the import layout of the repository: `trainer` and `tunedrop` only.

    `requirements.txt`, which the container installs, is the lock (see requirements/lock_jobs.py).
    """
    for package in (trainer, tunedrop):
        source = Path(package.__path__[0])
        shutil.copytree(source, folder / source.name, ignore=IGNORED)
    (folder / "trainer" / "requirements.lock").rename(folder / "requirements.txt")
    for name in ("requirements.txt", "Dockerfile"):  # no job reads them
        (folder / "trainer" / name).unlink()


def metric_definitions() -> dict[str, str]:
    """Return for each metric the regular expression with which SageMaker finds it in the job's log."""
    return {name: rf"\b{name}=([-+0-9.e]+)" for name in METRIC_NAMES}


def entry(kind: str) -> str:
    """Return the command of a `train` or `test` job, in one line, because ModelTrainer's shell script traps errors."""
    return f"[ ! -f {CUDA_COMPAT} ] || source {CUDA_COMPAT} || true; exec python -m trainer.job {kind}"


def model_trainer(session: Session, target: Target, kind: str, **kwargs: Any) -> ModelTrainer:
    """Make the ModelTrainer of a `train` or `test` job, whose code is staged in the folder `code`.

    With `command`, ModelTrainer's shell script ends in an `exec`, and trainer.job gets SageMaker's signals. With an entry
    script, the shell and a driver would receive the signals and not pass them on.
    """
    networking = Networking(
        subnets=list(target.subnets) or None,
        security_group_ids=list(target.security_groups) or None,
        enable_network_isolation=target.network_isolation,
        enable_inter_container_traffic_encryption=target.encrypt_traffic,
    )
    output = {"s3_output_path": f"s3://{target.artifact_bucket}/runs/{target.job_prefix}-submit/training/"}
    if target.kms_key:
        output["kms_key_id"] = target.kms_key
    defaults: dict[str, Any] = {
        "compute": Compute(instance_type=INSTANCE_TYPE, instance_count=1),
        "stopping_condition": StoppingCondition(max_runtime_in_seconds=MAX_RUNTIME),
    }
    return ModelTrainer(
        sagemaker_session=session,
        role=target.role,
        training_image=target.image,
        base_job_name=f"{target.job_prefix}-submit",
        source_code=SourceCode(source_dir="code", requirements="requirements.txt", command=entry(kind)),
        networking=networking,
        environment=dict(target.environment),
        output_data_config=OutputDataConfig(**output, compression_type="NONE"),
        # Without this argument ModelTrainer puts checkpoints beside the job's input.
        checkpoint_config=CheckpointConfig(),
        **defaults | kwargs,
    ).with_metric_definitions([MetricDefinition(name=name, regex=regex) for name, regex in metric_definitions().items()])


def capture(session: _StagingSession, target: Target, kind: str) -> dict[str, Any]:
    """Return ModelTrainer's CreateTrainingJob request without sending it."""
    captured: list[dict[str, Any]] = []

    def keep(params: dict[str, Any], model: Any, **_: Any) -> NoReturn:
        if model.name == "CreateTrainingJob":
            captured.append(params)
        raise _CapturedError

    # This stops the calls of all services. ModelTrainer also asks IAM about the role, and continues without a response.
    session.boto_session.events.register("provide-client-params", keep)
    try:
        model_trainer(session, target, kind).train(wait=False, logs=False)
    except _CapturedError:
        return captured[0]
    raise AssertionError("ModelTrainer did not make a CreateTrainingJob request")


def build_plan(target: Target, region: str, folder: Path) -> dict[str, Any]:
    """Build the launch plan, and write its files to `folder`, with their keys below `trainer/<digest>/`.

    The same source gives the same digest on every machine: names and URIs that change from call to call are replaced before
    hashing, and ModelTrainer's files contain no path of this machine.
    """
    requests: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch, chdir(scratch):
        stage(Path("code"))
        for kind in MODULES:
            # A new session for each kind: the SDK caches clients by session, with their registered event handlers.
            session = _StagingSession(boto3.Session(region_name=region), target.artifact_bucket, folder / kind)
            request = capture(session, target, kind)
            for name in ("TrainingJobName", "CheckpointConfig"):
                del request[name]
            request["OutputDataConfig"]["S3OutputPath"] = f"s3://{target.artifact_bucket}/runs/"
            for channel in request["InputDataConfig"]:
                uri = f"s3://{target.artifact_bucket}/trainer/{{digest}}/{kind}/{channel['ChannelName']}/"
                channel["DataSource"]["S3DataSource"]["S3Uri"] = uri
            requests[kind] = request
    digest = hashlib.sha256(json.dumps(requests, sort_keys=True).encode())
    for path in _files(folder):
        digest.update(f"\0{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    name = digest.hexdigest()[:16]
    filled: dict[str, Any] = json.loads(json.dumps(requests).replace("{digest}", name))
    return {"digest": name, "created_by": f"tunedrop {version('tunedrop-app')}", **filled}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def release(target: Target, region: str) -> str:
    """Upload code and launch plan to the artifact bucket, make the plan the current one, and return its digest."""
    s3 = boto3.client("s3", region_name=region)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plan = build_plan(target, region, folder)
        # Not part of the digest: prices and images change from day to day, and do not change what a job runs.
        plan["prices"] = instance_prices(region)
        plan["inference_image"] = inference_image(region)
        for path in _files(folder):
            key = f"trainer/{plan['digest']}/{path.relative_to(folder).as_posix()}"
            s3.upload_file(str(path), target.artifact_bucket, key)
    digest: str = plan["digest"]
    for key, body in ((f"{LAUNCH_PLANS}{digest}.json", plan), (CURRENT_PLAN, {"digest": digest})):  # the pointer is last
        s3.put_object(Bucket=target.artifact_bucket, Key=key, Body=json.dumps(body).encode())
    return digest
