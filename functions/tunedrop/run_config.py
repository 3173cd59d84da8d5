"""The run config: what `training_data/<dataset>.yaml` may say, and what the trainer runs.

The Lambda that accepts a config and the trainer that runs it use this one model. Section names and keys under `grpo`
and `lora` are TRL's and PEFT's own, checked against `config_fields.json` (written by trainer/fields.py from the pinned
versions), so that a typo is refused in a Lambda that has neither installed.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from tunedrop.problems import Problem, RejectedError, nearest
from tunedrop.rewards import PARAMETERS, RewardSpec

MAX_CONFIG_BYTES = 256 * 1024
# Tunedrop sets these itself: they are about where a job reads and writes, which a run config cannot know.
MANAGED_GRPO = frozenset(
    "output_dir resume_from_checkpoint reward_weights trust_remote_code push_to_hub hub_token hub_model_id "
    "hub_strategy hub_private_repo hub_always_push hub_revision local_rank do_train do_eval do_predict run_name "
    "project log_completions_hub_repo trackio_space_id trackio_bucket_id trackio_static_space_id report_to "
    "model_init_kwargs remove_unused_columns".split()
)
MANAGED_LORA = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode runtime_config".split()
)
# Where a LoRA run on a small dataset wants something else than TRL's defaults, which are made for full fine-tuning.
GRPO_DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-5,
    "num_train_epochs": 1,
    "max_completion_length": 256,
    "num_generations": 8,
    "logging_steps": 1,
}


@cache
def config_fields() -> dict[str, dict[str, dict[str, Any]]]:
    """Return the pinned configs' fields: `{"grpo": {name: {"types", "choices"?, "default"?}}, "lora": {…}}`."""
    fields: dict[str, dict[str, dict[str, Any]]] = json.loads(Path(__file__).with_name("config_fields.json").read_bytes())
    return fields


def _check_fields(section: str, given: dict[str, Any], managed: frozenset[str]) -> None:
    fields = config_fields()[section]
    for key, value in given.items():
        if key in managed:
            raise ValueError(f"'{key}' is set by Tunedrop and cannot be given")
        if key not in fields:
            raise ValueError(f"unknown key '{key}': {nearest(key, set(fields) - managed)}")
        kinds, found = fields[key]["types"], "null" if value is None else type(value).__name__
        if found not in kinds and not (found == "int" and "float" in kinds):
            raise ValueError(f"'{key}' must be {' or '.join(kinds)}, got {found} {value!r}")
        if isinstance(value, str) and value not in fields[key].get("choices", [value]):
            raise ValueError(f"'{key}' must be one of {', '.join(fields[key]['choices'])}, got '{value}'")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _seconds(value: Any) -> Any:
    """`3h`, `90m`, `1h30m` or `45s` → seconds; numbers are seconds already."""
    if not isinstance(value, str):
        return value
    parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", value.strip())
    if not value.strip() or parts is None:
        raise ValueError("must be a duration such as 3h, 90m or 1h30m")
    hours, minutes, seconds = (int(part or 0) for part in parts.groups())
    return hours * 3600 + minutes * 60 + seconds


class Columns(_Section):
    """Which columns of the dataset hold the prompt and the answer; guessed where absent."""

    prompt: str | None = None
    answer: str | None = None


class Lora(BaseModel):
    """LoRA: PEFT's `LoraConfig` fields, and whether the base model is loaded in 4 bits (QLoRA)."""

    model_config = ConfigDict(extra="allow", frozen=True)

    load_in_4bit: bool = False
    r: Annotated[int, Field(ge=1, le=1024)] = 16
    lora_alpha: Annotated[int, Field(ge=1)] = 32
    target_modules: str | list[str] = "all-linear"

    @model_validator(mode="after")
    def _check(self) -> "Lora":
        _check_fields("lora", self.peft_kwargs(), MANAGED_LORA)
        return self

    def peft_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments for `peft.LoraConfig`."""
        return self.model_dump(exclude={"load_in_4bit"})


InstanceType = Annotated[str, Field(pattern=r"^ml\.[a-z0-9-]+\.[a-z0-9]+$")]


class Compute(_Section):
    """Where the jobs run; what is absent comes from the stack's parameters."""

    instance_type: Annotated[
        list[InstanceType] | None, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
    ] = None
    instance_count: Annotated[int, Field(ge=1, le=16)] = 1
    spot: bool | None = None
    # SageMaker's own upper limit is 28 days.
    max_runtime: Annotated[int, Field(ge=60, le=28 * 86400), BeforeValidator(_seconds)] = 6 * 3600
    max_cost_usd: Annotated[float, Field(gt=0)] | None = None
    volume_size_gb: Annotated[int, Field(ge=1, le=16384)] = 100


class Gate(_Section):
    """A tuned model is approved when the lower confidence bound of its mean lift exceeds `min_lift`."""

    min_lift: float = 0.0
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    must_not_regress: list[str] = []


class Notify(_Section):
    """Which notifications are sent."""

    sns: bool = True


