"""Which models Bedrock can import, before a run is trained for a target that refuses its model."""

from collections.abc import Mapping
from typing import Any

from tunedrop.config.model import RunConfig
from tunedrop.problems import Problem

SOURCE = "https://docs.aws.amazon.com/bedrock/latest/userguide/model-customization-import-model.html"
# The architectures of the source's list, by the names that transformers writes into config.json. The source names two of
# Qwen3's itself; of the other families it names the family.
ARCHITECTURES = {
    "MistralForCausalLM": "Mistral",
    "MixtralForCausalLM": "Mixtral",
    "T5ForConditionalGeneration": "Flan",
    "LlamaForCausalLM": "Llama 2, 3, 3.1, 3.2, 3.3",
    "MllamaForConditionalGeneration": "Mllama",
    "GPTBigCodeForCausalLM": "GPTBigCode",
    "Qwen2ForCausalLM": "Qwen2, Qwen2.5",
    "Qwen2VLForConditionalGeneration": "Qwen2-VL",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2.5-VL",
    "Qwen3ForCausalLM": "Qwen3",
    "Qwen3MoeForCausalLM": "Qwen3",
    "GptOssForCausalLM": "GPT-OSS",
}
# "less than 128K". Assumption: 131,072 is meant to fit, which Llama 3.1 has, a model of the source's list.
MOST_POSITIONS = 131_072


def check_architecture(config: RunConfig, model: Mapping[str, Any]) -> list[Problem]:
    """Return why Bedrock would refuse the model whose `config.json` this is, if Bedrock is to serve it."""
    if not imports(config):
        return []
    hint = f"leave serve.target out, or tune a model of {', '.join(dict.fromkeys(ARCHITECTURES.values()))}"
    messages = [f"Bedrock cannot import '{config.model}': {reason}" for reason in refusals(model)]
    return [Problem("SERVE_TARGET", message, hint, key="serve.target") for message in messages]


def refusals(model: Mapping[str, Any]) -> list[str]:
    """Return why Bedrock does not import the model whose `config.json` this is; an empty list if it does."""
    reasons = []
    names = model.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else "none"
    if architecture not in ARCHITECTURES:
        reasons.append(f"its architecture is {architecture}, which is not in {SOURCE}")
    positions = model.get("max_position_embeddings")
    if isinstance(positions, int) and positions > MOST_POSITIONS:
        reasons.append(f"its config.json has max_position_embeddings {positions}, more than {MOST_POSITIONS} ({SOURCE})")
    return reasons


def unchecked(config: RunConfig) -> list[str]:
    """Return a warning about a model of the hub, whose files are not read before the job."""
    if not imports(config) or "/" not in config.model:
        return []
    warning = (
        f"serve.target: whether Bedrock can import '{config.model}' shows when its import job fails, because the files of a "
        f"hub model are not read here. Bedrock's list of architectures: {SOURCE}"
    )
    return [warning]


def imports(config: RunConfig) -> bool:
    """Return whether Bedrock is to serve the model."""
    return config.serve.enabled and config.serve.target == "bedrock"
