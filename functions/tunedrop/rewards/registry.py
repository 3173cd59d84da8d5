"""The registry of reward types: one decorator stands above a reward's function and declares the reward's traits.

A reward is a plain function. Its first parameter is `sample` (one completion) or `samples` (a whole batch, followed by
the `RewardPermissions`). Its keyword-only parameters are the keys that a run config may set. The function returns a
score or None, or a list of these for a batch. The docstring is the reward's help text in the config's schema.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, create_model

from tunedrop.rewards.permissions import RewardPermissions

Function = TypeVar("Function", bound=Callable[..., Any])
Parameters = dict[str, Any]
# How many requests a reward sends to its service at a time.
Concurrency = Annotated[int, Field(ge=1, le=64)]
# A reward measures a completion's form, its content, or its agreement with the row's answer.
Measure = Literal["form", "content", "answer"]
# Whether a reward compares with the answer may depend on its parameters and on the row's columns.
MeasureOfRow = Callable[[Parameters, Mapping[str, Any]], Literal["content", "answer"]]


class Need(NamedTuple):
    """A permission that a reward needs: the stack parameter that grants it, and the message when it is missing."""

    granted: Callable[[RewardPermissions, Parameters], bool]
    stack_parameter: str
    refusal: str


class Form(NamedTuple):
    r"""The form of a completion: XML elements in order, a `<think>` block before them, or `\boxed{}` around the answer."""

    tags: tuple[str, ...] = ()
    think: bool = False
    boxed: bool = False


@dataclass(frozen=True, kw_only=True)
class RewardType:
    """A registered reward: its function, a model of its parameters, and the traits that `@reward` documents."""

    name: str
    function: Callable[..., Any]
    parameters: type[BaseModel]
    measures: Measure | MeasureOfRow
    needs: Need | None
    waits: bool
    batch_dependent: bool
    ranks: bool
    repeatable: bool
    penalty: bool
    form: Callable[[Parameters], Form] | None
    file: str | None
    reads: Callable[[Parameters], Iterable[str]]
    when: Callable[[Parameters], bool] | None
    imports: str | None
    variant: "RewardType | None" = None

    def for_parameters(self, given: Parameters) -> "RewardType":
        """Return the type with the traits that a config's parameters give it: the variant, where it applies."""
        return self.variant if self.variant and self.variant.when and self.variant.when(given) else self

    @property
    def per_batch(self) -> bool:
        """Whether the function takes a whole batch, because it starts processes or calls a service."""
        return "samples" in inspect.signature(self.function).parameters

    def per_request(self, parameters: Parameters, completions: int) -> int:
        """Return how many completions one request to the reward's service scores, of `completions` of one row."""
        return completions if self.ranks else int(parameters.get("batch_size", 1))

    @property
    def external(self) -> bool:
        """Whether a service or a user's code computes the score. Tunedrop does not know what such a reward measures."""
        return self.waits or self.batch_dependent

    @property
    def help(self) -> str:
        """The reward's description, for the config's schema and its reference."""
        return inspect.cleandoc(self.function.__doc__ or "")


REWARDS: dict[str, RewardType] = {}
ALL_COLUMNS = "*"


def _named_column(parameters: Parameters) -> list[str]:
    return [parameters["column"]] if parameters.get("column") else []


def reward(
    *,
    measures: Measure | MeasureOfRow,
    name: str | None = None,
    needs: Need | None = None,
    waits: bool = False,
    batch_dependent: bool = False,
    ranks: bool = False,
    repeatable: bool = True,
    penalty: bool = False,
    form: Callable[[Parameters], Form] | None = None,
    file: str | None = None,
    reads: Callable[[Parameters], Iterable[str]] = _named_column,
    when: Callable[[Parameters], bool] | None = None,
    imports: str | None = None,
) -> Callable[[Function], Function]:
    """Register a function as a reward type. All other code reads a reward's traits; no other code lists reward names.

    - `measures`: `form`, `content` or `answer`, or a function that chooses between `content` and `answer`. The preflight
      expects the dataset's answers to win only where a reward measures `answer`. Alerts watch rewards that measure `form`.
    - `name`: the `type` in a config, where it is not the function's name.
    - `needs`: the permission that a stack must grant.
    - `waits`: the reward waits for a service, and training starts to score while the rollout goes on. The parameters
      `concurrency` and `batch_size`, if the reward has them, say how many completions the service scores at a time.
    - `batch_dependent`: a completion's score may depend on the rest of the batch. Equal completions are not skipped.
    - `ranks`: the reward compares the completions of a row with each other. One call must have all of a group, and the mean
      of the scores says little about how good the completions are.
    - `repeatable`: False where a second call costs money and may return another score.
    - `penalty`: the best score is 0.0, and not 1.0.
    - `form`: the form that the reward asks for; the preflight puts answers into it.
    - `file`: the parameter that names a file beside the dataset; the run's jobs get the file.
    - `reads`: the columns that the reward reads beside `answer`, ALL_COLUMNS where its code may read any column.
    - `when`: the function is a variant of the type `name`, which is registered before, for the parameters that it accepts.
    - `imports`: a package that takes seconds to import. It is imported before the first score, whose time is limited.
    """

    def register(function: Function) -> Function:
        type_ = name or function.__name__
        registered = RewardType(
            name=type_,
            function=function,
            parameters=_parameters_model(type_, function),
            measures=measures,
            needs=needs,
            waits=waits,
            batch_dependent=batch_dependent,
            ranks=ranks,
            repeatable=repeatable,
            penalty=penalty,
            form=form,
            file=file,
            reads=reads,
            when=when,
            imports=imports,
        )
        REWARDS[type_] = replace(REWARDS[type_], variant=registered) if when else registered
        return function

    return register


def _parameters_model(name: str, function: Callable[..., Any]) -> type[BaseModel]:
    """Return a model of a reward's keyword-only parameters: the function's signature is the config's schema."""
    fields: dict[str, Any] = {
        name: (parameter.annotation, ... if parameter.default is parameter.empty else parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    with warnings.catch_warnings():
        # json_schema has a parameter 'schema', which hides a deprecated method of pydantic's BaseModel.
        warnings.filterwarnings("ignore", message='Field name "schema"')
        return create_model(
            f"{name}_parameters", __config__=ConfigDict(extra="forbid", defer_build=True), __doc__=function.__doc__, **fields
        )
