"""Detects problems of a training from its metrics so far. Each function is pure and returns an alert with its evidence.

A point of the history is a line of metrics.jsonl. docs/alerts.md has the source of each threshold.
"""

import math
from collections.abc import Callable, Collection, Sequence
from statistics import fmean, variance
from typing import Any, NamedTuple

Point = dict[str, Any]

FEWEST_POINTS = 8  # an earlier alert is NON_FINITE or KL_BLOWUP
HACKING_POINTS, HACKING_SHARE = 12, 0.2
PLATEAU_POINTS, PLATEAU_SHARE = 20, 0.3
RECENT_SHARE = 0.1
DEAD_SHARE = 0.99  # of groups whose completions all get the same reward
TRUNCATED_SHARE = 0.5
FEWEST_FINISHED = 3  # points with finished completions, to compare their reward
FORMAT_RISE = 0.1
COLLAPSED_ENTROPY = 0.1  # of the entropy at the start
REACHED = 0.9  # of the best reward of any completion
KL_LIMIT = 1.0  # nats per token
STANDARD_ERRORS = 2.0


class Alert(NamedTuple):
    """A problem: its code, the step at which it was detected, a message, and the numbers behind it."""

    code: str
    step: int
    message: str
    evidence: dict[str, float]


def find(history: Sequence[Point], formats: Collection[str] = (), *, mean_rises: bool = True) -> list[Alert]:
    """Return the alerts of the last point. `formats` are the names of the rewards for a completion's format alone.

    `mean_rises`: the mean reward rises as the model learns. It stays where it is if prompts are chosen because their rewards
    differ, or if a reward ranks the completions of a prompt. Then no alert is raised because it does not rise.
    """
    checks: list[Callable[[], Alert | None]] = [
        lambda: non_finite(history),
        lambda: kl_blowup(history),
        lambda: dead_reward(history),
        lambda: truncation(history),
        lambda: entropy_collapse(history),
    ]
    if mean_rises:
        checks += [lambda: hacking_suspect(history, formats), lambda: plateau(history)]
    return [alert for check in checks if (alert := check())]


def non_finite(history: Sequence[Point]) -> Alert | None:
    """Return an alert if a metric of the last step is NaN or infinite."""
    last = history[-1]
    broken = [
        name
        for name in ("loss", "grad_norm", "kl", "entropy", "reward")
        if last.get(name) is not None and not math.isfinite(last[name])
    ]
    if not broken:
        return None
    return _alert(history, "NON_FINITE", f"{', '.join(broken)} is NaN or infinite: lower learning_rate or max_grad_norm", {})


def kl_blowup(history: Sequence[Point]) -> Alert | None:
    """Return an alert if the model is far from the reference model on every token. TRL measures KL only with `beta`."""
    kl = _values(history[-3:], "kl")
    if len(kl) < 3 or fmean(kl) <= KL_LIMIT:
        return None
    message = (
        f"the KL divergence from the reference model is {fmean(kl):.2g} nats per token: lower learning_rate or raise beta"
    )
    return _alert(history, "KL_BLOWUP", message, {"kl": fmean(kl), "kl_limit": KL_LIMIT})


def dead_reward(history: Sequence[Point]) -> Alert | None:
    """Return an alert if no group has different rewards, unless the training itself led there by raising the reward."""
    recent = _recent(history)
    same, reward = _values(recent, "frac_reward_zero_std"), _values(recent, "reward")
    if not same or min(same) < DEAD_SHARE or fmean(reward) > history[0]["reward"]:
        return None
    message = (
        f"all completions of a prompt get the same reward ({fmean(reward):.3g} on average), and the model learns nothing: "
        "check the rewards, or use rows that the model solves sometimes"
    )
    return _alert(history, "DEAD_REWARD", message, {"reward": fmean(reward), "zero_variance_share": fmean(same)})


def truncation(history: Sequence[Point]) -> Alert | None:
    """Return an alert if most completions are cut off, lose reward by it, and the reward does not rise.

    Cut completions lose reward if finished completions get more, or if none is finished and all get the same reward.
    """
    recent = _recent(history)
    clipped = _values(recent, "clipped_ratio")
    if not clipped or fmean(clipped) < TRUNCATED_SHARE or _rises(_values(history, "reward")):
        return None
    cut, finished = _values(recent, "reward_truncated"), _values(recent, "reward_finished")
    if len(finished) >= FEWEST_FINISHED and cut:
        costs = fmean(finished) - fmean(cut) > STANDARD_ERRORS * _error(finished, cut)
    else:
        costs = dead_reward(history) is not None
    if not costs:
        return None
    message = f"{fmean(clipped):.0%} of the completions are cut off: raise max_completion_length, or ask for shorter answers"
    evidence = {"clipped_ratio": fmean(clipped)}
    evidence |= {"reward_truncated": fmean(cut)} if cut else {}
    evidence |= {"reward_finished": fmean(finished)} if finished else {}
    return _alert(history, "TRUNCATION", message, evidence)


