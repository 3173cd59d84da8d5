"""The run config: what `training_data/<dataset>.yaml` may say, and what the trainer runs.

The Lambda that accepts a config and the trainer that runs it use this one model. Section names and keys under `grpo`
and `lora` are TRL's and PEFT's own, checked against `trl_fields.json` (written by release/fields.py from the pinned
versions), so that a typo is refused in a Lambda that has neither installed.

Values that contradict each other are refused with the reason, or fixed where there is one obvious way
(`RunConfig.fixes`). What depends on more than the config has functions of its own: `check_instances`, `check_lengths`,
`check_steps`; and `config_warnings` names what is allowed but unlikely to be meant.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from tunedrop.config.instances import gpus, has_bf16, why_not
from tunedrop.problems import Problem, RejectedError, nearest
from tunedrop.rewards import RewardSpec, check_names

MAX_CONFIG_BYTES = 256 * 1024
# Tunedrop sets these itself: they are about where a job reads and writes, which a run config cannot know.
MANAGED_GRPO = frozenset(
    "output_dir resume_from_checkpoint trust_remote_code push_to_hub hub_token hub_model_id "
    "hub_strategy hub_private_repo hub_always_push hub_revision local_rank do_train do_eval do_predict run_name "
    "project log_completions_hub_repo trackio_space_id trackio_bucket_id trackio_static_space_id report_to "
    "model_init_kwargs remove_unused_columns reward_weights use_cpu parallelism_config ddp_backend "
    # There is no evaluation set during training: the inference tests come after it.
    "eval_strategy eval_on_start load_best_model_at_end".split()
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
    """Return the pinned configs' fields: `{"grpo": {name: {"types", "choices"?, "default"?, "help", …}}, "lora": {…}}`.

    A range is in JSON Schema's words: `minimum`, `exclusiveMinimum`, `maximum`, `exclusiveMaximum`.
    """
    fields: dict[str, dict[str, dict[str, Any]]] = json.loads(Path(__file__).with_name("trl_fields.json").read_bytes())
    return fields


_RANGES: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "minimum": (lambda value, bound: value >= bound, "at least"),
    "exclusiveMinimum": (lambda value, bound: value > bound, "above"),
    "maximum": (lambda value, bound: value <= bound, "at most"),
    "exclusiveMaximum": (lambda value, bound: value < bound, "below"),
}


def _mistake(key: tuple[str, ...], message: str, value: Any = None, kind: str = "config_value") -> InitErrorDetails:
    # The message is no template: braces in it are the user's.
    return InitErrorDetails(type=PydanticCustomError(kind, "{message}", {"message": message}), loc=key, input=value)


def _check_fields(section: str, given: dict[str, Any], managed: frozenset[str]) -> None:
    """Check names, types, choices and ranges of a section's values. Raises ValidationError with all mistakes."""
    fields = config_fields()[section]
    mistakes = []
    for key, value in given.items():
        if key not in fields:
            hint = nearest(str(key), set(fields) - managed)
            mistakes.append(_mistake((str(key),), hint, kind="config_key"))
            continue
        reason = "is set by Tunedrop and cannot be given" if key in managed else _wrong(value, fields[key])
        if reason:
            mistakes.append(_mistake((key,), reason, value))
    if mistakes:
        raise ValidationError.from_exception_data(section, mistakes)


