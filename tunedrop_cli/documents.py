"""What commands print with `--json`: one document each, and `docs/json.md`, which has them as JSON Schemas.

python -m tunedrop_cli.documents > docs/json.md
"""

import sys
from typing import Any, Literal

import msgspec

from pipeline.notify.schemas import described
from pipeline.runs.states import Run
from pipeline.validation.receipt import Receipt
from tunedrop.rollouts import Group
from tunedrop_cli.doctor.finding import Finding
from tunedrop_cli.lines import Entry, History
from tunedrop_cli.registry import champion_of


class Document(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A document. `version` changes if a key gets another meaning or goes; a new key does not change it."""

    version: Literal[1] = 1


class LineSummary(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A line. `score` and `lift` are of the champion's own tests; `trend` are the scores of all its champions in turn.

    `published` counts runs; `tries` are the runs that the same tests judged since the last champion.
    """

    line: str
    champion: str | None
    champion_package: str | None
    score: float | None
    lift: float | None
    published: int
    tries: list[str]
    trend: list[float]
    changed: str


class LineHistory(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A line and its runs, the first one first. `newest_approved` is the run that becomes champion if it is not yet."""

    line: str
    champion: str | None
    champion_package: str | None
    tries: list[str]
    changed: str
    newest_approved: str | None
    runs: list[Entry]


class ServedLine(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What answers under a line's name. None means unknown. `at_most_usd` is the cost if the endpoint never slept."""

    line: str
    state: str
    run: str | None
    package_version: int | None
    next: str | None
    endpoint: str | None
    component: str | None
    model: str | None
    instance_type: str | None
    instances: int | None
    copies: int | None
    requests_24h: int | None
    busy_usd_per_hour: float | None
    idle_usd_per_hour: float | None
    price: str | None
    at_most_usd: float | None
    deployed: str | None
    answered: Any
    reason: str | None
    refused: dict[str, str]


class ModelAnswer(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A served model's answer. `finish_reason` is `stop`, or `length` for an answer that the limit cut."""

    model: str
    component: str
    answer: str
    finish_reason: str | None


class Runs(Document):
    """All runs, the newest first."""

    runs: list[Run]


class ShownRun(Document):
    """A run, its receipt (docs/receipt.md), its `result.json` (docs/evaluation.md), and the line of the same name."""

    run: Run | None = None
    receipt: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    line: LineHistory | None = None


class Compared(Document):
    """Figures and config keys by name, each with one value for each run; config keys only if the values differ."""

    runs: list[str]
    figures: dict[str, list[Any]]
    config: dict[str, list[Any]]


class Lines(Document):
    """All lines, the last changed first."""

    lines: list[LineSummary]


class Approval(Document):
    """The approval status of a run's model package, now and before, and the line's champion as it follows from it."""

    run_id: str
    model_package: str
    status: str
    before: str
    line: str | None
    champion: str | None


class Answers(Document):
    """The answers of one or more served models to a question."""

    line: str
    endpoint: str | None
    question: str
    answers: list[ModelAnswer]


class Endpoints(Document):
    """What the stack serves, by line."""

    endpoints: list[ServedLine]


class Undeployed(Document):
    """A line whose model is taken down. `ended` is false while this goes on."""

    line: str
    ended: bool


class Redriven(Document):
    """The functions to which undelivered events were sent again, one for each event."""

    functions: list[str]


class Findings(Document):
    """What keeps runs from working (`trouble`), notes, and how to fix each (`do`)."""

    ok: bool
    findings: list[Finding]


# By command, in the order of docs/json.md. `rollouts` prints JSON Lines: one group on each line.
DOCUMENTS: dict[str, Any] = {
    "check": Receipt,
    "runs": Runs,
    "drop, show, watch, stop": ShownRun,
    "rollouts": Group,
    "compare": Compared,
    "lines": Lines,
    "approve, reject, rollback": Approval,
    "ask": Answers,
    "endpoints": Endpoints,
    "undeploy": Undeployed,
    "redrive": Redriven,
    "doctor": Findings,
}
INTRODUCTION = """# JSON for scripts and agents

With `--json` a command prints one JSON document and nothing else on standard output; `rollouts` prints one group on each
line. Exit codes are the same with and without it: 0 success; 1 the run was rejected, failed or was stopped, the dataset is
not valid, or the stack has errors; 2 wrong usage. After an error that has no document, standard output
is empty, and standard error has the message as text.

This page has the JSON Schema (2020-12) of each document. `version` changes if a key gets another meaning or goes; later
versions of Tunedrop may add keys. The page is written by `.venv/bin/python -m tunedrop_cli.documents > docs/json.md`;
`tests/integration/test_json.py` holds it, and what the commands print, against the types in `tunedrop_cli/documents.py`.
"""


def history_document(past: History) -> LineHistory:
    """Return a line's history as a part of a document."""
    line, found = past.line, champion_of(past.packages)
    return LineHistory(
        line=line.line,
        champion=line.champion,
        champion_package=line.champion_package,
        tries=list(line.tries),
        changed=line.arrived,
        newest_approved=found and found.run_id,
        runs=past.entries,
    )


def print_document(document: msgspec.Struct) -> None:
    """Print a document on standard output."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(document), indent=1).decode() + "\n")
    sys.stdout.flush()


def page() -> str:
    """Return `docs/json.md`."""
    return "\n".join([INTRODUCTION, *(_section(names, document) for names, document in DOCUMENTS.items())]).rstrip() + "\n"


def _section(names: str, document: Any) -> str:
    commands = ", ".join(f"`tunedrop {name}`" for name in names.split(", "))
    return f"## {names}\n\n{commands}. {described(document)}"


if __name__ == "__main__":
    sys.stdout.write(page())
