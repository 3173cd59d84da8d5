"""Commands for runs: start, list, follow, compare and stop them, and read their results."""

import sys
import time
from pathlib import Path

import click
import msgspec
from rich.console import Console

from local_app.stack import StackError
from pipeline.runs.states import FINAL, Run, RunState
from tunedrop.plain import printable
from tunedrop_cli.deployment import Deployment, in_words, line_beside
from tunedrop_cli.documents import Compared, Runs, ShownRun, history_document, print_document
from tunedrop_cli.job_log import JobLog
from tunedrop_cli.lines import HEADER, all_lines, champion, facts_of_line, former_champions, history, tree
from tunedrop_cli.options import FILE, FOLDER, JSON, RUN_NAME, RUN_OR_LINE_NAME, with_deployment
from tunedrop_cli.output import console, print_facts, print_raw, print_table, say
from tunedrop_cli.results import differences, facts_of_end, facts_of_run, table_of
from tunedrop_cli.rollouts import Folder, facts_of_group, newest_step
from tunedrop_cli.watch import follow

MOST_COMPARED = 5  # columns that fit a terminal


@click.command()
@click.argument("file", type=FILE)
@click.option("--config", type=FILE, help="Run config (YAML) for this dataset.")
@click.option("--tests", type=FILE, help="Inference tests (JSON) for this dataset.")
@click.option("--model", type=FOLDER, help="Base model folder to upload and tune.")
@click.option("--wait", is_flag=True, help="Follow the run to its end.")
@JSON
@with_deployment
def drop(
    deployment: Deployment,
    file: Path,
    config: Path | None,
    tests: Path | None,
    model: Path | None,
    wait: bool,
    as_json: bool,
) -> None:
    """Upload a dataset, which starts a run.

    \b
    Example: tunedrop drop cars.jsonl --config cars.yaml --tests cars.tests.json --wait
    """
    run = deployment.drop(file, config, tests, model)
    if wait or run.state == RunState.REJECTED:
        _follow_to_end(deployment, run, as_json=as_json)
    elif as_json:
        print_document(_shown(deployment, run))
    else:
        print_facts(
            [
                ("run", run.run_id),
                ("state", in_words(run.state)),
                ("watch", f"`tunedrop watch {run.run_id}`"),
                ("logs", f"`tunedrop logs {run.run_id} --follow`"),
            ]
        )


def _follow_to_end(deployment: Deployment, run: Run, *, as_json: bool, samples: bool = True) -> None:
    """Follow a run to its end and print its results, as JSON without its progress; exit 1 if it ended without a model."""
    if as_json:
        ended = follow(deployment, run, Console(quiet=True))
        print_document(_shown(deployment, ended))
    else:
        ended = follow(deployment, run, console, samples=samples)
        print_facts(facts_of_end(deployment, ended))
    if ended.state != RunState.PUBLISHED:
        sys.exit(1)


@click.command()
@JSON
@with_deployment
def runs(deployment: Deployment, as_json: bool) -> None:
    """List the runs, newest first, with their lines where a line has another name than the dataset.

    \b
    Example: tunedrop runs
    """
    found = deployment.all_runs()
    if as_json:
        return print_document(Runs(runs=found))
    columns: dict[str, list[str]] = {
        "run": [run.run_id for run in found],
        "line": [line_beside(run) for run in found],
        "state": [in_words(run.state) for run in found],
        "attempt": [str(run.attempt) for run in found],
        "rows": [str(run.rows) for run in found],
        "arrived (UTC)": [run.arrived[:19].replace("T", " ") for run in found],
        "verdict or reason": [(run.verdict or run.reason or "").split("\n")[0][:80] for run in found],
    }
    if not any(columns["line"]):
        del columns["line"]
    if not found:
        return console.print("No runs. Start one with `tunedrop drop FILE`.")
    return print_table(list(zip(*columns.values(), strict=True)), header=list(columns))