def hacking_suspect(history: Sequence[Point], formats: Collection[str]) -> Alert | None:
    """Return an alert if a reward for the format has risen and no reward for the content has."""
    names = {name for point in history for name in point["rewards"]}
    forms, contents = sorted(names & set(formats)), sorted(names - set(formats))
    if not forms or not contents or len(history) < max(HACKING_POINTS, HACKING_SHARE * _planned(history)):
        return None
    changes = {name: _change([p["rewards"][name] for p in history if p["rewards"].get(name) is not None]) for name in names}
    risen = [name for name in forms if changes[name][0] > max(FORMAT_RISE, STANDARD_ERRORS * changes[name][1])]
    if not risen or any(changes[name][0] > changes[name][1] for name in contents):
        return None
    message = (
        f"{', '.join(risen)} rises while {', '.join(contents)} does not: lower the weight of {', '.join(risen)}, or pay it "
        "only_if the answer is right"
    )
    return _alert(history, "HACKING_SUSPECT", message, {f"change_of_{name}": changes[name][0] for name in risen + contents})


def entropy_collapse(history: Sequence[Point]) -> Alert | None:
    """Return an alert if the model has stopped exploring although better completions exist."""
    recent, entropy = _recent(history), _values(history, "entropy")
    reward, best = _values(recent, "reward"), _values(history, "reward_best")
    if not recent or not entropy or not best:
        return None
    now, before = fmean(_values(recent, "entropy")), fmean(entropy[:3])
    if now > COLLAPSED_ENTROPY * before or fmean(reward) >= REACHED * max(best) or _rises(reward):
        return None
    message = f"the entropy fell from {before:.3g} to {now:.3g} nats per token: lower learning_rate or raise temperature"
    return _alert(
        history, "ENTROPY_COLLAPSE", message, {"entropy": now, "entropy_at_start": before, "reward": fmean(reward)}
    )


def plateau(history: Sequence[Point]) -> Alert | None:
    """Return an alert if the reward has not risen for a large part of the run."""
    points = math.ceil(max(PLATEAU_POINTS, PLATEAU_SHARE * _planned(history)))
    reward = _values(history[-points:], "reward")
    if len(history) <= points or len(reward) < PLATEAU_POINTS or dead_reward(history):
        return None
    half = len(reward) // 2
    before, now = fmean(reward[:half]), fmean(reward[half:])
    if now - before > _error(reward[:half], reward[half:]):
        return None
    message = f"the reward has stayed at {now:.3g} for {points} points: more steps are unlikely to raise it"
    return _alert(history, "PLATEAU", message, {"reward": now, "reward_before": before, "points": points})


def _alert(history: Sequence[Point], code: str, message: str, evidence: dict[str, float]) -> Alert:
    return Alert(code, history[-1]["step"], message, {name: round(value, 6) for name, value in evidence.items()})


def _values(history: Sequence[Point], name: str) -> list[float]:
    """Return the finite values of a metric. Points may lack a metric: a step on a reused rollout has no rewards."""
    return [point[name] for point in history if point.get(name) is not None and math.isfinite(point[name])]


def _planned(history: Sequence[Point]) -> float:
    """Return the number of points that the whole run will have."""
    return float(history[-1]["max_steps"] * len(history) / history[-1]["step"])


def _recent(history: Sequence[Point]) -> Sequence[Point]:
    """Return the recent points, or no point while there are too few."""
    points = math.ceil(max(FEWEST_POINTS, RECENT_SHARE * _planned(history)))
    return history[-points:] if len(history) >= points else []


def _error(some: Sequence[float], others: Sequence[float]) -> float:
    """Return the standard error of the difference of two means."""
    return math.sqrt(sum(variance(each) / len(each) for each in (some, others) if len(each) > 1))


def _change(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of the last third minus the mean of the first third, and its standard error."""
    third = len(values) // 3
    if third == 0:
        return 0.0, 0.0
    return fmean(values[-third:]) - fmean(values[:third]), _error(values[:third], values[-third:])


def _rises(values: Sequence[float]) -> bool:
    change, error = _change(values)
    return change > STANDARD_ERRORS * error
