"""The launch plan: what the Lambdas start jobs with, made by SageMaker's own ModelTrainer.

The SageMaker SDK is too big for a Lambda. This module builds the CreateTrainingJob requests once per release, and
captures them before the SDK sends them. A plan is content-addressed: code, drivers and requests hash to a digest, which
is part of every key. A later release therefore does not change a run that an earlier one started.
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
from release.prices import inference_image, training_prices
from release.target import Target
from trainer.job import MODULES
from tunedrop.object_keys import CURRENT_PLAN, LAUNCH_PLANS

# One metric per figure that trainer/progress.py and trainer/test_model.py log; SageMaker takes 40 at most.
METRIC_NAMES = (
    "reward reward_std reward_best reward_truncated reward_finished heldout_reward frac_reward_zero_std loss grad_norm kl "
    "entropy completion_length clipped_ratio learning_rate memory_gb step_seconds eta_seconds base_score tuned_score"
).split()
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc")
# ModelTrainer's entry point is not the image's own, which would look whether the driver is too old for the image's CUDA and
# load NVIDIA's libraries that make up for that. AWS's images have a script for it, written to be sourced:
# https://github.com/aws/deep-learning-containers/blob/main/scripts/docker/pytorch/start_cuda_compat.sh
CUDA_COMPAT = "/usr/local/bin/start_cuda_compat.sh"
# ModelTrainer needs an instance type and a limit; the Lambda sets each run's own.
INSTANCE_TYPE = "ml.g5.4xlarge"
MAX_RUNTIME = 6 * 3600
NO_TELEMETRY = {"SchemaVersion": "1.0", "SageMaker": {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}}}


class ArtifactSession(Session):  # type: ignore[misc] # the SDK is untyped
    """A session on the artifact bucket, which exists: the SDK would look whether it does, and create it if not."""

    def __init__(self, boto_session: boto3.Session, bucket: str):
        super().__init__(boto_session, sagemaker_config=NO_TELEMETRY, default_bucket_prefix="runs")
        self._artifact_bucket = bucket

    def default_bucket(self) -> str:
        """Return the artifact bucket."""
        return self._artifact_bucket


class _StagingSession(ArtifactSession):
    """Keeps what ModelTrainer would upload in a local folder, under the channel's name."""

    def __init__(self, boto_session: boto3.Session, bucket: str, folder: Path):
        super().__init__(boto_session, bucket)
        self.folder = folder

    def upload_data(self, path: str, bucket: str | None = None, key_prefix: str = "data", **_: Any) -> str:
        shutil.copytree(path, self.folder / Path(key_prefix).name, ignore=IGNORED)
        return f"s3://{bucket}/{key_prefix}"


class _CapturedError(Exception):
    """Ends ModelTrainer.train() at the moment it would send its request."""


def stage(folder: Path) -> None:
    """Copy what a job's container needs into `folder`, in the import layout of the repository.

    What the container installs is the lock, see requirements/lock_jobs.py.
    """
    for package in (trainer, tunedrop):
        source = Path(package.__path__[0])
        shutil.copytree(source, folder / source.name, ignore=IGNORED)
    (folder / "trainer" / "requirements.lock").rename(folder / "requirements.txt")
    for name in ("requirements.txt", "Dockerfile"):  # no job reads them
        (folder / "trainer" / name).unlink()


def metric_definitions() -> dict[str, str]:
    """Return the regular expression by which SageMaker finds each metric in the job's log."""
    return {name: rf"\b{name}=([-+0-9.e]+)" for name in METRIC_NAMES}


def entry(kind: str) -> str:
    """Return the shell command of a `train` or `test` job, one line: ModelTrainer's script has `set -e` and traps errors."""
    return f"[ ! -f {CUDA_COMPAT} ] || source {CUDA_COMPAT} || true; exec python -m trainer.job {kind}"


def model_trainer(session: Session, target: Target, kind: str, **kwargs: Any) -> ModelTrainer:
    """Make the ModelTrainer of a `train` or `test` job over the tree staged in the folder `code`.

    With `command`, ModelTrainer's shell script ends in an `exec`, so that trainer.job gets SageMaker's signals; with an
    entry script the shell and a driver stay in front of it and keep them.
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
        # Without a URI ModelTrainer puts checkpoints beside the job's input.
        checkpoint_config=CheckpointConfig(),
        **defaults | kwargs,
    ).with_metric_definitions([MetricDefinition(name=name, regex=regex) for name, regex in metric_definitions().items()])


def capture(session: _StagingSession, target: Target, kind: str) -> dict[str, Any]:
    """Return the CreateTrainingJob request that ModelTrainer makes, without sending it."""
    captured: list[dict[str, Any]] = []

    def keep(params: dict[str, Any], model: Any, **_: Any) -> NoReturn:
        if model.name == "CreateTrainingJob":
            captured.append(params)
        raise _CapturedError

    # Every call of every service ends here: ModelTrainer also asks IAM about the role, and does without an answer.
    session.boto_session.events.register("provide-client-params", keep)
    try:
        model_trainer(session, target, kind).train(wait=False, logs=False)
    except _CapturedError:
        return captured[0]
    raise AssertionError("ModelTrainer did not make a CreateTrainingJob request")


def build_plan(target: Target, region: str, folder: Path) -> dict[str, Any]:
    """Build the launch plan, and in `folder` the files it refers to, as they belong under `trainer/<digest>/`.

    The same source gives the same digest, wherever it is built: the requests' names and places that change from call to
    call are replaced before they are hashed, and no path of this machine is in what ModelTrainer stages.
    """
    requests: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch, chdir(scratch):
        stage(Path("code"))
        for kind in MODULES:
            # A session of its own: the SDK caches clients by session, and with them the captured events.
            session = _StagingSession(boto3.Session(region_name=region), target.artifact_bucket, folder / kind)
            request = capture(session, target, kind)
            for name in ("TrainingJobName", "CheckpointConfig"):
                del request[name]
            request["OutputDataConfig"]["S3OutputPath"] = f"s3://{target.artifact_bucket}/runs/"
            for channel in request["InputDataConfig"]:
                place = f"s3://{target.artifact_bucket}/trainer/{{digest}}/{kind}/{channel['ChannelName']}/"
                channel["DataSource"]["S3DataSource"]["S3Uri"] = place
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
    """Upload code and launch plan to the artifact bucket and make it the current one; return its digest."""
    s3 = boto3.client("s3", region_name=region)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plan = build_plan(target, region, folder)
        # Beside the digest: they change from day to day, and nothing of what runs.
        plan["prices"] = training_prices(region)
        plan["inference_image"] = inference_image(region)
        for path in _files(folder):
            key = f"trainer/{plan['digest']}/{path.relative_to(folder).as_posix()}"
            s3.upload_file(str(path), target.artifact_bucket, key)
    digest: str = plan["digest"]
    for key, body in ((f"{LAUNCH_PLANS}{digest}.json", plan), (CURRENT_PLAN, {"digest": digest})):  # the pointer last
        s3.put_object(Bucket=target.artifact_bucket, Key=key, Body=json.dumps(body).encode())
    return digest
