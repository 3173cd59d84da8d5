"""Release and submit against moto's S3 and SageMaker, in process."""

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.stub import Stubber
from botocore.validate import validate_parameters
from moto import mock_aws

import trainer
from release import __main__ as command
from release import plan as launch_plans
from release.prices import instance_prices
from release.target import Target, differences
from trainer.job import MODULES

REGION = "eu-central-1"
TARGET = Target(
    artifact_bucket="artifacts",
    role="arn:aws:iam::123456789012:role/tunedrop-sagemaker",
    image="763104351884.dkr.ecr.eu-central-1.amazonaws.com/pytorch:2.13-cu133-amzn2023-sagemaker",
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
        patch.setenv("AWS_ENDPOINT_URL_PRICING", "http://127.0.0.1:9")  # nobody listens there
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
        digest = launch_plans.release(TARGET, REGION)
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
    plan = launch_plans.build_plan(target, REGION, tmp_path)
    for kind in MODULES:
        assert plan[kind]["VpcConfig"] == {"Subnets": ["s-1"], "SecurityGroupIds": ["g-1"]}
        assert plan[kind]["OutputDataConfig"]["KmsKeyId"] == target.kms_key
        assert plan[kind]["EnableNetworkIsolation"] is plan[kind]["EnableInterContainerTrafficEncryption"] is False
        check_request(plan[kind] | {"TrainingJobName": "a"})
        assert list(differences(target, plan[kind])) == []
        assert {name for name, _, _ in differences(TARGET, plan[kind])} == {
            "KmsKeyArn", "VpcSubnetIds", "VpcSecurityGroupIds",
        }  # fmt: skip


def test_isolation_and_encrypted_traffic_go_into_the_requests_without_a_network_of_ones_own(tmp_path):
    target = TARGET._replace(network_isolation=True, encrypt_traffic=True)
    plan = launch_plans.build_plan(target, REGION, tmp_path)
    for kind in MODULES:
        assert plan[kind]["EnableNetworkIsolation"] is plan[kind]["EnableInterContainerTrafficEncryption"] is True
        assert "VpcConfig" not in plan[kind]
        assert list(differences(target, plan[kind])) == []


def test_what_rewards_may_do_goes_into_the_jobs_environment(tmp_path, plan):
    environment = {"REWARD_FUNCTION_ARNS": "arn:aws:lambda:eu-central-1:1:function:a,b", "ALLOW_CODE_REWARDS": "true"}
    allowed = launch_plans.build_plan(TARGET._replace(environment=environment), REGION, tmp_path)
    for kind in MODULES:
        assert allowed[kind]["Environment"] == environment
        check_request(allowed[kind] | {"TrainingJobName": "a"})
        assert plan[kind].get("Environment", {}) == {}
        assert list(differences(TARGET._replace(environment=environment), allowed[kind])) == []
        has = {"RewardFunctionArns": environment["REWARD_FUNCTION_ARNS"], "AllowCodeRewards": "true"}
        assert list(differences(TARGET, allowed[kind])) == [(name, "", value) for name, value in has.items()]
    assert allowed["digest"] != plan["digest"]  # what a run may do is part of what it is


@pytest.mark.parametrize("kind", MODULES)
def test_what_the_containers_script_executes_is_the_job(bucket, plan, kind):
    folder = f"trainer/{plan['digest']}/{kind}/"
    script = bucket[f"{folder}sm_drivers/sm_train.sh"].decode()
    # The last thing that the shell does: what comes after an exec never runs.
    assert re.findall(r"\bexec .*", script) == [f"exec python -m trainer.job {kind}"]
    code = {key.removeprefix(f"{folder}code/") for key in bucket}
    assert {"requirements.txt", "trainer/job.py", "tunedrop/config/model.py"} <= code
    assert bucket[f"{folder}code/requirements.txt"] == (REPOSITORY / "trainer/requirements.lock").read_bytes()
    assert not [key for key in bucket if key.endswith(".pyc") or "__pycache__" in key]


@pytest.mark.parametrize(
    ("compat", "expected"),
    [
        (None, "/usr/lib"),
        ("export LD_LIBRARY_PATH=/usr/local/cuda/compat:$LD_LIBRARY_PATH", "/usr/local/cuda/compat:/usr/lib"),
        # One that ends with what `set -e` and a trap take for an error, half-way and at its end.
        ("false\nexport LD_LIBRARY_PATH=/compat:$LD_LIBRARY_PATH\n[ -f /not/there ]", "/compat:/usr/lib"),
    ],
)
def test_the_images_cuda_libraries_are_there_for_the_job_and_the_job_is_the_scripts_process(
    tmp_path, bucket, plan, compat, expected
):
    """The script's own lines from its command on, with a script of the image that may be there, and a python that tells."""
    script = bucket[f"trainer/{plan['digest']}/train/sm_drivers/sm_train.sh"].decode()
    command = script[script.index("CMD=$(cat") :].replace("/usr/local/bin/start_cuda_compat.sh", str(tmp_path / "compat.sh"))
    assert command != script[script.index("CMD=$(cat") :]
    if compat is not None:
        (tmp_path / "compat.sh").write_text(f"{compat}\n")
    (tmp_path / "python").write_text('#!/bin/sh\necho "$$ $LD_LIBRARY_PATH $*"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LD_LIBRARY_PATH": "/usr/lib"}
    program = f"set -e\ntrap 'echo TRAPPED; exit 7' ERR\necho $$\nset -x\n{command}"
    done = subprocess.run(["bash", "-c", program], env=environment, capture_output=True, text=True, check=False)
    pid, *_, result = done.stdout.splitlines()
    assert (done.returncode, result) == (0, f"{pid} {expected} -m trainer.job train")
    assert "TRAPPED" not in done.stdout


def test_one_commit_in_two_folders_gives_one_digest(plan, tmp_path):
    """Another checkout, released in another process, with compiled files lying about."""
    for package in ("trainer", "release", "functions/tunedrop"):
        shutil.copytree(REPOSITORY / package, tmp_path / "elsewhere" / Path(package).name)
    program = (
        "import sys, json; from pathlib import Path; from release import plan, target; "
        "built = plan.build_plan(target.Target(*json.loads(sys.argv[1])), sys.argv[2], Path(sys.argv[3])); "
        "sys.stdout.write(plan.__file__ + ' ' + built['digest'])"
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
    assert launch_plans.build_plan(TARGET, REGION, tmp_path / "plan")["digest"] != plan["digest"]


def test_stack_outputs_and_flags(monkeypatch, capsys):
    monkeypatch.setattr(command, "release", lambda target, region: f"{target} {region}")
    outputs = {
        "ArtifactBucket": "artifacts",
        "SageMakerRoleArn": TARGET.role,
        "TrainingImageUri": TARGET.image,
        "JobPrefix": "mine",
        "VpcSubnetIds": "s-1,s-2",
        "VpcSecurityGroupIds": "g-1",
        "KmsKeyArn": "",
        "EventBusName": "mine-bus",
        "EnableNetworkIsolation": "true",
        "EnableInterContainerTrafficEncryption": "false",
        "RewardFunctionArns": "",
        "RewardJudgeModel": "amazon.nova-lite-v1:0",
        "RewardHttpHosts": "a.example.com,b.example.com",
        "RewardHttpSecretArn": "arn:aws:secretsmanager:us-east-1:123456789012:secret:judges-AbCdEf",
        "AllowCodeRewards": "false",
        "AllowPythonRewards": "true",
    }
    stack = {
        "StackName": "mine",
        "StackStatus": "CREATE_COMPLETE",
        "CreationTime": "2026-01-01T00:00:00Z",
        "Outputs": [{"OutputKey": name, "OutputValue": value} for name, value in outputs.items()],
    }
    cloudformation = boto3.client("cloudformation", REGION)
    monkeypatch.setattr(boto3, "client", lambda service, region_name: cloudformation)
    with Stubber(cloudformation) as stub:
        stub.add_response("describe_stacks", {"Stacks": [stack]}, {"StackName": "mine"})
        given = ["--image", "other", "--environment", "CA_REPOSITORY_ARN=arn:b", "--environment", "EMPTY="]
        command.main(["--stack", "mine", "--region", REGION, *given])
    expected = TARGET._replace(job_prefix="mine", image="other", subnets=["s-1", "s-2"], security_groups=["g-1"])
    environment = {
        "REWARD_JUDGE_MODEL": "amazon.nova-lite-v1:0",
        "REWARD_HTTP_HOSTS": "a.example.com,b.example.com",
        "REWARD_HTTP_SECRET_ARN": "arn:aws:secretsmanager:us-east-1:123456789012:secret:judges-AbCdEf",
        "ALLOW_PYTHON_REWARDS": "true",
        "EVENT_BUS": "mine-bus",
        "CA_REPOSITORY_ARN": "arn:b",
        "EMPTY": "",
    }
    expected = expected._replace(network_isolation=True, environment=environment)
    assert capsys.readouterr().out == f"{expected} {REGION}\n"
    monkeypatch.delenv("SAGEMAKER_ROLE_ARN", raising=False)
    with pytest.raises(SystemExit, match="Pass --stack, or --role, --image"):
        command.main(["--region", REGION, "--artifact-bucket", "artifacts"])


def test_a_stack_that_is_not_deployed_is_said(monkeypatch):
    """`sam deploy` ends well, too, where its change set was refused: the stack is in review then, without outputs."""
    cloudformation = boto3.client("cloudformation", REGION)
    monkeypatch.setattr(boto3, "client", lambda service, region_name: cloudformation)
    stack = {"StackName": "mine", "StackStatus": "REVIEW_IN_PROGRESS", "CreationTime": "2026-01-01T00:00:00Z"}
    with Stubber(cloudformation) as stub:
        stub.add_response("describe_stacks", {"Stacks": [stack]}, {"StackName": "mine"})
        with pytest.raises(SystemExit, match="is REVIEW_IN_PROGRESS and has no output 'ArtifactBucket'"):
            command.main(["--stack", "mine", "--region", REGION])
        stub.add_client_error("describe_stacks", "ValidationError", "Stack with id mine does not exist")
        with pytest.raises(SystemExit, match="There is no stack 'mine' in eu-central-1"):
            command.main(["--stack", "mine", "--region", REGION])


# ---- prices ----------------------------------------------------------------------------------------------------------


def product(usage_type: str, usd: str, unit: str = "Hrs", terms: str = "OnDemand", component: str = "Training") -> str:
    """A product of the service AmazonSageMaker as GetProducts gives it: a JSON text."""
    price = {"SKU.T.R": {"unit": unit, "rateCode": "SKU.T.R", "pricePerUnit": {"USD": usd}, "beginRange": "0"}}
    attributes = {
        "servicecode": "AmazonSageMaker",
        "regionCode": REGION,
        "component": component,
        "instanceName": usage_type.partition("ml.")[2] and "ml." + usage_type.partition("ml.")[2],
        "usagetype": usage_type,
    }
    described = {"productFamily": "ML Instance", "attributes": attributes, "sku": "SKU"}
    return json.dumps(
        {"product": described, "serviceCode": "AmazonSageMaker", "terms": {terms: {"SKU.T": {"priceDimensions": price}}}}
    )


@pytest.fixture
def price_list(monkeypatch) -> Iterator[tuple[list[Any], list[Any]]]:
    """A server for the Price List API: the requests it got, and the answers (status, body) it is to give."""
    requests: list[Any] = []
    answers: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, body = answers.pop(0)
            raw = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_PRICING", f"http://127.0.0.1:{server.server_port}")
        yield requests, answers
        server.shutdown()


def test_prices_are_those_of_instances_by_the_hour(price_list):
    requests, answers = price_list
    offered = [
        product("EUC1-Train:ml.g5.xlarge", "1.7600000000"),
        product("EUC1-TrainDebugger:ml.g5.xlarge", "9.0"),
        product("EUC1-Train:ml.g5.2xlarge", "99.0", terms="Reserved"),
        product("EUC1-Train:VolumeUsage.gp2", "0.14", unit="GB-Mo"),
    ]
    answers += [
        (200, {"FormatVersion": "aws_v1", "PriceList": offered, "NextToken": "more"}),
        (200, {"FormatVersion": "aws_v1", "PriceList": [product("Train:ml.p5.48xlarge", "63.296")]}),
        (200, {"FormatVersion": "aws_v1", "PriceList": [product("EUC1-Host:ml.g5.xlarge", "1.9", component="Hosting")]}),
    ]
    prices = instance_prices(REGION)
    assert prices is not None
    assert prices["on_demand"] == {"ml.g5.xlarge": 1.76, "ml.p5.48xlarge": 63.296}
    assert prices["hosting"] == {"ml.g5.xlarge": 1.9}
    assert prices["region"] == REGION
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", prices["dated"])
    assert requests[0]["ServiceCode"] == "AmazonSageMaker"
    wanted = [{each["Field"]: each["Value"] for each in request["Filters"]} for request in requests]
    assert wanted == [{"regionCode": REGION, "component": name} for name in ("Training", "Training", "Hosting")]
    assert {each["Type"] for each in requests[0]["Filters"]} == {"TERM_MATCH"}
    assert requests[1]["NextToken"] == "more"


@pytest.mark.parametrize(
    "answer", [(400, {"__type": "AccessDeniedException", "Message": "not authorized"}), (200, {"FormatVersion": "aws_v1"})]
)
def test_a_plan_without_prices_is_a_plan(price_list, answer, capsys):
    price_list[1].append(answer)
    assert instance_prices(REGION) is None
    assert ("not authorized" in capsys.readouterr().err) == (answer[0] == 400)


def test_a_stand_in_for_aws_is_not_asked(price_list, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://127.0.0.1:4566")
    assert instance_prices(REGION) is None
    assert price_list[0] == []


def test_the_plan_says_whether_prices_are_known(plan):
    assert plan["prices"] is None  # nobody listened


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
    command.main([*flags, "--submit", "--hyperparameters", json.dumps(given), *chosen])
    name = capsys.readouterr().out.strip()
    job = boto3.client("sagemaker", REGION).describe_training_job(TrainingJobName=name)
    assert job["HyperParameters"] == {
        "max-runtime": "21600",
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
        command.read_hyperparameters(json.dumps(given))


def test_hyperparameters_from_a_file(tmp_path):
    path = tmp_path / "hps.json"
    path.write_text('{"learning-rate": 5e-3}')
    assert command.read_hyperparameters(f"@{path}") == {"learning-rate": 0.005}


@pytest.mark.parametrize("given", ["NAME", "=value", "A B=c", "1A=b", f"NAME={513 * 'a'}"])
def test_a_variable_that_sagemaker_would_refuse_is_refused(given, capsys):
    with pytest.raises(SystemExit):
        command.main([*FLAGS, "--environment", given])
    assert "is not NAME=VALUE with a value of at most 512 characters" in capsys.readouterr().err
