"""The rules of template.yaml, and the built functions under AWS's own Lambda runtime emulator."""

from typing import Any, NamedTuple

import pytest
import yaml

from local_app.stack import PROJECT

# What the events of `events/` stand for.
VALUES = {
    "DataBucket": "tunedrop-databucket-1kq2w3e4r5t6y",
    "JobPrefix": "tunedrop",
    "Id": "7fb2c419",
    "SageMakerRole.Arn": "arn:aws:iam::111122223333:role/tunedrop-SageMakerRole-1A2B3C4D5E6F",
}


class Rule(NamedTuple):
    """A rule of the template: which function it invokes for which events."""

    function: str
    pattern: dict[str, Any]


class _Loader(yaml.SafeLoader):
    """Reads CloudFormation's short forms, with the values above for what they refer to."""


def _intrinsic(loader: _Loader, tag: str, node: yaml.Node) -> Any:
    if tag == "Sub" and isinstance(node, yaml.SequenceNode):  # the text, and its own names: the model package group
        node = node.value[0]
    if not isinstance(node, yaml.ScalarNode):
        return None  # nothing that a pattern is made of
    text = str(loader.construct_scalar(node))
    for name, value in VALUES.items():
        text = text.replace("${" + name + "}", value)
    return VALUES.get(text, text)


_Loader.add_multi_constructor("!", _intrinsic)


@pytest.fixture(scope="session")
def rules() -> list[Rule]:
    template = yaml.load((PROJECT / "template.yaml").read_text(), Loader=_Loader)
    return [
        Rule(resource["Properties"]["Handler"].split(".")[0], event["Properties"]["Pattern"])
        for resource in template["Resources"].values()
        if resource["Type"] == "AWS::Serverless::Function"
        for event in resource["Properties"]["Events"].values()
        if event["Type"] == "EventBridgeRule"
    ]
