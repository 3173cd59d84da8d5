"""What a report says at the top of its sections: sentences for people who do not know the figures' names."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from pipeline.publish.comparison import percent

ENDED = {
    "complete": "after all planned steps",
    "max_runtime": "at the run's time limit",
    "max_cost_usd": "at the run's cost limit",
    None: "because the job was stopped",
}
FAST = 120  # seconds below which a time is shown in seconds


# --- numbers ---


def share(value: float) -> str:
    """Return a share as a percentage: whole, but never 0 % or 100 % for a share that is not: `0.614` → `61 %`."""
    if 0 < value < 0.01:
        return "under 1 %"
    if 0.99 < value < 1:
        return "over 99 %"
    return f"{value:.0%}".replace("%", " %")


def figure(value: Any) -> str:
    """Return a number with at most four digits that matter, and groups of thousands: `20.932577` → `20.93`."""
    if value is None:
        return "unknown"
    if isinstance(value, str):
        return value
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """`3725` → `1 h 2 min`."""
    if seconds is None:
        return "unknown"
    if seconds < FAST:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < FAST:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min".removesuffix(" 0 min")


def usd(value: float | None) -> str:
    """`3.5` → `$3.50`."""
    return "unknown" if value is None else f"${value:,.2f}"


def count(number: int, one: str, several: str = "") -> str:
    """`1, "test"` → `1 test`; `30, "test"` → `30 tests`."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


# --- sections ---


def about_tests(result: dict[str, Any]) -> str:
    """Return what the comparison shows."""
    c = result["comparison"]
    return (
        f"In {count(c['tests'], 'test')} the base model scored {c['base_score']:.3f} on average and the tuned model "
        f"{c['tuned_score']:.3f}: the tuned model was better in {c['wins']:,}, equal in {c['ties']:,} and worse in "
        f"{c['losses']:,}. Other tests like these would show a lift between {c['lift_low']:+.3f} and {c['lift_high']:+.3f}, "
        f"with {percent(result['confidence'])} % confidence."
    )


def about_gate(result: dict[str, Any]) -> str:
    """Return what the gate asked for and what it decided."""
    least, low = result["config"]["gate"]["min_lift"], result["comparison"]["lift_low"]
    decided = {
        "APPROVED": "The gate approved the model",
        "PENDING": "The gate left the decision to a person",
        "REJECTED": "The gate rejected the model",
    }[result["verdict"]]
    if low <= least:
        holds = "is not"
    elif result["verdict"] == "APPROVED":
        holds = "is"
    else:
        holds = "is, but another condition does not hold (see the top of the page)"
    return f"{decided}: it asks for a lift of more than {least:g}, which the lowest likely lift, {low:+.3f}, {holds}."


def about_answers(tests: int, shown: int, cut: int) -> str:
    """Return which answers the page shows."""
    which = "All are below" if shown == tests else f"The {shown:,} with the largest change are below"
    limit = f" The limit of tokens cut answers in {count(cut, 'test')}; their scores may be too low." if cut else ""
    return f"Each model answered {count(tests, 'test')}. {which}, those with the largest change first.{limit}"


def about_training(training: dict[str, Any], metrics: Sequence[dict[str, Any]], alerts: int) -> str:
    """Return how the training went."""
    rewards = [point["reward"] for point in metrics if point.get("reward") is not None]
    if not rewards:
        return "The training logged no rewards."
    first, last = rewards[0], rewards[-1]
    moved = f"rose from {first:.3g} to {last:.3g}" if last > first else f"did not rise: it was {first:.3g}, then {last:.3g}"
    ended = training.get("ended")
    said = [f"The mean reward {moved}, and the training ended {ENDED.get(ended, f'because of the alert {ended}')}"]
    said.append(f" ({training['steps']:,} of {training['max_steps']:,} steps).")
    saved = training.get("checkpoint") or {}
    if saved.get("heldout_reward") is not None:
        said.append(f" The saved model is that of step {saved['step']:,}: {saved['heldout_reward']:.3g} on held-out rows.")
    said.append(f" {count(alerts, 'alert')} was raised." if alerts == 1 else f" {count(alerts, 'alert')} were raised.")
    return "".join(said) if alerts else "".join(said[:-1]) + " No alert was raised."


def about_learnability(gate: dict[str, Any], metrics: Sequence[dict[str, Any]]) -> str:
    """Return whether the rows could teach the model, as asked before the training, and whether they did."""
    used = used_groups(metrics)
    whole = "" if used is None else f", and used {share(used)}"
    return (
        f"{share(gate['learnable'])} of the {count(gate['prompts'], 'prompt')} that the model was asked before the training "
        f"were learnable: its {gate['samples']} answers got different rewards. The training could use "
        f"{share(gate['expected_nonzero_groups'])} of its groups{whole}."
    )


def used_groups(metrics: Sequence[dict[str, Any]]) -> float | None:
    """Return the share of a training's groups that had a gradient, None if no point has it."""
    flat = [point["frac_reward_zero_std"] for point in metrics if point.get("frac_reward_zero_std") is not None]
    return 1 - fmean(flat) if flat else None


# Why a warm start ended, by its `ended` in training.json.
WARM_START_ENDED = {
    "learnable": "enough prompts were learnable",
    "heldout_loss": "the loss on held-out rows rose",
    "warm_start.max_share": "its share of the time was over",
    "complete": "its passes over the rows were complete",
}


def about_warm_start(warm: dict[str, Any]) -> str:
    """Return why the training began with supervised fine-tuning, and why that ended."""
    ended = WARM_START_ENDED.get(warm["ended"], "the job was stopped")
    return (
        f"The training began with supervised fine-tuning on the rows' own solutions: {warm['reason']}. It ended after "
        f"{count(warm['steps'], 'step')}, because {ended}."
    )


