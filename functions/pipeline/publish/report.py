"""`report.html`: the page of one run."""

import functools
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from pipeline.publish import words
from pipeline.publish.charts import charts
from pipeline.publish.comparison import FEW_TESTS
from pipeline.publish.page import render_page
from pipeline.publish.shown_rollouts import fitted
from pipeline.publish.statistics import Other, failed_must_pass, is_cut, outcome, totals
from pipeline.publish.trackers import links
from tunedrop.inference_tests import Outcome
from tunedrop.rollouts import Group, Index

# The most characters of answers, the most tests, and the most tests of the suite. Rollouts have what is left of MOST_BYTES.
MOST_TEXT, MOST_TESTS, MOST_LOST = 900_000, 500, 100
MOST_BYTES = 2_000_000
OUTCOMES = ("won", "tied", "lost", "failed")


def render_report(
    result: dict[str, Any],
    *,
    receipt: dict[str, Any],
    metrics: list[dict[str, Any]],
    tests: Sequence[Outcome],
    suite: Sequence[Outcome] = (),
    probe: Sequence[Outcome] = (),
    alerts: Sequence[dict[str, Any]] = (),
    rollouts: tuple[Index, Sequence[Group]] | None = None,
) -> str:
    """Return the page of a run.

    `result` is its `result.json`, `receipt` its `validation.json`. `metrics` and `alerts` are the lines of the files with
    these names. `tests`, `suite` and `probe` are the outcomes of the inference tests, of the line's suite and of the general
    questions. `rollouts` are those of `shown_rollouts.read_groups`.
    """
    champion = result["champion"]
    others: tuple[Other, ...] = ("base", "champion") if champion else ("base",)
    shown = sorted(tests, key=lambda test: max(_change(test, other) for other in others), reverse=True)[:MOST_TESTS]
    lost = _lost(suite) if champion else []
    limit = max(200, MOST_TEXT // sum(map(_texts, [*shown, *lost[:MOST_LOST], *probe])))
    counts = {other: Counter[str](outcome(test, other) for test in tests) for other in others}
    outcomes = {name: {other: counts[other][name] for other in others} for name in OUTCOMES}

    def cut(test: Outcome) -> bool:
        return any(is_cut(test, other) for other in others)

    page = functools.partial(
        render_page,
        "report",
        limit=limit,
        result=result,
        receipt=receipt,
        tests=tests,
        shown=shown,
        cut_tests=sum(map(cut, tests)),
        outcomes={name: each for name, each in outcomes.items() if any(each.values())},
        others=others,
        outcome=outcome,
        is_cut=cut,
        lost=lost,
        most_lost=MOST_LOST,
        tags=sorted({tag for test in tests for tag in test.tags}),
        probe={
            "tests": probe,
            "base": sum(test.base.passed is True for test in probe),
            "tuned": sum(test.tuned.passed is True for test in probe),
        }
        if probe
        else None,
        alerts=alerts,
        training=result["training"],
        pages=links(result["training"]),
        metrics=metrics,
        words=words,
        charts=charts(metrics, result["training"], alerts),
        scale=_scale(result),
        few_tests=FEW_TESTS,
        folder=result["artifacts"]["report"].removesuffix("report.html"),
        # With a test file, all held-out rows choose the checkpoint.
        reproduce=_reproduce(result, own_tests=receipt.get("choosing") in {None, receipt["heldout"]}),
    )
    if rollouts is None:
        return page(rollouts=None)
    room = MOST_BYTES - len(page(rollouts=_rollouts(rollouts, 0, result, metrics, alerts)).encode())
    return page(rollouts=_rollouts(rollouts, room, result, metrics, alerts))


def _rollouts(
    found: tuple[Index, Sequence[Group]],
    room: int,
    result: dict[str, Any],
    metrics: Sequence[dict[str, Any]],
    alerts: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Return the sentence about the rollouts, and their data for `rollouts.js`: those that fit into `room` bytes."""
    from markupsafe import Markup

    index, read = found
    groups = fitted(read, room)
    size = result["config"]["grpo"]["num_generations"]
    steps = [point for point in metrics if "phase" not in point]  # supervised fine-tuning has no rollouts
    sampled = sum(int(point.get("answers") or 0) for point in steps) // size
    shown = sum(not group.panel for group in msgspec.json.decode(groups, type=list[Group]))
    about = {
        "alerts": [
            {"code": each["code"], "step": each["step"], "rollouts": each.get("rollouts", [])}
            for each in alerts
            if each.get("step") is not None
        ],
        "weights": {reward["name"] or reward["type"]: reward["weight"] for reward in result["config"]["rewards"]},
    }
    described = msgspec.json.encode(about).decode().replace("<", "\\u003c")
    stored = sum(part.bytes for part in index.parts) / 1e6
    return {
        "sentence": words.about_rollouts(max(sampled, shown), len(steps), shown, stored),
        "about": Markup(described),  # noqa: S704 - JSON without "<"
        "groups": Markup(groups.decode()),  # noqa: S704 - JSON without "<"
    }


def _change(test: Outcome, other: Other) -> float:
    theirs, ours = totals(other)(test)
    return abs((ours or 0.0) - (theirs or 0.0))


def _lost(suite: Sequence[Outcome]) -> list[Outcome]:
    """Return the suite's tests that the tuned model lost against the champion or failed, the must-pass tests first."""
    lost = [test for test in suite if outcome(test, "champion") in {"lost", "failed"} or failed_must_pass(test)]
    return sorted(lost, key=lambda test: (not failed_must_pass(test), -_change(test, "champion")))


def _texts(test: Outcome) -> int:
    """Return the number of texts that a test's card shows."""
    results = [each for each in (test.base, test.champion, test.tuned) if each]
    return 1 + len(test.prompt) + sum(1 + len(each.samples) for each in results)


def _scale(result: dict[str, Any]) -> float:
    """Return the lift at the ends of the intervals' bars."""
    compared = [result["comparison"], result["ended"], *result["by_reward"].values(), *result["by_tag"].values()]
    if champion := result["champion"]:
        compared += [champion["comparison"], champion["ended"], *champion["by_tag"].values()]
        compared += [champion["suite"], *champion["suite_by_run"].values()]
    return max([abs(each[bound]) for each in compared if each for bound in ("lift_low", "lift_high")]) or 1.0


def _reproduce(result: dict[str, Any], *, own_tests: bool) -> str:
    """Return the commands that repeat the run. Without `own_tests`, held-out rows are the tests."""
    bucket, _, key = result["source"].removeprefix("s3://").partition("/")
    name, folder = key.rpartition("/")[2], result["artifacts"]["input"]
    version = f" --version-id {result['source_version']}" if result["source_version"] != "null" else ""
    lines = [
        f"aws s3api get-object --bucket {bucket} --key {shlex.quote(key)}{version} {shlex.quote(name)}",
        f"aws s3 cp {folder}config.json config.yaml",
        *([f"aws s3 cp {folder}inference_tests.json tests.json"] if own_tests else []),
        f"tunedrop drop {shlex.quote(name)} --config config.yaml{' --tests tests.json' if own_tests else ''} --wait",
    ]
    return "\n".join(lines)
