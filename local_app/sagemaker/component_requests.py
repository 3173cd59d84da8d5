"""Requests about inference components: the rules that botocore's model cannot express, and what a description shows.

https://docs.aws.amazon.com/sagemaker/latest/dg/realtime-endpoints-deploy-models.html and, for adapters,
https://docs.aws.amazon.com/sagemaker/latest/dg/realtime-endpoints-adapt.html
"""

from __future__ import annotations

from local_app.common import Json
from local_app.sagemaker.api import ServiceError, fitting
from local_app.sagemaker.models import HERE, refuse

# The states in SageMaker's messages: https://github.com/huggingface/skills and Terraform's
# aws_sagemaker_inference_component.
IN_PROGRESS = {"Creating": "CREATE_IN_PROGRESS", "Updating": "UPDATE_IN_PROGRESS", "Deleting": "DELETE_IN_PROGRESS"}


def is_adapter(component: Json) -> bool:
    """Return whether a component (or a request that creates one) is an adapter of another component."""
    return "BaseInferenceComponentName" in component.get("Specification", {})


def base_of(adapter: Json) -> str:
    """Return the name of the component that contains an adapter."""
    name: str = adapter["Specification"]["BaseInferenceComponentName"]
    return name


def check_new(request: Json, variant: Json) -> None:
    """Raise ServiceError if a CreateInferenceComponent request breaks AWS's rules; `variant` is the endpoint's."""
    refuse(_shared_rules(request))
    name, specification = request.get("VariantName", variant["VariantName"]), request["Specification"]
    if is_adapter(request):
        rules = [
            ("ArtifactUrl" not in specification.get("Container", {}), "An adapter needs Container.ArtifactUrl."),
            (
                bool({"ModelName", "ComputeResourceRequirements"} & specification.keys()),
                "An adapter uses its base's model and compute: omit ModelName and ComputeResourceRequirements.",
            ),
            ("RuntimeConfig" in request, "An adapter has the copies of its base: omit RuntimeConfig."),
        ]
    else:
        rules = [
            ("VariantName" not in request, "VariantName is required."),
            ("Container" in specification, f"{HERE} components with a ModelName, not with a Container of their own"),
            ("ModelName" not in specification, "Specification must have a ModelName."),
            ("ComputeResourceRequirements" not in specification, "Specification must have ComputeResourceRequirements."),
            ("RuntimeConfig" not in request, "RuntimeConfig is required."),
        ]
    refuse([*rules, (name != variant["VariantName"], f"Could not find variant {name} on the endpoint.")])


def check_update(request: Json, component: Json) -> None:
    """Raise ServiceError if an UpdateInferenceComponent request does not fit the component."""
    present, given = component["Specification"], request.get("Specification", {})
    base = "BaseInferenceComponentName"
    refuse(
        [
            *_shared_rules(request, required=False),
            (not {"Specification", "RuntimeConfig"} & request.keys(), "Specify a Specification or a RuntimeConfig."),
            (given.get(base) != present.get(base) and base in given, f"{base} cannot be changed."),
            (
                is_adapter(component) and "RuntimeConfig" in request,
                "An adapter has the copies of its base: omit RuntimeConfig.",
            ),
            (
                is_adapter(component) and bool({"ModelName", "ComputeResourceRequirements"} & given.keys()),
                "An adapter uses its base's model and compute: omit ModelName and ComputeResourceRequirements.",
            ),
            (is_adapter(component) and "DeploymentConfig" in request, f"{HERE} adapters: all copies change over at once"),
            (
                not is_adapter(component) and "Container" in given,
                f"{HERE} components with a ModelName, not with a Container",
            ),
        ]
    )


def _shared_rules(request: Json, *, required: bool = True) -> list[tuple[bool, str]]:
    environment = request.get("Specification", {}).get("Container", {}).get("Environment", {})
    return [
        ("Specifications" in request, f"{HERE} components with one Specification"),
        (required and "Specification" not in request, "Specification is required."),
        # InferenceComponentContainerSpecification: "We support up to 16 entries in the map."
        (len(environment) > 16, "The Environment of a component has at most 16 entries."),
    ]


def check_settled(component: Json, verb: str) -> None:
    """Raise ServiceError while a component changes: SageMaker then refuses to update and to delete it."""
    status = component["InferenceComponentStatus"]
    if state := IN_PROGRESS.get(status):
        if status == "Updating" and "Specification" not in component["Update"]:
            state = "UPDATE_RC_IN_PROGRESS"  # RC: runtime configuration
        arn = component["InferenceComponentArn"]
        raise ServiceError("ValidationException", f'Cannot {verb} inference component "{arn}" while it is in state {state}.')


def description(component: Json, ready_copies: int) -> Json:
    """Return DescribeInferenceComponent's response. During an update, it shows the version that the update replaces."""
    specification = fitting("InferenceComponentSpecificationSummary", component["Specification"])
    if container := component["Specification"].get("Container"):
        image = {"DeployedImage": {"SpecifiedImage": container["Image"]}} if "Image" in container else {}
        specification["Container"] = fitting("InferenceComponentContainerSpecificationSummary", container) | image
    copies = {"DesiredCopyCount": component.get("DesiredCopyCount", 0), "CurrentCopyCount": ready_copies}
    return (
        fitting("DescribeInferenceComponentOutput", component)
        | {"Specification": specification}
        | ({} if is_adapter(component) else {"RuntimeConfig": copies})
    )
