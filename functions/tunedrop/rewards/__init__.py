"""Rewards: named in a run config, called in TRL's contract, and used again to score the inference tests.

A reward is a plain function whose keyword-only parameters are what a config may set. Its first parameter says what it
looks at: `sample`, one completion at a time, or `samples`, a whole batch, together with the `RewardPermissions` it runs in.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_validator

from tunedrop.problems import nearest
from tunedrop.rewards import code, openai, remote, structured, text
from tunedrop.rewards.base import (
    NO_PERMISSIONS,
    REWARD_ENVIRONMENT,
    RewardError,
    RewardPermissions,
    Sample,
    content_text,
    reward_permissions,
    text_of,
)

REWARDS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        text.exact_match,
        text.numeric,
        text.math,
        text.multiple_choice,
        text.contains,
        text.regex,
        text.xml_format,
        text.think_format,
        text.length,
        text.overlong_penalty,
        text.repetition_penalty,
        text.similarity,
        text.rouge,
        text.relevance,
        text.keywords,
        text.citations,
        text.quotes,
        structured.json_valid,
        structured.json_schema,
        structured.tool_call,
        openai.openai_grader,
        code.code_tests,
        remote.http,
        remote.judge,
        remote.python,
    )
} | {"lambda": remote.reward_lambda}

# What a deployment must allow a reward, by its parameters, and what to say where it does not.
_NEEDS: dict[str, tuple[Callable[[RewardPermissions, dict[str, Any]], Any], str]] = {
    "code_tests": (
        lambda permissions, _: permissions.allow_code,
        "runs programs that a model wrote, which is not allowed here (stack parameter AllowCodeRewards)",
    ),
    "python": (
        lambda permissions, _: permissions.python_folder,
        "runs a Python file, which is not allowed here (stack parameter AllowPythonRewards)",
    ),
    "lambda": (
        lambda permissions, given: any(
            given["function_arn"] in {arn, arn.partition(":function:")[2]} for arn in permissions.functions
        ),
        "calls a function that is not among those allowed here (stack parameter RewardFunctionArns)",
    ),
    "judge": (
        lambda permissions, given: given["model"] == permissions.judge_model,
        "asks a model that is not the one allowed here (stack parameter RewardJudgeModel)",
    ),
    "http": (
        lambda permissions, given: (
            not {urlsplit(given["url"]).netloc, urlsplit(given["url"]).hostname}.isdisjoint(permissions.hosts)
        ),
        "calls a host that is not among those allowed here (stack parameter RewardHttpHosts)",
    ),
}
# Batches in which one answer may bear on another's score: what computes them is not ours.
_OF_OTHERS = frozenset({"lambda", "http", "python"})
# Rewards for the form of an answer alone.
FORMAT_REWARDS = frozenset("xml_format think_format json_valid length overlong_penalty repetition_penalty regex".split())
# These look at what is said, but not at whether it is what the row's answer says.
_CONTENT_REWARDS = frozenset("json_schema keywords citations quotes".split())
# Lists that TRL passes beside the dataset's columns.
_TRAINER_COLUMNS = frozenset({"prompts", "completions", "completion_ids", "prompt_ids", "environments"})


def _parameters(name: str, function: Callable[..., Any]) -> type[BaseModel]:
    """A model of a reward's keyword-only parameters, so that a config is checked against the function itself."""
    fields: dict[str, Any] = {
        name: (parameter.annotation, ... if parameter.default is parameter.empty else parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    with warnings.catch_warnings():
        # json_schema's 'schema' hides a deprecated method of pydantic's that nobody calls here.
        warnings.filterwarnings("ignore", message='Field name "schema"')
        return create_model(
            f"{name}_parameters", __config__=ConfigDict(extra="forbid", defer_build=True), __doc__=function.__doc__, **fields
        )


PARAMETERS = {name: _parameters(name, function) for name, function in REWARDS.items()}


class OnlyIf(BaseModel):
    """A condition on another reward's score of the same completion; written short, its name alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reward: str
    at_least: Annotated[float, Field(allow_inf_nan=False)] = 1.0


def _ascending(value: tuple[float, float] | None) -> tuple[float, float] | None:
    if value is not None and value[0] >= value[1]:
        raise ValueError(f"the lower bound {value[0]:g} must be below the upper bound {value[1]:g}")
    return value


class RewardSpec(BaseModel):
    """One entry of a config's `rewards`: a type, its weight, and that type's own parameters beside them.

    `clip` bounds the score. `only_if` pays it only where another reward, listed above, gave at least its threshold.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    clip: tuple[float, float] | None = None
    only_if: Annotated[
        OnlyIf | None, BeforeValidator(lambda value: {"reward": value} if isinstance(value, str) else value)
    ] = None

    @property
    def label(self) -> str:
        """What the reward is called in metrics and results."""
        return self.name or self.type

    @property
    def waits(self) -> bool:
        """Whether its time goes by in waiting for somebody else's answer."""
        return self.type in {"lambda", "http", "judge"}

    @property
    def compares(self) -> bool:
        """Whether it compares with the row's answer, so that the answer itself must score well and another must not."""
        given = self.model_extra or {}
        fixed = "text" in given if self.type == "contains" else self.type == "openai_grader" and "item." not in str(given)
        return not fixed and self.type not in FORMAT_REWARDS | _CONTENT_REWARDS

    @model_validator(mode="after")
    def _check(self) -> "RewardSpec":
        if self.type not in REWARDS:
            raise ValueError(f"unknown reward '{self.type}': {nearest(self.type, REWARDS)}")
        _ascending(self.clip)
        unknown = set(self.model_extra or {}) - set(PARAMETERS[self.type].model_fields)
        if unknown:
            key = min(unknown)
            valid = [*PARAMETERS[self.type].model_fields, *RewardSpec.model_fields]
            raise ValueError(f"reward '{self.type}' has no parameter '{key}': {nearest(key, valid)}")
        PARAMETERS[self.type].model_validate(self.model_extra or {})
        return self


def check_names(specs: Sequence[RewardSpec]) -> None:
    """Raise ValueError where two rewards have one name, or `only_if` names none that is listed above."""
    above: list[str] = []
    for spec in specs:
        if spec.label in above:
            raise ValueError(f"two rewards are called '{spec.label}': give one of them another name with 'name:'")
        if spec.only_if and spec.only_if.reward not in above:
            hint = nearest(spec.only_if.reward, above) if above else "there is none"
            raise ValueError(f"'{spec.label}' has only_if '{spec.only_if.reward}', no reward listed above it: {hint}")
        above.append(spec.label)


def _question(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return next((content_text(message.get("content")) for message in reversed(prompt) if message["role"] == "user"), "")


def _messages(value: Any, role: str) -> list[dict[str, Any]]:
    """A prompt or completion as messages; a bare text is one message."""
    return ([{"role": role, "content": value}] if value else []) if isinstance(value, str) else list(value)


class Reward:
    """A configured reward. Calling it follows TRL: `reward(prompts, completions, **columns) -> list[float | None]`.

    `permissions` is what the place gives and allows; `gate` is the reward that `only_if` names. Raises RewardError when
    the deployment does not allow this type.
    """

    def __init__(self, spec: RewardSpec, permissions: RewardPermissions = NO_PERMISSIONS, gate: "Reward | None" = None):
        self.__name__ = spec.label  # TRL names the metric rewards/<__name__>/mean
        self.weight = spec.weight
        self.spec = spec
        self.gate = gate
        self.parameters = dict(PARAMETERS[spec.type].model_validate(spec.model_extra or {}))
        available, refusal = _NEEDS.get(spec.type, (lambda *_: True, ""))
        if not available(permissions, self.parameters):
            raise RewardError(f"reward '{self.__name__}' {refusal}")
        self._permissions = permissions
        self._function = REWARDS[spec.type]
        # Whole batches are for rewards that take their time: they start a process, or call somebody.
        self.per_batch = "samples" in inspect.signature(self._function).parameters
        self._last: tuple[tuple[list[Any], ...], list[float | None]] | None = None

    def __call__(
        self, /, prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str] | None = None, **columns: Any
    ) -> list[float | None]:
        """Score each completion against its row's answer (TRL's column `answer`, empty where there is none); None abstains.

        Where the gate abstains, so does this reward; where the gate is not met, it is 0.0. Raises RewardError, naming the
        row, when a score is no finite number, when there are not as many as completions, or when the reward fails.
        """
        samples = _samples(prompts, completions, answer, columns)
        scores: list[float | None] = [None] * len(samples)
        chosen = list(range(len(samples)))
        if self.gate and self.spec.only_if:
            gates = self.gate._recalled(prompts, completions, answer, columns)
            scores = [None if gate is None else 0.0 for gate in gates]
            chosen = [at for at, gate in enumerate(gates) if gate is not None and gate >= self.spec.only_if.at_least]
        for at, value in zip(chosen, self._score([samples[at] for at in chosen]), strict=True):
            scores[at] = self._checked(value, samples[at])
        self._last = (_asked(prompts, completions, answer), scores)
        return list(scores)

    def _recalled(
        self, prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str] | None, columns: dict[str, Any]
    ) -> list[float | None]:
        """The scores of a batch for the rewards that this one gates: a judge that gave them should not be asked again."""
        if self._last is None or self._last[0] != _asked(prompts, completions, answer):
            self(prompts, completions, answer, **columns)
        assert self._last is not None
        return self._last[1]

    def _score(self, samples: list[Sample]) -> Sequence[Any]:
        """Score samples, equal ones once (a group often answers alike), unless others compute the scores."""
        if self.spec.type in _OF_OTHERS:
            return self._all(samples)
        different, which = _different(samples)
        scores = self._all(different) if self.per_batch else [self._one(sample) for sample in different]
        return [scores[at] for at in which]

    def _all(self, samples: list[Sample]) -> Sequence[Any]:
        if not samples:
            return []
        try:
            scores = self._function(samples, self._permissions, **self.parameters)
        except (Exception, SystemExit) as error:  # a user's file may end with one: the job must not, as if all were well
            where = f"on {len(samples)} completions, the first of {_row(samples[0])}"
            if self.spec.type == "python" and len(samples) > 1:
                for sample in samples:  # calling it again costs nothing, and one row alone says which it was
                    self._all([sample])
            elif len(samples) == 1:
                where = f"on {_row(samples[0])}"
            raise RewardError(f"reward '{self.__name__}' failed {where}: {_reason(error)}") from error
        if not isinstance(scores, Sequence) or len(scores) != len(samples):
            got = f"{len(scores)} scores" if isinstance(scores, Sequence) else f"a {type(scores).__name__}"
            raise RewardError(
                f"reward '{self.__name__}' returned {got} for {len(samples)} completions, the first of {_row(samples[0])}"
            )
        return scores

    def _one(self, sample: Sample) -> Any:
        try:
            return self._function(sample, **self.parameters)
        except Exception as error:
            raise RewardError(f"reward '{self.__name__}' failed on {_row(sample)}: {_reason(error)}") from error

    def _checked(self, value: Any, sample: Sample) -> float | None:
        if value is None:
            return None
        if not isinstance(value, Real) or not math.isfinite(value):
            raise RewardError(f"reward '{self.__name__}' returned {value!r} for {_row(sample)}")
        low, high = self.spec.clip or (-math.inf, math.inf)
        return min(high, max(low, float(value)))


def _different(samples: Sequence[Sample]) -> tuple[list[Sample], list[int]]:
    """Return the samples without those that equal an earlier one, and for each sample which of the returned it is."""
    different: list[Sample] = []
    alike: dict[tuple[str, str, str], list[int]] = {}
    which = []
    for sample in samples:
        places = alike.setdefault((sample.completion, sample.answer, sample.question), [])
        place = next((place for place in places if different[place] == sample), None)
        if place is None:
            place = len(different)
            places.append(place)
            different.append(sample)
        which.append(place)
    return different, which


def _asked(*batch: Sequence[Any] | None) -> tuple[list[Any], ...]:
    return tuple(list(each or []) for each in batch)


def _samples(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str] | None, columns: dict[str, Any]
) -> list[Sample]:
    # TRL also passes trainer objects; only per-row lists are columns.
    rows = {
        key: value
        for key, value in columns.items()
        if isinstance(value, list) and len(value) == len(completions) and key not in _TRAINER_COLUMNS
    }
    answers = [""] * len(completions) if answer is None else answer
    return [
        Sample(
            text_of(completion),
            answers[at],
            _question(prompt),
            {key: value[at] for key, value in rows.items()},
            _messages(prompt, "user"),
            _messages(completion, "assistant"),
        )
        for at, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]