@click.command()
@click.argument("name", metavar="RUN|LINE", type=RUN_OR_LINE_NAME)
@JSON
@with_deployment
def show(deployment: Deployment, name: str, as_json: bool) -> None:
    """Show a run and its results, and the history of a line.

    RUN is the run's id, the beginning of its id, or its dataset (the newest run). A LINE's history is a tree: below each run
    are the runs that started from it, with their verdicts, scores, and the approval of their model packages. Where a dataset
    and a line have the same name, both are shown.

    \b
    Example: tunedrop show cars
    """
    lines = all_lines(deployment)
    line, match = lines.get(name), deployment.named(name)
    if line is None and match is None:
        match = deployment.find(name, lines)
    past = history(deployment, line) if line else None
    if as_json:
        document = _shown(deployment, match) if match else ShownRun()
        document.line = history_document(past) if past else None
        return print_document(document)
    if match:
        results = facts_of_end(deployment, match) if match.state in FINAL else []
        print_facts(dict.fromkeys([*facts_of_run(match), *results]))
    if match and past:
        console.print()
    if past:
        print_facts(facts_of_line(past))
        print_table(list(tree(past)), header=HEADER)
    return None


def _shown(deployment: Deployment, run: Run) -> ShownRun:
    receipt, result = (deployment.read_json(run, name) for name in ("validation.json", "result.json"))
    return ShownRun(run=run, receipt=receipt, result=result)


@click.command()
@click.argument("run", type=RUN_NAME)
@click.option("--quiet", is_flag=True, help="Print no sample answers.")
@JSON
@with_deployment
def watch(deployment: Deployment, run: str, quiet: bool, as_json: bool) -> None:
    """Follow a run to its end.

    Prints the run's stages, steps, reward, time left, cost, and the alerts of its training; every few steps also two answers
    of the model with their rewards, the best and the worst to one prompt. With --json, prints the run when it has ended.

    \b
    Example: tunedrop watch cars
    """
    _follow_to_end(deployment, deployment.find(run), as_json=as_json, samples=not quiet)


@click.command()
@click.argument("run", type=RUN_NAME)
@click.option("--step", type=int, help="Only the groups of this step.  [default: the newest step]")
@click.option("--prompt", metavar="ID", help="Only the answers to this prompt (its row's id), in all steps.")
@click.option("--worst", is_flag=True, help="The groups with the lowest mean reward first, of all steps.")
@click.option("--most", type=click.IntRange(min=1), default=5, show_default=True, help="Groups to print.")
@click.option("--json", "as_json", is_flag=True, help="Print all matching groups as JSON Lines (docs/json.md).")
@with_deployment
def rollouts(
    deployment: Deployment, run: str, step: int | None, prompt: str | None, worst: bool, most: int, as_json: bool
) -> None:
    """Print what the model answered in its training, with the rewards of each answer.

    A running job's answers are there as it writes them. A group is the answers to one prompt in one step; the highest reward
    is first. The answers of the evaluations belong to the step before them.

    \b
    Example: tunedrop rollouts cars --worst
    """
    match = deployment.find(run)
    folder = Folder(deployment, match)
    index = folder.index()
    newest = newest_step(index) if index else None
    if index is None or newest is None:
        raise StackError(
            f"{match.run_id} has no rollouts: it is {in_words(match.state)}. A training writes them from its first logging "
            "step on, unless rollouts.max_mb is 0."
        )
    if step is None and prompt is None and not worst:
        step = newest
    groups = [
        group for group in folder.groups(index, lambda each: step in {None, each}) if prompt in {None, group.prompt_id}
    ]
    if not groups:
        kept = sorted({part.step for part in index.parts})
        asked = " and ".join(
            [*([f"step {step}"] if step is not None else []), *([f"the prompt '{prompt}'"] if prompt is not None else [])]
        )
        raise StackError(
            f"{match.run_id} has kept no answers of {asked}. It has kept {len(kept)} steps, {kept[0]} to {kept[-1]}."
        )
    if worst:
        groups.sort(key=lambda group: group.mean)
    if as_json:
        for group in groups:
            print_raw(msgspec.json.encode(group).decode())
        return
    for number, group in enumerate(groups[:most]):
        if number:
            console.print()
        print_facts(facts_of_group(group))
    if len(groups) > most:
        say(f"\n{len(groups) - most} more groups: print them with --most {len(groups)}.")


