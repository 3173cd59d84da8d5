"""Detects problems of a training from its metrics so far. Each function is pure and returns an alert with its evidence.

A point of the history is a line of metrics.jsonl. docs/alerts.md has the source of each threshold.
"""

import math
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from statistics import fmean, median, variance
from typing import Any, NamedTuple

from tunedrop.sign_test import sign_test

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
OVERFIT_EVALUATIONS = 3  # whose mean is compared, at the best time and now
OVERFIT_ERRORS, OVERFIT_SHARE = 4.0, 0.05  # the fall: in standard errors, and as a share of the best held-out reward
STALLED_STEPS, STALLED_SECONDS = 10, 600.0  # without a step: in median steps, and at least
FIRST_STEP_SECONDS = 3600.0  # without the first step, whose time nobody knows
MISMATCH_POINTS, MISMATCH_MEAN, MISMATCH_P99 = 3, 0.1, 1.0  # nats per token
FORGETTING_P, FORGETTING_EVALUATIONS = 0.05, 2  # in a row


class Alert(NamedTuple):
    """A problem: its code, the step at which it was detected, a message, and the numbers behind it."""

    code: str
    step: int
    message: str
    evidence: dict[str, float | list[float]]


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
        lambda: rollout_mismatch(history),
        lambda: forgetting(history),
    ]
    if mean_rises:
        checks += [lambda: hacking_suspect(history, formats), lambda: plateau(history), lambda: overfit(history)]
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


def overfit(history: Sequence[Point]) -> Alert | None:
    """Return an alert if the held-out reward has fallen from its best while the reward in training has risen.

    The noise of the held-out curve is that of its successive differences (von Neumann, 1941), which a trend hardly changes.
    """
    evaluated = [point for point in history if _values([point], "heldout_reward")]
    size, curve = OVERFIT_EVALUATIONS, _values(history, "heldout_reward")
    if len(curve) < 2 * size or evaluated[-1] is not history[-1]:
        return None
    means = [fmean(curve[first : first + size]) for first in range(len(curve) - size + 1)]
    at = max(range(len(curve) - 2 * size + 1), key=means.__getitem__)  # windows without a part of the last one
    error = math.sqrt(fmean((b - a) ** 2 for a, b in pairwise(curve)) / size)  # of a difference of two windows
    fall = means[at] - means[-1]

    def training(first: int) -> list[float]:
        begin, end = evaluated[first]["step"], evaluated[first + size - 1]["step"]
        return _values([point for point in history if begin <= point["step"] <= end], "reward")

    then, now = training(at), training(len(curve) - size)
    if not then or not now:
        return None
    rise = fmean(now) - fmean(then)
    if fall <= max(OVERFIT_ERRORS * error, OVERFIT_SHARE * abs(means[at])) or rise <= STANDARD_ERRORS * _error(then, now):
        return None
    message = (
        f"the held-out reward fell from {means[at]:.3g} to {means[-1]:.3g} while the reward in training rose from "
        f"{fmean(then):.3g} to {fmean(now):.3g}: train fewer epochs, add rows, or raise beta"
    )
    evidence = {
        "heldout_best": means[at],
        "heldout_now": means[-1],
        "reward_then": fmean(then),
        "reward_now": fmean(now),
        "gap": rise + fall,
        "heldout_curve": curve,
        "reward_curve": [_values([point], "reward")[0] for point in evaluated if _values([point], "reward")],
    }
    return _alert(history, "OVERFIT", message, evidence)


def stalled(history: Sequence[Point], waited: float, steps: float = 1.0) -> Alert | None:
    """Return an alert if the training has done nothing for too long: `waited` seconds.

    `steps`: how many steps' work the longest part of the training is, an evaluation for example.
    """
    seconds = _values(history[-PLATEAU_POINTS:], "seconds")
    limit = max(STALLED_SECONDS, STALLED_STEPS * max(1.0, steps) * median(seconds)) if seconds else FIRST_STEP_SECONDS
    if waited <= limit:
        return None
    usual = f"; a step takes {median(seconds):.3g} s" if seconds else ""
    message = (
        f"the training has done nothing for {waited:.0f} s{usual}: the log has the stack of each thread, and with it the "
        "call that hangs (a reward's service, a reward's own code, or the connection between GPUs)"
    )
    evidence: dict[str, float | list[float]] = {"waited": round(waited, 1), "limit": round(limit, 1)}
    evidence |= {"median_step": round(median(seconds), 3)} if seconds else {}
    return Alert("STALLED", history[-1]["step"] if history else 0, message, evidence)


def rollout_mismatch(history: Sequence[Point]) -> Alert | None:
    """Return an alert if the sampler and the trainer disagree on the probabilities of the sampled tokens."""
    recent = [point for point in history if _values([point], "mismatch")][-MISMATCH_POINTS:]
    if len(recent) < MISMATCH_POINTS:
        return None
    mean, p99 = fmean(_values(recent, "mismatch")), fmean(_values(recent, "mismatch_p99"))
    if mean <= MISMATCH_MEAN and p99 <= MISMATCH_P99:
        return None
    message = (
        f"the log-probabilities of the sampler and of the trainer differ by {mean:.2g} nats per token (p99 {p99:.2g}): the "
        "samples are of another policy than the one that learns; set bf16 to false, or report it with the packages' versions"
    )
    evidence = {"mean": mean, "p99": p99, "clipped": fmean(_values(recent, "mismatch_clipped"))}
    return _alert(history, "ROLLOUT_MISMATCH", message, evidence)


def forgetting(history: Sequence[Point]) -> Alert | None:
    """Return an alert if the model has lost general questions that it answered before the first step."""
    probed = [point for point in history if _values([point], "probe_score")][-FORGETTING_EVALUATIONS:]
    if len(probed) < FORGETTING_EVALUATIONS or probed[-1] is not history[-1]:
        return None
    if any(
        point["probe_lost"] <= point["probe_gained"]
        or sign_test(round(point["probe_gained"]), round(point["probe_lost"])) > FORGETTING_P
        for point in probed
    ):
        return None
    last = probed[-1]
    message = (
        f"the model has lost {last['probe_lost']:.0f} of the general questions that it answered before the training, and "
        f"gained {last['probe_gained']:.0f}: lower learning_rate, train fewer steps, raise beta, or add general rows"
    )
    evidence = {name: last[f"probe_{name}"] for name in ("score", "lost", "gained")}
    evidence["p_value"] = sign_test(round(last["probe_gained"]), round(last["probe_lost"]))
    return _alert(history, "FORGETTING", message, evidence)


def _alert(history: Sequence[Point], code: str, message: str, evidence: dict[str, Any]) -> Alert:
    """Return an alert of the last point. A value of the evidence is a number or a curve."""
    rounded = {
        name: [round(each, 6) for each in value] if isinstance(value, list) else round(value, 6)
        for name, value in evidence.items()
    }
    return Alert(code, history[-1]["step"], message, rounded)


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
