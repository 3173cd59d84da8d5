"""The jobs' role is minimal: it allows every call of training and test jobs, and no other call."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from botocore.httpsession import URLLib3Session
from fake_stack import ARTIFACTS, BUS, DATA, PLAN, SETTINGS, TRAINED_RUN, plan_request
from msgspec import structs
from permissions import ACCOUNT, KEY, REGION, Permission, allows, needless, of_request, policies

from pipeline.jobs.answers import Opponents
from pipeline.jobs.plan import job_request
from tunedrop.config.model import ResolvedConfig
from tunedrop.object_keys import line_key

ROLE = "SageMakerRole"
FOLDER = "runs/cars-0123456789ab"
SCRIPT = (
    "echo x > /opt/ml/model/training.json; if [ -d /opt/ml/checkpoints ]; then echo x > /opt/ml/checkpoints/a; fi; echo done"
)


# What the trainer says while it trains; what it may say beside that, nothing.
ALERT = Permission(
    ROLE,
    "events:PutEvents",
    f"arn:aws:events:{REGION}:{ACCOUNT}:event-bus/{BUS}",
    {"events:source": "tunedrop", "events:detail-type": "Training Alert"},
)


def made_by_sagemaker() -> list[Permission]:
    """What SageMaker does in the role's name, and the emulator does not: images, metrics, keys, network, large uploads.

    https://docs.aws.amazon.com/sagemaker/latest/dg/sagemaker-roles.html#sagemaker-roles-createtrainingjob-perms
    """
    image = f"arn:aws:ecr:{REGION}:763104351884:repository/pytorch"
    logs = f"arn:aws:logs:{REGION}:{ACCOUNT}:log-group:/aws/sagemaker/TrainingJobs:log-stream:job/algo-1-1"
    # Subnets and security groups may be another account's, which shares them.
    network = [
        f"arn:aws:ec2:{REGION}:{ACCOUNT}:network-interface/*",
        f"arn:aws:ec2:{REGION}:210987654321:subnet/s-1",
        f"arn:aws:ec2:{REGION}:210987654321:security-group/g-1",
    ]
    ecr = ("BatchCheckLayerAvailability", "BatchGetImage", "GetDownloadUrlForLayer")
    keys = ("Encrypt", "Decrypt", "GenerateDataKey", "DescribeKey", "CreateGrant")
    looks = ("DhcpOptions", "NetworkInterfaces", "SecurityGroups", "Subnets", "Vpcs")
    changes = ("CreateNetworkInterfacePermission", "DeleteNetworkInterface", "DeleteNetworkInterfacePermission")
    return [
        Permission(ROLE, "ecr:GetAuthorizationToken", "*"),
        *(Permission(ROLE, f"ecr:{action}", image) for action in ecr),
        Permission(ROLE, "logs:DescribeLogStreams", logs),
        Permission(ROLE, "cloudwatch:PutMetricData", "*", {"cloudwatch:namespace": "/aws/sagemaker/TrainingJobs"}),
        *(Permission(ROLE, f"kms:{action}", KEY) for action in keys),
        *(Permission(ROLE, "ec2:CreateNetworkInterface", resource) for resource in network),
        *(Permission(ROLE, f"ec2:{action}", network[0]) for action in changes),
        *(Permission(ROLE, f"ec2:Describe{what}", "*") for what in looks),
        # Weights go up in parts; an upload that fails is taken back.
        Permission(ROLE, "s3:AbortMultipartUpload", f"arn:aws:s3:::{ARTIFACTS}/{FOLDER}/training/job/output/model/a"),
    ]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> set[Permission]:
    """The permissions of the requests with temporary credentials, which are the role's."""
    found: set[Permission] = set()
    send = URLLib3Session.send

    def noting(session: Any, request: Any) -> Any:
        authorization = request.headers.get("Authorization", b"")
        text = authorization.decode() if isinstance(authorization, bytes) else authorization
        signer = re.search("Credential=([^/]+)/", text)
        if signer and signer[1].startswith("ASIA"):  # what STS gives out
            found.update(of_request(ROLE, request.method, request.url, request.headers, request.body))
        return send(session, request)

    monkeypatch.setattr(URLLib3Session, "send", noting)
    return found


