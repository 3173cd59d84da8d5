"""Lines as the command sees them: their items in the run table, their champions, and their history.

A line is a model that successive runs improve, and its champion the model in use: the run of its newest approved package.
"""

import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from local_app.stack import StackError
from pipeline.runs.lines import Line
from pipeline.runs.states import Run, RunState
from tunedrop_cli.deployment import Deployment, in_words, line_of_run, unknown
from tunedrop_cli.output import Fact
from tunedrop_cli.registry import Package, champion_of, packages_of

if TYPE_CHECKING:
    from pipeline.publish.index import IndexedRun

BARS = "▁▂▃▄▅▆▇█"
NO_CHAMPION = "none: no model package of the line is approved"


def all_lines(deployment: Deployment) -> dict[str, Line]:
    """Return the lines by name, the last changed first. The index lags behind the table by up to seconds."""
    return {line.line: line for line in sorted(deployment.lines.all(), key=lambda line: line.arrived, reverse=True)}


def members(line: Line) -> set[str]:
    """Return the ids of the runs that a line's item names."""
    return {*line.packages.values(), *line.tries, *([line.champion] if line.champion else [])}


def find_line(deployment: Deployment, name: str) -> Line:
    """Return a line by its name. Raises StackError for an unknown name."""
    lines = all_lines(deployment)
    if name not in lines:
        raise unknown("line", name, lines, "List the lines with `tunedrop lines`.")
    return lines[name]


# --- champions ---


def champions(deployment: Deployment, lines: Iterable[Line]) -> "dict[str, list[IndexedRun]]":
    """Return the published champions of each line, the first one first, as the page of all runs has them.

    A run was a champion if the gate approved it, or if another run was compared with it.
    """
    indexed = sorted(deployment.index(), key=lambda run: run.published)
    compared = {run.champion for run in indexed}
    return {
        line.line: [
            run
            for run in indexed
            if run.run_id in members(line)
            and (run.verdict == "APPROVED" or run.run_id in compared or run.run_id == line.champion)
        ]
        for line in lines
    }


def champion(deployment: Deployment, name: str) -> Run:
    """Return the champion of a line. Raises StackError for an unknown line, and for a line without a champion."""
    line = find_line(deployment, name)
    if line.champion is None:
        raise without_champion(name)
    return deployment.find(line.champion)


def former_champions(deployment: Deployment, name: str) -> list[Run]:
    """Return the champions of a line, the first one first. Raises StackError as `champion` does."""
    line = find_line(deployment, name)
    found = champions(deployment, [line])[name]
    if not found:
        raise without_champion(name)
    return [deployment.find(each.run_id) for each in found]


def without_champion(name: str) -> StackError:
    """Return the error for a line of which no model is approved."""
    return StackError(
        f"The line '{name}' has no champion: no model of it is approved. Its runs: `tunedrop show {shlex.quote(name)}`."
    )


def summaries(deployment: Deployment) -> list[dict[str, Any]]:
    """Return what `tunedrop lines` says of each line. Scores are those of the champion's own tests."""
    lines = all_lines(deployment)
    former = champions(deployment, lines.values())
    found = []
    for name, line in lines.items():
        now = next((run for run in former[name] if run.run_id == line.champion), None)
        found.append(
            {
                "line": name,
                "champion": line.champion,
                "champion_package": line.champion_package,
                "score": now and now.tuned,
                "lift": now and now.lift,
                "published": len(set(line.packages.values())),
                "tries": line.tries,
                "trend": [run.tuned for run in former[name]],
                "changed": line.arrived,
            }
        )
    return found


def sparkline(values: list[float]) -> str:
    """Return one bar for each value, between the smallest and the largest value."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    steps = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * steps)] for value in values)


# --- history ---


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A run in the history of its line. `start` is the run whose adapter it started from, None for the base model.

    `lift` is over the base model, `champion_lift` over `champion`, the model in use when the run was tested.
    """

    run_id: str
    state: str
    arrived: str
    start: str | None
    verdict: str | None
    base_score: float | None
    tuned_score: float | None
    lift: float | None
    tests: int | None
    champion: str | None
    champion_lift: float | None
    package_version: int | None
    approval: str | None