def _wrong(value: Any, field: dict[str, Any]) -> str | None:
    """Return what is wrong with a field's value, or None."""
    kinds, found = field["types"], "null" if value is None else type(value).__name__
    if found not in kinds and not (found == "int" and "float" in kinds):
        return f"must be {' or '.join(kinds)}, not {found}"
    if isinstance(value, str) and value not in field.get("choices", [value]):
        close = nearest(value, field["choices"])
        return f"must be one of {', '.join(field['choices'])}" + (f" ({close})" if close.startswith("did") else "")
    if found in {"int", "float"}:
        if not math.isfinite(value):
            return "must be a finite number"
        for name, (holds, words) in _RANGES.items():
            if name in field and not holds(value, field[name]):
                return f"must be {words} {field[name]}"
    return None


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

    load_in_4bit: bool = Field(default=False, description="Load the base model in 4 bits (QLoRA); needs a GPU instance.")
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
        list[InstanceType] | None,
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
        Field(description="One type or several, the first choice first; each attempt takes the next."),
    ] = None
    instance_count: Annotated[int, Field(ge=1, le=16)] = 1
    spot: bool | None = None
    max_runtime: Annotated[
        int,
        # SageMaker's own upper limit is 28 days.
        Field(ge=60, le=28 * 86400, description="Seconds, or a duration such as 3h, 90m or 1h30m."),
        BeforeValidator(_seconds),
    ] = 6 * 3600
    max_cost_usd: float | None = Field(
        default=None, gt=0, description="Ends the training when it has cost this; a run that must cost more is refused."
    )
    volume_size_gb: Annotated[int, Field(ge=1, le=16384)] = 100
    keep_alive: Annotated[
        int,
        # SageMaker's own upper limit is an hour.
        Field(ge=0, le=3600, description="How long instances stay, and cost, for the next job (warm pool); not with spot."),
        BeforeValidator(_seconds),
    ] = 0


class Gate(_Section):
    """A tuned model is approved when the lower confidence bound of its mean lift exceeds `min_lift`."""

    min_lift: float = 0.0
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    must_not_regress: list[str] = Field(default=[], description="Tags of inference tests whose scores must not fall.")


class Preflight(_Section):
    """How the rewards are tried before a job starts: the dataset's own answers against wrong ones."""

    on_failure: Literal["reject", "warn"] = Field(
        default="reject", description="What happens to a run whose rewards do not prefer the dataset's answers."
    )
    rows: Annotated[
        int,
        Field(ge=0, le=256, description="How many rows are tried; 4 at most where a reward calls out or runs programs."),
    ] = 32


class Learnability(_Section):
    """Before training, the base model answers some rows: what it never or always gets right teaches it nothing."""

    policy: Literal["go_on", "drop", "stop"] = Field(
        default="go_on",
        description="go_on, drop the rows found to teach nothing, or stop the job if too few groups teach anything.",
    )
    samples: Annotated[int, Field(ge=0, le=64, description="Answers to each row that is asked; 0: no row is asked.")] = 8
    min_nonzero_groups: Annotated[
        float, Field(ge=0, le=1, description="Expected share of groups with a gradient below which `stop` stops.")
    ] = 0.1


# What can be said of a training while it goes on: see docs/alerts.md.
AlertCode = Literal["NON_FINITE", "KL_BLOWUP", "DEAD_REWARD", "TRUNCATION", "HACKING_SUSPECT", "ENTROPY_COLLAPSE", "PLATEAU"]


class Alerts(_Section):
    """What is said of a training that goes wrong, and what ends it early."""

    stop_on: list[AlertCode] = Field(
        default=["NON_FINITE", "DEAD_REWARD"], description="Alerts that end the training; its best checkpoint is tested."
    )


class Notify(_Section):
    """Which notifications are sent."""

    sns: bool = True


