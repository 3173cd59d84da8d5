"""Template, images, roles and plan agree in every region of the SageMaker SDK's registries."""

import pytest
from botocore.session import get_session
from sagemaker.core import image_uris
from template import load_template, of_type, resolve

from release.prices import inference_image

TEMPLATE = load_template()
IMAGE = "pytorch:2.13-cu133-amzn2023-sagemaker"
TRAINING = image_uris.config_for_framework("pytorch-amzn2023")["training"]["versions"]["2.13"]["registries"]
SERVING = image_uris.config_for_framework("vllm")["inference"]["versions"]
REGIONS = sorted(TRAINING)


ENDPOINTS = get_session().get_component("endpoint_resolver")


def known(region, **more):
    partition = ENDPOINTS.get_partition_for_region(region)
    return {
        "AWS::Region": region,
        "AWS::Partition": partition,
        "AWS::URLSuffix": ENDPOINTS.get_partition_dns_suffix(partition),
        "AWS::AccountId": "123456789012",
        "TrainingImageUri": "",
    } | more


def pulled(region, uri="", role="SageMakerRole"):
    """The repository that a role may pull from."""
    (policy,) = of_type(TEMPLATE, "AWS::IAM::Role")[role]["Policies"]
    (statement,) = [s for s in policy["PolicyDocument"]["Statement"] if "ecr:BatchGetImage" in s.get("Action", ())]
    return resolve(statement["Resource"], known(region, TrainingImageUri=uri), {"HasTrainingImage": bool(uri)})


def test_the_registry_has_the_regions_that_the_template_has():
    assert {region: entry["Account"] for region, entry in TEMPLATE["Mappings"]["TrainingImage"].items()} == TRAINING
    rule = TEMPLATE["Rules"]["TrainingImageIsInTheRegion"]
    ((assertion),) = rule["Assertions"]
    assert "RuleCondition" not in rule  # CloudFormation looks into the map whichever branch of an If is taken
    assert assertion["Assert"] == {"Fn::Contains": [REGIONS, {"Ref": "AWS::Region"}]}


@pytest.mark.parametrize("region", REGIONS)
def test_the_training_image_is_the_sdks_and_the_role_may_pull_it(region):
    uri = image_uris.retrieve("pytorch-amzn2023", region, "2.13", image_scope="training", instance_type="ml.g5.xlarge")
    output = TEMPLATE["Outputs"]["TrainingImageUri"]["Value"]
    assert resolve(output, known(region), {"HasTrainingImage": False}) == uri
    account, _, _, there = uri.split(".")[:4]
    assert there == region
    assert uri.endswith(f"/{IMAGE}")
    assert pulled(region) == f"arn:{known(region)['AWS::Partition']}:ecr:{region}:{account}:repository/pytorch"


@pytest.mark.parametrize("region", REGIONS)
def test_the_serving_image_is_the_newest_of_the_region_and_endpoints_may_pull_it(region):
    newest = [version for version, image in SERVING.items() if region in image["registries"]][-1]
    image = inference_image(region)
    assert image is not None
    registry, _, image = image.partition("/")
    assert registry.startswith(f"{SERVING[newest]['registries'][region]}.dkr.ecr.{region}.")
    assert image.startswith(f"vllm:{newest}-")
    account = registry.partition(".")[0]
    repository = f"arn:{known(region)['AWS::Partition']}:ecr:{region}:{account}:repository/vllm"
    assert pulled(region, role="ServingRole") == repository


def test_a_region_without_the_serving_image_has_none():
    assert inference_image("xx-nowhere-1") is None


@pytest.mark.parametrize(
    ("image", "repository"),
    [
        ("tunedrop:1", "tunedrop"),
        ("tunedrop", "tunedrop"),
        (f"tunedrop@sha256:{'0a' * 32}", "tunedrop"),
        (f"tunedrop:1@sha256:{'0a' * 32}", "tunedrop"),
        ("team/tunedrop:1", "team"),  # and what begins so: the template cannot take more apart
    ],
)
@pytest.mark.parametrize(("region", "suffix", "partition"), [
    ("eu-central-1", "amazonaws.com", "aws"),
    ("cn-north-1", "amazonaws.com.cn", "aws-cn"),
])  # fmt: skip
def test_the_role_may_pull_an_image_of_ones_own_by_tag_and_by_digest(region, suffix, partition, image, repository):
    uri = f"210987654321.dkr.ecr.{region}.{suffix}/{image}"
    assert pulled(region, uri) == f"arn:{partition}:ecr:{region}:210987654321:repository/{repository}*"