def _row(sample: Sample) -> str:
    id_ = f" '{sample.columns['id']}'" if "id" in sample.columns else ""
    return f"the row{id_} asking {sample.question[:200]!r}"


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, RewardError) else f"{type(error).__name__}: {error}"


def build_rewards(specs: Sequence[RewardSpec], permissions: RewardPermissions = NO_PERMISSIONS) -> list[Reward]:
    """Make the rewards of a config, in its order. Raises RewardError for one that the deployment does not allow."""
    check_names(specs)
    built: dict[str, Reward] = {}
    for spec in specs:
        built[spec.label] = Reward(spec, permissions, built[spec.only_if.reward] if spec.only_if else None)
    return list(built.values())


def score(
    rewards: Sequence[Reward], prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, list[Any]]
) -> list[dict[str, Any]]:
    """Score completions by the weighted sum that training maximises, abstentions left out as TRL's nansum does.

    Returns one `{"score": float, "rewards": {name: float | None}}` per completion.
    """
    others = {name: values for name, values in columns.items() if name not in _TRAINER_COLUMNS}
    by_reward = [reward(prompts, completions, **others) for reward in rewards]
    return [
        {
            "score": sum(reward.weight * value for reward, value in zip(rewards, values, strict=True) if value is not None),
            "rewards": {reward.__name__: value for reward, value in zip(rewards, values, strict=True)},
        }
        for values in zip(*by_reward, strict=True)
    ]


__all__ = [
    "FORMAT_REWARDS",
    "NO_PERMISSIONS",
    "PARAMETERS",
    "REWARDS",
    "REWARD_ENVIRONMENT",
    "OnlyIf",
    "Reward",
    "RewardError",
    "RewardPermissions",
    "RewardSpec",
    "Sample",
    "build_rewards",
    "check_names",
    "reward_permissions",
    "score",
    "text_of",
]
