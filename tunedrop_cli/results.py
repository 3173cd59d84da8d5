"""Results of runs for a terminal: how two of them differ."""

from collections.abc import Iterator
from typing import Any

# What two runs are compared by, and where it is in `result.json`.
FIGURES = {
    "verdict": ("verdict",),
    "base score": ("comparison", "base_score"),
    "tuned score": ("comparison", "tuned_score"),
    "lift": ("comparison", "lift"),
    "lift, at least": ("comparison", "lift_low"),
    "lift, at most": ("comparison", "lift_high"),
    "tests": ("comparison", "tests"),
    "won": ("comparison", "wins"),
    "tied": ("comparison", "ties"),
    "lost": ("comparison", "losses"),
    "steps": ("training", "steps"),
    "training seconds": ("training", "seconds"),
    "cost in USD": ("cost", "usd"),
    "trainer": ("trainer",),
    "data": ("source",),
    "version of the data": ("source_version",),
}


def differences(one: dict[str, Any], other: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the figures of two results, name and both values, then every key of their configs that differs."""
    for name, path in FIGURES.items():
        yield name, _text(_at(one, path)), _text(_at(other, path))
    before, after = dict(_flat(one["config"])), dict(_flat(other["config"]))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield f"config: {key}", _text(before.get(key)), _text(after.get(key))


def _at(value: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
