"""A config file's bytes to a `RunConfig`, and its mistakes in a user's words."""

import json
import re
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from tunedrop.config.fields import free_fields
from tunedrop.config.model import RunConfig
from tunedrop.config.rules import check_rules
from tunedrop.config.synonyms import is_section, place_of
from tunedrop.problems import Problem, RejectedError, is_misspelt, nearest
from tunedrop.rewards.synonyms import reward_like, written

MAX_CONFIG_BYTES = 256 * 1024


class YamlLoader(yaml.SafeLoader):
    """Safe YAML that reads 1e-5 as a number, and refuses aliases (they can expand without bound) and duplicate keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse aliases."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None,
                None,
                "anchors and aliases are not accepted",
                self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse duplicate keys."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for (key_node, _), key in zip(node.value, keys, strict=True):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' is given twice", key_node.start_mark)
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, which reads "1e-5" as text because it has no dot. A config means the number.
YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


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
        raise RejectedError([_problem(detail) for detail in error.errors(include_url=False)]) from None
    if problems := check_rules(config):
        raise RejectedError(problems)
    return config


def load_mapping(raw: bytes) -> dict[Any, Any]:
    """Return the mapping in a YAML or JSON file, empty for an empty file. Raises RejectedError with `CONFIG_SYNTAX`."""
    if len(raw) > MAX_CONFIG_BYTES:
        raise _syntax(f"the config has {len(raw)} bytes; at most {MAX_CONFIG_BYTES} are accepted")
    try:
        values = yaml.load(raw.decode("utf-8-sig"), Loader=YamlLoader)  # noqa: S506 - a SafeLoader, made stricter
    except UnicodeDecodeError as error:
        raise _syntax(f"the config is not UTF-8: {error.reason} at byte {error.start}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        message = getattr(error, "problem", None) or str(error) or "nested too deeply"
        raise _syntax(f"the config is not valid YAML: {message}", mark.line + 1 if mark else None) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise _syntax(f"the config must be a mapping of keys to values, not a {type(values).__name__}")
    return values


def _syntax(message: str, line: int | None = None) -> RejectedError:
    return RejectedError([Problem("CONFIG_SYNTAX", message, line=line)])


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


def _problem(detail: Any) -> Problem:
    """Return a pydantic error in a user's words."""
    path: tuple[int | str, ...] = detail["loc"]
    key = ".".join(map(str, path)) or None
    if detail["type"] == "extra_forbidden":
        return Problem("CONFIG_KEY", f"unknown key '{key}'", _hint(path, detail["input"]), key=key)
    message = detail["msg"].removeprefix("Value error, ")
    if "input" in detail and not isinstance(detail["input"], dict | list | RunConfig):
        message += f", got {detail['input']!r}"[:200]
    return Problem("CONFIG_VALUE", f"{key}: {message}" if key else message, key=key)
