"""Release the trainer: what the Lambdas start jobs with, made by SageMaker's own ModelTrainer.

    python -m trainer.release --stack tunedrop                      # a launch plan for a deployed stack
    python -m trainer.release --artifact-bucket B --role R --image I    # the same without reading a stack
    python -m trainer.release --stack tunedrop --submit --training-data cars.jsonl \\
        --hyperparameters '{"model-name": "Qwen/Qwen3-0.6B", "lora-rank": 32, "learning-rate": 5e-3}'   # one job, now

The SageMaker SDK is too big for a Lambda. So it builds the CreateTrainingJob requests here, once per release, and they are
captured before they are sent. The plan is content-addressed: code, drivers and requests hash to a digest, which is in
every key, so that a run started with one release is not changed by the next.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from sagemaker.core.helper.session_helper import Session
from sagemaker.core.shapes import OutputDataConfig
from sagemaker.core.training.configs import (
    CheckpointConfig,
    Compute,
    InputData,
    MetricDefinition,
    Networking,
    SourceCode,
    StoppingCondition,
)
from sagemaker.train import ModelTrainer

import trainer
import tunedrop
from trainer.job import MODULES
from trainer.target import Target, comma_separated, target_of_outputs
from tunedrop.layout import CURRENT_PLAN, LAUNCH_PLANS
from tunedrop.run_config import load_run_config

# What may travel as a hyperparameter: ModelTrainer's driver writes them into a shell file without quoting.
SAFE_VALUE = re.compile(r"[A-Za-z0-9._:/+-]*")
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


class _Session(Session):  # type: ignore[misc] # the SDK is untyped
    """A session on the artifact bucket, which exists: the SDK would look whether it does, and create it if not."""

    def __init__(self, boto_session: boto3.Session, bucket: str):
        super().__init__(boto_session, sagemaker_config=NO_TELEMETRY, default_bucket_prefix="runs")
        self._artifact_bucket = bucket

    def default_bucket(self) -> str:
        return self._artifact_bucket


class _StagingSession(_Session):
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
    return {"digest": name, "created_by": f"tunedrop {version('tunedrop')}", **filled}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def inference_image(region: str) -> str | None:
    """Return the image that serves a tuned model on an endpoint: AWS's container of vLLM, the newest that the region has.

    Regions and versions are those of the SDK's registry. None for a region without any: its runs are published all the same.
    """
    from sagemaker.core import image_uris

    versions = image_uris.config_for_framework("vllm")["inference"]["versions"]
    there = [version for version, image in versions.items() if region in image["registries"]]
    if not there:
        return None
    # The instance type only says that there is a GPU.
    uri: str = image_uris.retrieve("vllm", region, there[-1], image_scope="inference", instance_type="ml.g5.xlarge")
    return uri


def training_prices(region: str) -> dict[str, Any] | None:
    """Return what training costs in a region, `{"dated", "region", "on_demand": {instance type: USD an hour}}`.

    By AWS's Price List API (https://docs.aws.amazon.com/aws-cost-management/latest/APIReference/API_pricing_GetProducts.html),
    which few regions of a partition serve for all of them. None where it cannot be asked, or has no prices in USD: a plan
    without prices works, and says so.
    """
    session = boto3.Session()
    serving = session.get_available_regions("pricing", session.get_partition_for_region(region))
    if "AWS_ENDPOINT_URL" in os.environ or not serving:  # a stand-in for AWS has no price list either
        return None
    few_tries = Config(connect_timeout=5, retries={"total_max_attempts": 2})
    client = session.client("pricing", region_name=serving[-1], config=few_tries)
    wanted = {"regionCode": region, "component": "Training"}
    filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in wanted.items()]
    prices: dict[str, float] = {}
    try:
        for page in client.get_paginator("get_products").paginate(ServiceCode="AmazonSageMaker", Filters=filters):
            for product in map(json.loads, page.get("PriceList", [])):
                # The region's short name stands before it; profilers and reserved capacity are called otherwise.
                name = re.fullmatch(r"(?:\w+-)?Train:(ml\..+)", product["product"]["attributes"].get("usagetype", ""))
                terms = product["terms"].get("OnDemand", {}).values()
                hourly = [each for term in terms for each in term["priceDimensions"].values() if each["unit"] == "Hrs"]
                if name and hourly and "USD" in hourly[0]["pricePerUnit"]:
                    prices[name[1]] = float(hourly[0]["pricePerUnit"]["USD"])
    except (BotoCoreError, ClientError) as error:
        sys.stderr.write(f"Prices could not be read, so receipts will not say what a run costs: {error}\n")
    return {"dated": datetime.now(UTC).date().isoformat(), "region": region, "on_demand": prices} if prices else None


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


def read_hyperparameters(text: str) -> dict[str, Any]:
    """Parse hyperparameters given as JSON, or as `@file`. Exits with the key's name for what cannot travel safely."""
    given = json.loads(Path(text[1:]).read_text() if text.startswith("@") else text)
    if not isinstance(given, dict):
        sys.exit(f"--hyperparameters must be a JSON object, got {text[:100]}")
    for key, value in given.items():
        if not SAFE_VALUE.fullmatch(key) or not SAFE_VALUE.fullmatch(str(value)):
            sys.exit(
                f"Hyperparameter '{key}' has the value {value!r}: only letters, digits and . _ : / + - are allowed, since "
                "SageMaker's driver passes it through a shell. Put prompts and other text into --config."
            )
    return given


