"""The run config: what `training_data/<dataset>.yaml` may contain, and what the trainer runs.

The Lambda that accepts a config and the trainer that runs it use this one model. Section names are ours; the keys under
`grpo` and `lora` are TRL's and PEFT's own (fields.py). parse.py makes a `RunConfig` of a file, rules.py checks values
against each other, and schedule.py computes batches, steps and lengths.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from tunedrop.config.fields import GRPO_DEFAULTS, MANAGED_GRPO, MANAGED_LORA, check_fields, config_fields
from tunedrop.config.fine_tuning import Sft, WarmStart
from tunedrop.config.section import NoBoolNumbers as _NoBoolNumbers
from tunedrop.config.section import Section as _Section
from tunedrop.rewards import RewardSpec


def _seconds(value: Any) -> Any:
    """Return `3h`, `90m`, `1h30m` or `45s` in seconds. A number is in seconds already."""
    if not isinstance(value, str):
        return value
    parts = re.fullmatch(r"(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m)?(?:([0-9]{1,9})s)?", value.strip())
    if not value.strip() or parts is None:
        raise ValueError("must be a duration such as 3h, 90m or 1h30m")
    hours, minutes, seconds = (int(part or 0) for part in parts.groups())
    return hours * 3600 + minutes * 60 + seconds


def _listed(rewards: Any) -> Any:
    """Refuse one reward without its list, as people paste it."""
    if isinstance(rewards, str | dict):
        raise ValueError("must be a list of rewards: begin each with '- ', as in - {type: exact_match}")
    return rewards


class Columns(_Section):
    """The columns that the model sees. Without a name, Tunedrop guesses columns by their names (docs/receipt.md)."""

    prompt: str | None = Field(
        default=None,
        description="A column, a dotted path (`extra_info.question`), or a template with columns in braces "
        '(`"{passage}\n\nQuestion: {question}"`), which alone decides what the model sees.',
    )
    answer: str | None = Field(default=None, description="A column or a dotted path (`reference_answer.final_answer`).")
    ignore: list[str] = Field(default=[], description="Columns that the model need not see.")


class Lora(_NoBoolNumbers):
    """PEFT's `LoraConfig` fields, and whether to load the base model in 4 bits (QLoRA)."""

    model_config = ConfigDict(extra="allow", frozen=True)

    load_in_4bit: bool = Field(default=False, description="Load the base model in 4 bits (QLoRA); needs a GPU instance.")
    r: Annotated[int, Field(ge=1, le=1024)] = 16
    lora_alpha: Annotated[int, Field(ge=1, le=2**16)] = 32
    target_modules: Annotated[
        str | list[str], BeforeValidator(lambda value: "all-linear" if value is None else value)  # null is PEFT's default
    ] = "all-linear"

    @model_validator(mode="after")
    def _check(self) -> "Lora":
        check_fields("lora", self.peft_kwargs(), MANAGED_LORA)
        return self

    def peft_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments for `peft.LoraConfig`."""
        return self.model_dump(exclude={"load_in_4bit"})


InstanceType = Annotated[str, Field(pattern=r"^ml\.[a-z0-9-]+\.[a-z0-9]+$")]


class Compute(_Section):
    """Where the jobs run. Without `instance_type` or `spot`, the stack's parameters decide."""

    instance_type: Annotated[
        list[InstanceType] | None,
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
        Field(description="One type or several, best first; each attempt begins with the next type."),
    ] = None
    instance_count: Annotated[int, Field(ge=1, le=16)] = 1
    spot: bool | None = None
    max_runtime: Annotated[
        int,
        # 28 days is SageMaker's limit (MaxRuntimeInSeconds).
        Field(ge=60, le=28 * 86400, description="Seconds, or a duration such as 3h, 90m or 1h30m."),
        BeforeValidator(_seconds),
    ] = 6 * 3600
    max_cost_usd: float | None = Field(
        default=None, gt=0, description="Training ends at this cost; a run that must cost more is rejected."
    )
    volume_size_gb: Annotated[int, Field(ge=1, le=16384)] = 100
    keep_alive: Annotated[
        int,
        # One hour is SageMaker's limit (KeepAlivePeriodInSeconds).
        Field(
            ge=0,
            le=3600,
            description="How long instances wait, and are billed, for the next job (warm pool); not with spot.",
        ),
        BeforeValidator(_seconds),
    ] = 0


