"""Release and submit against moto's S3 and SageMaker, in process."""

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import boto3
import pytest
from botocore.stub import Stubber
from botocore.validate import validate_parameters
from moto import mock_aws

import trainer
from trainer import release
from trainer.job import MODULES

REGION = "eu-central-1"
TARGET = release.Target(
    artifact_bucket="artifacts",
    role="arn:aws:iam::123456789012:role/tunedrop-sagemaker",
    image="763104351884.dkr.ecr.eu-central-1.amazonaws.com/pytorch-training:2.9.0-gpu-py312",
)
FLAGS = ["--region", REGION, "--artifact-bucket", TARGET.artifact_bucket, "--role", TARGET.role, "--image", TARGET.image]
REPOSITORY = Path(trainer.__file__).parents[1]


@pytest.fixture(autouse=True, scope="module")
def environment():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_SAGEMAKER", "AWS_PROFILE", "AWS_CA_BUNDLE"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("SAGEMAKER_VALIDATE_ROLE", "false")
        yield


@pytest.fixture
def aws():
    with mock_aws():
        make_bucket()
        yield


def make_bucket():
    place = {"LocationConstraint": REGION}
    boto3.client("s3", REGION).create_bucket(Bucket="artifacts", CreateBucketConfiguration=place)


def objects():
    s3 = boto3.client("s3", REGION)
    listed = s3.list_objects_v2(Bucket="artifacts").get("Contents", [])
    return {each["Key"]: s3.get_object(Bucket="artifacts", Key=each["Key"])["Body"].read() for each in listed}


def check_request(request):
    shape = boto3.client("sagemaker", REGION).meta.service_model.operation_model("CreateTrainingJob").input_shape
    validate_parameters(request, shape)


@pytest.fixture(scope="module")
def bucket():
    """What a release leaves in the artifact bucket: its objects by key."""
    with mock_aws():
        make_bucket()
        digest = release.release(TARGET, REGION)
        stored = objects()
    assert json.loads(stored["launch_plans/current.json"]) == {"digest": digest}
    return stored


@pytest.fixture(scope="module")
def plan(bucket):
    digest = json.loads(bucket["launch_plans/current.json"])["digest"]
    plan = json.loads(bucket[f"launch_plans/{digest}.json"])
    assert plan["digest"] == digest
    return plan


@pytest.mark.parametrize("kind", MODULES)
def test_a_plan_is_sagemakers_request_without_a_run(plan, kind):
    request = plan[kind]
    check_request(request | {"TrainingJobName": "a"})
    assert request["HyperParameters"] == {}
    assert request["RoleArn"] == TARGET.role
    assert request["OutputDataConfig"]["CompressionType"] == "NONE"
    assert len(request["AlgorithmSpecification"]["MetricDefinitions"]) <= 40
    places = [each["DataSource"]["S3DataSource"]["S3Uri"] for each in request["InputDataConfig"]]
    assert places == [f"s3://artifacts/trainer/{plan['digest']}/{kind}/{name}/" for name in ("code", "sm_drivers")]
    assert "VpcConfig" not in request


def test_network_and_key_go_into_the_requests(tmp_path):
    target = TARGET._replace(kms_key="arn:aws:kms:eu-central-1:123456789012:key/k", subnets=["s-1"], security_groups=["g-1"])
    plan = release.build_plan(target, REGION, tmp_path)
    for kind in MODULES:
        assert plan[kind]["VpcConfig"] == {"Subnets": ["s-1"], "SecurityGroupIds": ["g-1"]}
        assert plan[kind]["OutputDataConfig"]["KmsKeyId"] == target.kms_key
        check_request(plan[kind] | {"TrainingJobName": "a"})


@pytest.mark.parametrize("kind", MODULES)
def test_what_the_containers_script_executes_is_the_job(bucket, plan, kind):
    folder = f"trainer/{plan['digest']}/{kind}/"
    script = bucket[f"{folder}sm_drivers/sm_train.sh"].decode()
    assert re.findall(r"^exec .*", script, re.MULTILINE) == [f"exec python -m trainer.job {kind}"]
    code = {key.removeprefix(f"{folder}code/") for key in bucket}
    assert {"requirements.txt", "trainer/job.py", "tunedrop/run_config.py"} <= code
    assert not [key for key in bucket if key.endswith(".pyc") or "__pycache__" in key]


