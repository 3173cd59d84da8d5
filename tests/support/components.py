"""Helpers for the tests of endpoints: a container that starts at once, and requests in the pipeline's form."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import boto3
import psutil
from botocore.config import Config

Json = dict[str, Any]
ROLE = "arn:aws:iam::123456789012:role/SageMakerRole"
IMAGE = "763104351884.dkr.ecr.us-east-1.amazonaws.com/vllm:0.11.2-sagemaker"
CONTAINER = (sys.executable, str(Path(__file__).with_name("vllm_container.py")))
ENVIRONMENT = {"SM_VLLM_MODEL": "/opt/ml/model", "SM_VLLM_ENABLE_LORA": "true", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true"}
VARIANT = {
    "VariantName": "AllTraffic",
    "InstanceType": "ml.g5.xlarge",
    "InitialInstanceCount": 1,
    "ManagedInstanceScaling": {"Status": "ENABLED", "MinInstanceCount": 0, "MaxInstanceCount": 2},
    "InferenceAmiVersion": "al2023-ami-sagemaker-inference-gpu-4-1",
}
COMPUTE = {"MinMemoryRequiredInMb": 1024, "NumberOfAcceleratorDevicesRequired": 1}


def is_alive(pid: int) -> bool:
    """Return whether there is a process with this id that has not ended."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Serving:
    """Makes models, endpoints and components in an emulator, and asks them."""

    def __init__(self, local: Any, scaling: Any) -> None:
        self.local, self.client, self.s3, self.scaling = local, local.client, local.s3, scaling
        config = Config(retries={"total_max_attempts": 1}, max_pool_connections=50)
        self.runtime = boto3.client("sagemaker-runtime", endpoint_url=local.url, config=config)

    def model(self, name: str, version: str = "base", **environment: str) -> str:
        """A model whose only file is its version."""
        self.s3.put_object(Bucket="art", Key=f"models/{name}/version", Body=version)
        self.client.create_model(ModelName=name, PrimaryContainer=self.container(f"s3://art/models/{name}/", **environment))
        return name

    @staticmethod
    def container(uri: str, **environment: str) -> Json:
        source = {"S3Uri": uri, "S3DataType": "S3Prefix", "CompressionType": "None"}
        return {
            "Image": IMAGE,
            "Environment": ENVIRONMENT | environment,
            "ModelDataSource": {"S3DataSource": source},
        }

    def endpoint(self, name: str = "ep", **variant: Any) -> str:
        """An endpoint in service."""
        config = f"{name}-config"
        self.client.create_endpoint_config(
            EndpointConfigName=config, ExecutionRoleArn=ROLE, ProductionVariants=[VARIANT | variant]
        )
        self.client.create_endpoint(EndpointName=name, EndpointConfigName=config)
        self.local.until(lambda: self.client.describe_endpoint(EndpointName=name)["EndpointStatus"] == "InService")
        return name

    def base(self, name: str = "base", *, endpoint: str = "ep", model: str = "", copies: int = 1, wait: bool = True) -> str:
        """A component with a model."""
        self.client.create_inference_component(
            InferenceComponentName=name,
            EndpointName=endpoint,
            VariantName="AllTraffic",
            Specification={"ModelName": model or self.model(f"{name}-model"), "ComputeResourceRequirements": COMPUTE},
            RuntimeConfig={"CopyCount": copies},
        )
        if wait:
            assert self.settled(name)["InferenceComponentStatus"] == "InService", self.describe(name)
        return name

    def archive(self, version: str, key: str = "") -> str:
        """An adapter in S3."""
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w:gz") as tar:
            member = tarfile.TarInfo("version")
            member.size = len(version)
            tar.addfile(member, io.BytesIO(version.encode()))
        key = key or f"adapters/{version}.tar.gz"
        self.s3.put_object(Bucket="art", Key=key, Body=data.getvalue())
        return f"s3://art/{key}"

    def adapter(self, name: str, version: str, *, base: str = "base", endpoint: str = "ep", wait: bool = True) -> str:
        """An adapter component."""
        self.client.create_inference_component(
            InferenceComponentName=name,
            EndpointName=endpoint,
            Specification={
                "BaseInferenceComponentName": base,
                "Container": {"ArtifactUrl": self.archive(version)},
            },
        )
        if wait:
            assert self.settled(name)["InferenceComponentStatus"] == "InService", self.describe(name)
        return name

    def describe(self, name: str) -> Json:
        return dict(self.client.describe_inference_component(InferenceComponentName=name))

    def settled(self, name: str, seconds: float = 15) -> Json:
        """Wait until a component has a status that lasts."""
        self.local.until(lambda: self.describe(name)["InferenceComponentStatus"] in ("InService", "Failed"), seconds)
        return self.describe(name)

    def update(self, name: str, **changes: Any) -> Json:
        self.client.update_inference_component(InferenceComponentName=name, **changes)
        return self.settled(name)

    def scale(self, name: str, copies: int) -> Json:
        self.client.update_inference_component_runtime_config(
            InferenceComponentName=name, DesiredRuntimeConfig={"CopyCount": copies}
        )
        return self.settled(name)

    def gone(self, name: str) -> None:
        """Delete a component and wait until it is gone."""
        self.client.delete_inference_component(InferenceComponentName=name)
        listed = self.client.list_inference_components
        self.local.until(lambda: not listed(NameContains=name)["InferenceComponents"])

    def ask(self, name: str | None, endpoint: str = "ep", **body: Any) -> Json:
        """Invoke a component; its answer."""
        component = {"InferenceComponentName": name} if name else {}
        answer = self.runtime.invoke_endpoint(
            EndpointName=endpoint, ContentType="application/json", Body=json.dumps(body), **component
        )
        return dict(json.loads(answer["Body"].read()))
