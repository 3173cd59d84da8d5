"""The charts of a training by step: coordinates for the SVG of `report.html.j2`, and values for `charts.js`."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from tunedrop.rollouts import spread

CURVES = {
    "completion_length": "Answer length (tokens)",
    "kl": "Distance from the reference (KL, nats per token)",
    "entropy": "Entropy (nats per token)",
    "loss": "Loss",
    "frac_reward_zero_std": "Groups with equal rewards (share)",
}
MOST_POINTS = 200
# The size of the drawing, and its margins: left, right, top, bottom.
WIDTH, HEIGHT, MARGINS = 420.0, 230.0, (46.0, 12.0, 12.0, 26.0)
TICKS = 5

Point = tuple[int, float]


class Curve(NamedTuple):
    """A line of a chart: its name, its points (step, value), and whether each point has a dot."""

    name: str
    points: Sequence[Point]
    dots: bool = False


class Mark(NamedTuple):
    """A step with a meaning: `kind` is alert, evaluation or saved."""

    step: int
    kind: str
    label: str


def charts(metrics: Sequence[dict[str, Any]], training: dict[str, Any], alerts: Sequence[dict[str, Any]]) -> list[Any]:
    """Return the charts: rewards in training and on held-out rows, then each of `CURVES` that has values.

    `metrics` and `alerts` are the lines of the files with these names, `training` is `training.json`.
    """
    evaluations = [each for each in training.get("evaluations") or [] if "heldout_reward" in each]
    marks = [Mark(each["step"], "evaluation", "evaluation on held-out rows") for each in evaluations]
    if saved := training.get("checkpoint"):
        marks.append(Mark(saved["step"], "saved", "the saved model"))
    marks += [Mark(each["step"], "alert", f"alert {each['code']}") for each in alerts if each.get("step") is not None]
    learned = [point for point in metrics if point.get("phase") == "sft"]  # whose steps are others
    metrics = [point for point in metrics if "phase" not in point]
    names = sorted({name for point in metrics for name in point["rewards"]})
    rewards = [Curve("training", _points(metrics, lambda point: point.get("reward")))]
    if evaluations:
        rewards.append(Curve("held-out rows", [(each["step"], each["heldout_reward"]) for each in evaluations], dots=True))
    if len(names) > 1:
        rewards += [Curve(name, _points(metrics, lambda point, name=name: point["rewards"].get(name))) for name in names]
    losses = [
        Curve(name, _points(learned, lambda point, key=key: point.get(key)))
        for name, key in (("training rows", "loss"), ("held-out rows", "heldout_loss"))
    ]
    found = [chart("Loss of supervised fine-tuning", losses, [])] if learned else []
    found.append(chart("Reward", rewards, marks))
    for key, title in CURVES.items():
        points = _points(metrics, lambda point, key=key: point.get(key))
        if any(value for _, value in points):
            found.append(chart(title, [Curve(title, points)], marks))
    return found


def _points(metrics: Sequence[dict[str, Any]], value: Any) -> list[Point]:
    return spread([(point["step"], found) for point in metrics if (found := value(point)) is not None], MOST_POINTS)


def chart(title: str, curves: Sequence[Curve], marks: Sequence[Mark]) -> dict[str, Any]:
    """Return a chart for the template: `lines`, `marks`, ticks, `summary` (words by curve), `hover` ([x, text] by step)."""
    curves = [curve for curve in curves if curve.points]
    steps = sorted({step for curve in curves for step, _ in curve.points} | {mark.step for mark in marks})
    values = [value for curve in curves for _, value in curve.points]
    y_ticks = ticks(min(values, default=0.0), max(values, default=1.0))
    left, right, top, bottom = MARGINS
    first, last = (steps[0], steps[-1]) if steps else (0, 1)
    low, high = y_ticks[0], y_ticks[-1]

    def x(step: float) -> float:
        return round(left + (WIDTH - left - right) * (step - first) / ((last - first) or 1), 1)

    def y(value: float) -> float:
        return round(top + (HEIGHT - top - bottom) * (high - value) / (high - low), 1)

    return {
        "title": title,
        "lines": [
            {
                "name": curve.name,
                "path": " ".join(f"{x(step)},{y(value)}" for step, value in curve.points),
                "dots": [(x(step), y(value)) for step, value in curve.points]
                if curve.dots or len(curve.points) == 1
                else [],
            }
            for curve in curves
        ],
        "marks": [{"x": x(mark.step), "kind": mark.kind} for mark in marks],
        "x_ticks": [(x(step), f"{step:g}") for step in ticks(first, last) if first <= step <= last and step == int(step)],
        "y_ticks": [(y(value), f"{value:g}") for value in y_ticks],
        "summary": [f"{curve.name} {_in_words(curve)}" for curve in curves],
        "hover": [[x(step), text] for step, text in _hover(steps, curves, marks).items()],
    }


def ticks(low: float, high: float) -> list[float]:
    """Return about TICKS round numbers in equal distances: the first is at most `low`, the last at least `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        room = abs(high) / 2 or 0.5
        low, high = low - room, high + room
    rough = (high - low) / (TICKS - 1)
    unit = 10.0 ** math.floor(math.log10(rough))
    distance = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    return [round(number * distance, 12) for number in range(first, last + 1)]


def _in_words(curve: Curve) -> str:
    (first, start), (last, end) = curve.points[0], curve.points[-1]
    if first == last:
        return f"{start:.3g} at step {first}"
    return f"from {start:.3g} at step {first} to {end:.3g} at step {last}"


def _hover(steps: Iterable[int], curves: Sequence[Curve], marks: Sequence[Mark]) -> dict[int, str]:
    """Return what a reader sees at each step: the values of the curves, and the marks."""
    known = [dict(curve.points) for curve in curves]
    texts = {}
    for step in steps:
        parts = [f"step {step}"]
        parts += [f"{curve.name} {of[step]:.4g}" for curve, of in zip(curves, known, strict=True) if step in of]
        parts += [mark.label for mark in marks if mark.step == step]
        texts[step] = " · ".join(parts)
    return texts
