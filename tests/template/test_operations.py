"""Alarms, dashboard and docs/operations.md say the same, and alarms arrive."""

import json
import re

import pytest
from template import TEMPLATE, Json, load_template, of_type, resolve

TEMPLATE_DATA = load_template()
ALARMS = of_type(TEMPLATE_DATA, "AWS::CloudWatch::Alarm")
FUNCTIONS = of_type(TEMPLATE_DATA, "AWS::Serverless::Function")
OPERATIONS = (TEMPLATE.parent / "docs" / "operations.md").read_text()
KNOWN = {
    "AWS::StackName": "mine",
    "JobPrefix": "ours",
    "AWS::Partition": "aws",
    "AWS::Region": "eu-central-1",
    "AWS::AccountId": "123456789012",
    "DeadLetterQueue.QueueName": "mine-DeadLetterQueue",
}


def names_of(resources: dict[str, Json], name: str, serves: bool) -> set[str]:
    """The names of alarms or functions of a stack that serves models, or of one that does not."""
    return {
        resolve(properties[name], KNOWN)
        for logical_id, properties in resources.items()
        if serves or TEMPLATE_DATA["Resources"][logical_id].get("Condition") != "ServesModels"
    }


def names(serves: bool = True) -> set[str]:
    return names_of(ALARMS, "AlarmName", serves)


def test_every_function_the_dead_letters_and_old_runs_have_an_alarm() -> None:
    watched = {
        dimension["Value"]["Ref"]
        for alarm in ALARMS.values()
        if (alarm["Namespace"], alarm["MetricName"]) == ("AWS/Lambda", "Errors")
        for dimension in alarm["Dimensions"]
    }
    assert watched == FUNCTIONS.keys()
    assert ALARMS["DeadLettersAlarm"]["Dimensions"][0]["Value"] == {"Fn::GetAtt": ["DeadLetterQueue", "QueueName"]}
    assert ALARMS["OldRunsAlarm"]["Threshold"] == {"Ref": "RunAgeLimitHours"}


@pytest.mark.parametrize("name", ALARMS)
def test_an_alarm_is_announced_when_it_comes_and_when_it_goes(name: str) -> None:
    assert ALARMS[name]["AlarmActions"] == ALARMS[name]["OKActions"] == [{"Ref": "AlarmTopic"}]
    assert ALARMS[name]["AlarmName"]["Fn::Sub"].startswith("${AWS::StackName}-")  # what the topic's policy lets in
    assert "docs/operations.md" in ALARMS[name]["AlarmDescription"]


def test_cloudwatch_can_publish_to_the_alarm_topic() -> None:
    """It cannot under alias/aws/sns, whose policy nobody can change: no alarm would arrive, and nothing would say so."""
    encryption = of_type(TEMPLATE_DATA, "AWS::SNS::Topic")["AlarmTopic"]["KmsMasterKeyId"]
    assert encryption == {"Fn::If": ["HasKmsKey", {"Ref": "KmsKeyArn"}, {"Ref": "AWS::NoValue"}]}
    (document,) = [block for block in re.findall(r"```json\n(.*?)```", OPERATIONS, re.S) if "kms:" in block]
    statements = json.loads(document)["Statement"]
    services = {s["Principal"].get("Service"): s for s in statements}
    assert services["cloudwatch.amazonaws.com"]["Action"] == ["kms:Decrypt", "kms:GenerateDataKey*"]
    assert any("logs." in str(service) for service in services)


def test_the_metric_of_old_runs_is_the_one_that_reconcile_emits() -> None:
    alarm = ALARMS["OldRunsAlarm"]
    assert (
        alarm["Namespace"]
        == TEMPLATE_DATA["Globals"]["Function"]["Environment"]["Variables"]["POWERTOOLS_METRICS_NAMESPACE"]
    )
    source = (TEMPLATE.parent / "functions" / "pipeline" / "stages" / "reconcile.py").read_text()
    assert f'name="{alarm["MetricName"]}"' in source
    assert alarm["Dimensions"] == [{"Name": "service", "Value": "reconcile"}]


@pytest.mark.parametrize("serves", [True, False])
def test_the_dashboard_is_json_and_shows_every_alarm_and_function(serves: bool) -> None:
    (dashboard,) = of_type(TEMPLATE_DATA, "AWS::CloudWatch::Dashboard").values()
    body = json.loads(resolve(dashboard["DashboardBody"], KNOWN, {"ServesModels": serves}))
    shown = {arn.rpartition(":")[2] for widget in body["widgets"] for arn in widget["properties"].get("alarms", [])}
    assert shown == names(serves)
    functions = names_of(FUNCTIONS, "FunctionName", serves)
    rows = [row for widget in body["widgets"] for row in widget["properties"].get("metrics", [])]
    for metric in ("Errors", "Duration"):
        assert {row[3] for row in rows if row[:2] == ["AWS/Lambda", metric]} == functions
    searches = [row[0]["expression"] for row in rows if isinstance(row[0], dict)]
    assert len(searches) == (6 if serves else 0)
    assert all(search.startswith("SEARCH('{") and "InferenceComponentName=ours'" in search for search in searches)
    assert all(widget["width"] + widget["x"] <= 24 for widget in body["widgets"])


def test_operations_tells_of_every_alarm_parameter_and_state() -> None:
    for name in names():
        assert f"`{name.replace('mine-', '<stack>-', 1)}`" in OPERATIONS, name
    endpoints = [parameter for parameter in TEMPLATE_DATA["Parameters"] if parameter.startswith("Endpoint")]
    isolation = ["EnableNetworkIsolation", "EnableInterContainerTrafficEncryption"]
    for parameter in ("KmsKeyArn", "VpcSubnetIds", *isolation, *endpoints):
        assert f"`{parameter}`" in OPERATIONS
    from pipeline.runs.states import RunState

    assert {state for state in RunState if f"`{state}`" not in OPERATIONS} == set()
