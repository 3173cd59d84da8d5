"""What MlflowTrackingUri gives to the jobs and to the functions that publish: nothing, or MLflow's API alone."""

import re

import pytest
from permissions import ACCOUNT, REGION, Permission, allows
from template import Json, load_template, resolve

from release.target import ENVIRONMENT, target_of_outputs

TEMPLATE = load_template()
APP = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:mlflow-app/app-ABC"
SERVER = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:mlflow-tracking-server/my-mlflow-server"
OUTPUTS = {"ArtifactBucket": "a", "SageMakerRoleArn": "r", "TrainingImageUri": "i", "JobPrefix": "p"}


def granted(name: str, uri: str) -> list[Json]:
    """The statements of a role or policy that are about MLflow, in a stack with this parameter."""
    properties = TEMPLATE["Resources"][name]["Properties"]
    policy = properties.get("PolicyDocument") or properties["Policies"][0]["PolicyDocument"]
    known = {"MlflowTrackingUri": uri, "AWS::Partition": "aws"}
    found = [each["Fn::If"] for each in policy["Statement"] if "Fn::If" in each]
    return [resolve(each[1], known) for each in found if each[0] == "HasMlflow" and uri]


@pytest.mark.parametrize("name", ["SageMakerRole", "PublishPolicy"])
@pytest.mark.parametrize("uri", ["", "https://mlflow.example.com"])
def test_a_server_with_a_url_needs_no_permission(name, uri):
    assert TEMPLATE["Conditions"]["HasMlflow"] == {"Fn::Not": [{"Fn::Equals": [{"Ref": "MlflowTrackingUri"}, ""]}]}
    assert [statement["Resource"] for statement in granted(name, uri)] == (
        ["arn:aws:sagemaker:::mlflow-none"] if uri else []
    )


@pytest.mark.parametrize("arn", [APP, SERVER])
def test_a_managed_server_may_be_written_to_and_no_other(arn):
    jobs, functions = granted("SageMakerRole", arn), granted("PublishPolicy", arn)
    for action in ("sagemaker-mlflow:CreateRun", "sagemaker-mlflow:LogBatch", "sagemaker:CallMlflowAppApi"):
        assert allows(jobs, Permission("jobs", action, arn))
        assert not allows(jobs, Permission("jobs", action, arn + "2"))
    assert allows(functions, Permission("functions", "sagemaker-mlflow:LogBatch", arn))
    assert not allows(functions, Permission("functions", "sagemaker-mlflow:CreateRun", arn))
    assert "*" not in str([jobs, functions])
    assert "Delete" not in str([jobs, functions])


def test_the_parameter_is_in_the_jobs_environment_and_without_it_the_target_is_as_it_was():
    assert TEMPLATE["Outputs"]["MlflowTrackingUri"]["Value"] == {"Ref": "MlflowTrackingUri"}
    assert ENVIRONMENT["MLFLOW_TRACKING_URI"] == "MlflowTrackingUri"
    assert target_of_outputs(OUTPUTS | {"MlflowTrackingUri": APP}).environment == {"MLFLOW_TRACKING_URI": APP}
    assert target_of_outputs(OUTPUTS | {"MlflowTrackingUri": ""}) == target_of_outputs(OUTPUTS)
    assert target_of_outputs(OUTPUTS).environment == {}


def test_isolated_jobs_cannot_log():
    rule = TEMPLATE["Rules"]["IsolatedJobsCallNobody"]["Assertions"][1]
    assert rule["Assert"] == {"Fn::Equals": [{"Ref": "MlflowTrackingUri"}, ""]}


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        *((each, True) for each in ("", APP, SERVER, "http://127.0.0.1:5000", "https://mlflow.example.com/team")),
        *(
            (each, False)
            for each in ("mlflow", "https://user:password@a.org", f"{APP}*", "arn:aws:s3:::bucket", "sqlite:///a")
        ),
    ],
)
def test_the_parameter_takes_a_server_and_no_password(value, fits):
    assert bool(re.fullmatch(TEMPLATE["Parameters"]["MlflowTrackingUri"]["AllowedPattern"], value)) == fits