class ChampionGate(_Section):
    """What a tuned model must also show against the line's champion, the model in use."""

    min_lift: float = Field(
        default=0.0, description="The lower confidence bound of the lift over the champion, on this run's tests, exceeds it."
    )
    max_loss: Annotated[float, Field(ge=0)] = Field(
        default=0.02, description="On the line's suite, the tuned model may score lower than the champion by less than this."
    )


class Gate(_Section):
    """A tuned model is approved if the lower confidence bound of its mean lift exceeds `min_lift`."""

    min_lift: float = 0.0
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    must_not_regress: list[str] = Field(default=[], description="Tags of inference tests whose mean score must not fall.")
    probe_max_loss: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="The tuned model may answer a smaller share of the general questions right, by less than this. A model "
        "that loses none of the 24 shows a loss below 0.13. Default: they do not affect the verdict.",
    )
    champion: ChampionGate = ChampionGate()


class Suite(_Section):
    """The tests of the line's approved runs, which each tuned model of the line answers too."""

    max: Annotated[int, Field(ge=0, le=5000)] = Field(
        default=400, description="The most tests of the suite. Must-pass tests stay; the others keep their tags balanced."
    )


class Tests(_Section):
    """The inference tests: which rows they take from the training, and how both models answer them."""

    leave_out_rows: bool = Field(
        default=False,
        description="Leave out the rows that ask a test's question, so that the test judges the model. By default a test "
        "that repeats a row does not judge.",
    )

    max_completion_length: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Limit for an answer in tokens. Default: twice grpo.max_completion_length, or more if the expected "
        "answers of the tests need it.",
    )


class Preflight(_Section):
    """The trial of the rewards before a job starts: the dataset's own answers against wrong answers."""

    on_failure: Literal["reject", "warn"] = Field(
        default="reject", description="What to do if the rewards do not prefer the dataset's answers."
    )
    rows: Annotated[
        int,
        Field(ge=0, le=256, description="Rows to try; at most 4 if a reward calls a service or runs programs."),
    ] = 32


def _samples(value: int) -> int:
    """Refuse one answer per row, which has no other answer to differ from."""
    if value == 1:
        raise ValueError("must be 0 or at least 2: one answer cannot differ from another")
    return value


class Learnability(_Section):
    """Before training, the base model answers some rows. A row that it always or never gets right teaches nothing."""

    policy: Literal["stop_if_nothing_to_learn", "stop", "drop", "go_on"] = Field(
        default="stop_if_nothing_to_learn",
        description="The job ends if no sampled row has different rewards. stop: also if too few groups have a gradient; "
        "drop: also leave out the sampled rows that teach nothing; go_on: train in any case.",
    )
    samples: Annotated[
        int,
        Field(ge=0, le=64, description="Answers per sampled row, at least 2; 0 turns the check off."),
        AfterValidator(_samples),
    ] = 8
    min_nonzero_groups: Annotated[
        float, Field(ge=0, le=1, description="`stop` stops below this expected share of groups with a gradient.")
    ] = 0.1


class Sampling(_Section):
    """Which prompts a rollout takes. A group of answers teaches only if their rewards differ."""

    policy: Literal["uniform", "teach"] = Field(
        default="uniform",
        description="uniform: in a random order; teach: those whose answers will probably have different rewards.",
    )
    refills: Annotated[
        int,
        Field(ge=0, le=10, description="With `teach`, how often a rollout replaces its groups that teach nothing."),
    ] = 1


# docs/alerts.md explains the alerts.
AlertCode = Literal[
    "NON_FINITE",
    "KL_BLOWUP",
    "DEAD_REWARD",
    "TRUNCATION",
    "HACKING_SUSPECT",
    "ENTROPY_COLLAPSE",
    "PLATEAU",
    "OVERFIT",
    "STALLED",
    "ROLLOUT_MISMATCH",
    "FORGETTING",
]


class Alerts(_Section):
    """The alerts that end a training early."""

    stop_on: list[AlertCode] = Field(
        default=["NON_FINITE", "DEAD_REWARD"],
        description="Alerts that end the training. The test job then tests the best checkpoint.",
    )


class Rollouts(_Section):
    """The answers of the training that the job keeps with their scores (docs/training.md)."""

    max_mb: Annotated[float, Field(ge=0, le=1000, description="The most megabytes of them, compressed; 0 keeps none.")] = (
        50.0
    )


