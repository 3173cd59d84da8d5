"""Write the fields of the pinned TRL and PEFT as JSON. With this file a Lambda checks a run config without torch.

Each field has its JSON types, choices, range, default and help text; a list has the types of its items, and a nested
dataclass its keys.

    python -m release.fields > functions/tunedrop/config/trl_fields.json

A test fails when the committed file differs from the installed packages.
"""

import dataclasses
import enum
import inspect
import json
import re
import sys
import types
import typing
from contextlib import suppress
from typing import Any, NamedTuple

from transformers.trainer_pt_utils import AcceleratorConfig

# TRL and Transformers type these fields as plain strings and check them only when training starts. The values come from
# the comparisons in trl/trainer/grpo_trainer.py, grpo_config.py and transformers' training_args.py.
CHOICES = {
    "loss_type": ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"],
    "scale_rewards": ["group", "batch", "none"],
    "importance_sampling_level": ["token", "sequence"],
    "multi_objective_aggregation": ["sum_then_normalize", "normalize_then_sum"],
    "vllm_mode": ["colocate", "server"],
    "vllm_importance_sampling_mode": ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
    "pad_to_multiple_of": ["auto", "none", "null"],
    "debug": ["", "underflow_overflow", "tpu_metrics_debug", "underflow_overflow tpu_metrics_debug"],
    # The options of transformers' FSDPOption that its FSDP version 2 takes, as people combine them.
    "fsdp": [
        *("", "full_shard", "shard_grad_op", "full_shard auto_wrap", "shard_grad_op auto_wrap", "full_shard offload"),
        *("full_shard auto_wrap offload", "shard_grad_op auto_wrap offload"),
    ],
    "fsdp_config.auto_wrap_policy": ["TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"],
    "fsdp_config.state_dict_type": ["FULL_STATE_DICT", "SHARDED_STATE_DICT"],
    "velora_config.init_type": ["batch_average_once", "batch_average", "random"],
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
# A generation batch of more completions fits no machine.
_SIZES = """
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps generation_batch_size
    steps_per_generation num_iterations num_generations dataloader_num_workers dataloader_prefetch_factor lora_alpha
"""
_BOUNDS: list[tuple[str, dict[str, float]]] = [
    (_POSITIVE, {"exclusiveMinimum": 0}),
    (_NOT_NEGATIVE, {"minimum": 0}),
    (_AT_LEAST_1, {"minimum": 1}),
    ("num_generations", {"minimum": 2}),
    (_SIZES, {"maximum": 2**16}),
    # The longest contexts of models. Validation and the trainer make texts of this length.
    ("max_completion_length vllm_max_model_length", {"maximum": 1_000_000}),
    ("max_steps", {"minimum": -1}),
    ("min_p top_entropy_quantile label_smoothing_factor ref_model_mixup_alpha", {"minimum": 0, "maximum": 1}),
    ("top_p vllm_gpu_memory_utilization", {"exclusiveMinimum": 0, "maximum": 1}),
    ("adam_beta1 adam_beta2 lora_dropout", {"minimum": 0, "exclusiveMaximum": 1}),
    ("seed", {"minimum": 0, "maximum": 2**32 - 1}),  # numpy's, which transformers' set_seed calls
    ("ddp_timeout", {"minimum": 1, "maximum": 86399999999999}),  # datetime.timedelta's
    ("pad_to_multiple_of", {"minimum": 1}),
    ("fsdp_config.version", {"minimum": 1, "maximum": 2}),
    # The errors of peft's nested dataclasses (peft/tuners/lora/config.py).
    ("velora_config.num_groups velora_config.scale arrow_config.top_k", {"exclusiveMinimum": 0}),
    ("arrow_config.router_temperature monteclora_config.num_samples", {"exclusiveMinimum": 0}),
    ("monteclora_config.dirichlet_prior monteclora_config.buffer_size", {"exclusiveMinimum": 0}),
    ("eva_config.rho", {"minimum": 1}),
    ("eva_config.tau", {"minimum": 0, "maximum": 1}),
    ("kasa_config.beta kasa_config.gamma", {"minimum": 0}),
]
RANGES: dict[str, dict[str, float]] = {}
for _names, _bounds in _BOUNDS:
    for _name in _names.split():
        RANGES[_name] = RANGES.get(_name, {}) | _bounds
# Dataclasses that Transformers makes of fields which it annotates as mappings.
NESTED: dict[str, type] = {"accelerator_config": AcceleratorConfig}


class _Kinds(NamedTuple):
    """What an annotation admits: JSON types, values of enums and literals, types of a list's items, a nested dataclass."""

    types: set[str]
    choices: list[Any] = []  # noqa: RUF012 - nothing writes to the defaults, and a NamedTuple has no factories
    items: set[str] = set()  # noqa: RUF012
    nested: type | None = None


def _kinds(annotation: Any) -> _Kinds:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in {typing.Union, types.UnionType}:
        parts = [_kinds(part) for part in arguments]
        return _Kinds(
            set().union(*(part.types for part in parts)),
            [value for part in parts for value in part.choices],
            set().union(*(part.items for part in parts)),
            next((part.nested for part in parts if part.nested), None),
        )
    if origin is typing.Literal:
        return _Kinds({type(value).__name__ for value in arguments}, list(arguments))
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return _Kinds({"str"}, [member.value for member in annotation])
    kind = origin or annotation
    if kind is types.NoneType:
        return _Kinds({"null"})
    if kind in {bool, int, float, str, dict}:
        return _Kinds({kind.__name__})
    if kind in {list, tuple}:
        return _Kinds({"list"}, [], _kinds(arguments[0]).types if kind is list and arguments else set())
    return _Kinds({"dict"}, nested=kind)  # all others are dataclasses, written as mappings


def _documented(cls: type) -> dict[str, set[str]]:
    """Return the types by field that the docstrings name, such as {"str", "bool"}: TRL converts more than it annotates."""
    lines = "\n".join(inspect.getdoc(base) or "" for base in reversed(cls.__mro__))
    found = re.findall(r"^ *(?:- )?(\w+) \(`(\w+)`(?: or `(\w+)`)?[,)]", lines, re.MULTILINE)
    return {name: set(kinds) & {"bool", "int", "float", "str", "dict", "list"} for name, *kinds in found}


def _fields(cls: type, section: str = "") -> dict[str, dict[str, Any]]:
    hints, documented = typing.get_type_hints(cls), _documented(cls)
    # Transformers reads a text in these fields as a JSON object or a path. A job has no such file.
    mappings = set(getattr(cls, "_VALID_DICT_FIELDS", []))
    described = {}
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        kinds = _kinds(hints[field.name])
        entry: dict[str, Any] = {"types": sorted(kinds.types | documented.get(field.name, set()))}
        entry |= _choices(CHOICES.get(section + field.name) or list(field.metadata.get("choices") or kinds.choices))
        if kinds.items:
            entry["items"] = sorted(kinds.items)
        if field.name in mappings:
            entry["json"] = True
        if field.name == "fsdp_config":
            entry["keys"] = _fsdp_keys(cls)
        elif nested := NESTED.get(field.name, kinds.nested):
            entry["keys"] = _fields(nested, f"{field.name}.")
        default = field.default.value if isinstance(field.default, enum.Enum) else field.default
        if isinstance(default, bool | int | float | str):
            entry["default"] = default
        entry |= RANGES.get(section + field.name, {})
        # The texts are written for argparse, which needs "%%" for a percent sign.
        entry["help"] = " ".join(field.metadata.get("help", "").replace("%%", "%").split())
        described[field.name] = entry
    return dict(sorted(described.items()))


def _choices(values: list[Any]) -> dict[str, Any]:
    """Return `choices`, and `pattern` for a family of names, such as "pissa_niter_[number of iters]".

    A literal next to another type (LoRA's init_lora_weights: bool or a name) limits only the strings.
    """
    names = [value for value in values if isinstance(value, str)]
    families = [re.sub(r"\[.*\]", "[0-9]+", name) for name in names if "[" in name]
    choices = {"choices": [name for name in names if "[" not in name]} if names else {}
    return choices | ({"pattern": "|".join(families)} if families else {})


def _fsdp_keys(cls: type) -> dict[str, dict[str, Any]]:
    """Return the keys of `fsdp_config`, which is a mapping without a dataclass: those that its documentation lists."""
    text = next(doc for base in cls.__mro__ if "fsdp_config (`" in (doc := inspect.getdoc(base) or ""))
    listed = text.partition("fsdp_config (`")[2].partition("\n> DeepSpeed")[0]
    keys = {}
    for name, kind, item in re.findall(r"^ *- (\w+) \(`(\w+)(?:\[(\w+)\])?`", listed, re.MULTILINE):
        path = f"fsdp_config.{name}"
        entry = {"types": [kind]} | _choices(CHOICES.get(path, [])) | RANGES.get(path, {})
        keys[name] = entry | ({"items": [item]} if item else {}) | {"help": ""}
    return keys


def _optimizers() -> list[str]:
    """Return the optimizers that the installed packages have: Transformers makes each one's class."""
    import torch
    from transformers import Trainer, TrainingArguments
    from transformers.training_args import OptimizerNames

    model, installed = torch.nn.Linear(1, 1), []
    for optimizer in OptimizerNames:
        with suppress(ImportError, ValueError):
            Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(optim=optimizer, use_cpu=True, report_to=[]), model)
            installed.append(optimizer.value)
    return installed


def describe() -> dict[str, Any]:
    """Return `{"versions": {...}, "grpo": {field: {"types", "choices"?, "default"?, "help", …}}, "lora": {...}}`.

    A field may also have `items` (types of a list's items), `pattern` (further strings), `json` (a string must be a JSON
    object) and `keys` (the fields of a nested mapping).
    """
    import peft
    import transformers
    import trl

    versions = {module.__name__: module.__version__ for module in (peft, transformers, trl)}
    grpo = _fields(trl.GRPOConfig)
    grpo["optim"]["choices"] = _optimizers()
    return {"versions": versions, "grpo": grpo, "lora": _fields(peft.LoraConfig)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(describe(), indent=1) + "\n")