class RunConfig(_Section):
    """Everything a user decides about a run. Unknown keys are errors."""

    model: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$",
            max_length=200,
            description="A folder under models/ in the data bucket, or a hub id.",
        ),
    ]
    system_prompt: str | None = Field(default=None, description="Put before every prompt that has no system message.")
    columns: Columns = Columns()
    rewards: Annotated[
        list[RewardSpec], Field(min_length=1, description="Their weighted sum is what training raises and tests score.")
    ] = [RewardSpec(type="exact_match")]
    lora: Lora = Lora()
    grpo: dict[str, Any] = Field(default={}, validate_default=True, description="TRL's `GRPOConfig` fields.")
    compute: Compute = Compute()
    gate: Gate = Gate()
    preflight: Preflight = Preflight()
    learnability: Learnability = Learnability()
    alerts: Alerts = Alerts()
    notify: Notify = Notify()
    max_prompt_length: Annotated[int, Field(ge=1, description="Tokens a prompt may have, chat template included.")] = 512
    max_seq_length: Annotated[int, Field(ge=2, description="Tokens prompt and completion may have together.")] | None = None
    prompt_overflow: Literal["drop", "reject", "truncate"] = Field(
        default="drop", description="What happens to a row whose prompt is longer than max_prompt_length tokens."
    )
    max_bad_rows: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="Share of the rows that may be broken: they are set aside in rejected.jsonl; more reject the dataset.",
    )
    heldout_fraction: Annotated[float, Field(ge=0, le=0.5)] = Field(
        default=0.1,
        description="Share of the rows kept out of training, 256 at most: the inference tests where none are given.",
    )

    @field_validator("grpo")
    @classmethod
    def _grpo(cls, given: dict[str, Any]) -> dict[str, Any]:
        _check_fields("grpo", given, MANAGED_GRPO)
        return GRPO_DEFAULTS | given

    _fixes: list[str] = PrivateAttr(default_factory=list)

    @property
    def fixes(self) -> list[str]:
        """What was changed because it could not have worked, in words for the receipt ("… 12 → 16: …")."""
        return self._fixes

    def grpo_value(self, key: str) -> Any:
        """Return a `grpo` field's value: as given, else our default, else TRL's (None where TRL has none)."""
        return self.grpo.get(key, config_fields()["grpo"][key].get("default"))

    def generation_batch(self, processes: int = 1) -> int:
        """Return how many answers are generated at once on so many GPUs: whole groups of `num_generations`."""
        steps = self.grpo_value("steps_per_generation") or self.grpo_value("gradient_accumulation_steps")
        size = self.grpo_value("generation_batch_size") or self.grpo_value("per_device_train_batch_size") * processes * steps
        return int(size)

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        check_names(self.rewards)
        if not any(spec.weight > 0 for spec in self.rewards):
            raise ValueError("no reward has a weight above 0: there is nothing to learn")
        mistakes = [_mistake(key, reason, kind="config_rule") for key, broken, reason in _RULES if broken(self)]
        if mistakes:
            raise ValidationError.from_exception_data("config", mistakes)
        self._fit_generation_batch()
        return self

    def _fit_generation_batch(self) -> None:
        """Raise what makes the generation batch, so that it holds whole groups on the GPUs that the config names."""
        group, per_gpu = self.grpo_value("num_generations"), self.grpo_value("per_device_train_batch_size")
        counts = {self.compute.instance_count * (gpus(name) or 1) for name in self.compute.instance_type or ["ml.any.one"]}
        given = self.grpo_value("generation_batch_size")
        if given is not None:
            key, unit = "generation_batch_size", math.lcm(group, *(per_gpu * count for count in counts))
            reason = f"a multiple of num_generations ({group}) and of what the GPUs take at once ({per_gpu} each)"
        else:
            key = "steps_per_generation" if self.grpo_value("steps_per_generation") else "gradient_accumulation_steps"
            given = self.grpo_value(key)
            unit = math.lcm(*(group // math.gcd(group, per_gpu * count) for count in counts))
            reason = f"so that a generation batch holds whole groups of num_generations ({group}) answers"
        fitted = -(-given // unit) * unit
        if fitted != given:
            self.grpo[key] = fitted
            self._fixes.append(f"grpo.{key} {given} → {fitted}: {reason}")


def _targets(config: RunConfig) -> list[str]:
    return [config.lora.target_modules] if isinstance(config.lora.target_modules, str) else config.lora.target_modules


# What TRL, Transformers and PEFT refuse only once a GPU runs: the key to change, when it is wrong, and why.
_RULES: list[tuple[tuple[str, ...], Callable[[RunConfig], Any], str]] = [
    (
        ("grpo", "num_generations"),
        lambda config: config.grpo_value("num_generations") is None,
        "needs a number, at least 2: an advantage compares answers within a group",
    ),
    (
        ("lora", "load_in_4bit"),
        lambda config: config.lora.load_in_4bit and config.grpo_value("use_vllm"),
        "load_in_4bit and grpo.use_vllm do not work together in TRL: turn one of them off",
    ),
    (
        ("grpo", "fp16"),
        lambda config: config.grpo_value("fp16") and config.grpo_value("bf16"),
        "fp16 and bf16 exclude each other: turn one of them off",
    ),
    (
        ("grpo", "generation_batch_size"),
        lambda config: config.grpo_value("generation_batch_size") and config.grpo_value("steps_per_generation"),
        "generation_batch_size and steps_per_generation say the same in two ways: give one of them",
    ),
    (
        ("grpo", "auto_find_batch_size"),
        lambda config: config.grpo_value("auto_find_batch_size"),
        "GRPO needs whole groups in a batch, which shrinking it on its own would break: lower per_device_train_batch_size",
    ),
    (
        ("grpo", "sync_ref_model"),
        lambda config: config.grpo_value("sync_ref_model"),
        "a LoRA run has no reference model to synchronise: the base model without its adapter is the reference",
    ),
    (
        ("grpo", "lr_scheduler_type"),
        lambda config: config.grpo_value("lr_scheduler_type") in {"reduce_lr_on_plateau", "greedy"},
        "this scheduler needs evaluations during training, which there are none of: take linear, cosine or constant",
    ),
    (
        ("grpo", "max_completion_length"),
        lambda config: config.grpo_value("max_completion_length") is None,
        "needs a number of tokens: without one an answer may never end",
    ),
    (
        ("max_seq_length",),
        lambda config: config.max_seq_length and config.max_seq_length <= (config.grpo_value("max_completion_length") or 0),
        "leaves no room for a prompt beside grpo.max_completion_length: raise the first or lower the second",
    ),
    (
        ("grpo", "dataloader_prefetch_factor"),
        lambda config: config.grpo_value("dataloader_prefetch_factor") and not config.grpo_value("dataloader_num_workers"),
        "only workers prefetch: give dataloader_num_workers too",
    ),
    (
        ("grpo", "vllm_importance_sampling_clip_min"),
        lambda config: (
            (low := config.grpo_value("vllm_importance_sampling_clip_min")) is not None
            and (high := config.grpo_value("vllm_importance_sampling_clip_max")) is not None
            and low >= high
        ),
        "must be below vllm_importance_sampling_clip_max",
    ),
    (
        ("lora", "target_modules"),
        lambda config: any(name.endswith("lm_head") for name in _targets(config)),
        "an adapter on lm_head would never be trained: TRL computes log-probabilities from its weights directly",
    ),
    (
        ("lora", "target_modules"),
        lambda config: (
            isinstance(config.lora.target_modules, str)
            and (config.lora.peft_kwargs().get("layers_to_transform") or config.lora.peft_kwargs().get("layers_pattern"))
        ),
        "must be a list of module names where layers_to_transform or layers_pattern choose among layers",
    ),
    (
        ("lora", "lora_bias"),
        lambda config: config.lora.peft_kwargs().get("lora_bias") and config.lora.peft_kwargs().get("use_dora"),
        "PEFT has no bias for DoRA: turn lora_bias or use_dora off",
    ),
]


def check_instances(config: RunConfig, instance_types: Sequence[str], image: str = "") -> list[Problem]:
    """Return what of the config cannot run on one of these instance types: those it names, else its deployment's.

    `image` is the deployment's for its jobs. A stand-in for SageMaker that runs jobs on this machine has no instance types
    to check.
    """
    problems = []
    for name in instance_types:
        if reason := why_not(name, image):
            hint = "choose another, such as ml.g5.xlarge"
            if config.compute.instance_type is None:
                hint += ": it is one of the stack's InstanceTypes"
            problems.append(Problem("CONFIG_INSTANCE", f"{name} runs no job: {reason}", hint, key="compute.instance_type"))
            continue
        count = gpus(name)
        for key, wanted in (
            ("lora.load_in_4bit", config.lora.load_in_4bit),
            ("grpo.use_vllm", config.grpo_value("use_vllm")),
        ):
            if wanted and count == 0:
                hint = "choose an instance type with a GPU, such as ml.g5.xlarge, or turn it off"
                problems.append(Problem("CONFIG_INSTANCE", f"{key} needs a GPU and {name} has none", hint, key=key))
        if config.grpo_value("bf16") and not has_bf16(name):
            hint = "set fp16 instead, or choose ml.g5 or newer"
            problems.append(Problem("CONFIG_INSTANCE", f"the GPUs of {name} do not compute in bf16", hint, key="grpo.bf16"))
        processes = config.compute.instance_count * (count or 1)
        batch, group = config.generation_batch(processes), config.grpo_value("num_generations")
        once = config.grpo_value("per_device_train_batch_size") * processes
        if batch % group or batch % once:
            problems.append(
                Problem(
                    "CONFIG_INSTANCE",
                    f"a generation batch of {batch} is no multiple of num_generations ({group}) and of the {once} answers "
                    f"that the {processes} GPUs of {name} take at once",
                    f"set generation_batch_size to a multiple of {math.lcm(group, once)}",
                    key="grpo.generation_batch_size",
                )
            )
    return problems


def check_lengths(config: RunConfig, context: int) -> list[Problem]:
    """Return which length limits go beyond the model's context of so many tokens (`max_position_embeddings`)."""
    completion = config.grpo_value("max_completion_length")
    problems = []
    if config.max_seq_length is not None and config.max_seq_length > context:
        message = f"max_seq_length {config.max_seq_length} is more than the model's context of {context} tokens"
        problems.append(Problem("CONFIG_LENGTH", message, f"lower it to {context}", key="max_seq_length"))
    elif config.max_seq_length is None and config.max_prompt_length + completion > context:
        message = (
            f"max_prompt_length {config.max_prompt_length} and grpo.max_completion_length {completion} are more than the "
            f"model's context of {context} tokens together"
        )
        room = context - completion
        hint = f"lower max_prompt_length to {room}" if room > 0 else f"lower max_completion_length below {context}"
        key = "max_prompt_length" if room > 0 else "grpo.max_completion_length"
        problems.append(Problem("CONFIG_LENGTH", message, hint, key=key))
    return problems


def prompt_limit(config: RunConfig) -> int:
    """Return how many tokens a prompt may have, so that prompt and completion fit `max_seq_length`."""
    if config.max_seq_length is None:
        return config.max_prompt_length
    return min(config.max_prompt_length, config.max_seq_length - int(config.grpo_value("max_completion_length")))


def optimizer_steps(config: RunConfig, rows: int, processes: int = 1) -> int:
    """Return how many optimizer steps a run over so many rows takes on so many GPUs; TRL drops an incomplete last batch."""
    if config.grpo_value("max_steps") > 0:
        return int(config.grpo_value("max_steps"))
    batch = config.generation_batch(processes)
    batches = rows * config.grpo_value("num_generations") // batch
    per_step = (
        config.grpo_value("per_device_train_batch_size") * processes * config.grpo_value("gradient_accumulation_steps")
    )
    per_epoch = batches * batch * config.grpo_value("num_iterations") // per_step
    return math.ceil(config.grpo_value("num_train_epochs") * max(per_epoch, 1)) if batches else 0


def generated_answers(config: RunConfig, rows: int, processes: int = 1) -> int:
    """Return how many answers a run over so many rows samples; each is trained on `num_iterations` times."""
    per_step = (
        config.grpo_value("per_device_train_batch_size") * processes * config.grpo_value("gradient_accumulation_steps")
    )
    return int(optimizer_steps(config, rows, processes) * per_step // config.grpo_value("num_iterations"))


def check_steps(config: RunConfig, rows: int, processes: int = 1) -> list[Problem]:
    """Return a problem when so many training rows are too few for a single step."""
    prompts = config.generation_batch(processes) // config.grpo_value("num_generations")
    if rows >= prompts:
        return []
    message = f"{rows} training rows give no optimizer step: one takes {prompts} prompts"
    hint = "add rows, or lower per_device_train_batch_size, gradient_accumulation_steps or generation_batch_size"
    return [Problem("CONFIG_STEPS", message, hint, key="grpo.per_device_train_batch_size")]


def config_warnings(config: RunConfig) -> list[str]:
    """Return what is allowed but unlikely to be meant, with the reason."""
    return [warning for holds, warning in _warnings(config) if holds]


def _warnings(config: RunConfig) -> Iterator[tuple[bool, str]]:
    rate, temperature = config.grpo_value("learning_rate"), config.grpo_value("temperature")
    group, beta, completion = (config.grpo_value(key) for key in ("num_generations", "beta", "max_completion_length"))
    yield (
        rate > 5e-4,
        f"grpo.learning_rate {rate:g} is high: GRPO with LoRA usually breaks above 5e-4; 1e-5 to 1e-4 is common",
    )
    yield rate < 1e-7, f"grpo.learning_rate {rate:g} is low: an adapter hardly changes below 1e-7; 1e-5 to 1e-4 is common"
    yield (
        temperature < 0.3,
        f"grpo.temperature {temperature:g} is low: answers to one prompt will be alike and teach nothing",
    )
    yield temperature > 1.5, f"grpo.temperature {temperature:g} is high: most answers will be noise"
    yield group < 4, f"grpo.num_generations {group} is small: a group of so few answers gives a noisy advantage"
    yield beta > 0.5, f"grpo.beta {beta:g} is high: the tuned model will stay close to its base"
    yield completion < 16, f"grpo.max_completion_length {completion} is short: answers will be cut off"
    room = (config.max_seq_length or math.inf) - completion
    yield config.max_prompt_length > room, f"max_seq_length leaves prompts {room} tokens, fewer than max_prompt_length"
    yield config.lora.r > 256, f"lora.r {config.lora.r} is large: it costs memory and seldom helps above 64"
    form = sum(spec.weight for spec in config.rewards if spec.reward_type.measures == "form")
    other = sum(spec.weight for spec in config.rewards if spec.reward_type.measures != "form")
    yield form > other, "the rewards pay more for the format than for the answer"


class YamlLoader(yaml.SafeLoader):
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
YamlLoader.add_implicit_resolver(
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
        given = yaml.load(raw.decode("utf-8-sig"), Loader=YamlLoader)  # noqa: S506 - a SafeLoader, made stricter
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
    if detail["type"] == "config_key":
        return Problem("CONFIG_KEY", f"unknown key '{key}'", message, key=key)
    # A rule is about several values, so its one is not said to be what was got.
    if "input" in detail and detail["type"] != "config_rule" and not isinstance(detail["input"], dict | list | RunConfig):
        message += f", got {detail['input']!r}"[:200]
    return Problem("CONFIG_VALUE", f"{key}: {message}" if key else message, key=key)


__all__ = [
    "GRPO_DEFAULTS",
    "MANAGED_GRPO",
    "MANAGED_LORA",
    "Columns",
    "Compute",
    "Gate",
    "Lora",
    "Preflight",
    "RewardSpec",
    "RunConfig",
    "check_instances",
    "check_lengths",
    "check_steps",
    "config_fields",
    "config_warnings",
    "generated_answers",
    "load_run_config",
    "optimizer_steps",
    "parse_run_config",
    "prompt_limit",
]
