"""A configured reward: from a config's entry to the scores of a batch."""

import logging
import math
from collections.abc import Sequence
from importlib import import_module
from numbers import Real
from typing import Any

from tunedrop.rewards.deadline import SECONDS, DeadlineError, deadline
from tunedrop.rewards.permissions import NO_PERMISSIONS, RewardPermissions
from tunedrop.rewards.sample import ACCEPTED, TRAINER_COLUMNS, RewardError, Sample, distinct, make_samples
from tunedrop.rewards.spec import RewardSpec, check_names

logger = logging.getLogger(__name__)


class Reward:
    """A configured reward, with TRL's contract: `reward(prompts, completions, **columns) -> list[float | None]`.

    `permissions` are those of the job, function or shell that runs the reward. `gate` is the reward that the spec's
    `only_if` names. Raises RewardError when the permissions do not allow the reward.
    """

    def __init__(self, spec: RewardSpec, permissions: RewardPermissions = NO_PERMISSIONS, gate: "Reward | None" = None):
        self.__name__ = spec.label  # TRL names the metric rewards/<__name__>/mean
        self.weight = spec.weight
        self.spec = spec
        self.gate = gate
        self.parameters = spec.parameters
        self.per_batch = spec.reward_type.per_batch
        needs = spec.reward_type.needs
        if needs and not needs.granted(permissions, self.parameters):
            raise RewardError(f"reward '{self.__name__}' {needs.refusal} (stack parameter {needs.stack_parameter})")
        self._permissions = permissions
        self._function = spec.reward_type.function
        self.expired = 0  # completions on which the reward abstained because they took too long
        self._last: tuple[list[Sample], list[float | None]] | None = None

    def __call__(self, /, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Score a batch in TRL's format; the column `answer` holds the rows' answers. See `score_samples`."""
        return self.score_samples(make_samples(prompts, completions, columns))

    def score_samples(self, samples: list[Sample]) -> list[float | None]:
        """Return each sample's score, or None where the reward abstains.

        Where the gate abstains, this reward abstains. Where the gate stays below its threshold, this reward gives 0.0.
        Raises RewardError with the row when the reward fails, when a score is not a finite number, or when the number of
        scores is not the number of samples.
        """
        scores: list[float | None] = [None] * len(samples)
        passed = list(range(len(samples)))
        if self.gate and self.spec.only_if:
            gates = self.gate._recall(samples)
            scores = [None if gate is None else 0.0 for gate in gates]
            passed = [index for index, gate in enumerate(gates) if gate is not None and gate >= self.spec.only_if.at_least]
        unique, positions = [samples[index] for index in passed], list(range(len(passed)))
        if not self.spec.reward_type.batch_dependent:
            unique, positions = distinct(unique)  # the completions of a group are often equal
        calls = [unique] if self.per_batch else [[sample] for sample in unique]
        values = [value for call in calls if call for value in self._call_function(call)]
        for index, position in zip(passed, positions, strict=True):
            scores[index] = self._checked(values[position], samples[index])
        self._last = samples, scores
        return list(scores)

    def _recall(self, samples: list[Sample]) -> list[float | None]:
        """Return the batch's scores. Scores of the last batch are kept: a gate that costs money is not called twice."""
        if self._last is None or self._last[0] != samples:
            self.score_samples(samples)
        assert self._last is not None
        return self._last[1]

    def _call_function(self, samples: list[Sample]) -> Sequence[Any]:
        try:
            if not self.per_batch:
                return [self._in_time(*samples)]
            values = self._function(samples, self._permissions, **self.parameters)
        except (Exception, SystemExit) as error:  # a user's file may call exit(), which must not end the job as a success
            if self.spec.reward_file and len(samples) > 1:
                for sample in samples:  # a second call of a file costs nothing, and one sample per call finds the row
                    self._call_function([sample])
            reason = str(error) if isinstance(error, RewardError) else f"{type(error).__name__}: {error}"
            raise RewardError(f"reward '{self.__name__}' failed on {_rows(samples)}: {reason}") from error
        if not isinstance(values, Sequence) or len(values) != len(samples):
            result = f"{len(values)} scores" if isinstance(values, Sequence) else f"a {type(values).__name__}"
            raise RewardError(f"reward '{self.__name__}' returned {result} for {_rows(samples)}")
        return values

    def _in_time(self, sample: Sample) -> Any:
        """Return the sample's score; None, and a warning in the log, if the score takes too long."""
        if self.spec.reward_file:  # a user's code may take its time
            return self._best(sample)
        if package := self.spec.reward_type.imports:
            import_module(package)
        try:
            with deadline(SECONDS):
                return self._best(sample)
        except DeadlineError:
            self.expired += 1
            logger.warning(
                "reward '%s' abstained: a completion of %d characters took more than %g s of CPU time",
                self.__name__,
                len(sample.completion),
                SECONDS,
            )
            return None

    def _best(self, sample: Sample) -> Any:
        """Return the sample's score: the best one where the row accepts several answers."""
        accepted = sample.columns.get(ACCEPTED)
        if not accepted or self.spec.reward_type.measures != "answer":
            return self._function(sample, **self.parameters)
        scores = [self._function(sample._replace(answer=answer), **self.parameters) for answer in accepted]
        return max((score for score in scores if score is not None), default=None)

    def _checked(self, value: Any, sample: Sample) -> float | None:
        if value is None:
            return None
        if not isinstance(value, Real) or not math.isfinite(value):
            raise RewardError(f"reward '{self.__name__}' returned {value!r} for {sample.row_name}")
        low, high = self.spec.clip or (-math.inf, math.inf)
        return min(high, max(low, float(value)))


def _rows(samples: Sequence[Sample]) -> str:
    row = samples[0].row_name
    return row if len(samples) == 1 else f"{len(samples)} completions, the first of {row}"


def build_rewards(specs: Sequence[RewardSpec], permissions: RewardPermissions = NO_PERMISSIONS) -> list[Reward]:
    """Build the rewards of a config, in its order. Raises RewardError for a reward that the permissions do not allow."""
    check_names(specs)
    rewards: dict[str, Reward] = {}
    for spec in specs:
        rewards[spec.label] = Reward(spec, permissions, rewards[spec.only_if.reward] if spec.only_if else None)
    return list(rewards.values())


def score(
    rewards: Sequence[Reward], prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, list[Any]]
) -> list[dict[str, Any]]:
    """Score completions with the weighted sum that training maximises. Abstentions are left out, as TRL's nansum does.

    Returns `{"score": float, "rewards": {name: float | None}}` for each completion.
    """
    own_columns = {name: values for name, values in columns.items() if name not in TRAINER_COLUMNS}
    by_reward = [reward(prompts, completions, **own_columns) for reward in rewards]
    return [
        {
            "score": sum(reward.weight * value for reward, value in zip(rewards, values, strict=True) if value is not None),
            "rewards": {reward.__name__: value for reward, value in zip(rewards, values, strict=True)},
        }
        for values in zip(*by_reward, strict=True)
    ]