def submit(target: Target, region: str, options: argparse.Namespace) -> str:
    """Start one training job directly, without the pipeline; return its name."""
    session = _Session(boto3.Session(region_name=region), target.artifact_bucket)
    channels = {"training": options.training_data, "models": options.models}
    with tempfile.TemporaryDirectory() as scratch:
        if options.config:
            hyperparameter = options.hyperparameters.get("model-name")
            config = load_run_config(options.config.read_bytes(), default_model=hyperparameter or "")
            channels["run"] = str(Path(scratch, "config.json"))
            Path(channels["run"]).write_text(config.model_dump_json())
        inputs = [
            InputData(channel_name=name, data_source=source if source.startswith("s3://") else str(Path(source).resolve()))
            for name, source in channels.items()
            if source
        ]
        limits = {"max_runtime_in_seconds": options.max_runtime}
        if options.spot:
            limits["max_wait_time_in_seconds"] = 2 * options.max_runtime
        with chdir(scratch):
            stage(Path("code"))
            job = model_trainer(
                session,
                target,
                "train",
                compute=Compute(
                    instance_type=options.instance_type, instance_count=1, enable_managed_spot_training=options.spot
                ),
                stopping_condition=StoppingCondition(**limits),
                hyperparameters={"max-runtime": options.max_runtime} | options.hyperparameters,
            )
            names: list[str] = []
            session.boto_session.events.register(
                "provide-client-params.sagemaker.CreateTrainingJob",
                lambda params, **_: names.append(params["TrainingJobName"]),
            )
            job.train(input_data_config=inputs, wait=False, logs=False)
    return names[0]


def target_of_stack(stack: str, region: str) -> Target:
    """Read a deployed stack's outputs. Exits with what to do where there is no such stack, or no outputs yet."""
    try:
        described = boto3.client("cloudformation", region_name=region).describe_stacks(StackName=stack)["Stacks"][0]
        return target_of_outputs({output["OutputKey"]: output["OutputValue"] for output in described.get("Outputs", [])})
    except ClientError as error:
        if error.response["Error"]["Code"] != "ValidationError":
            raise
        sys.exit(f"There is no stack '{stack}' in {region}. Deploy it with `make deploy`, or give --stack and --region.")
    except KeyError as missing:
        status = described["StackStatus"]
        sys.exit(f"The stack '{stack}' in {region} is {status} and has no output {missing}. Deploy it with `make deploy`.")


def _variable(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    # The service model's own rules for a job's environment.
    if not separator or not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]{0,511}", name) or len(value) > 512:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE, with a value of at most 512 characters")
    return name, value


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trainer.release", description=__doc__.split("\n")[0])
    parser.add_argument("--stack", help="read what follows from this stack's outputs; flags win over them")
    parser.add_argument("--region", default=boto3.Session().region_name)
    parser.add_argument("--artifact-bucket")
    parser.add_argument(
        "--role", default=os.environ.get("SAGEMAKER_ROLE_ARN"), help="the jobs' role (or SAGEMAKER_ROLE_ARN)"
    )
    parser.add_argument("--image", help="the container image of the jobs")
    parser.add_argument("--job-prefix")
    parser.add_argument("--kms-key")
    parser.add_argument("--subnets", type=comma_separated, help="comma-separated")
    parser.add_argument("--security-groups", type=comma_separated, help="comma-separated")
    parser.add_argument("--network-isolation", action="store_true")
    parser.add_argument("--encrypt-traffic", action="store_true", help="between the instances of one job")
    parser.add_argument(
        "--environment",
        type=_variable,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable of every job, beside the stack's own: CA_REPOSITORY_ARN, MLFLOW_TRACKING_URI; may be given again",
    )
    direct = parser.add_argument_group("start one job directly")
    direct.add_argument("--submit", action="store_true")
    direct.add_argument("--hyperparameters", type=read_hyperparameters, default={}, help="JSON, or @file")
    direct.add_argument("--training-data", help="s3:// URI, file or folder")
    direct.add_argument("--models", help="s3:// URI or folder of the base model; without it model-name is a hub id")
    direct.add_argument("--config", type=Path, help="run config (YAML), for rewards and prompts")
    direct.add_argument("--instance-type", default=INSTANCE_TYPE)
    direct.add_argument("--max-runtime", type=int, default=MAX_RUNTIME, help="seconds")
    direct.add_argument("--spot", action="store_true")
    options = parser.parse_args(arguments)
    if not options.region:
        parser.error("which region? give --region or set AWS_DEFAULT_REGION")
    if options.submit and not options.training_data:
        parser.error("--submit needs --training-data")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Release, or submit; prints the digest or the job's name."""
    options = _options(arguments)
    # The SDK would check the role by IAM and STS calls that who releases may not be allowed, and that ignore a local
    # endpoint. The role is the stack's own, and CreateTrainingJob checks it anyway.
    os.environ.setdefault("SAGEMAKER_VALIDATE_ROLE", "false")
    known = target_of_stack(options.stack, options.region)._asdict() if options.stack else {}
    options.environment = {**known.get("environment", {}), **dict(options.environment)}
    given = {name: getattr(options, name) for name in Target._fields if getattr(options, name, None)}
    missing = [name for name in ("artifact_bucket", "role", "image") if name not in known | given]
    if missing:
        sys.exit(f"Give --stack, or --{', --'.join(missing).replace('_', '-')}.")
    target = Target(**known | given)
    started = submit(target, options.region, options) if options.submit else release(target, options.region)
    sys.stdout.write(started + "\n")


if __name__ == "__main__":
    main()
