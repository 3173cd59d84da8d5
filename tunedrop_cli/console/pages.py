"""The console's HTML. The templates escape all text, which comes from users, datasets and models."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from local_app.stack import StackError
from pipeline.publish.page import FOLDER as PUBLISH
from pipeline.runs.states import FINAL, Run, RunState
from pipeline.validation.receipt import Receipt
from tunedrop.plain import one_line
from tunedrop_cli.check import SHOWN, facts_of_receipt, problem_text
from tunedrop_cli.console.live import Live, best_and_worst, stages
from tunedrop_cli.deployment import Deployment, in_words, line_of_run
from tunedrop_cli.endpoints import summaries as endpoints
from tunedrop_cli.lines import HEADER, facts_of_line, find_line, history, score, signed, tree
from tunedrop_cli.lines import summaries as lines
from tunedrop_cli.results import differences, facts_of_end, facts_of_run, table_of
from tunedrop_cli.rollouts import in_digits

FOLDER = Path(__file__).parent
STATIC = {
    **{name: FOLDER / "static" / name for name in ("console.css", "console.js", "htmx.min.js", "sse.min.js")},
    **{name: PUBLISH / name for name in ("page.css", "charts.js")},
}
# What templates call.
HELPERS = {each.__name__: each for each in (best_and_worst, in_digits, in_words, score, signed)} | {"line_of": line_of_run}


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader([FOLDER / "templates", PUBLISH]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= HELPERS
    environment.filters["tojson_attribute"] = lambda value: msgspec.json.encode(value).decode()
    return environment


class Pages:
    """Renders the pages of one stack. `base` begins every address, `place` says where the stack is."""

    def __init__(self, base: str, place: str):
        self.base = base
        self._always = {"base": base, "place": place}

    def _render(self, template: str, **values: Any) -> str:
        return _environment().get_template(f"{template}.html.j2").render(**self._always, **values)

    def home(self, deployment: Deployment) -> str:
        """The page of all runs, where a run is started."""
        return self._render("home", runs=Markup(self.runs(deployment)))  # noqa: S704 - our own HTML

    def runs(self, deployment: Deployment) -> str:
        """The table of all runs."""
        return self._render("runs", runs=deployment.all_runs())

    def standing(self, deployment: Deployment) -> str:
        """Lines, endpoints, and undelivered events."""
        return self._render(
            "standing",
            lines=lines(deployment),
            served=endpoints(deployment),
            undelivered=deployment.undelivered(),
        )

    def receipt(self, receipt: Receipt, data: Path, config: Path | None, tests: Path | None) -> str:
        """The receipt of a dataset before it is dropped."""
        shown = receipt.errors[:SHOWN]
        return self._render(
            "receipt",
            receipt=receipt,
            name=data.name,
            facts=[(name, one_line(value)) for name, value in facts_of_receipt(receipt)],
            problems=[one_line(problem_text(problem, data, config, tests)) for problem in shown],
            more=sum(receipt.error_counts.values()) - sum(problem.count for problem in shown),
        )

    def problem(self, message: str) -> str:
        """A message on the page that asked for something."""
        return self._render("problem", message=message)

    def error(self, message: str) -> str:
        """A page that is not there."""
        return self._render("error", message=message)

    def run(self, live: Live, deployment: Deployment) -> str:
        """The page of a run."""
        parts = {name: Markup(part) for name, part in self.parts(live, deployment).items()}  # noqa: S704 - our own HTML
        return self._render("run", run=live.run, ended=live.ended, **parts)

    def parts(self, live: Live, deployment: Deployment) -> dict[str, str]:
        """The parts of a run's page that change while the run goes on, by name."""
        run = live.run
        final = run.state in FINAL
        return {
            "state": self._render("state", run=run, live=live, stages=stages(run), final=final, facts=facts_of_run(run)),
            "end": self._render(
                "end",
                run=run,
                facts=facts_of_end(deployment, run) if live.ended else [],
                published=run.state == RunState.PUBLISHED,
            ),
            "chart": self._render("chart.live", chart=live.chart()),
            "alerts": self._render("alerts", alerts=live.alerts),
            "answers": self._render("answers", groups=live.groups),
            "log": self._render("log", lines=live.lines),
        }

    def line(self, deployment: Deployment, name: str) -> str:
        """The history of a line. Raises StackError for an unknown line."""
        past = history(deployment, find_line(deployment, name))
        return self._render("line", line=name, facts=facts_of_line(past), header=HEADER, rows=list(tree(past)))

    def compare(self, deployment: Deployment, runs: Sequence[Run]) -> str:
        """The differences of published runs. Raises StackError for fewer than two, and for a run without results."""
        if len(runs) < 2:
            raise StackError("Select at least two published runs to compare them.")
        results = [deployment.read_json(run, "result.json") for run in runs]
        for run, result in zip(runs, results, strict=True):
            if result is None:
                raise StackError(f"{run.run_id} has no results: it is {in_words(run.state)}.")
        return self._render("compare", runs=runs, rows=table_of(*differences(*results)))
