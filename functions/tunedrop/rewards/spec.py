"""The rewards section of a run config."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tunedrop.problems import nearest
from tunedrop.rewards.registry import REWARDS, Measure, Parameters, RewardType
from tunedrop.rewards.synonyms import reward_like, written


class OnlyIf(BaseModel):
    """A condition: another reward gave the same completion at least this score. A config may write the name alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reward: str
    at_least: Annotated[float, Field(allow_inf_nan=False)] = 1.0


class RewardSpec(BaseModel):
    """One entry of a config's `rewards`: the type, its weight, and the parameters of that type beside them.

    `clip` bounds the score. `only_if` names a reward listed above: where that reward gives less than its threshold, this
    reward gives 0.
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
        """The reward's name in metrics and results."""
        return self.name or self.type

    @property
    def reward_type(self) -> RewardType:
        """The registered reward, with its traits."""
        return REWARDS[self.type].for_parameters(self.model_extra or {})

    @property
    def parameters(self) -> Parameters:
        """The reward's own parameters with their defaults."""
        return dict(self.reward_type.parameters.model_validate(self.model_extra or {}))

    @property
    def reward_file(self) -> str | None:
        """The name of the file beside the dataset that the reward runs; None for a reward without one."""
        parameter = self.reward_type.file
        return self.parameters[parameter] if parameter else None

    @property
    def columns(self) -> set[str]:
        """The columns of the dataset that the reward reads beside `answer`, `*` for all columns."""
        return set(self.reward_type.reads(self.parameters))

    def measures(self, columns: Mapping[str, Any]) -> Measure:
        """Return what the reward measures with its parameters, in a row that has these columns."""
        measures = self.reward_type.measures
        return measures if isinstance(measures, str) else measures(self.parameters, columns)

    @model_validator(mode="before")
    @classmethod
    def _mapping(cls, value: Any) -> Any:
        """Refuse a bare name: it says what to write."""
        if isinstance(value, str):
            raise ValueError(f"must be a mapping with the reward's type: {_hint(value)}")
        return value

    @model_validator(mode="after")
    def _check(self) -> "RewardSpec":
        if self.type not in REWARDS:
            raise ValueError(f"unknown reward '{self.type}': {_hint(self.type)}")
        if self.clip is not None and self.clip[0] >= self.clip[1]:
            raise ValueError(f"the lower bound {self.clip[0]:g} must be below the upper bound {self.clip[1]:g}")
        own = self.reward_type.parameters.model_fields
        if unknown := set(self.model_extra or {}) - set(own):
            key = min(unknown)
            hint = nearest(key, [*own, *RewardSpec.model_fields])
            raise ValueError(f"reward '{self.type}' has no parameter '{key}': {hint}")
        self.reward_type.parameters.model_validate(self.model_extra or {})
        return self


def _hint(name: str) -> str:
    """Return which entry to write for a reward's name, here or in another framework."""
    entry = {"type": name} if name in REWARDS else reward_like(name)
    return f"write {written(entry)}" if entry else nearest(name, REWARDS)


def check_names(specs: Sequence[RewardSpec]) -> None:
    """Raise ValueError where two rewards have one name, or an `only_if` names no reward that is listed above it."""
    above: list[str] = []
    for spec in specs:
        if spec.label in above:
            raise ValueError(f"two rewards are called '{spec.label}': rename one of them with 'name:'")
        if spec.only_if and spec.only_if.reward not in above:
            hint = nearest(spec.only_if.reward, above) if above else "it is the first reward"
            raise ValueError(
                f"'{spec.label}' has only_if: {spec.only_if.reward}, but no reward listed above it has that name: {hint}"
            )
        above.append(spec.label)
