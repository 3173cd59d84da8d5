"""The `tunedrop` command: run the whole application on this machine, and use it, here or on AWS."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import update_wrapper
from pathlib import Path
from typing import Any

import click
import msgspec
from click.shell_completion import CompletionItem, get_completion_class
from rich.console import Console
from rich.table import Table

from local_app import base_model
from local_app.stack import PROJECT, STACK_NAME, Stack, StackError
from pipeline.notify import events
from pipeline.runs.states import FINAL, Run, RunState
from tunedrop.config.reference import config_defaults, config_schema
from tunedrop.dataset.readers import refuse
from tunedrop.problems import Problem
from tunedrop_cli.check import check_file, receipt_json, receipt_text
from tunedrop_cli.deployment import Deployment, Place
from tunedrop_cli.listener import listening
from tunedrop_cli.results import differences
from tunedrop_cli.sample import CONFIG, DATA, TESTS
from tunedrop_cli.watch import follow

DEFAULT_FOLDER = PROJECT / ".tunedrop"
# A pipe has no width: nothing is cut there.
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 240)


class RunName(click.ParamType[str]):
    """A run's id, the beginning of its id, or its dataset; completed from the runs of the local application."""

    name = "run"

    def shell_complete(self, context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the ids and datasets that begin so; none when the application does not run."""
        try:
            runs = Deployment.local(Stack(context.find_root().params.get("state") or DEFAULT_FOLDER)).all_runs()
        except StackError:
            return []
        names = dict.fromkeys([run.dataset for run in runs] + [run.run_id for run in runs])
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


RUN_NAME = RunName()
file_path = click.Path(exists=True, dir_okay=False, path_type=Path)
folder_path = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--state", type=click.Path(path_type=Path), default=DEFAULT_FOLDER, help="Folder of the local app.")
@click.pass_context
def cli(context: click.Context, state: Path) -> None:
    """Drop a dataset, get back a model tuned with GRPO + LoRA, tested against its base, and a report."""
    context.obj = state


def _stack_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that name a stack on AWS."""
    for option in (
        click.option("--stack", help=f"Name of a stack on AWS.  [default there: {STACK_NAME}]"),
        click.option("--region", help="AWS region: use a stack on AWS."),
        click.option("--profile", help="AWS profile: use a stack on AWS."),
    ):
        command = option(command)
    return command


def _deployment(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the deployment it works on: the local one, or one on AWS when a profile, region or stack is named."""

    @_stack_options
    @click.pass_obj
    def wrapped(state: Path, /, profile: str | None, region: str | None, stack: str | None, **options: Any) -> Any:
        on_aws = profile or region or stack
        name = stack or STACK_NAME
        deployment = Deployment.on_aws(state, profile, region, name) if on_aws else Deployment.local(Stack(state))
        return command(deployment, **options)

    return update_wrapper(wrapped, command)


def _say(line: str) -> None:
    console.print(line, style="dim")


def _python(stack: Stack, module: str, *arguments: str) -> str:
    """Run one of our modules against the local stack, in a process of its own for the SDKs it loads; return what it says."""
    done = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-m", module, *arguments], env=stack.environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise StackError(f"`python -m {module}` failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip()


def _pairs(_context: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    """Read NAME=VALUE options."""
    wrong = [pair for pair in given if "=" not in pair]
    if wrong:
        raise click.BadParameter(f"'{wrong[0]}' is not NAME=VALUE")
    return dict(pair.split("=", 1) for pair in given)


def _start(state: Path, host: str = "127.0.0.1", parameters: Mapping[str, str] | None = None) -> Stack:
    """Bring the local stack up: servers, stack, base model, launch plan; what is there already stays."""
    stack = Stack(state, host=host, parameters=parameters, progress=_say)
    stack.up()
    deployment = Deployment.local(stack)
    _say(f"base model: {base_model.NAME}")
    deployment.upload_model(Path(_python(stack, "local_app.base_model", str(PROJECT / ".tunedrop" / "models"))))
    _say("launch plan: python -m release")
    _python(stack, "release", "--stack", STACK_NAME, "--region", stack.region)
    return stack


@cli.command()
@click.option("--detach", "-d", is_flag=True, help="Return when everything is up, instead of following what happens.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--parameter", "-p", "parameters", multiple=True, metavar="NAME=VALUE", callback=_pairs, help="One of template.yaml's."
)
@click.pass_obj
def up(state: Path, detach: bool, host: str, parameters: dict[str, str]) -> None:
    """Start the application on this machine and follow what happens in it.

    Example: tunedrop up -p AllowCodeRewards=true
    """
    stack = _start(state, host, parameters)
    outputs = stack.outputs
    console.print(f"endpoint:        {stack.endpoint}  (AWS_ENDPOINT_URL)")
    console.print(f"SageMaker:       {stack.sagemaker_endpoint}  (AWS_ENDPOINT_URL_SAGEMAKER)")
    console.print(f"data bucket:     s3://{outputs.data_bucket}")
    console.print(f"artifact bucket: s3://{outputs.artifact_bucket}")
    if detach:
        return
    console.print("Drop a dataset with `tunedrop drop FILE`. Ctrl-C stops following; `tunedrop down` ends the application.")
    seen: dict[str, tuple[RunState, int]] = {}
    deployment = Deployment.local(stack)
    while True:
        for run in reversed(deployment.all_runs()):
            if seen.get(run.run_id) != (run.state, run.attempt):
                seen[run.run_id] = (run.state, run.attempt)
                console.print(
                    f"{run.updated[11:19]} {run.run_id} {run.state.lower()} {run.reason or run.verdict or ''}".rstrip()
                )
        time.sleep(1)


@cli.command()
@click.option("--defaults", "what", flag_value="defaults", default=True, help="Print YAML, commented. What it does anyway.")
@click.option("--schema", "what", flag_value="schema", help="Print the JSON Schema that editors complete a run config with.")
def config(what: str) -> None:
    """Print a run config with every key, its default and what it does.

    Example: tunedrop config --defaults > cars.yaml
    """
    print(json.dumps(config_schema(), indent=1) if what == "schema" else config_defaults())  # noqa: T201 - for a file


@cli.command()
@click.pass_obj
def env(state: Path) -> None:
    """Print the environments in which `sam local invoke` runs the functions against the local application.

    They are the variables of the deployed functions. A container reaches the application at Docker's bridge address: start
    the application with `tunedrop up --host`. It trusts `ca.pem` of a layer, where the README has it copied to.

    Example: tunedrop env > .tunedrop/env.json
    """
    print(json.dumps(Stack(state).function_environments("/opt/ca.pem"), indent=1))  # noqa: T201 - for a program


@cli.command()
@click.pass_obj
def down(state: Path) -> None:
    """End everything that `tunedrop up` started; what it has done stays in its folder.

    Example: tunedrop down
    """
    Stack(state, progress=console.print).down()


@cli.command()
@click.argument("file", type=file_path)
@click.option("--config", type=file_path, help="Run config (YAML) for this dataset.")
@click.option("--tests", type=file_path, help="Inference tests (JSON) for this dataset.")
@click.option("--model", type=folder_path, help="Base model folder to upload and tune.")
@click.option("--wait", is_flag=True, help="Follow the run to its end.")
@_deployment
def drop(
    deployment: Deployment, file: Path, config: Path | None, tests: Path | None, model: Path | None, wait: bool
) -> None:
    """Upload a dataset, which starts a run.

    Example: tunedrop drop cars.jsonl --config cars.yaml --tests cars.tests.json --wait
    """
    run = deployment.drop(file, config, tests, model)
    if wait or run.state == RunState.REJECTED:
        run = follow(deployment, run, console)
        _finish(run, _end_of(deployment, run))
    else:
        console.print(f"{run.run_id}: {run.state.lower()}. `tunedrop logs {run.run_id} --follow` shows its jobs.")


@cli.command()
@click.argument("file", type=file_path)
@click.option("--config", type=file_path, help="Run config (YAML) for this dataset.")
@click.option("--tests", type=file_path, help="Inference tests for this dataset.")
@click.option("--model", type=folder_path, help="Base model folder: checked too, and its tokenizer counts tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print the receipt, as docs/receipt.md describes it.")
def check(file: Path, config: Path | None, tests: Path | None, model: Path | None, as_json: bool) -> None:
    """Check a dataset as the application would, without it and without AWS: exit 0 valid, 1 rejected, 2 wrong usage.

    Example: tunedrop check cars.jsonl --config cars.yaml --tests cars.tests.json
    """
    if problem := refuse(file.name, size=0):
        raise click.BadParameter(f"{file.name}: {problem}", param_hint="FILE")
    try:
        receipt = check_file(file, config, tests, model)
    except StackError as error:
        raise click.UsageError(str(error)) from None
    print(receipt_json(receipt) if as_json else "\n".join(receipt_text(receipt, file, config, tests)))  # noqa: T201 - for programs: no wrapping
    if not receipt.ok:
        sys.exit(1)


def _rejection(deployment: Deployment, run: Run) -> list[str]:
    receipt = deployment.read_json(run, "validation.json")
    problems = [msgspec.convert(error, Problem) for error in receipt["errors"]]
    lines = [f"{run.run_id}: rejected", *(f"  {problem.code}: {problem}" for problem in problems)]
    more = sum(receipt["error_counts"].values()) - len(problems)
    return [*lines, f"  and {more} more: {receipt['error_counts']}"] if more else lines


def _end_of(deployment: Deployment, run: Run) -> list[str]:
    """Return the lines that say how a run ended."""
    if run.state == RunState.REJECTED:
        return _rejection(deployment, run)
    if run.state != RunState.PUBLISHED:
        return [f"{run.run_id}: {run.state.lower().replace('_', ' ')}: {run.reason}"]
    result = deployment.read_json(run, "result.json")
    comparison = result["comparison"]
    scores = f"base {comparison['base_score']:.3f} → tuned {comparison['tuned_score']:.3f} over {comparison['tests']} tests"
    return [
        f"verdict: {result['verdict']}: {scores}",
        *(f"  {reason}" for reason in result["reasons"]),
        f"model: {result['artifacts']['merged_model']}",
        f"model package: {result['model_package']}",
        f"published: {deployment.save_report(run)}",
    ]


def _finish(run: Run, lines: list[str]) -> None:
    """Print how a run ended; exit 1 if it ended without a model."""
    console.print("\n".join(lines), markup=False)
    if run.state != RunState.PUBLISHED:
        sys.exit(1)


@cli.command()
@_deployment
def runs(deployment: Deployment) -> None:
    """List the runs, the newest first.

    Example: tunedrop runs
    """
    table = Table(box=None)
    for column in ("run", "state", "attempt", "rows", "arrived", "verdict or reason"):
        table.add_column(column, no_wrap=True)
    for run in deployment.all_runs():
        last = (run.verdict or run.reason or "").split("\n")[0][:80]
        table.add_row(run.run_id, run.state.lower(), str(run.attempt), str(run.rows), run.arrived[:19], last)
    console.print(table)


@cli.command()
@click.argument("run", type=RUN_NAME)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@_deployment
def show(deployment: Deployment, run: str, as_json: bool) -> None:
    """Show a run, named by its id, the beginning of its id, or its dataset.

    Example: tunedrop show cars
    """
    found = deployment.find(run)
    everything = msgspec.to_builtins(found) | {
        "receipt": deployment.read_json(found, "validation.json"),
        "result": deployment.read_json(found, "result.json"),
    }
    if as_json:
        print(json.dumps(everything, indent=1))  # noqa: T201 - for programs: no wrapping, no colours
        return
    for name, value in msgspec.to_builtins(found).items():
        if value not in {None, False}:
            console.print(f"{name:14} {value}", markup=False)
    if found.state in FINAL:
        console.print("\n".join(_end_of(deployment, found)), markup=False)


@cli.command()
@click.argument("run", type=RUN_NAME)
@_deployment
def watch(deployment: Deployment, run: str) -> None:
    """Follow a run to its end: its stages, steps, reward, time left, cost so far and what the trainer notices.

    Example: tunedrop watch cars
    """
    ended = follow(deployment, deployment.find(run), console)
    _finish(ended, _end_of(deployment, ended))


@cli.command()
@click.argument("run", type=RUN_NAME)
@click.argument("other", type=RUN_NAME)
@_deployment
def compare(deployment: Deployment, run: str, other: str) -> None:
    """Compare two published runs: their figures, and what differs in their configs.

    Example: tunedrop compare cars-1f0c cars-88ab
    """
    found = [deployment.find(name) for name in (run, other)]
    results = [deployment.read_json(each, "result.json") for each in found]
    for each, result in zip(found, results, strict=True):
        if result is None:
            raise StackError(
                f"{each.run_id} has no results: {each.state.lower()}. `tunedrop watch` follows a run to its end."
            )
    table = Table(box=None)
    for title in ("", *(each.run_id for each in found)):
        table.add_column(title, no_wrap=True)
    for name, one, two in differences(*results):
        table.add_row(name, one, two, style="" if one == two else "bold")
    console.print(table)


@cli.command(name="open")
@click.argument("run", type=RUN_NAME, required=False)
@_deployment
def open_(deployment: Deployment, run: str | None) -> None:
    """Open a run's report in the browser, or the page of all runs; prints where it lies on this machine.

    Example: tunedrop open cars
    """
    found = deployment.find(run) if run else None
    if found and found.state != RunState.PUBLISHED:
        raise StackError(f"{found.run_id} has no report: {found.state.lower()}. `tunedrop watch` follows a run to its end.")
    path = deployment.save_report(found) if found else deployment.save_index()
    print(path)  # noqa: T201 - for programs: no wrapping
    if sys.stdout.isatty():
        click.launch(str(path))


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes commands, options and runs in a shell.

    Example: tunedrop completion bash > ~/.local/share/bash-completion/completions/tunedrop
    """
    kind = get_completion_class(shell)
    assert kind is not None  # click has these three
    print(kind(cli, {}, "tunedrop", "_TUNEDROP_COMPLETE").source())  # noqa: T201 - for a shell


@cli.command()
@click.argument("run", type=RUN_NAME)
@click.option("--follow", "-f", "keep_on", is_flag=True, help="Go on until the run has ended.")
@_deployment
def logs(deployment: Deployment, run: str, keep_on: bool) -> None:
    """Print the logs of a run's jobs.

    Example: tunedrop logs cars --follow
    """
    seen: dict[str, str] = {}
    while True:
        found = deployment.find(run)
        for job in filter(None, (found.train_job, found.test_job)):
            for line in deployment.log_lines(job, seen):
                print(line, flush=True)  # noqa: T201 - a job's own words, as they are
        if not keep_on or found.open is None:
            return
        time.sleep(1)


@cli.command()
@click.argument("run", type=RUN_NAME)
@_deployment
def stop(deployment: Deployment, run: str) -> None:
    """Stop a run, named as for `show`: it is cancelled, and its job is stopped.

    Example: tunedrop stop cars
    """
    ended = deployment.stop(deployment.find(run))
    console.print(f"{ended.run_id}: {ended.state.lower().replace('_', ' ')}")
    if ended.state != RunState.CANCELLED:
        sys.exit(1)


@cli.command()
@click.argument("run", type=RUN_NAME)
@click.pass_obj
def interrupt(state: Path, run: str) -> None:
    """Take the machine of a run's spot job away, as AWS may at any time; on this machine only.

    Example: tunedrop interrupt cars
    """
    stack = Stack(state)
    found = Deployment.local(stack).find(run)
    job = found.test_job or found.train_job
    if job is None:
        raise StackError(f"{found.run_id} has no job to interrupt: it is {found.state.lower()}.")
    stack.interrupt(job)
    console.print(f"{job}: interrupted, it starts again with its checkpoints")


@cli.command()
@click.argument("name", metavar="KEY|JOB|RUN")
@click.option("--stage", type=click.Choice(["start", "test", "publish"]), help="Of a run: the stage that is to come.")
@_deployment
def event(deployment: Deployment, name: str, stage: str | None) -> None:
    """Print the event that a function takes, for `sam local invoke --event`.

    That is S3's of an object that is in the data bucket, named by its KEY; SageMaker's of a JOB that has ended; or, of a RUN
    and its `--stage`: what has it started, and what has its tests and its publication begin.

    Example: tunedrop event training_data/cars.jsonl
    """
    from tunedrop_cli.printed_event import event_of

    print(json.dumps(event_of(deployment, name, stage), indent=1))  # noqa: T201 - for a program


@cli.command()
@_deployment
def redrive(deployment: Deployment) -> None:
    """Give the events in the dead-letter queue to their functions again.

    Example: tunedrop redrive --region eu-central-1
    """
    functions = []
    for function in deployment.redrive():
        console.print(function)
        functions.append(function)
    console.print(f"{len(functions)} events redriven")


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@_stack_options
@click.pass_obj
def doctor(state: Path, profile: str | None, region: str | None, stack: str | None, as_json: bool) -> None:
    """Say what keeps runs from working, and how to mend it; changes nothing. Exit 0: nothing is wrong, 1: something is.

    Example: tunedrop doctor --stack tunedrop --region eu-central-1
    """
    from tunedrop_cli.doctor import Finding, examine, report

    name = stack or STACK_NAME
    try:
        place = Place.aws(profile, region, name) if profile or region or stack else Place.local(Stack(state))
        findings = examine(place)
    except StackError as error:  # nothing runs here, or there is no such profile
        findings = [Finding("NOT_REACHED", str(error), "")]
    troubles = any(finding.trouble for finding in findings)
    shown = {"ok": not troubles, "findings": msgspec.to_builtins(findings)}
    print(json.dumps(shown, indent=1) if as_json else report(name, findings))  # noqa: T201 - commands to copy: no wrapping
    if troubles:
        sys.exit(1)


@cli.command()
@click.pass_context
def demo(context: click.Context) -> None:
    """Start the application, drop the sample dataset, wait for its published model, and end the application.

    Beside the verdict it shows what a subscriber of the stack's topic and a rule on its bus received.

    Example: tunedrop demo
    """
    stack = _start(context.obj)
    try:
        deployment = Deployment.local(stack)
        with listening(stack) as listener:
            run = follow(deployment, deployment.drop(DATA, CONFIG, TESTS), console)
            lines = _end_of(deployment, run)
            if run.state == RunState.PUBLISHED:
                notification, types = listener.heard_of(run.run_id, events.PUBLISHED)
                lines[-1:-1] = [f"notification: {notification['Subject']}", f"events: {', '.join(types)}"]
    finally:
        stack.down()
    _finish(run, lines)


def main() -> None:
    """Run the command; a mistake that a person can mend is a message and exit code 1."""
    try:
        cli()
    except StackError as error:
        console.print(f"error: {error}", style="red", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
