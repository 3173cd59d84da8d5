"""The fields of TRL's `GRPOConfig` and PEFT's `LoraConfig`, and the check of a config's values against them.

`trl_fields.json` describes the fields of the pinned versions. release/fields.py writes that file, so that a Lambda without
TRL and PEFT rejects a misspelt key or a wrong type.
"""

import json
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from tunedrop.problems import nearest

# Tunedrop sets these fields: they say where a job reads and writes, which a run config cannot know.
MANAGED_GRPO = frozenset(
    "output_dir resume_from_checkpoint trust_remote_code push_to_hub hub_token hub_model_id "
    "hub_strategy hub_private_repo hub_always_push hub_revision local_rank do_train do_eval do_predict run_name "
    "project log_completions_hub_repo trackio_space_id trackio_bucket_id trackio_static_space_id report_to "
    "model_init_kwargs remove_unused_columns reward_weights use_cpu parallelism_config ddp_backend "
    # Training has no evaluation set: the inference tests run after it.
    "eval_strategy eval_on_start load_best_model_at_end".split()
)
MANAGED_LORA = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode runtime_config".split()
)
# Fields that need a package which the jobs do not have.
NOT_INSTALLED = {
    "deepspeed": "the jobs have no deepspeed: leave it out (LoRA trains data-parallel), or shard a large model with fsdp",
    "use_liger_kernel": "the jobs have no liger-kernel: leave it out",
    "megatron_config": "the jobs have no Megatron-LM: leave it out",
    "megatron_core": "the jobs have no Megatron-LM: leave it out",
    **dict.fromkeys(
        "vllm_server_base_url vllm_server_host vllm_model_impl vllm_structured_outputs_regex".split(),
        "the jobs' image has no vLLM: leave it out",
    ),
}
# Texts that a job compares with the names of the model's own modules and parameters; some are regular expressions.
MODULE_NAMES = frozenset(
    "target_modules exclude_modules modules_to_save layers_pattern target_parameters optim_target_modules "
    "transformer_layer_cls_to_wrap target_modules_bd_a target_modules_bd_b".split()
)
# A mapping that a text holds as JSON must not nest deeper than Python can follow.
MAX_BRACKETS = 100
# Any other text must be one of the field's choices, or a name. So no text is a path, a host, or a module to import.
_NAME = re.compile(r"[\w ,+-]{0,200}", re.ASCII)
# Transformers reads optim_args as numbers and names: `rank=64, scale=0.25`.
_PATTERNS = {"optim_args": re.compile(r"[\w ,=.+-]{0,500}", re.ASCII)}
# TRL's defaults suit full fine-tuning. These suit LoRA on a small dataset.
GRPO_DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-5,
    "num_train_epochs": 1,
    "max_completion_length": 256,
    "num_generations": 8,
    "logging_steps": 1,
}
# JSON Schema's words for a range, the comparison, and its name in a message.
_RANGES: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "minimum": (lambda value, bound: value >= bound, "at least"),
    "exclusiveMinimum": (lambda value, bound: value > bound, "above"),
    "maximum": (lambda value, bound: value <= bound, "at most"),
    "exclusiveMaximum": (lambda value, bound: value < bound, "below"),
}


@cache
def config_fields() -> dict[str, dict[str, dict[str, Any]]]:
    """Return the fields by section: `{"grpo": {name: {"types", "choices"?, "default"?, "help", …}}, "lora": {…}}`.

    The keys `minimum`, `exclusiveMinimum`, `maximum` and `exclusiveMaximum` of a field are those of JSON Schema. `items` are
    the types of a list's items, and `keys` the fields of a nested mapping. `pattern` matches further strings beside the
    choices. `json`: a string must be a JSON object.
    """
    fields: dict[str, dict[str, dict[str, Any]]] = json.loads(Path(__file__).with_name("trl_fields.json").read_bytes())
    return fields


def free_fields(section: str) -> list[str]:
    """Return the fields of `grpo` or `lora` that a run config may set."""
    return sorted(config_fields()[section].keys() - MANAGED_GRPO - MANAGED_LORA)


