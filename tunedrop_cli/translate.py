"""`tunedrop config --from`: a config of TRL, Axolotl, verl, ms-swift, Unsloth or SageMaker becomes a run config.

`tunedrop.config.synonyms` has the names. This module adds the values that mean something else here.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import yaml

from tunedrop.config.parse import load_mapping, parse_run_config
from tunedrop.config.synonyms import Place, is_section, place_of
from tunedrop.problems import RejectedError
from tunedrop.rewards.synonyms import reward_like
from tunedrop.yaml_file import YamlError, read_yaml

# Objects in which SageMaker's requests and scripts keep hyperparameters.
WRAPPERS = ("HyperParameters", "hyperparameters", "hyper_parameters", "Hyperparameters")
OWN_REWARD = "a reward function of its own: put its file beside the dataset and write {type: python, file: …, function: …}"
UNKNOWN = "no setting of a run config means this"

Values = dict[str, Any]


class Translation(NamedTuple):
    """A run config as a mapping, and each key that is not part of it with the reason."""

    config: Values
    left_out: dict[str, str]


class LeaveOutError(Exception):
    """A value has no place in a run config; the message is the reason."""


def translate(raw: bytes) -> Translation:
    """Translate another framework's config, YAML or JSON. The result passes validation.

    Raises RejectedError with `CONFIG_SYNTAX` for bytes that are no mapping.
    """
    source = load_mapping(raw)
    for wrapper in WRAPPERS:
        if isinstance(source.get(wrapper), dict):
            source = {name: value for name, value in source.items() if name != wrapper} | source[wrapper]
    settings = dict(_settings(source))
    config: Values = {}
    sources: dict[str, str] = {}  # the name in the source of each key of the config
    left_out: dict[str, str] = {}
    for name, value in settings.items():
        place = place_of(name) or Place(None, UNKNOWN)
        try:
            if name in PARTS:
                continue
            if place.key is None:
                raise LeaveOutError(place.reason)
            if place.key in sources:
                raise LeaveOutError(f"{sources[place.key]} sets {place.key} already")
            config[place.key] = _value(name, place.key, _scalar(value), settings)
            sources[place.key] = name
        except LeaveOutError as reason:
            left_out[name] = str(reason)
    accepted = _accepted(config, sources, left_out)
    left_out |= {name: f"{key} is left out" for name, key in PARTS.items() if name in settings and key not in config}
    return Translation(accepted, left_out)


def _settings(section: Values, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of every setting. A mapping is a section unless it is itself a setting."""
    for key, value in section.items():
        name = f"{path}{key}"
        if isinstance(value, dict) and value and (is_section(name) or place_of(name) is None):
            yield from _settings(value, f"{name}.")
        else:
            yield name, value


def _scalar(value: Any) -> Any:
    """Return the number, boolean or list in a text: SageMaker's hyperparameters are texts, and may be quoted twice."""
    if not isinstance(value, str):
        return value
    try:
        read = read_yaml(value)
    except YamlError:
        return value
    quoted = isinstance(read, str) and value.startswith('"')
    return read if quoted or isinstance(read, bool | int | float | list) else value


# ---- values that mean something else ------------------------------------------------------------------------------------


def _model(value: Any, _: Values) -> Any:
    if str(value).startswith(("/", ".", "~", "s3:", "$")):
        raise LeaveOutError(f"{value} is a path elsewhere: upload the folder to models/<name>/, and write model: <name>")
    return value


def _rewards(value: Any, settings: Values) -> list[Values]:
    names = [str(name) for name in value] if isinstance(value, list) else str(value).split()
    weights = _first(settings, "reward_weights", "trl.reward_weights") or []
    entries: list[Values] = []
    for index, name in enumerate(names):
        entry = reward_like(name)
        if entry is None:
            raise LeaveOutError(f"'{name}' is {OWN_REWARD}")
        if any(entry["type"] == other["type"] for other in entries):
            entry = entry | {"name": name.rpartition(".")[2]}
        entries.append(entry | ({"weight": weights[index]} if index < len(weights) else {}))
    return entries


def _modules(value: Any, _: Values) -> Any:
    """Return target modules: Axolotl's `lora_target_linear: true` means all; SageMaker has names between commas."""
    if isinstance(value, bool):
        return _if(value, "all-linear", "Tunedrop adapts all linear layers unless target_modules names some")
    if value in (["all-linear"], ["all_linear"], "all", "all_linear", ["all"]):
        return "all-linear"
    return [name.strip() for name in value.split(",")] if isinstance(value, str) and "," in value else value


