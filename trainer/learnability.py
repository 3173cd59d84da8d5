"""The learnability gate: whether the base model can learn from these rows with these rewards, asked before the first step.

GRPO learns from differences within a group: one whose answers all get the same reward has no gradient. So the base model
answers a sample of the rows a few times. What these rewards say about groups of `num_generations` answers is estimated with
a Dirichlet-multinomial model: its prior is how often each reward was given to any prompt, as strong as makes what was seen
most likely (empirical Bayes), and a prompt's own answers update it.
"""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, variance
from typing import Any, NamedTuple

# The gate may cost this share of the run's answers; runs too short for it to say anything still ask so many prompts.
SHARE, FEWEST_PROMPTS, MOST_PROMPTS = 0.03, 24, 128
# Strengths of the prior that are tried, in pseudo-answers.
STRENGTHS = [2.0 ** (power / 2) for power in range(-12, 17)]
# Rewards closer than this are one value, as for TRL's frac_reward_zero_std.
DIGITS = 6
STANDARD_ERRORS = 2.0


class Learnability(NamedTuple):
    """What the gate found. Shares are of the prompts asked; `expected_nonzero_groups` of groups that have a gradient.

    `dead`: all answers to a prompt got one reward, and not the best there is. `solved`: they all got the best one seen.
    `reward` is the mean and `reward_error` its standard error. `flat` are the indices of the dead and solved prompts.
    """

    prompts: int
    samples: int
    dead: float
    learnable: float
    solved: float
    reward: float
    reward_error: float
    expected_nonzero_groups: float
    flat: list[int]

    def summary(self) -> dict[str, Any]:
        """Return what training.json says."""
        return {name: round(value, 4) for name, value in self._asdict().items() if name != "flat"}


def prompts_to_ask(answers_of_run: int, samples: int) -> int:
    """Return how many prompts to ask in a run that samples so many answers, each prompt for so many."""
    return min(MOST_PROMPTS, max(FEWEST_PROMPTS, int(answers_of_run * SHARE / samples)))


def judge(rewards: Sequence[Sequence[float]], group: int) -> Learnability:
    """Say what the rewards of each prompt's answers mean for groups of so many answers."""
    seen = [Counter(round(reward, DIGITS) for reward in each) for each in rewards]
    best = max(value for each in seen for value in each)
    means = [fmean(each) for each in rewards]
    flat = [index for index, each in enumerate(seen) if len(each) == 1]
    # Where nothing was ever rewarded, the best is nothing to be proud of.
    solved = sum(best > 0 and best in seen[index] for index in flat)
    pooled = sum(seen, Counter())
    prior = {value: count / pooled.total() for value, count in pooled.items()}
    strength = max(STRENGTHS, key=lambda strength: sum(_log_likelihood(each, prior, strength) for each in seen))
    equal = [_all_equal(each, prior, strength, group) for each in seen]
    return Learnability(
        prompts=len(seen),
        samples=seen[0].total(),
        dead=(len(flat) - solved) / len(seen),
        learnable=1 - len(flat) / len(seen),
        solved=solved / len(seen),
        reward=fmean(means),
        reward_error=math.sqrt(variance(means) / len(means)) if len(means) > 1 else 0.0,
        expected_nonzero_groups=1 - sum(equal) / len(equal),
        flat=flat,
    )


def _log_likelihood(seen: Counter[float], prior: dict[float, float], strength: float) -> float:
    """Log of the Dirichlet-multinomial probability of one prompt's rewards, in the order they came."""
    total = math.lgamma(strength) - math.lgamma(strength + seen.total())
    return total + sum(
        math.lgamma(strength * prior[value] + count) - math.lgamma(strength * prior[value]) for value, count in seen.items()
    )


def _all_equal(seen: Counter[float], prior: dict[float, float], strength: float, group: int) -> float:
    """Return the probability that a prompt's next `group` answers all get the same reward."""
    total = strength + seen.total()
    all_draws = math.lgamma(total + group) - math.lgamma(total)
    weights = [strength * share + seen[value] for value, share in prior.items()]
    return sum(math.exp(math.lgamma(weight + group) - math.lgamma(weight) - all_draws) for weight in weights)


def measured(history: Sequence[dict[str, Any]], asked: dict[str, Any], group: int) -> dict[str, Any]:
    """Return what the first steps showed: `measured_nonzero_groups`, the share with a gradient, of `measured_groups`.

    As many groups as the gate asked prompts, at most, and only while the reward is what the gate saw: then the model is
    another one. `asked` is the gate's summary. Without a step there is nothing to tell.
    """
    first: list[dict[str, Any]] = []
    for point in history:
        error = math.hypot(asked["reward_error"], point["reward_std"] / math.sqrt(point["answers"]))
        changed = abs(point["reward"] - asked["reward"]) > STANDARD_ERRORS * error
        if first and (changed or _groups(first, group) >= asked["prompts"]):
            break
        first.append(point)
    if not first:
        return {}
    share = 1 - fmean(point["frac_reward_zero_std"] for point in first)
    return {"measured_nonzero_groups": round(share, 4), "measured_groups": _groups(first, group)}


def _groups(points: Sequence[dict[str, Any]], group: int) -> int:
    answers = sum(int(point["answers"]) for point in points)
    return answers // group
