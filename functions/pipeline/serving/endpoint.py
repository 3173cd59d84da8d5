"""An endpoint, and the base model on it that the adapters of several lines share."""

from typing import Any

from pipeline.aws import Aws, describe_if_any
from pipeline.serving import components, scaling
from pipeline.serving.served import MOST_RANK, VARIANT, Served
from pipeline.serving.waiting import DeploymentFailedError, NotYetError
from pipeline.settings import DeploySettings
from tunedrop import object_keys

# vLLM's image is built for CUDA 13; the other AMIs' drivers are older (CreateEndpointConfig, InferenceAmiVersion).
AMI = "al2023-ami-sagemaker-inference-gpu-4-1"
# Adapters in one batch, and adapters that wait in the host's memory.
MOST_ADAPTERS, MOST_WAITING_ADAPTERS = 8, 64
STARTUP_SECONDS = 3600


def prepare(wanted: Served, settings: DeploySettings, aws: Aws) -> None:
    """Make endpoint, base component and their scaling ready for a model. Raises NotYetError and DeploymentFailedError."""
    _make_endpoint(wanted, settings, aws)
    scaling.watch(wanted.component, settings, aws)
    if wanted.adapter:
        _make_model(wanted.endpoint, _base_container(wanted, settings), settings, aws)
        name = wanted.endpoint
        components.serve_model(name, name, name, scaling.alarms(name), lambda _: None, aws)
        scaling.scale(wanted.endpoint, settings, aws, endpoint=wanted.endpoint)
        scaling.wake_by(wanted.component, wanted.endpoint, aws)
        components.wake(wanted.endpoint, aws)


def serve(
    wanted: Served, component: str, settings: DeploySettings, aws: Aws, before: components.BeforeUpdate = lambda _: None
) -> None:
    """Let a component of the line serve the wanted model. Raises NotYetError until it does, and DeploymentFailedError."""
    if wanted.adapter:
        components.serve_adapter(component, wanted.endpoint, wanted.adapter, before, aws)
    else:
        container = {"ModelPackageName": wanted.package}
        _make_model(wanted.merged_name, container, settings, aws)
        components.serve_model(component, wanted.endpoint, wanted.merged_name, scaling.alarms(component), before, aws)
    components.wake(wanted.computes, aws)


def tear_down(endpoint: str, aws: Aws) -> None:
    """Delete an endpoint that no line uses, with its base component. Raises NotYetError until all is gone.

    Components come first: they would outlive their endpoint, and keep their names.
    """
    scaling.forget(endpoint, aws)
    components.remove(endpoint, aws)
    described = describe_if_any(aws.sagemaker.describe_endpoint, EndpointName=endpoint)
    if described:
        if described["EndpointStatus"] not in {"Creating", "Updating", "Deleting"}:
            aws.sagemaker.delete_endpoint(EndpointName=endpoint)
        raise NotYetError(f"the endpoint {endpoint} is deleted")
    if describe_if_any(aws.sagemaker.describe_endpoint_config, EndpointConfigName=endpoint):
        aws.sagemaker.delete_endpoint_config(EndpointConfigName=endpoint)
    delete_model(endpoint, aws)


def delete_model(name: str, aws: Aws) -> None:
    """Delete one of SageMaker's models, if there is one of this name. Its files stay."""
    if describe_if_any(aws.sagemaker.describe_model, ModelName=name):
        aws.sagemaker.delete_model(ModelName=name)


def _make_endpoint(wanted: Served, settings: DeploySettings, aws: Aws) -> None:
    """Create the endpoint with its configuration unless it is there. Raises NotYetError until it is in service."""
    name = wanted.endpoint
    described = describe_if_any(aws.sagemaker.describe_endpoint, EndpointName=name)
    if described is None:
        if describe_if_any(aws.sagemaker.describe_endpoint_config, EndpointConfigName=name) is None:
            aws.sagemaker.create_endpoint_config(**_endpoint_config(wanted, settings))
        aws.sagemaker.create_endpoint(EndpointName=name, EndpointConfigName=name, Tags=_tags(settings))
        raise NotYetError(f"the endpoint {name} is created")
    status = described["EndpointStatus"]
    if status in {"Failed", "OutOfService"}:
        aws.sagemaker.delete_endpoint(EndpointName=name)  # the next deployment begins with a new one
        raise DeploymentFailedError(f"the endpoint {name} failed: {described.get('FailureReason', 'no reason')}")
    if status != "InService":
        raise NotYetError(f"the endpoint {name} is {status}")


def _endpoint_config(wanted: Served, settings: DeploySettings) -> dict[str, Any]:
    """Return the CreateEndpointConfig request of an endpoint that hosts inference components, and may have no instance.

    https://docs.aws.amazon.com/sagemaker/latest/dg/endpoint-auto-scaling-zero-instances.html
    """
    variant = {
        "VariantName": VARIANT,
        "InstanceType": wanted.instance_type,
        "InitialInstanceCount": 1,
        "ManagedInstanceScaling": {
            "Status": "ENABLED",
            "MinInstanceCount": 0,
            "MaxInstanceCount": settings.endpoint_max_instances,
        },
        "RoutingConfig": {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"},
        "ModelDataDownloadTimeoutInSeconds": STARTUP_SECONDS,
        "ContainerStartupHealthCheckTimeoutInSeconds": STARTUP_SECONDS,
        "InferenceAmiVersion": AMI,
    }
    return {
        "EndpointConfigName": wanted.endpoint,
        "ExecutionRoleArn": settings.serving_role_arn,
        "ProductionVariants": [variant],
        **wanted.network,
        "Tags": _tags(settings),
    }


def _base_container(wanted: Served, settings: DeploySettings) -> dict[str, Any]:
    """Return the container of the base model: vLLM's image, which takes adapters while it runs.

    The variables are those of AWS's vLLM image: `SM_VLLM_*` are flags of vLLM (https://github.com/aws/
    deep-learning-containers, "LoRA Adapter Management"). A hub id is downloaded by the container.
    """
    environment = {
        "SM_VLLM_ENABLE_LORA": "true",
        "SM_VLLM_MAX_LORA_RANK": str(MOST_RANK),
        "SM_VLLM_MAX_LORAS": str(MOST_ADAPTERS),
        "SM_VLLM_MAX_CPU_LORAS": str(MOST_WAITING_ADAPTERS),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true",
    }
    container: dict[str, Any] = {"Image": wanted.image} if wanted.image else {}
    name, _, revision = wanted.model.partition("@")
    if "/" in name:
        return container | {"Environment": {"SM_VLLM_MODEL": name, "SM_VLLM_REVISION": revision} | environment}
    source = {
        "S3Uri": f"s3://{settings.data_bucket}/{object_keys.model_prefix(name)}",
        "S3DataType": "S3Prefix",
        "CompressionType": "None",
    }
    return container | {
        "Environment": {"SM_VLLM_MODEL": "/opt/ml/model"} | environment,
        "ModelDataSource": {"S3DataSource": source},
    }


def _make_model(name: str, container: dict[str, Any], settings: DeploySettings, aws: Aws) -> None:
    if describe_if_any(aws.sagemaker.describe_model, ModelName=name) is None:
        aws.sagemaker.create_model(
            ModelName=name,
            PrimaryContainer=container,
            ExecutionRoleArn=settings.serving_role_arn,
            Tags=_tags(settings),
        )


def _tags(settings: DeploySettings) -> list[dict[str, str]]:
    return [{"Key": "tunedrop:prefix", "Value": settings.job_prefix}]
