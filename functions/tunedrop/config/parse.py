"""A config file's bytes to a `RunConfig`, and its mistakes in a user's words."""

import json
from typing import Any

from pydantic import BaseModel, ValidationError

from tunedrop.config.fields import free_fields
from tunedrop.config.model import RunConfig
from tunedrop.config.rules import check_rules
from tunedrop.config.synonyms import is_section, place_of
from tunedrop.problems import Problem, RejectedError, is_misspelt, nearest
from tunedrop.rewards.synonyms import reward_like, written
from tunedrop.yaml_file import YamlError, read_yaml

MAX_CONFIG_BYTES = 256 * 1024
MAX_PROBLEMS = 100


def load_run_config(raw: bytes, *, default_model: str) -> RunConfig:
    """Parse the bytes of a config file: YAML, or JSON, which is a part of YAML. Empty bytes give the defaults.

    Raises RejectedError with a Problem for every mistake: `CONFIG_SYNTAX` with its line, or `CONFIG_KEY` or `CONFIG_VALUE`
    with the dotted key.
    """
    return parse_run_config({"model": default_model} | load_mapping(raw))


def parse_run_config(values: dict[Any, Any]) -> RunConfig:
    """Check a config that is a mapping already. Raises RejectedError, as `load_run_config` does."""
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        details = error.errors(include_url=False)[:MAX_PROBLEMS]  # a hint takes a millisecond
        raise RejectedError([_problem(detail) for detail in details]) from None
    if problems := check_rules(config):
        raise RejectedError(problems)
    return config


def load_mapping(raw: bytes) -> dict[Any, Any]:
    """Return the mapping in a YAML or JSON file, empty for an empty file. Raises RejectedError with `CONFIG_SYNTAX`."""
    if len(raw) > MAX_CONFIG_BYTES:
        raise _syntax(f"the config has {len(raw)} bytes; at most {MAX_CONFIG_BYTES} are accepted")
    try:
        values = read_yaml(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _syntax(f"the config is not UTF-8: {error.reason} at byte {error.start}") from None
    except YamlError as error:
        raise _syntax(f"the config is not valid YAML: {error}", error.line, error.key) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise _syntax(f"the config must be a mapping of keys to values, not a {type(values).__name__}")
    return values


def _syntax(message: str, line: int | None = None, key: str | None = None) -> RejectedError:
    return RejectedError([Problem("CONFIG_SYNTAX", message, line=line, key=key)])


def _valid_keys(path: tuple[int | str, ...]) -> list[str]:
    """Return the keys of a config's section."""
    model: type[BaseModel] = RunConfig
    for part in path:
        section = model.model_fields[part].annotation if part in model.model_fields else None
        if isinstance(section, type) and issubclass(section, BaseModel):
            model = section
    if path == ("grpo",):
        return free_fields("grpo")
    return [*model.model_fields, *(free_fields("lora") if path == ("lora",) else [])]


def _hint(path: tuple[int | str, ...], value: Any) -> str:
    """Return where an unknown key belongs: by its name in another framework, else by its spelling."""
    key, valid = str(path[-1]), _valid_keys(path[:-1])
    place = place_of(".".join(map(str, path))) or place_of(key)
    if place and place.key:
        section, _, name = place.key.rpartition(".")
        line = f"{name}: {_shown(name, value)}"
        return (
            f"here it is {place.key}: write {section}: {{{line}}}" if section else f"write {line} at the top of the config"
        )
    if place and not is_misspelt(key, valid):
        return f"leave it out: {place.reason}"
    if isinstance(value, dict) and (is_section(key) or any(place_of(f"{key}.{each}") for each in value)):
        return "`tunedrop config --from FILE` translates the config of another framework"
    return nearest(key, valid)


def _shown(name: str, value: Any) -> str:
    """Return a value of another framework's key as a config has it, in a line."""
    if name == "rewards" and isinstance(value, list):
        return f"[{', '.join(written(reward_like(str(each)) or {'type': '...'}) for each in value)}]"
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else "…"


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def _problem(detail: Any) -> Problem:
    """Return a pydantic error in a user's words."""
    path: tuple[int | str, ...] = tuple(_short(part) if isinstance(part, str) else part for part in detail["loc"])
    key = ".".join(map(str, path)) or None
    if detail["type"] == "extra_forbidden":
        return Problem("CONFIG_KEY", f"unknown key '{key}'", _hint(path, detail["input"]), key=key)
    message = detail["msg"].removeprefix("Value error, ")
    if "input" in detail and not isinstance(detail["input"], dict | list | RunConfig):
        message += f", got {detail['input']!r}"[:200]
    message = _short(message, 600)
    return Problem("CONFIG_VALUE", f"{key}: {message}" if key else message, key=key)
