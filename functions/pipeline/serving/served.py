"""What serves a run's model: its endpoint and its component with the adapter or the merged model, or Bedrock."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from pipeline.aws import Aws
from pipeline.jobs.plan import load_plan
from pipeline.publish.evidence import read
from pipeline.settings import DeploySettings
from tunedrop import object_keys
from tunedrop.config.fields import config_fields
from tunedrop.config.model import RunConfig

VARIANT = "main"  # the only variant of each endpoint
# Of the base component: vLLM reserves GPU memory for adapters of this rank. AWS's example has the same number
# (https://github.com/aws/deep-learning-containers, "LoRA Adapter Management" of the vLLM image).
MOST_RANK = 64
# The options of `LoraConfig` with which vLLM's adapters do the same as PEFT's (vllm/lora/peft_helper.py, `PEFTHelper`: it
# refuses DoRA, biases, saved modules, patterns of ranks, and weights that begin as a part of the base model).
IN_VLLM = frozenset("r lora_alpha target_modules exclude_modules lora_dropout use_rslora".split())
# The least share of an adapter's effect that must be left beside bf16 weights (trainer/proofs.py). vLLM adds the adapter's
# part to a layer's bf16 output, which rounds the sum (vllm/lora/ops/triton_ops/lora_expand_op.py).
LEAST_KEPT = 0.9
# Layers whose adapters would need the base component's vocabulary to be extended.
NOT_ADAPTED = ("embed_tokens", "lm_head")


class Served(NamedTuple):
    """How a run's model is served.

    With an `adapter`, the S3 URI of its archive, the line's component is an adapter component on the base component, which
    has the endpoint's name. Without an adapter, the line's component has the merged model of the model `package`. `network`
    is that of the stack's jobs. With the target `bedrock`, there is no component: Bedrock imports the files under the S3 URI
    `merged`.
    """

    run_id: str
    line: str
    endpoint: str
    component: str
    instance_type: str
    adapter: str | None
    merged: str
    package: str
    image: str
    network: dict[str, Any]
    model: str
    config: RunConfig
    tested: str

    @property
    def on_bedrock(self) -> bool:
        """Whether Bedrock serves the model, not an endpoint of SageMaker."""
        return self.config.serve.target == "bedrock"

    @property
    def computes(self) -> str:
        """The component with the copies, which the line's component itself or its base component is."""
        return self.endpoint if self.adapter else self.component

    @property
    def candidate(self) -> str:
        """The component under which an adapter is tried."""
        return candidate_name(self.component)

    @property
    def merged_name(self) -> str:
        """The name of SageMaker's model that has the merged weights."""
        return merged_name(self.component, self.run_id)


def candidate_name(component: str) -> str:
    """Return the component under which a line's next adapter is tried."""
    return f"{component}-next"


def merged_name(component: str, run_id: str) -> str:
    """Return the name of SageMaker's model that has a run's merged weights, if it has one."""
    return f"{component}-{run_id.rpartition('-')[2]}"


def read_config(run_id: str, bucket: str, aws: Aws) -> RunConfig:
    """Return a run's config. Raises FileNotFoundError without one."""
    return RunConfig.model_validate_json(read(aws, bucket, object_keys.run_key(run_id, "input/config.json")))


def served(run_id: str, instance_type: str | None, settings: DeploySettings, aws: Aws) -> Served:
    """Return how the model of a published run is served, as a champion's is.

    `instance_type` is that of a model that is served already; without it, the run's config and the stack decide.
    """
    run = aws.runs.get(run_id)
    assert run is not None  # and published:
    assert run.artifacts is not None
    assert run.model_package is not None
    config = read_config(run_id, settings.artifact_bucket, aws)
    instance_type = instance_type or config.serve.instance_type or settings.endpoint_instance_type
    plan = load_plan(aws, settings.artifact_bucket, run.plan)
    folder = run.artifacts.rstrip("/")
    key = object_keys.folder_key(folder, settings.artifact_bucket) + "training.json"
    training = msgspec.json.decode(read(aws, settings.artifact_bucket, key))
    beside = adapter_fits(config.lora.peft_kwargs()) and training["proofs"]["adapter_served"]["kept"] >= LEAST_KEPT
    return Served(
        run_id=run.run_id,
        line=run.line,
        endpoint=object_keys.endpoint_name(settings.job_prefix, config.model, run.base, instance_type),
        component=object_keys.component_name(settings.job_prefix, run.line),
        instance_type=instance_type,
        adapter=f"{folder}/adapter.tar.gz" if beside else None,
        merged=f"{folder}/merged/",
        package=run.model_package,
        image=plan["inference_image"],
        network={"VpcConfig": plan["train"]["VpcConfig"]} if "VpcConfig" in plan["train"] else {},
        model=config.model,
        config=config,
        tested=object_keys.run_key(run_id, f"inference/{run.test_job}/output/model/inference.json"),
    )


def adapter_fits(lora: Mapping[str, Any]) -> bool:
    """Return whether vLLM can serve an adapter of this `LoraConfig` on a base component."""
    defaults = config_fields()["lora"]
    others = (key for key in lora if key not in IN_VLLM)
    if lora["r"] > MOST_RANK or any(lora[key] != defaults[key].get("default") for key in others):
        return False
    modules = lora["target_modules"]
    names = [modules] if isinstance(modules, str) else modules
    return not any(layer in name for name in names for layer in NOT_ADAPTED)
