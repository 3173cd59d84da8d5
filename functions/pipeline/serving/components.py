"""Inference components: made, updated, woken and deleted. Every function looks first, and repeating it changes nothing.

SageMaker sends no event about an inference component (its events: https://docs.aws.amazon.com/sagemaker/latest/dg/
automating-sagemaker-with-eventbridge.html), so a component that is not ready raises NotYetError.
"""

from collections.abc import Callable
from typing import Any

from pipeline.aws import Aws, describe_if_any
from pipeline.serving.served import VARIANT
from pipeline.serving.waiting import DeploymentFailedError, NotYetError

# A reservation, not a limit, of the memory that SageMaker keeps for components on an instance, which is far below the
# instance's own: an ml.g5.xlarge takes 1,024 MB and refuses 4,096.
MEMORY_MB = 1024
# Loading a large model takes long; one hour is the maximum of both (InferenceComponentStartupParameters).
STARTUP = {"ModelDataDownloadTimeoutInSeconds": 3600, "ContainerStartupHealthCheckTimeoutInSeconds": 3600}
SETTLING = {"Creating", "Updating", "Deleting"}
ROLLING_WAIT_SECONDS = 60

# Gets the reason why the last update failed, empty if none did. Raises an error to prevent another update.
BeforeUpdate = Callable[[str], None]


def describe(name: str, aws: Aws) -> dict[str, Any] | None:
    """Return DescribeInferenceComponent's answer, None for an unknown component."""
    return describe_if_any(aws.sagemaker.describe_inference_component, InferenceComponentName=name)


def serve_model(name: str, endpoint: str, model: str, alarms: list[str], before: BeforeUpdate, aws: Aws) -> None:
    """Let a component serve one of SageMaker's models. Raises NotYetError until it does, and DeploymentFailedError.

    Another model replaces the present one copy by copy; an alarm meanwhile brings the present one back
    (https://docs.aws.amazon.com/sagemaker/latest/dg/deployment-guardrails-rolling.html).
    """
    creation = {
        "VariantName": VARIANT,
        "Specification": {
            "ModelName": model,
            "StartupParameters": STARTUP,
            "ComputeResourceRequirements": {"NumberOfAcceleratorDevicesRequired": 1, "MinMemoryRequiredInMb": MEMORY_MB},
        },
        "RuntimeConfig": {"CopyCount": 1},
    }
    update = {
        "Specification": {"ModelName": model},
        "DeploymentConfig": {
            "RollingUpdatePolicy": {
                "MaximumBatchSize": {"Type": "COPY_COUNT", "Value": 1},
                "WaitIntervalInSeconds": ROLLING_WAIT_SECONDS,
            },
            "AutoRollbackConfiguration": {"Alarms": [{"AlarmName": alarm} for alarm in alarms]},
        },
    }
    _serve(name, endpoint, creation, update, before, aws)


def serve_adapter(name: str, base: str, adapter: str, before: BeforeUpdate, aws: Aws) -> None:
    """Let a component serve an adapter on a base component, which has its endpoint's name. Raises as `serve_model`.

    `adapter` is the S3 URI of the adapter's archive
    (https://docs.aws.amazon.com/sagemaker/latest/dg/realtime-endpoints-adapt.html).
    """
    container = {"Container": {"ArtifactUrl": adapter}}
    creation = {"Specification": {"BaseInferenceComponentName": base} | container}
    _serve(name, base, creation, {"Specification": container}, before, aws)


def wake(name: str, aws: Aws) -> None:
    """Give a component a copy if it sleeps. Raises NotYetError until one runs."""
    present = describe(name, aws)
    if present is None:
        raise NotYetError(f"the inference component {name} is gone")
    copies = present.get("RuntimeConfig", {})
    if copies.get("CurrentCopyCount", 0) > 0:
        return
    if present["InferenceComponentStatus"] == "InService" and copies.get("DesiredCopyCount", 0) == 0:
        aws.sagemaker.update_inference_component_runtime_config(
            InferenceComponentName=name, DesiredRuntimeConfig={"CopyCount": 1}
        )
    raise NotYetError(f"the inference component {name} wakes up")


def remove(name: str, aws: Aws) -> None:
    """Delete a component. Raises NotYetError until it is gone.

    SageMaker refuses the deletion of a component that is created or updated.
    """
    present = describe(name, aws)
    if present is None:
        return
    if present["InferenceComponentStatus"] not in SETTLING:
        aws.sagemaker.delete_inference_component(InferenceComponentName=name)
    raise NotYetError(f"the inference component {name} is deleted")


def _serve(
    name: str, endpoint: str, creation: dict[str, Any], update: dict[str, Any], before: BeforeUpdate, aws: Aws
) -> None:
    """Create a component, or update it, until it serves what `creation` describes.

    A component cannot move to another endpoint, and an adapter cannot become a model: such a component is deleted first, and
    so is one that failed with something else.
    """
    present = describe(name, aws)
    if present is None:
        aws.sagemaker.create_inference_component(InferenceComponentName=name, EndpointName=endpoint, **creation)
        raise NotYetError(f"the inference component {name} is created")
    status = present["InferenceComponentStatus"]
    if status in SETTLING:
        raise NotYetError(f"the inference component {name} is {status}")
    kind, content = _content(present["Specification"])
    wanted = _content(creation["Specification"])
    served = present["EndpointName"] == endpoint and (kind, content) == wanted
    if status == "Failed" and served:
        raise DeploymentFailedError(f"the inference component {name} failed: {present.get('FailureReason', 'no reason')}")
    if status == "Failed" or present["EndpointName"] != endpoint or kind != wanted[0]:
        remove(name, aws)
    if not served:
        before(present.get("FailureReason", ""))
        aws.sagemaker.update_inference_component(InferenceComponentName=name, **update)
        raise NotYetError(f"the inference component {name} is updated")


def _content(specification: dict[str, Any]) -> tuple[str, str]:
    """Return what a component serves: an adapter's archive, or a model's name."""
    if "BaseInferenceComponentName" in specification:
        return "adapter", specification["Container"]["ArtifactUrl"]
    return "model", specification["ModelName"]
