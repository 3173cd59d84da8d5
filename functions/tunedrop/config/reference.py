"""The reference of the run config: a JSON Schema for editors, and all defaults as commented YAML."""

import inspect
import json
import re
import textwrap
from typing import Any

from pydantic import BaseModel

from tunedrop.config.fields import GRPO_DEFAULTS, MANAGED_GRPO, MANAGED_LORA, NOT_INSTALLED, config_fields
from tunedrop.config.model import Lora, RunConfig
from tunedrop.rewards import REWARDS, RewardSpec

_JSON_TYPES = {
    "bool": "boolean",
    "int": "integer",
    "float": "number",
    "str": "string",
    "list": "array",
    "dict": "object",
    "null": "null",
}
_WIDTH = 100


def config_schema() -> dict[str, Any]:
    """Return a JSON Schema (2020-12) of the run config, with every TRL, PEFT and reward parameter and its help text."""
    schema = RunConfig.model_json_schema()
    definitions = schema["$defs"]
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Tunedrop run config"
    schema["required"] = []  # the stack has a default model
    schema["properties"]["grpo"] |= {
        "properties": _fields("grpo", MANAGED_GRPO, GRPO_DEFAULTS),
        "additionalProperties": False,
    }
    schema["properties"]["grpo"].pop("default", None)
    lora = definitions["Lora"]
    lora["properties"] = _fields("lora", MANAGED_LORA, {}) | {
        name: _described("lora", name) | field for name, field in lora["properties"].items()
    }
    lora["additionalProperties"] = False
    # Short forms that YAML accepts and the model expands.
    only_if = definitions["RewardSpec"]["properties"]["only_if"]
    only_if["anyOf"].append({"type": "string"})
    compute = definitions["Compute"]["properties"]
    compute["instance_type"]["anyOf"].append(compute["instance_type"]["anyOf"][0]["items"])
    compute["max_runtime"] |= {"type": ["integer", "string"], "pattern": r"^(?=.)(\d+h)?(\d+m)?(\d+s)?$"}
    common = definitions.pop("RewardSpec")["properties"]
    schema["properties"]["rewards"]["items"] = {"oneOf": [_reward(name, common, definitions) for name in REWARDS]}
    return schema


def _described(section: str, name: str) -> dict[str, Any]:
    field = config_fields()[section].get(name)
    return {"description": field["help"]} if field else {}


def _fields(section: str, managed: frozenset[str], ours: dict[str, Any]) -> dict[str, Any]:
    properties = {}
    for name, field in config_fields()[section].items():
        if name in managed:
            continue
        entry = {"description": field["help"]} | ({"enum": [None, False]} if name in NOT_INSTALLED else _values(field))
        if name in ours or "default" in field:
            entry["default"] = ours.get(name, field.get("default"))
        properties[name] = entry
    return properties


def _values(field: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON Schema of a field's values."""
    kinds = [_JSON_TYPES[kind] for kind in field["types"]]
    limits = {key: value for key, value in field.items() if key.lower().endswith("imum")}
    if "json" in field:
        limits["pattern"] = r"^\s*\{"
    if "items" in field:
        limits["items"] = {"type": [_JSON_TYPES[kind] for kind in field["items"]]}
    if "keys" in field:
        limits |= {
            "properties": {name: _values(each) for name, each in field["keys"].items()},
            "additionalProperties": False,
        }
    if "choices" not in field:
        return {"type": kinds} | limits
    strings = [{"enum": field["choices"]}, *([{"pattern": f"^({field['pattern']})$"}] if "pattern" in field else [])]
    return limits | {"anyOf": [*strings, *({"type": kind} for kind in kinds if kind != "string")]}


def _reward(name: str, common: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    # A variant has the type's parameters, and may have more.
    parameters = (REWARDS[name].variant or REWARDS[name]).parameters.model_json_schema()
    definitions.update(parameters.pop("$defs", {}))
    return {
        "title": name,
        "description": REWARDS[name].help,
        "type": "object",
        "properties": {**common, "type": {"const": name}, **parameters.get("properties", {})},
        "required": ["type", *parameters.get("required", [])],
        "additionalProperties": False,
    }


def config_defaults() -> str:
    """Return a valid YAML config with every key, its default and its meaning.

    TRL's and PEFT's fields are commented out (`#key: value`) unless Tunedrop has a default of its own. Rewards are commented
    out, too.
    """
    config = RunConfig(model="SmolLM2-135M-Instruct")
    lines = ["# Every key is optional. These are the defaults. A # without a space after it comments out a key."]
    for name, field in RunConfig.model_fields.items():
        value = getattr(config, name)
        help_text = field.description or inspect.cleandoc(type(value).__doc__ or "" if isinstance(value, BaseModel) else "")
        lines += ["", *_comment(help_text)]
        match name:
            case "rewards":
                lines += ["rewards: []"]
                lines += _comment(
                    f"All types take {', '.join(list(RewardSpec.model_fields)[1:])}. The types and their own parameters:",
                    2,
                )
                lines += [line for kind in REWARDS for line in _reward_line(kind)]
            case "lora":
                lines += ["lora:", *_section(Lora.model_fields, config.lora)]
                lines += _others("lora", MANAGED_LORA | set(Lora.model_fields))
            case "grpo":
                lines += ["grpo:"]
                for key, default in GRPO_DEFAULTS.items():
                    lines += [*_comment(config_fields()["grpo"][key]["help"], 2), f"  {key}: {_yaml(default)}"]
                lines += _others("grpo", MANAGED_GRPO | set(GRPO_DEFAULTS))
            case _ if isinstance(value, BaseModel):
                lines += [f"{name}:", *_section(type(value).model_fields, value)]
            case _:
                lines.append(f"{name}: {_yaml(value)}")
    return "\n".join(lines) + "\n"


def _section(fields: dict[str, Any], section: BaseModel, indent: int = 2) -> list[str]:
    lines = []
    for key, field in fields.items():
        value, pad = getattr(section, key), " " * indent
        help_text = field.description or (
            _described("lora", key).get("description", "") if isinstance(section, Lora) else ""
        )
        if isinstance(value, BaseModel):
            lines += [*_comment(inspect.cleandoc(type(value).__doc__ or ""), indent), f"{pad}{key}:"]
            lines += _section(type(value).model_fields, value, indent + 2)
        else:
            lines += [*_comment(help_text, indent), f"{pad}{key}: {_yaml(value)}"]
    return lines


def _others(section: str, without: frozenset[str] | set[str]) -> list[str]:
    lines = []
    for key, field in config_fields()[section].items():
        if key not in without:
            choices = f" One of: {', '.join(field['choices'])}." if "choices" in field else ""
            summary = re.match(r".*?[a-z`')]\.(?= |$)|.*", field["help"])
            assert summary is not None
            lines += [*_comment(summary[0] + choices, 2), f"  #{key}: {_yaml(field.get('default'))}"]
    return lines


def _reward_line(kind: str) -> list[str]:
    fields = REWARDS[kind].parameters.model_fields
    parameters = ", ".join(
        f"{key}: {'...' if field.is_required() else _yaml(field.default)}" for key, field in fields.items()
    )
    summary = REWARDS[kind].help.partition("\n")[0]
    return [*_comment(summary, 2), f"  #- {{type: {kind}{', ' + parameters if parameters else ''}}}"]


def _comment(text: str, indent: int = 0) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()), _WIDTH, initial_indent=" " * indent + "# ", subsequent_indent=" " * indent + "# "
    )


def _yaml(value: Any) -> str:
    """Return a value in YAML's flow style, which includes JSON."""
    return "null" if value is None else json.dumps(value, ensure_ascii=False)