def about_sampling(sampling: dict[str, Any]) -> str:
    """Return how many of the sampled groups taught."""
    taught = share(sampling["taught"] / sampling["groups"]) if sampling["groups"] else "none"
    return (
        f"The prompts were chosen by their chance to teach: {taught} of {count(sampling['groups'], 'sampled group')} "
        f"taught, and {sampling['refilled']:,} of them replaced a group that taught nothing."
    )


def about_proofs(proofs: dict[str, Any]) -> str:
    """Return whether the saved model is the trained one."""
    kept = proofs["merge_parity"]["kept"]
    return (
        "Yes. A process of its own loaded the saved model and measured it on held-out prompts: the tuning changes the "
        f"model's answers, and the saved model has {share(min(kept, 1.0))} of that change."
    )


def proof_rows(proofs: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a label and a value for each measured figure of the proofs. docs/training.md has their meaning and limits."""
    effect, parity, fresh = proofs["adapter_effect"], proofs["merge_parity"], proofs["fresh_process"]
    yield (
        "change of a token's log-probability by the tuning",
        f"{figure(effect['mean'])} nats on average, {figure(effect['largest'])} at most",
    )
    yield "part of the change that the merged model has", f"{share(min(parity['kept'], 1.0))} (at least 95 %)"
    yield "error of the merged model", f"{share(parity['error'])} of the change (at most 30 %)"
    yield "difference of merged and trained model", f"{figure(parity['mean'])} nats on average (at most 0.1)"
    if "from_4bit" in parity:
        yield "difference to the model in 4 bits, on which it was trained", f"{share(parity['from_4bit'])} of the change"
    yield (
        "weights of the merged model",
        f"{parity['dtype']}; {count(parity['tensors_off'], 'tensor')} differ from base + adapter",
    )
    versions = ", ".join(f"{name} {version}" for name, version in fresh.items() if name != "seconds")
    yield "the process of its own", f"took {duration(fresh['seconds'])}, with {versions}"


def about_cost(result: dict[str, Any], receipt: dict[str, Any]) -> str:
    """Return what the run cost, beside the estimate before it."""
    jobs = list(result["cost"]["jobs"].values())
    known = [job["seconds"] for job in jobs if job["seconds"] is not None]
    took = f"Training and tests took {duration(sum(known)) if known else 'an unknown time'}"
    if result["cost"]["usd"] is None:
        said = f"{took}. What they cost is not known: the launch plan has no price of {jobs[0]['instance_type']}."
    else:
        said = f"{took} and cost {usd(result['cost']['usd'])}."
    used = jobs[0]["instance_type"]
    expected = [each for each in (receipt.get("cost") or {}).get("instances", []) if each["instance_type"] == used]
    if not expected:
        return said
    low, high = (hours * 3600 for hours in expected[0]["hours"])
    price = expected[0]["usd"]
    for_money = f", for {usd(price[0])} to {usd(price[1])}" if price else ""
    return f"{said} The estimate before the start was {duration(low)} to {duration(high)}{for_money}."


def about_data(receipt: dict[str, Any], training: dict[str, Any]) -> str:
    """Return what became of the dataset's rows."""
    rows, heldout = receipt["rows"], receipt["heldout"]
    left = [
        (receipt.get("rejected", {}).get("rows", 0), "were broken"),
        (training.get("rows_dropped", 0), "were left out of the training"),
        (training.get("rows_truncated", 0), "were shortened"),
    ]
    rest = [f"{number:,} {what}" for number, what in left if number]
    trained = f"trained on {training['rows']:,} of them" if "rows" in training else "trained on the others"
    said = f"The dataset has {count(rows, 'row')}. {heldout:,} were held out to judge the training, and the model {trained}."
    found = f" {', '.join(rest)}." if rest else " No row was left out or shortened."
    warnings = len(receipt["warnings"])
    return said + found + (f" Validation gave {count(warnings, 'warning')}." if warnings else "")


def data_rows(receipt: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a label and a value for the lengths of prompts and answers, and for repetitions."""
    tokens, stats = receipt.get("tokens") or {}, receipt.get("stats") or {}
    for what in ("prompt", "answer"):
        if of := tokens.get(what):
            yield f"length of {_an(what)} in tokens", _lengths(of)
        elif of := stats.get(f"{what}_characters"):
            yield f"length of {_an(what)} in characters", _lengths(of)
    if repeated := stats.get("duplicates"):
        yield (
            "repetitions",
            (
                f"rows that repeat another row: {repeated['exact']:,}; only its prompt, with another answer: "
                f"{repeated['same_prompt']:,}"
            ),
        )
    if asked := stats.get("tests_in_training"):
        yield "inference tests that repeat a row", f"{len(asked):,}"


def _an(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _lengths(of: Mapping[str, float]) -> str:
    return f"half have at most {figure(of['p50'])}, 95 % at most {figure(of['p95'])}; the longest has {figure(of['max'])}"


def about_rollouts(sampled: int, steps: int, shown: int, megabytes: float) -> str:
    """Return which of the training's answers the page shows. `sampled` groups in so many logged `steps`."""
    which = "all of them" if shown == sampled else f"{shown:,} of them, evenly spread over the steps"
    more = "" if shown == sampled else f"; rollouts/ in S3 has {figure(round(megabytes, 2))} MB of them"
    return (
        f"What the model answered while it learnt: {count(sampled, 'group')} of answers in {count(steps, 'step')}. "
        f"This page shows {which}{more}. Read some answers with a high reward: do they deserve it?"
    )