@click.command()
@click.argument("name", metavar="RUN|LINE", type=RUN_OR_LINE_NAME)
@click.argument("other", metavar="[RUN|LINE]", type=RUN_OR_LINE_NAME, required=False)
@click.option("--champions", is_flag=True, help="Compare the champions of two lines.")
@JSON
@with_deployment
def compare(deployment: Deployment, name: str, other: str | None, champions: bool, as_json: bool) -> None:
    """Compare two published runs, the champions of a line, or the champions of two lines.

    Prints the figures of the runs, and the differences of their configs. A single LINE stands for its champions over time,
    at most the newest five.

    \b
    Example: tunedrop compare cars-1f0c cars-88ab
    Example: tunedrop compare cars
    Example: tunedrop compare cars trucks --champions
    """
    if other is None:
        compared = former_champions(deployment, name)[-MOST_COMPARED:]
    elif champions:
        compared = [champion(deployment, each) for each in (name, other)]
    else:
        compared = [deployment.find(each) for each in (name, other)]
    results = [deployment.read_json(each, "result.json") for each in compared]
    for each, result in zip(compared, results, strict=True):
        if result is None:
            raise StackError(
                f"{each.run_id} has no results: it is {in_words(each.state)}. Follow it with `tunedrop watch {each.run_id}`."
            )
    figures, config = differences(*results)
    if as_json:
        return print_document(Compared(runs=[each.run_id for each in compared], figures=figures, config=config))
    rows = table_of(figures, config)
    header = ["", *(each.run_id for each in compared)]
    return print_table(rows, header, ["" if len(set(values)) == 1 else "bold" for _, *values in rows])


@click.command(name="open")
@click.argument("run", type=RUN_NAME, required=False)
@with_deployment
def open_(deployment: Deployment, run: str | None) -> None:
    """Open a run's report, or the page of all runs.

    Downloads the page, prints its path, and opens the page in the browser.

    \b
    Example: tunedrop open cars
    """
    match = deployment.find(run) if run else None
    if match and match.state != RunState.PUBLISHED:
        follow_it = f"Follow it with `tunedrop watch {match.run_id}`."
        advice = f"Upload {match.key} again to start its next attempt." if match.state in FINAL else follow_it
        raise StackError(f"{match.run_id} has no report: it is {in_words(match.state)}. {advice}")
    path = deployment.save_report(match) if match else deployment.save_index()
    print_raw(path)
    if sys.stdout.isatty():
        click.launch(str(path))


@click.command()
@click.argument("run", type=RUN_NAME)
@click.option("--follow", "-f", "to_the_end", is_flag=True, help="Continue until the run has ended.")
@with_deployment
def logs(deployment: Deployment, run: str, to_the_end: bool) -> None:
    """Print the logs of a run's jobs.

    The output of the container's start, such as pip's, is left out, unless the start fails.

    \b
    Example: tunedrop logs cars --follow
    """
    positions: dict[str, str] = {}
    log = JobLog()
    while True:
        match = deployment.find(run)
        for job in filter(None, (match.train_job, match.test_job)):
            for stream, message in deployment.log_events(job, positions):
                for line in log.own_lines(stream, message):
                    print_raw(printable(line))
        if not to_the_end or match.open is None:
            for line in log.unfinished_start():
                print_raw(printable(line))
            if match.train_job is None:
                say(f"{match.run_id} has no job: it is {in_words(match.state)}. See `tunedrop show {match.run_id}`.")
            return
        time.sleep(1)


@click.command()
@click.argument("run", type=RUN_NAME)
@JSON
@with_deployment
def stop(deployment: Deployment, run: str, as_json: bool) -> None:
    """Stop a run: it is cancelled, and its job is stopped.

    \b
    Example: tunedrop stop cars
    """
    ended = deployment.stop(deployment.find(run))
    if as_json:
        print_document(_shown(deployment, ended))
    else:
        console.print(f"{ended.run_id}: {in_words(ended.state)}", markup=False)
    if ended.state != RunState.CANCELLED:
        sys.exit(1)
