"""Write the fields of the pinned TRL and PEFT as JSON. With this file a Lambda checks a run config without torch.

Each field has its JSON types, choices, range, default and help text.

    python -m release.fields > functions/tunedrop/config/trl_fields.json

A test fails when the committed file differs from the installed packages.
"""

import dataclasses
import enum
import json
import sys
import types
import typing
from typing import Any

# TRL and Transformers type these fields as plain strings and check them only when training starts. The values come from
# the comparisons in trl/trainer/grpo_trainer.py, grpo_config.py and transformers' training_args.py.
CHOICES = {
    "loss_type": ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"],
    "scale_rewards": ["group", "batch", "none"],
    "importance_sampling_level": ["token", "sequence"],
    "multi_objective_aggregation": ["sum_then_normalize", "normalize_then_sum"],
    "vllm_mode": ["colocate", "server"],
    "vllm_importance_sampling_mode": ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
}

# Ranges from the documentation of TRL, Transformers and PEFT, or from their later errors, in JSON Schema's keywords.
_AT_LEAST_1 = """
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps generation_batch_size
    steps_per_generation num_iterations max_completion_length save_total_limit vllm_max_model_length
    vllm_tensor_parallel_size torch_empty_cache_steps ref_model_sync_steps dataloader_prefetch_factor r lora_alpha
"""
_NOT_NEGATIVE = """
    warmup_steps weight_decay max_grad_norm beta epsilon epsilon_high top_k neftune_noise_alpha
    dataloader_num_workers off_policy_mask_threshold router_aux_loss_coef
"""
_POSITIVE = """
    learning_rate num_train_epochs logging_steps save_steps adam_epsilon delta repetition_penalty temperature
    sapo_temperature_neg sapo_temperature_pos vllm_server_timeout
"""
_BOUNDS: list[tuple[str, dict[str, float]]] = [
    (_POSITIVE, {"exclusiveMinimum": 0}),
    (_NOT_NEGATIVE, {"minimum": 0}),
    (_AT_LEAST_1, {"minimum": 1}),
    ("num_generations", {"minimum": 2}),
    ("max_steps", {"minimum": -1}),
    ("min_p top_entropy_quantile label_smoothing_factor ref_model_mixup_alpha", {"minimum": 0, "maximum": 1}),
    ("top_p vllm_gpu_memory_utilization", {"exclusiveMinimum": 0, "maximum": 1}),
    ("adam_beta1 adam_beta2 lora_dropout", {"minimum": 0, "exclusiveMaximum": 1}),
]
RANGES = {name: bounds for names, bounds in _BOUNDS for name in names.split()}


def _json_types(annotation: Any) -> tuple[set[str], list[Any]]:
    """Return the JSON types that an annotation admits, and the values of enums and literals."""
    origin = typing.get_origin(annotation)
    if origin in {typing.Union, types.UnionType}:
        parts = [_json_types(part) for part in typing.get_args(annotation)]
        return set().union(*(kinds for kinds, _ in parts)), [value for _, values in parts for value in values]
    if origin is typing.Literal:
        values = list(typing.get_args(annotation))
        return {type(value).__name__ for value in values}, values
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return {"str"}, [member.value for member in annotation]
    kind = origin or annotation
    if kind is types.NoneType:
        return {"null"}, []
    if kind in {bool, int, float, str, list, dict}:
        return {kind.__name__}, []
    return ({"list"}, []) if kind is tuple else ({"dict"}, [])  # all others are nested dataclasses, written as mappings


def _fields(cls: type) -> dict[str, dict[str, Any]]:
    hints = typing.get_type_hints(cls)
    described = {}
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        kinds, choices = _json_types(hints[field.name])
        entry: dict[str, Any] = {"types": sorted(kinds)}
        choices = CHOICES.get(field.name) or list(field.metadata.get("choices") or choices)
        # A literal next to another type (LoRA's init_lora_weights: bool or a name) limits only the strings.
        names = [value for value in choices if isinstance(value, str)]
        # "pissa_niter_[number of iters]" is a family of names. Only PEFT can check such a field.
        if names and not any("[" in name for name in names):
            entry["choices"] = names
        if isinstance(field.default, bool | int | float | str) and not isinstance(field.default, enum.Enum):
            entry["default"] = field.default
        elif isinstance(field.default, enum.Enum):
            entry["default"] = field.default.value
        entry |= RANGES.get(field.name, {})
        # The texts are written for argparse, which needs "%%" for a percent sign.
        entry["help"] = " ".join(field.metadata["help"].replace("%%", "%").split())
        described[field.name] = entry
    return dict(sorted(described.items()))


def describe() -> dict[str, Any]:
    """Return `{"versions": {...}, "grpo": {field: {"types", "choices"?, "default"?, "help", …}}, "lora": {...}}`."""
    import peft
    import transformers
    import trl

    versions = {module.__name__: module.__version__ for module in (peft, transformers, trl)}
    return {"versions": versions, "grpo": _fields(trl.GRPOConfig), "lora": _fields(peft.LoraConfig)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(describe(), indent=1) + "\n")
