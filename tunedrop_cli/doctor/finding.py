"""The input and the output of a check of `tunedrop doctor`: a deployed stack and a finding."""

from functools import cache, cached_property, partial
from typing import Any

import msgspec

from tunedrop_cli.location import StackLocation

Json = dict[str, Any]


class Finding(msgspec.Struct, frozen=True):
    """Something wrong with a stack (`what`), and how to fix it (`do`).

    A finding with `trouble` keeps runs from working. A finding without it is a note.
    """

    code: str
    what: str
    do: str
    trouble: bool = True


class DeployedStack:
    """A stack whose resources exist: CloudFormation's description of it, and clients of its services."""

    def __init__(self, location: StackLocation, stack: Json):
        self.location = location
        self.client = cache(partial(location.connect, "client"))
        self.name: str = stack["StackName"]
        _, self.partition, _, self.region, self.account, _ = stack["StackId"].split(":", 5)
        self.parameters: dict[str, str] = {
            each["ParameterKey"]: each.get("ParameterValue", "") for each in stack.get("Parameters", [])
        }
        self.outputs: dict[str, str] = {each["OutputKey"]: each.get("OutputValue", "") for each in stack.get("Outputs", [])}

    @cached_property
    def _resources(self) -> list[Json]:
        pages = self.client("cloudformation").get_paginator("list_stack_resources").paginate(StackName=self.name)
        return [each for page in pages for each in page["StackResourceSummaries"] if each.get("PhysicalResourceId")]

    def resources(self, kind: str) -> dict[str, str]:
        """Return the physical ids of the stack's resources of a type, by logical id."""
        return {
            each["LogicalResourceId"]: each["PhysicalResourceId"] for each in self._resources if each["ResourceType"] == kind
        }