class Serve(_Section):
    """How the line's model is served once it is approved. The stack's parameter EndpointInstanceType turns serving on."""

    enabled: bool = Field(default=True, description="Whether the stack serves the line, if the stack serves models at all.")
    target: Literal["sagemaker", "bedrock"] = Field(
        default="sagemaker",
        description="Where the model is served: on an endpoint of SageMaker, or by Bedrock's Custom Model Import.",
    )
    instance_type: InstanceType | None = Field(
        default=None,
        description="The instance type of SageMaker's endpoint. Default: the stack's parameter EndpointInstanceType.",
    )


class Notify(_Section):
    """The notifications to send."""

    sns: bool = True


class RunConfig(_Section):
    """Everything that a user decides about a run. Unknown keys are errors."""

    model: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9][A-Za-z0-9._-]*)?)?$",
            max_length=200,
            description="A folder under models/ in the data bucket, or a hub id: `org/name`, or `org/name@revision`. "
            "Validation replaces a branch or tag by its commit.",
        ),
    ]
    line: str | None = Field(
        default=None,
        pattern=r"^[^/]+$",
        max_length=1024,
        description="The line that the run belongs to: a model that successive runs improve. Default: the first folder "
        "below training_data/, else the dataset's name.",
    )
    start_from: Annotated[
        str,
        Field(
            pattern=r"^(base|champion|[A-Za-z0-9-]+-[0-9a-f]{12})$",
            description="Where the adapter starts: base (a new adapter), champion (the line's model in use), or the id of a "
            "published run.",
        ),
    ] = "base"
    method: Literal["grpo", "sft"] = Field(
        default="grpo",
        description="grpo, or supervised fine-tuning alone, on the rows' own answers or worked solutions.",
    )
    reference: Literal["base", "start"] = Field(
        default="base", description="The model that `grpo.beta` keeps the tuned model close to: base, or the start."
    )
    system_prompt: str | None = Field(default=None, description="Added to every prompt without a system message.")
    columns: Columns = Columns()
    rewards: Annotated[list[RewardSpec], BeforeValidator(_listed)] = Field(
        default=[],
        description="Training raises the weighted sum of these rewards, and the inference tests score by it. Without "
        "rewards, Tunedrop chooses one that fits the dataset's answers.",
    )
    lora: Lora = Lora()
    grpo: dict[str, Any] = Field(default={}, validate_default=True, description="TRL's `GRPOConfig` fields.")
    compute: Compute = Compute()
    tests: Tests = Tests()
    suite: Suite = Suite()
    gate: Gate = Gate()
    preflight: Preflight = Preflight()
    learnability: Learnability = Learnability()
    sampling: Sampling = Sampling()
    warm_start: WarmStart = WarmStart()
    sft: Sft = Sft()
    alerts: Alerts = Alerts()
    rollouts: Rollouts = Rollouts()
    notify: Notify = Notify()
    serve: Serve = Serve()
    max_prompt_length: Annotated[
        int, Field(ge=1, le=1_000_000, description="Limit for a prompt in tokens, chat template included.")
    ] = 512
    max_seq_length: (
        Annotated[int, Field(ge=2, le=1_000_000, description="Limit for prompt and completion together, in tokens.")] | None
    ) = None
    prompt_overflow: Literal["drop", "reject", "truncate"] = Field(
        default="drop", description="What to do with a row whose prompt has more than max_prompt_length tokens."
    )
    max_bad_rows: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="Share of rows that may be broken. They go to rejected.jsonl. A larger share rejects the dataset.",
    )
    heldout_fraction: Annotated[float, Field(ge=0, le=0.5)] = Field(
        default=0.1,
        description="Share of rows to keep out of training, at most 256 rows. They choose the checkpoint; without a test "
        "file, most of them are the inference tests instead.",
    )

    @field_validator("grpo")
    @classmethod
    def _grpo(cls, values: dict[str, Any]) -> dict[str, Any]:
        check_fields("grpo", values, MANAGED_GRPO)
        return GRPO_DEFAULTS | values

    def reward_columns(self) -> set[str]:
        """Return the columns of the dataset that the rewards read, `*` for all columns."""
        return {column for spec in self.rewards for column in spec.columns}

    def grpo_value(self, key: str) -> Any:
        """Return a `grpo` field's value: the config's, else our default, else TRL's (None if TRL has no default)."""
        return self.grpo.get(key, config_fields()["grpo"][key].get("default"))


class ResolvedCompute(Compute):
    """`Compute` without gaps."""

    instance_type: list[InstanceType]
    spot: bool


class ResolvedConfig(RunConfig):
    """A valid config that the stack's parameters completed: a run's `input/config.json`."""

    compute: ResolvedCompute
