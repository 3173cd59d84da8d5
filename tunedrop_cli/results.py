"""A run and its results as facts for a terminal, and the differences of results."""

from collections.abc import Iterator
from typing import Any

import msgspec

from pipeline.runs.states import Run, RunState
from tunedrop.problems import Problem
from tunedrop_cli.deployment import Deployment, in_words, line_beside
from tunedrop_cli.output import Fact

# The figures by which runs are compared, and their paths in `result.json`.
FIGURES = {
    "verdict": ("verdict",),
    "line": ("line",),
    "started from": ("start", "run_id"),
    "base score": ("comparison", "base_score"),
    "tuned score": ("comparison", "tuned_score"),
    "lift": ("comparison", "lift"),
    "lift, at least": ("comparison", "lift_low"),
    "lift, at most": ("comparison", "lift_high"),
    "tests": ("comparison", "tests"),
    "won": ("comparison", "wins"),
    "tied": ("comparison", "ties"),
    "lost": ("comparison", "losses"),
    "against champion": ("champion", "run_id"),
    "lift over champion": ("champion", "comparison", "lift"),
    "judged on these tests": ("tries",),
    "cut answers, base": ("cut", "base"),
    "cut answers, tuned": ("cut", "tuned"),
    "steps": ("training", "steps"),
    "training seconds": ("training", "seconds"),
    "cost in USD": ("cost", "usd"),
    "trainer": ("trainer",),
    "data": ("source",),
    "version of the data": ("source_version",),
}


def facts_of_run(run: Run) -> list[Fact]:
    """Return a run's own facts. Times are in UTC."""
    facts = [
        ("run", run.run_id),
        ("state", in_words(run.state)),
        ("attempt", str(run.attempt)),
        ("dataset", run.dataset),
        ("line", line_beside(run)),
        ("started from", run.start),
        ("data", f"{run.key} (version {run.version_id})"),
        ("rows", str(run.rows)),
        ("base model", run.model),
        ("arrived", run.arrived[:19].replace("T", " ")),
        ("updated", run.updated[:19].replace("T", " ")),
        ("launch plan", run.plan),
        ("instance type", run.instance_type),
        ("training job", run.train_job),
        ("test job", run.test_job),
        ("next attempt", run.not_before),
        ("bounded", "training ended at its time limit" if run.bounded else None),
        ("reason", run.reason),
    ]
    return [(label, value) for label, value in facts if value]


def facts_of_end(deployment: Deployment, run: Run) -> list[Fact]:
    """Return the facts about how a run ended; saves the report of a published run."""
    state = [("run", run.run_id), ("state", in_words(run.state))]
    if run.state == RunState.REJECTED:
        return [*state, *_rejection(deployment.read_json(run, "validation.json"))]
    if run.state != RunState.PUBLISHED:
        return [*state, ("reason", run.reason or "")]
    result = deployment.read_json(run, "result.json")
    comparison, cost = result["comparison"], result["cost"]["usd"]
    scores = f"base {comparison['base_score']:.3f} → tuned {comparison['tuned_score']:.3f} over {comparison['tests']} tests"
    return [
        *state,
        ("verdict", result["verdict"]),
        ("score", scores),
        *_cut_answers(result),
        *(("reason", reason) for reason in result["reasons"]),
        *([] if cost is None else [("cost", f"${cost:.2f}")]),
        ("model", result["artifacts"]["merged_model"]),
        ("model package", result["model_package"]),
        ("report", str(deployment.save_report(run))),
    ]


def _cut_answers(result: dict[str, Any]) -> Iterator[Fact]:
    """Yield the fact about answers that the limit of tokens cut, if there are any. Runs of older versions have no count."""
    cut = result.get("cut", {})
    if any(cut.values()):
        ended = result["ended"]
        rest = (
            f"the lift without them is {ended['lift']:+.3f} over {ended['tests']} tests" if ended else "no test without them"
        )
        yield "cut answers", f"base {cut['base']}, tuned {cut['tuned']}; {rest}"


def _rejection(receipt: dict[str, Any]) -> Iterator[Fact]:
    problems = [msgspec.convert(error, Problem) for error in receipt["errors"]]
    yield from (("problem", f"{problem.code}: {problem}") for problem in problems)
    counts = receipt["error_counts"]
    if more := sum(counts.values()) - len(problems):
        yield "problems", f"{more} more; all by code: {', '.join(f'{code} {count}' for code, count in counts.items())}"


Values = dict[str, list[Any]]  # one value for each run, by the name of a figure or the key of a config


def differences(*results: dict[str, Any]) -> tuple[Values, Values]:
    """Return the figures that a result has, and the config keys in which the results differ."""
    figures = {name: [_at(result, path) for result in results] for name, path in FIGURES.items()}
    configs = [dict(_flat(result["config"])) for result in results]
    keys = {key: [config.get(key) for config in configs] for key in sorted(set().union(*configs))}
    return (
        {name: values for name, values in figures.items() if any(value not in (None, "") for value in values)},
        {key: values for key, values in keys.items() if any(value != values[0] for value in values)},
    )


def table_of(figures: Values, config: Values) -> list[list[str]]:
    """Return the differences as rows of a table: a name, and the values as text."""
    named = {**figures, **{f"config: {key}": values for key, values in config.items()}}
    return [[name, *map(_text, values)] for name, values in named.items()]


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
