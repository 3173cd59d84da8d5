"""Rewards: named in a run config, called in TRL's contract, and used again to score the inference tests."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from tunedrop.problems import nearest
from tunedrop.rewards import functions
from tunedrop.rewards.functions import Sample

REWARDS: dict[str, Callable[..., float | None]] = {
    function.__name__: function
    for function in (
        functions.exact_match,
        functions.contains,
        functions.regex,
        functions.xml_format,
        functions.think_format,
        functions.numeric,
        functions.length,
        functions.relevance,
    )
}


def _parameters(function: Callable[..., float | None]) -> type[BaseModel]:
    """A model of a reward's keyword-only parameters, so that a config is checked against the function itself."""
    fields: dict[str, Any] = {
        name: (parameter.annotation, ... if parameter.default is parameter.empty else parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    return create_model(f"{function.__name__}_parameters", __config__=ConfigDict(extra="forbid"), **fields)


PARAMETERS = {name: _parameters(function) for name, function in REWARDS.items()}


class RewardSpec(BaseModel):
    """One entry of a config's `rewards`: a type, its weight, and that type's own parameters beside them."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.-]{1,64}$")

    @model_validator(mode="after")
    def _check(self) -> "RewardSpec":
        if self.type not in REWARDS:
            raise ValueError(f"unknown reward '{self.type}': {nearest(self.type, REWARDS)}")
        unknown = set(self.model_extra or {}) - set(PARAMETERS[self.type].model_fields)
        if unknown:
            key = min(unknown)
            valid = [*PARAMETERS[self.type].model_fields, "type", "weight", "name"]
            raise ValueError(f"reward '{self.type}' has no parameter '{key}': {nearest(key, valid)}")
        PARAMETERS[self.type].model_validate(self.model_extra or {})
        return self


class RewardError(Exception):
    """A reward returned something that is no score. It fails the job: a broken reward must not train as 0.0."""


def text_of(completion: Any) -> str:
    """Return the text of a completion: a string, or the content of its messages (TRL's conversational format)."""
    return completion if isinstance(completion, str) else "".join(str(message["content"]) for message in completion)


def _question(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return next((str(message["content"]) for message in reversed(prompt) if message["role"] == "user"), "")


class Reward:
    """A configured reward. Calling it follows TRL: `reward(prompts, completions, **columns) -> list[float | None]`."""

    def __init__(self, spec: RewardSpec):
        self.__name__ = spec.name or spec.type  # TRL names the metric rewards/<__name__>/mean
        self.weight = spec.weight
        self._function = REWARDS[spec.type]
        self._parameters = dict(PARAMETERS[spec.type].model_validate(spec.model_extra or {}))

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **columns: Any
    ) -> list[float | None]:
        """Score each completion against its row's answer; None abstains.

        Raises RewardError, naming the row's question, when a score is not a finite number. Whatever the reward itself
        raises passes through.
        """
        # TRL also passes trainer objects; only per-row lists are columns.
        rows = {key: value for key, value in columns.items() if isinstance(value, list) and len(value) == len(completions)}
        scores: list[float | None] = []
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            row = {key: value[index] for key, value in rows.items()}
            sample = Sample(text_of(completion), answer[index], _question(prompt), row)
            score = self._function(sample, **self._parameters)
            if score is not None and not math.isfinite(score):
                raise RewardError(f"reward '{self.__name__}' returned {score} for the row asking {sample.question[:200]!r}")
            scores.append(score)
        return scores


def build_rewards(specs: Sequence[RewardSpec]) -> list[Reward]:
    """Make the rewards of a config, in its order."""
    return [Reward(spec) for spec in specs]


def score(
    rewards: Sequence[Reward], prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, list[Any]]
) -> list[dict[str, Any]]:
    """Score completions by the weighted sum that training maximises, abstentions left out as TRL's nansum does.

    Returns one `{"score": float, "rewards": {name: float | None}}` per completion.
    """
    by_reward = [reward(prompts, completions, **columns) for reward in rewards]
    return [
        {
            "score": sum(reward.weight * value for reward, value in zip(rewards, values, strict=True) if value is not None),
            "rewards": {reward.__name__: value for reward, value in zip(rewards, values, strict=True)},
        }
        for values in zip(*by_reward, strict=True)
    ]