class History(NamedTuple):
    """A line, its runs that are open or published, the first one first, and its model packages."""

    line: Line
    entries: list[Entry]
    packages: list[Package]


def history(deployment: Deployment, line: Line) -> History:
    """Return the history of a line. One object is read for each published run."""
    packages = packages_of(deployment, line.packages)
    runs = [
        run
        for run in reversed(deployment.all_runs())
        if run.run_id in members(line) or (run.open and line_of_run(run) == line.line)
    ]
    by_run = {package.run_id: package for package in packages}
    entries = [_entry(deployment, run, by_run.get(run.run_id), run.run_id in line.packages.values()) for run in runs]
    return History(line, entries, packages)


def _entry(deployment: Deployment, run: Run, package: Package | None, registered: bool) -> Entry:
    published = run.state == RunState.PUBLISHED
    result: dict[str, Any] = (deployment.read_json(run, "result.json") if published else None) or {}
    comparison, against = result.get("comparison", {}), result.get("champion") or {}
    return Entry(
        run_id=run.run_id,
        state=in_words(run.state),
        arrived=run.arrived,
        start=(result.get("start") or {}).get("run_id") or run.start,
        verdict=run.verdict,
        base_score=comparison.get("base_score"),
        tuned_score=comparison.get("tuned_score"),
        lift=comparison.get("lift"),
        tests=comparison.get("tests"),
        champion=against.get("run_id"),
        champion_lift=against.get("comparison", {}).get("lift"),
        package_version=package.version if package else None,
        approval=package.status if package else "deleted" if registered else None,
    )


def facts_of_line(past: History) -> list[Fact]:
    """Return the facts about a line as it is now."""
    line, found = past.line, champion_of(past.packages)
    facts = [
        ("line", line.line),
        ("champion", line.champion or NO_CHAMPION),
        ("model package", line.champion_package or ""),
        ("since", line.arrived[:19].replace("T", " ")),
        ("judged since", ", ".join(line.tries)),
    ]
    if found and found.run_id != line.champion:
        facts.append(("registry", f"The newest approved model package is that of {found.run_id}: it becomes the champion."))
    return [(label, value) for label, value in facts if value]


def tree(past: History) -> Iterator[list[str]]:
    """Yield the rows of a history as a tree: below each run are the runs that started from it."""
    known = {entry.run_id for entry in past.entries}
    below: dict[str | None, list[Entry]] = {}
    for entry in past.entries:
        below.setdefault(entry.start, []).append(entry)
    for start in [start for start in below if start not in known]:
        yield ["base model" if start is None else start, *[""] * (len(HEADER) - 1)]
        yield from _branch(past.line, below, start, "")


HEADER = ("run", "arrived (UTC)", "state", "package", "score", "over base", "over champion", "")


def _branch(line: Line, below: Mapping[str | None, list[Entry]], start: str | None, indent: str) -> Iterator[list[str]]:
    entries = below.get(start, [])
    for entry in entries:
        last = entry is entries[-1]
        yield [
            f"{indent}{'└' if last else '├'} {entry.run_id}",
            entry.arrived[:10],
            entry.verdict or entry.state,
            " ".join(str(part) for part in (entry.package_version, entry.approval) if part is not None),
            score(entry.tuned_score),
            signed(entry.lift),
            signed(entry.champion_lift) + (f" ({entry.champion})" if entry.champion else ""),
            "← champion" if entry.run_id == line.champion else "",
        ]
        yield from _branch(line, below, entry.run_id, indent + ("  " if last else "│ "))


def score(value: float | None) -> str:
    """Return a score as text; empty without a score."""
    return "" if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """Return a lift as text with its sign; empty without a lift."""
    return "" if value is None else f"{value:+.3f}"