def _if(condition: Any, value: Any, reason: str) -> Any:
    if not condition:
        raise LeaveOutError(reason)
    return value


def _text(value: Any, _: Values) -> Any:
    path = str(value).strip().endswith((".txt", ".md", ".jinja"))
    return _if(not path, value, f"{value} is a file: write its text as system_prompt")


def _generation_batch(value: Any, settings: Values) -> Any:
    """Return verl's batch of prompts as a batch of completions: `rollout.n` for each prompt."""
    group = _first(settings, "actor_rollout_ref.rollout.n")
    return value * group if isinstance(value, int) and isinstance(group, int) else value


def _accumulation(value: Any, settings: Values) -> Any:
    """Return verl's prompts per optimizer step as micro-batches of completions on one GPU."""
    micro = _first(settings, "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu") or 1
    completions = _generation_batch(value, settings)
    return -(-completions // micro) if isinstance(completions, int) and isinstance(micro, int) else value


def _kl(value: Any, settings: Values) -> Any:
    used = settings.get("actor_rollout_ref.actor.use_kl_loss", False)
    return _if(used is True, value, "use_kl_loss is off: grpo.beta stays 0")


def _quantized(value: Any, _: Values) -> bool:
    return bool(_if(value in (4, True), value, "Tunedrop quantizes to 4 bits or not at all")) if value else False


def _positive(value: Any, _: Values) -> Any:
    off = isinstance(value, int | float) and value <= 0
    return _if(not off, value, f"{value} means off, which is the default here")


CONVERSIONS: dict[str, Callable[[Any, Values], Any]] = {
    "model": _model,
    "rewards": _rewards,
    "system_prompt": _text,
    "lora.target_modules": _modules,
    "lora.load_in_4bit": _quantized,
    # verl, vLLM and others write -1 for "off".
    "grpo.top_k": lambda value, _: max(value, 0) if isinstance(value, int) else value,
    "grpo.save_steps": _positive,
    "grpo.max_steps": _positive,
    "grpo.warmup_steps": _positive,
    "heldout_fraction": lambda value, _: _if(
        isinstance(value, int | float) and value < 1, value, "heldout_fraction is a share of the rows, not their number"
    ),
    "data.train_batch_size": _generation_batch,
    "actor_rollout_ref.actor.ppo_mini_batch_size": _accumulation,
    "actor_rollout_ref.actor.kl_loss_coef": _kl,
    "data.truncation": lambda value, _: (
        {"left": "truncate", "error": "reject"}.get(str(value))
        or _if(False, value, "Tunedrop drops, rejects or cuts a long prompt on its left")
    ),
}
# Settings that are a part of another key's value.
PARTS = {
    "reward_weights": "rewards",
    "trl.reward_weights": "rewards",
    "actor_rollout_ref.actor.use_kl_loss": "grpo.beta",
}


def _value(name: str, key: str, value: Any, settings: Values) -> Any:
    """Return a setting's value as the key of a run config has it. Raises LeaveOutError with the reason if there is none."""
    if isinstance(value, str) and "${" in value:
        raise LeaveOutError(f"{value} refers to another value: write the value")
    if value is None or value == "":
        raise LeaveOutError("it is empty, and the default holds")
    convert = CONVERSIONS.get(name) or CONVERSIONS.get(key)
    return convert(value, settings) if convert else value


def _first(settings: Values, *names: str) -> Any:
    return next((_scalar(settings[name]) for name in names if name in settings), None)


# ---- the config ---------------------------------------------------------------------------------------------------------


def _accepted(config: Values, sources: dict[str, str], left_out: dict[str, str]) -> Values:
    """Return the config in its sections, without the keys that validation refuses; these go to `left_out`."""
    while True:
        nested = _nested(config)
        try:
            parse_run_config({"model": "base"} | nested)
        except RejectedError as error:
            for problem in error.problems:
                key = str(problem.key)
                # A rule names the key to change. Where that key has its default, the other keys that the message names go.
                broken = [each for each in config if f"{key}.".startswith(f"{each}.")]
                named = [each for each in config if each.rpartition(".")[2] in str(problem)]
                for each in broken or named or list(config):
                    left_out[sources[each]] = str(problem)
                    config.pop(each)
        else:
            return nested


def _nested(config: Values) -> Values:
    nested: Values = {}
    for key, value in config.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


def written(translation: Translation, name: str) -> str:
    """Return the run config in YAML."""
    text = yaml.safe_dump(json.loads(json.dumps(translation.config)), sort_keys=False, allow_unicode=True, width=100)
    return f"# Translated from {name} by `tunedrop config --from`.\n{text if translation.config else ''}"