def request(kind: str) -> dict[str, Any]:
    """A run's job, as the Lambda makes it of a launch plan, but for what the container executes."""
    plan = plan_request(kind)
    code = {"S3DataType": "S3Prefix", "S3Uri": f"s3://{ARTIFACTS}/trainer/{PLAN}/{kind}/code/"}
    plan["InputDataConfig"] = [{"ChannelName": "code", "DataSource": {"S3DataSource": code}}]
    plan["AlgorithmSpecification"] |= {"ContainerArguments": ["-c", SCRIPT]}
    instances = {"InstanceType": "ml.g5.4xlarge"}
    config = ResolvedConfig(model="base", compute={"instance_type": ["ml.g5.4xlarge"], "spot": True})
    run = structs.replace(TRAINED_RUN, start="cars-ba9876543210")
    line = Opponents({"suite": "lines/cars/suite/1/", "answers_base": "lines/cars/answers/1/"}, {"line-version": "1"})
    return job_request({kind: plan}, kind, run, config, SETTINGS, instances=instances, opponents=line)


def test_every_call_of_jobs_is_allowed_and_every_permission_is_needed(
    start: Callable[..., Any], endpoint: str, s3: Any, recorded: set[Permission]
) -> None:
    for bucket in (DATA, ARTIFACTS):
        s3.create_bucket(Bucket=bucket)
    for key in ("config.json", "train.jsonl", "inference_tests.json"):
        s3.put_object(Bucket=ARTIFACTS, Key=f"{FOLDER}/input/{key}", Body=b"x")
    for kind in ("train", "test"):
        s3.put_object(Bucket=ARTIFACTS, Key=f"trainer/{PLAN}/{kind}/code/run.sh", Body=b"x")
    for key in (
        f"{FOLDER}/checkpoints/checkpoint-1/a",
        f"{FOLDER}/start/a",
        "lines/cars/suite/1/a",
        "lines/cars/answers/1/a",
    ):
        s3.put_object(Bucket=ARTIFACTS, Key=key, Body=b"x")
    s3.put_object(Bucket=DATA, Key="models/base/config.json", Body=b"x")
    local = start()
    for kind in ("train", "test"):
        job = request(kind)
        local.client.create_training_job(**job)
        local.until(lambda name=job["TrainingJobName"]: local.describe(name)["TrainingJobStatus"] != "InProgress", 60)
        assert local.describe(job["TrainingJobName"])["TrainingJobStatus"] == "Completed"
    assert {p.action for p in recorded} >= {"s3:GetObject", "s3:PutObject", "s3:ListBucket", "logs:PutLogEvents"}
    needed = [*recorded, *made_by_sagemaker(), ALERT]
    given = policies()[ROLE]
    assert [permission for permission in needed if not allows(given, permission)] == []
    assert needless(given, needed) == []


@pytest.mark.parametrize(
    ("action", "resource"),
    [
        ("s3:GetObject", f"{DATA}/training_data/cars.jsonl"),
        ("s3:PutObject", f"{DATA}/models/base/config.json"),
        ("s3:PutObject", f"{ARTIFACTS}/trainer/{PLAN}/train/code/run.sh"),
        ("s3:PutObject", f"{ARTIFACTS}/launch_plans/current.json"),
        ("s3:PutObject", f"{ARTIFACTS}/{FOLDER}/input/train.jsonl"),
        ("s3:PutObject", f"{ARTIFACTS}/{FOLDER}/start/adapter_model.safetensors"),
        ("s3:PutObject", f"{ARTIFACTS}/{line_key('cars', 'suite/0/suite.json')}"),
        ("s3:PutObject", f"{ARTIFACTS}/{line_key('cars', 'answers/0/job.jsonl')}"),
        ("s3:PutObject", f"{ARTIFACTS}/{FOLDER}/result.json"),
        ("s3:PutObject", f"{ARTIFACTS}/{FOLDER}/validation.json"),
        ("s3:GetObject", f"{ARTIFACTS}/{FOLDER}/inference/job/output/model/inference.json"),
        ("s3:DeleteObject", f"{ARTIFACTS}/{FOLDER}/training/job/output/model/a"),
    ],
)
def test_what_a_job_may_not_touch(action: str, resource: str) -> None:
    assert not allows(policies()[ROLE], Permission(ROLE, action, f"arn:aws:s3:::{resource}"))


@pytest.mark.parametrize(
    ("image", "repository", "allowed"),
    [
        (
            "111122223333.dkr.ecr.eu-west-1.amazonaws.com/my/image:1",
            "arn:aws:ecr:eu-west-1:111122223333:repository/my",
            True,
        ),
        ("111122223333.dkr.ecr.eu-west-1.amazonaws.com/my:1", "arn:aws:ecr:eu-west-1:111122223333:repository/other", False),
    ],
)
def test_a_given_image_may_be_pulled_and_no_other(
    monkeypatch: pytest.MonkeyPatch, image: str, repository: str, allowed: bool
) -> None:
    monkeypatch.setattr("permissions.IMAGE", image)
    pull = Permission(ROLE, "ecr:BatchGetImage", repository)
    assert allows(policies(has_image=True)[ROLE], pull) == allowed
