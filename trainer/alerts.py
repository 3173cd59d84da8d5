"""Names what goes wrong while a model trains, with evidence: pure functions over the metrics so far.

A point of the history is a line of metrics.jsonl. docs/alerts.md says where each threshold comes from.
"""

import math
from collections.abc import Callable, Collection, Sequence
from statistics import fmean, variance
from typing import Any, NamedTuple

Point = dict[str, Any]

FEWEST_POINTS = 8  # before these nothing but NON_FINITE and KL_BLOWUP is named
HACKING_POINTS, HACKING_SHARE = 12, 0.2
PLATEAU_POINTS, PLATEAU_SHARE = 20, 0.3
RECENT_SHARE = 0.1
DEAD_SHARE = 0.99  # of groups whose answers all get the same reward
TRUNCATED_SHARE = 0.5
FEWEST_FINISHED = 3  # points with finished answers that say what these get
FORMAT_RISE = 0.1
COLLAPSED_ENTROPY = 0.1  # of what it was at the start
REACHED = 0.9  # of the best reward any answer got
KL_LIMIT = 1.0  # nats per token
STANDARD_ERRORS = 2.0


class Alert(NamedTuple):
    """What is wrong, since when it shows, in words, and the numbers that say so."""

    code: str
    step: int
    message: str
    evidence: dict[str, float]


def find(history: Sequence[Point], formats: Collection[str] = ()) -> list[Alert]:
    """Return what is wrong at the last point; `formats` are the rewards that pay for an answer's form alone."""
    checks: list[Callable[[], Alert | None]] = [
        lambda: non_finite(history),
        lambda: kl_blowup(history),
        lambda: dead_reward(history),
        lambda: truncation(history),
        lambda: hacking_suspect(history, formats),
        lambda: entropy_collapse(history),
        lambda: plateau(history),
    ]
    return [alert for check in checks if (alert := check())]


def non_finite(history: Sequence[Point]) -> Alert | None:
    """A number of the step is not a number any more."""
    last = history[-1]
    broken = [
        name
        for name in ("loss", "grad_norm", "kl", "entropy", "reward")
        if last.get(name) is not None and not math.isfinite(last[name])
    ]
    if not broken:
        return None
    return _alert(history, "NON_FINITE", f"{', '.join(broken)} is not finite: lower learning_rate or max_grad_norm", {})


def kl_blowup(history: Sequence[Point]) -> Alert | None:
    """The model is far from its base on every token (needs `beta` above 0, else nobody measures it)."""
    kl = _values(history[-3:], "kl")
    if len(kl) < 3 or fmean(kl) <= KL_LIMIT:
        return None
    message = f"the KL divergence from the base model is {fmean(kl):.2g} nats per token: lower learning_rate or raise beta"
    return _alert(history, "KL_BLOWUP", message, {"kl": fmean(kl), "kl_limit": KL_LIMIT})


def dead_reward(history: Sequence[Point]) -> Alert | None:
    """No group has answers of different reward, and it was not training that brought that about."""
    recent = _recent(history)
    same, reward = _values(recent, "frac_reward_zero_std"), _values(recent, "reward")
    if not same or min(same) < DEAD_SHARE or fmean(reward) > history[0]["reward"]:
        return None
    message = (
        f"all answers to a prompt get the same reward ({fmean(reward):.3g} on average), so nothing is learned: "
        "check the rewards, or give rows that the model sometimes gets right"
    )
    return _alert(history, "DEAD_REWARD", message, {"reward": fmean(reward), "zero_variance_share": fmean(same)})


def truncation(history: Sequence[Point]) -> Alert | None:
    """Most answers are cut off, that costs them their reward, and the reward does not rise all the same.

    It costs them their reward if finished answers get more, or if none is finished and none is paid.
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
    message = f"{fmean(clipped):.0%} of the answers are cut off at max_completion_length: raise it, or ask for shorter ones"
    evidence = {"clipped_ratio": fmean(clipped)}
    evidence |= {"reward_truncated": fmean(cut)} if cut else {}
    evidence |= {"reward_finished": fmean(finished)} if finished else {}
    return _alert(history, "TRUNCATION", message, evidence)


def hacking_suspect(history: Sequence[Point], formats: Collection[str]) -> Alert | None:
    """A reward for the form of answers has risen, and those for what they say have not."""
    names = {name for point in history for name in point["rewards"]}
    forms, contents = sorted(names & set(formats)), sorted(names - set(formats))
    if not forms or not contents or len(history) < max(HACKING_POINTS, HACKING_SHARE * _planned(history)):
        return None
    changes = {name: _change([p["rewards"][name] for p in history if p["rewards"].get(name) is not None]) for name in names}
    risen = [name for name in forms if changes[name][0] > max(FORMAT_RISE, STANDARD_ERRORS * changes[name][1])]
    if not risen or any(changes[name][0] > changes[name][1] for name in contents):
        return None
    message = (
        f"{', '.join(risen)} rises while {', '.join(contents)} does not: give it less weight, or pay it only_if the answer "
        "is right"
    )
    return _alert(history, "HACKING_SUSPECT", message, {f"change_of_{name}": changes[name][0] for name in risen + contents})


def entropy_collapse(history: Sequence[Point]) -> Alert | None:
    """The model has stopped trying other answers though better ones exist."""
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
    """The reward has not risen for long."""
    points = math.ceil(max(PLATEAU_POINTS, PLATEAU_SHARE * _planned(history)))
    reward = _values(history[-points:], "reward")
    if len(history) <= points or len(reward) < PLATEAU_POINTS or dead_reward(history):
        return None
    half = len(reward) // 2
    before, now = fmean(reward[:half]), fmean(reward[half:])
    if now - before > _error(reward[:half], reward[half:]):
        return None
    message = f"the reward has stayed at {now:.3g} for {points} points: the rest of the run is unlikely to bring more"
    return _alert(history, "PLATEAU", message, {"reward": now, "reward_before": before, "points": points})


def _alert(history: Sequence[Point], code: str, message: str, evidence: dict[str, float]) -> Alert:
    return Alert(code, history[-1]["step"], message, {name: round(value, 6) for name, value in evidence.items()})


def _values(history: Sequence[Point], name: str) -> list[float]:
    """The finite values of a metric; points may lack it (a reused rollout has no rewards of its own)."""
    return [point[name] for point in history if point.get(name) is not None and math.isfinite(point[name])]


def _planned(history: Sequence[Point]) -> float:
    """How many points the whole run will have."""
    return float(history[-1]["max_steps"] * len(history) / history[-1]["step"])


def _recent(history: Sequence[Point]) -> Sequence[Point]:
    """The last points, none before there are enough."""
    points = math.ceil(max(FEWEST_POINTS, RECENT_SHARE * _planned(history)))
    return history[-points:] if len(history) >= points else []


def _error(some: Sequence[float], others: Sequence[float]) -> float:
    """Standard error of the difference of two means."""
    return math.sqrt(sum(variance(each) / len(each) for each in (some, others) if len(each) > 1))


def _change(values: Sequence[float]) -> tuple[float, float]:
    """By how much the last third is above the first on average, and the standard error of that."""
    third = len(values) // 3
    if third == 0:
        return 0.0, 0.0
    return fmean(values[-third:]) - fmean(values[:third]), _error(values[:third], values[-third:])


def _rises(values: Sequence[float]) -> bool:
    change, error = _change(values)
    return change > STANDARD_ERRORS * error