class RunConfig(_Section):
    """Everything a user decides about a run. Unknown keys are errors."""

    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$", max_length=200)]
    system_prompt: str | None = None
    columns: Columns = Columns()
    rewards: Annotated[list[RewardSpec], Field(min_length=1)] = [RewardSpec(type="exact_match")]
    lora: Lora = Lora()
    grpo: dict[str, Any] = Field(default={}, validate_default=True)
    compute: Compute = Compute()
    gate: Gate = Gate()
    notify: Notify = Notify()
    max_prompt_length: Annotated[int, Field(ge=1)] = 512
    max_seq_length: Annotated[int, Field(ge=2)] | None = None
    # What happens to a row whose prompt is longer than max_prompt_length tokens.
    prompt_overflow: Literal["drop", "reject", "truncate"] = "drop"
    # Share of the rows kept out of training, at most 256 of them; they serve as inference tests where none are given.
    heldout_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.1

    @field_validator("grpo")
    @classmethod
    def _grpo(cls, given: dict[str, Any]) -> dict[str, Any]:
        _check_fields("grpo", given, MANAGED_GRPO)
        return GRPO_DEFAULTS | given

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        names = [spec.name or spec.type for spec in self.rewards]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two rewards are called '{min(twice)}': give one of them another name with 'name:'")
        if not any(spec.weight > 0 for spec in self.rewards):
            raise ValueError("no reward has a weight above 0: there is nothing to learn")
        generations = self.grpo["num_generations"]
        if generations is None or generations < 2:
            raise ValueError("grpo.num_generations must be at least 2: an advantage compares answers within a group")
        if self.lora.load_in_4bit and self.grpo.get("use_vllm"):
            raise ValueError("lora.load_in_4bit and grpo.use_vllm do not work together in TRL: turn one of them off")
        return self


class _YamlLoader(yaml.SafeLoader):
    """Safe YAML without aliases (they can expand without bound), refusing duplicate keys, reading 1e-5 as a number."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None,
                None,
                "anchors and aliases are not accepted",
                self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for (key_node, _), key in zip(node.value, keys, strict=True):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' is given twice", key_node.start_mark)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML follows, reads "1e-5" as text because it has no dot. Nobody means that in a config.
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_run_config(raw: bytes, *, default_model: str) -> RunConfig:
    """Parse the bytes of a config file (YAML, of which JSON is a part); empty bytes give the defaults.

    Raises RejectedError with a Problem per mistake: `CONFIG_SYNTAX` with its line, or `CONFIG_KEY`/`CONFIG_VALUE` with
    the dotted key.
    """
    if len(raw) > MAX_CONFIG_BYTES:
        raise RejectedError(
            [Problem("CONFIG_SYNTAX", f"the config has {len(raw)} bytes, at most {MAX_CONFIG_BYTES} are read")]
        )
    try:
        given = yaml.load(raw.decode("utf-8-sig"), Loader=_YamlLoader)  # noqa: S506 - a SafeLoader, made stricter
    except UnicodeDecodeError as error:
        raise RejectedError(
            [Problem("CONFIG_SYNTAX", f"the config is not UTF-8: {error.reason} at byte {error.start}")]
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        message = getattr(error, "problem", None) or str(error) or "nested too deeply"
        line = mark.line + 1 if mark else None
        raise RejectedError([Problem("CONFIG_SYNTAX", f"the config is not valid YAML: {message}", line=line)]) from None
    if given is None:
        given = {}
    if not isinstance(given, dict):
        message = f"the config must be a mapping of keys to values, got a {type(given).__name__}"
        raise RejectedError([Problem("CONFIG_SYNTAX", message)])
    return parse_run_config({"model": default_model} | given)


def parse_run_config(given: dict[Any, Any]) -> RunConfig:
    """Check a config given as a mapping. Raises RejectedError, as `load_run_config` does."""
    try:
        return RunConfig.model_validate(given)
    except ValidationError as error:
        raise RejectedError([_problem(detail) for detail in error.errors(include_url=False)]) from None


def _valid_keys(path: tuple[int | str, ...]) -> list[str]:
    """Return the keys that a section of the config has, for a hint."""
    model: type[BaseModel] = RunConfig
    for part in path:
        section = model.model_fields[part].annotation if part in model.model_fields else None
        if isinstance(section, type) and issubclass(section, BaseModel):
            model = section
    return list(model.model_fields)


def _problem(detail: Any) -> Problem:
    """Say a pydantic error in a user's words."""
    path: tuple[int | str, ...] = detail["loc"]
    key = ".".join(map(str, path)) or None
    if detail["type"] == "extra_forbidden":
        hint = nearest(str(path[-1]), _valid_keys(path[:-1]))
        return Problem("CONFIG_KEY", f"unknown key '{key}'", hint, key=key)
    message = detail["msg"].removeprefix("Value error, ")
    if "input" in detail and not isinstance(detail["input"], dict | list | RunConfig):
        message += f", got {detail['input']!r}"[:200]
    unknown = re.match(r"unknown key '([^']*)': (.*)", message)
    if unknown:
        key = f"{key}.{unknown[1]}"
        return Problem("CONFIG_KEY", f"unknown key '{key}'", unknown[2], key=key)
    return Problem("CONFIG_VALUE", f"{key}: {message}" if key else message, key=key)


__all__ = [
    "PARAMETERS",
    "Columns",
    "Compute",
    "Gate",
    "Lora",
    "RewardSpec",
    "RunConfig",
    "load_run_config",
    "parse_run_config",
]
