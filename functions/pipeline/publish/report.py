"""`report.html`: the page of one run."""

import hashlib
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pipeline.publish.comparison import FEW_TESTS
from pipeline.publish.page import render_page
from pipeline.publish.statistics import Other, failed_must_pass, is_cut, outcome, totals
from tunedrop.inference_tests import Outcome

# The most characters of answers, the most tests, and the most tests of the suite: they keep a report below 2 MB.
MOST_TEXT, MOST_TESTS, MOST_LOST = 1_200_000, 500, 100
OUTCOMES = ("won", "tied", "lost", "failed")
CHART_POINTS = 200
APART = {"learnability", "proofs", "sampling", "shares", "warm_start"}  # sections of training.json with a table of their own
CURVES = {
    "completion_length": "Completion length (tokens)",
    "kl": "KL divergence from the reference model",
    "entropy": "Entropy",
    "loss": "Loss",
    "frac_reward_zero_std": "Share of groups with equal rewards",
}


def render_report(
    result: dict[str, Any],
    *,
    receipt: dict[str, Any],
    metrics: list[dict[str, Any]],
    tests: Sequence[Outcome],
    suite: Sequence[Outcome] = (),
    probe: Sequence[Outcome] = (),
    alerts: Sequence[dict[str, Any]] = (),
) -> str:
    """Return the page of a run.

    `result` is its `result.json`, `receipt` its `validation.json`. `metrics` and `alerts` are the lines of the files with
    these names. `tests`, `suite` and `probe` are the outcomes of the inference tests, of the line's suite and of the general
    questions.
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

    return render_page(
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
        learnability=result["training"].get("learnability"),
        proofs=result["training"].get("proofs", {}),
        sampling=result["training"].get("sampling"),
        shares=result["training"].get("shares") or {},
        warm_start=result["training"].get("warm_start"),
        figures={name: value for name, value in result["training"].items() if name not in APART},
        charts=charts(metrics),
        scale=_scale(result),
        few_tests=FEW_TESTS,
        folder=result["artifacts"]["report"].removesuffix("report.html"),
        # With a test file, all held-out rows choose the checkpoint.
        reproduce=_reproduce(result, own_tests=receipt.get("choosing") in {None, receipt["heldout"]}),
    )


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


# --- charts ---


def charts(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the SVG charts of the metrics by step, by title: the mean rewards, then each of `CURVES` that has values.

    Supervised fine-tuning has a chart of its own: its steps are others.
    """
    from markupsafe import Markup

    learned = [point for point in metrics if point.get("phase") == "sft"]
    losses = {
        name: [(point["step"], point[key]) for point in learned if point.get(key) is not None]
        for name, key in (("training rows", "loss"), ("held-out rows", "heldout_loss"))
    }
    metrics = [point for point in metrics if "phase" not in point]
    names = sorted({name for point in metrics for name in point["rewards"]})
    reward = {"reward": [(point["step"], point["reward"]) for point in metrics]}
    if len(names) > 1:
        reward |= {name: [(point["step"], point["rewards"].get(name)) for point in metrics] for name in names}
    series = {"Loss of supervised fine-tuning": losses, "Mean reward": reward} | {
        title: {title: [(point["step"], point[key]) for point in metrics if point.get(key) is not None]}
        for key, title in CURVES.items()
        if any(point.get(key) for point in metrics)
    }
    # pygal escapes all text, and reward names contain no markup.
    return {title: Markup(_chart(title, curves)) for title, curves in series.items() if any(curves.values())}  # noqa: S704


def thinned(points: list[Any], most: int) -> list[Any]:
    """Return at most `most` points, evenly spread, including the first and the last."""
    if len(points) <= most:
        return points
    return [points[round(at * (len(points) - 1) / (most - 1))] for at in range(most)]


def _chart(title: str, curves: dict[str, list[tuple[int, float | None]]]) -> str:
    from pygal import XY
    from pygal.style import Style

    style = Style(
        font_family="inherit",
        background="transparent",
        plot_background="transparent",
        foreground="var(--soft)",
        foreground_strong="var(--soft)",
        foreground_subtle="var(--line)",
        guide_stroke_color="var(--line)",
        major_guide_stroke_color="var(--line)",
        colors=tuple(f"var(--c{n})" for n in range(1, 7)),
        label_font_size=13,
        major_label_font_size=13,
        legend_font_size=13,
        opacity="1",
        stroke_opacity="1",
        stroke_width="2",
    )
    chart = XY(
        style=style,
        width=420,
        height=240,
        max_scale=6,
        margin=6,
        show_legend=len(curves) > 1,
        legend_at_bottom=True,
        legend_at_bottom_columns=3,
        legend_box_size=10,
        dots_size=2,
        show_x_guides=False,
        x_labels_major_count=6,
        show_minor_x_labels=False,
        js=[],
        disable_xml_declaration=True,
    )
    chart.uuid = hashlib.sha256(title.encode()).hexdigest()[
        :8
    ]  # pygal's random default would make every rendering different
    chart.add_xml_filter(_without_scripts)
    for name, points in curves.items():
        chart.add(name, thinned(points, CHART_POINTS), show_dots=len(points) <= 50)
    svg: str = chart.render(is_unicode=True)
    return svg


def _without_scripts(root: Any) -> Any:
    """Remove the script of pygal's tooltips, which the page's content security policy blocks."""
    for parent in list(root.iter()):
        for child in [child for child in parent if str(child.tag).endswith("script")]:
            parent.remove(child)
    return root
