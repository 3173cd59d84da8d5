"""Release the trainer, or submit one training job.

    python -m release --stack tunedrop                          # store a launch plan for a deployed stack
    python -m release --artifact-bucket B --role R --image I    # the same, without the outputs of a stack
    python -m release --stack tunedrop --submit --training-data cars.jsonl \\
        --hyperparameters '{"model-name": "Qwen/Qwen3-0.6B", "lora-rank": 32, "learning-rate": 5e-3}'   # start one job
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import ClientError
from sagemaker.core.training.configs import (
    Compute,
    InputData,
    StoppingCondition,
)

from release.plan import INSTANCE_TYPE, MAX_RUNTIME, ArtifactSession, model_trainer, release, stage
from release.target import Target, comma_separated, target_of_outputs
from tunedrop.config.parse import load_run_config

# Safe hyperparameters: ModelTrainer's driver writes them into a shell file without quoting.
SAFE_VALUE = re.compile(r"[A-Za-z0-9._:/+-]*")


def read_hyperparameters(text: str) -> dict[str, Any]:
    """Parse hyperparameters from JSON or from `@file`. Exits with the name of the key whose value is not safe."""
    hyperparameters = json.loads(Path(text[1:]).read_text() if text.startswith("@") else text)
    if not isinstance(hyperparameters, dict):
        sys.exit(f"--hyperparameters must be a JSON object, got {text[:100]}")
    for key, value in hyperparameters.items():
        if not SAFE_VALUE.fullmatch(key) or not SAFE_VALUE.fullmatch(str(value)):
            sys.exit(
                f"Hyperparameter '{key}' has the value {value!r}: only letters, digits and . _ : / + - are allowed, because "
                "SageMaker's driver passes the value through a shell. Put prompts and other text into --config."
            )
    return hyperparameters


def submit(target: Target, region: str, options: argparse.Namespace) -> str:
    """Start one training job without the pipeline, and return its name."""
    session = ArtifactSession(boto3.Session(region_name=region), target.artifact_bucket)
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
    """Return the target that a deployed stack's outputs describe. Exits with the remedy if stack or outputs are missing."""
    try:
        described = boto3.client("cloudformation", region_name=region).describe_stacks(StackName=stack)["Stacks"][0]
        return target_of_outputs({output["OutputKey"]: output["OutputValue"] for output in described.get("Outputs", [])})
    except ClientError as error:
        if error.response["Error"]["Code"] != "ValidationError":
            raise
        sys.exit(
            f"There is no stack '{stack}' in {region}. Deploy it with `make deploy`, or pass another --stack or --region."
        )
    except KeyError as missing:
        status = described["StackStatus"]
        sys.exit(f"The stack '{stack}' in {region} is {status} and has no output {missing}. Deploy it with `make deploy`.")


def _variable(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    # SageMaker's rules for a job's environment, from its service model.
    if not separator or not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]{0,511}", name) or len(value) > 512:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE with a value of at most 512 characters")
    return name, value


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m release", description=__doc__.split("\n")[0])
    parser.add_argument("--stack", help="take the following values from this stack's outputs; flags override them")
    parser.add_argument("--region", default=boto3.Session().region_name)
    parser.add_argument("--artifact-bucket")
    parser.add_argument(
        "--role", default=os.environ.get("SAGEMAKER_ROLE_ARN"), help="the role of the jobs; default: SAGEMAKER_ROLE_ARN"
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
        help="an environment variable of all jobs, such as CA_REPOSITORY_ARN or MLFLOW_EXPERIMENT_NAME; can be repeated",
    )
    direct = parser.add_argument_group("start one job directly")
    direct.add_argument("--submit", action="store_true")
    direct.add_argument("--hyperparameters", type=read_hyperparameters, default={}, help="JSON, or @file")
    direct.add_argument("--training-data", help="s3:// URI, file or folder")
    direct.add_argument("--models", help="s3:// URI or folder of the base model; by default model-name is a hub id")
    direct.add_argument("--config", type=Path, help="run config (YAML), for rewards and prompts")
    direct.add_argument("--instance-type", default=INSTANCE_TYPE)
    direct.add_argument("--max-runtime", type=int, default=MAX_RUNTIME, help="seconds")
    direct.add_argument("--spot", action="store_true")
    options = parser.parse_args(arguments)
    if not options.region:
        parser.error("no region: pass --region or set AWS_DEFAULT_REGION")
    if options.submit and not options.training_data:
        parser.error("--submit needs --training-data")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Release or submit. Prints the digest of the launch plan, or the name of the job."""
    options = _options(arguments)
    # The SDK checks the role with IAM and STS calls, which ignore a local endpoint and need permissions that the caller may
    # lack. The check is not needed: the role is the stack's own, and CreateTrainingJob checks it.
    os.environ.setdefault("SAGEMAKER_VALIDATE_ROLE", "false")
    outputs = target_of_stack(options.stack, options.region)._asdict() if options.stack else {}
    options.environment = {**outputs.get("environment", {}), **dict(options.environment)}
    flags = {name: getattr(options, name) for name in Target._fields if getattr(options, name, None)}
    missing = [name for name in ("artifact_bucket", "role", "image") if name not in outputs | flags]
    if missing:
        sys.exit(f"Pass --stack, or --{', --'.join(missing).replace('_', '-')}.")
    target = Target(**outputs | flags)
    result = submit(target, options.region, options) if options.submit else release(target, options.region)
    sys.stdout.write(result + "\n")


if __name__ == "__main__":
    main()