def check_fields(section: str, values: dict[str, Any], managed: frozenset[str]) -> None:
    """Check names, types, choices and ranges of a section's values. Raises ValidationError that lists every mistake."""
    fields = config_fields()[section]
    mistakes = []
    for key, value in values.items():
        if key not in fields:
            mistakes.append(_mistake("extra_forbidden", str(key), "unknown key", value))
            continue
        reason = _managed(key) if key in managed else NOT_INSTALLED.get(key) if value else None
        if reason := reason or _wrong(value, fields[key]) or _wrong_name(key, value, fields[key]):
            mistakes.append(_mistake("config_value", key, reason, value))
    if mistakes:
        raise ValidationError.from_exception_data(section, mistakes)


def _managed(key: str) -> str:
    instead = ": each entry of rewards has a weight of its own" if key == "reward_weights" else ""
    return f"is set by Tunedrop; remove it{instead}"


def _mistake(kind: str, key: str, message: str, value: Any = None) -> InitErrorDetails:
    # pydantic formats the template, not the message: a user's braces stay as they are.
    return InitErrorDetails(type=PydanticCustomError(kind, "{message}", {"message": message}), loc=(key,), input=value)


def _wrong(value: Any, field: dict[str, Any]) -> str | None:
    """Return what is wrong with a field's value, or None."""
    if isinstance(value, str) and field.get("json"):
        return _wrong_json(value, field)
    if reason := _wrong_type(value, field["types"]):
        return reason
    match value:
        case str():
            return _wrong_choice(value, field)
        case list():
            return next(filter(None, (_wrong_type(item, field.get("items", [])) for item in value)), None)
        case dict():
            return _wrong_keys(value, field["keys"]) if "keys" in field else None
        case bool() | None:
            return None
        case _:
            return _out_of_range(value, field)


def _wrong_type(value: Any, kinds: list[str]) -> str | None:
    """Return what is wrong with a value's type. No `kinds`: every type is right."""
    kind = "null" if value is None else type(value).__name__
    if not kinds or kind in kinds or (kind == "int" and "float" in kinds):
        return None
    return f"must be {' or '.join(kinds)}, not {kind}"


def _wrong_choice(value: str, field: dict[str, Any]) -> str | None:
    choices = field.get("choices", [value])
    if value in choices or ("pattern" in field and re.fullmatch(field["pattern"], value)):
        return None
    close = nearest(value, choices)
    return f"must be one of {', '.join(choices)}" + (f" ({close})" if close.startswith("did") else "")


def _wrong_name(key: str, value: Any, field: dict[str, Any]) -> str | None:
    """Return what is wrong with the texts in a value whose type is right: its own, or those of a list or a mapping."""
    if key in MODULE_NAMES:
        return None
    if isinstance(value, str) and field.get("json"):
        value = msgspec.json.decode(value)
    match value:
        case dict():
            keys = field.get("keys", {})
            wrong = (_wrong_name(name, each, keys.get(name, {})) for name, each in value.items())
            return next((f"'{name}' {reason}" for name, reason in zip(value, wrong, strict=True) if reason), None)
        case list():
            return next(filter(None, (_wrong_name(key, each, {}) for each in value)), None)
        case str() if not ({"choices", "pattern"} & field.keys() or _PATTERNS.get(key, _NAME).fullmatch(value)):
            return "must be a name without '/', ':' and '.': a job opens no file, host or module that a config names"
        case _:
            return None


def _wrong_json(value: str, field: dict[str, Any]) -> str | None:
    try:
        content = msgspec.json.decode(value) if len(re.findall(r"[{\[]", value)) <= MAX_BRACKETS else None
    except (msgspec.DecodeError, RecursionError):
        content = None
    if not isinstance(content, dict):
        return "must be a mapping: a job has no file of that name"
    return _wrong(content, field)


def _wrong_keys(values: dict[Any, Any], fields: dict[str, dict[str, Any]]) -> str | None:
    for key, value in values.items():
        if key not in fields:
            return f"has no key '{key}': {nearest(str(key), fields)}"
        if reason := _wrong(value, fields[key]):
            return f"'{key}' {reason}"
    return None


def _out_of_range(value: float, field: dict[str, Any]) -> str | None:
    if isinstance(value, int) and abs(value) >= 2**63:
        return "must be a number of at most 64 bits"
    if not math.isfinite(value):
        return "must be a finite number"
    for name, (holds, words) in _RANGES.items():
        if name in field and not holds(value, field[name]):
            return f"must be {words} {field[name]}"
    return None