def test_one_commit_in_two_folders_gives_one_digest(plan, tmp_path):
    """Another checkout, released in another process, with compiled files lying about."""
    for package in ("trainer", "functions/tunedrop"):
        shutil.copytree(REPOSITORY / package, tmp_path / "elsewhere" / Path(package).name)
    program = (
        "import sys, json; from pathlib import Path; from trainer import release; "
        "plan = release.build_plan(release.Target(*json.loads(sys.argv[1])), sys.argv[2], Path(sys.argv[3])); "
        "sys.stdout.write(release.__file__ + ' ' + plan['digest'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, json.dumps(TARGET), REGION, str(tmp_path / "plan")],
        cwd=tmp_path / "elsewhere",
        env={"PATH": "/usr/bin:/bin", "SAGEMAKER_VALIDATE_ROLE": "false", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    where, digest = result.stdout.split()
    assert where.startswith(str(tmp_path))
    assert digest == plan["digest"]


def test_changed_source_gives_another_digest(plan, tmp_path, monkeypatch):
    source = shutil.copytree(REPOSITORY / "trainer", tmp_path / "trainer")
    (source / "job.py").write_text((source / "job.py").read_text() + "# changed\n")
    monkeypatch.setattr(trainer, "__path__", [str(source)])
    assert release.build_plan(TARGET, REGION, tmp_path / "plan")["digest"] != plan["digest"]


def test_stack_outputs_and_flags(monkeypatch, capsys):
    monkeypatch.setattr(release, "release", lambda target, region: f"{target} {region}")
    outputs = {
        "ArtifactBucket": "artifacts",
        "SageMakerRoleArn": TARGET.role,
        "TrainingImageUri": TARGET.image,
        "JobPrefix": "mine",
        "VpcSubnetIds": "s-1,s-2",
        "VpcSecurityGroupIds": "g-1",
        "KmsKeyArn": "",
    }
    stack = {
        "StackName": "mine",
        "StackStatus": "CREATE_COMPLETE",
        "CreationTime": "2026-01-01T00:00:00Z",
        "Outputs": [{"OutputKey": name, "OutputValue": value} for name, value in outputs.items()],
    }
    cloudformation = boto3.client("cloudformation", REGION)
    monkeypatch.setattr(release.boto3, "client", lambda service, region_name: cloudformation)
    with Stubber(cloudformation) as stub:
        stub.add_response("describe_stacks", {"Stacks": [stack]}, {"StackName": "mine"})
        release.main(["--stack", "mine", "--region", REGION, "--image", "other"])
    expected = TARGET._replace(job_prefix="mine", image="other", subnets=["s-1", "s-2"], security_groups=["g-1"])
    assert capsys.readouterr().out == f"{expected} {REGION}\n"
    monkeypatch.delenv("SAGEMAKER_ROLE_ARN", raising=False)
    with pytest.raises(SystemExit, match="Give --stack, or --role, --image"):
        release.main(["--region", REGION, "--artifact-bucket", "artifacts"])


def test_submit_starts_a_job_without_the_pipeline(aws, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SAGEMAKER_ROLE_ARN", TARGET.role)
    monkeypatch.chdir(tmp_path)
    Path("cars.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    Path("run.yaml").write_text("system_prompt: It's $(here)\n")
    given = {
        "model-name": "org/model",
        "max-seq-length": 2048,
        "lora-rank": 32,
        "num-train-epochs": 3,
        "learning-rate": 5e-3,
    }
    flags = [flag for flag in FLAGS if flag not in {"--role", TARGET.role}]
    chosen = ["--training-data", "cars.jsonl", "--models", "s3://data/models/m/", "--config", "run.yaml", "--spot"]
    release.main([*flags, "--submit", "--hyperparameters", json.dumps(given), *chosen])
    name = capsys.readouterr().out.strip()
    job = boto3.client("sagemaker", REGION).describe_training_job(TrainingJobName=name)
    assert job["HyperParameters"] == {
        "model-name": "org/model",
        "max-seq-length": "2048",
        "lora-rank": "32",
        "num-train-epochs": "3",
        "learning-rate": "0.005",
    }
    channels = {each["ChannelName"]: each["DataSource"]["S3DataSource"]["S3Uri"] for each in job["InputDataConfig"]}
    assert set(channels) == {"training", "models", "run", "code", "sm_drivers"}
    assert channels["models"] == "s3://data/models/m/"
    stored = objects()
    assert stored[channels["training"].removeprefix("s3://artifacts/")] == Path("cars.jsonl").read_bytes()
    config = json.loads(stored[channels["run"].removeprefix("s3://artifacts/")])
    assert config["system_prompt"] == "It's $(here)"
    # Keys that the stack's role may read and write.
    assert all(key.startswith("runs/") for key in stored)
    assert job["OutputDataConfig"]["S3OutputPath"] == "s3://artifacts/runs/tunedrop-submit/training/"
    assert re.fullmatch(r"s3://artifacts/runs/.*/checkpoints", job["CheckpointConfig"]["S3Uri"])
    assert job["RoleArn"] == TARGET.role


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": "it's"}, "'prompt' has the value \"it's\""),
        ({"lora-rank": "$(reboot)"}, "'lora-rank' has the value '\\$\\(reboot\\)'"),
        ({"a b": 1}, "'a b' has the value 1"),
        ([1], "must be a JSON object"),
    ],
)
def test_hyperparameters_that_a_shell_could_misread_are_refused(given, message):
    with pytest.raises(SystemExit, match=message):
        release.read_hyperparameters(json.dumps(given))


def test_hyperparameters_from_a_file(tmp_path):
    path = tmp_path / "hps.json"
    path.write_text('{"learning-rate": 5e-3}')
    assert release.read_hyperparameters(f"@{path}") == {"learning-rate": 0.005}


def test_requirements_are_the_versions_tested_here():
    lines = (REPOSITORY / "trainer/requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert "torch" not in pins
    assert pins == {name: version(name) for name in pins}


def test_requirements_resolve_for_the_training_images_python():
    """AWS's PyTorch images bring Python 3.12 or newer; nothing may need compiling there."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--target", "unused"]
    choice = ["--python-version", "3.12", "--only-binary=:all:", "-r", str(REPOSITORY / "trainer/requirements.txt")]
    subprocess.run([*command, *choice], check=True, capture_output=True, timeout=120)
