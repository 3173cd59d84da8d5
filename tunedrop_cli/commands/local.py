"""Commands for the application on this machine."""

import functools
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import click

from local_app import base_model
from local_app.stack import PROJECT, STACK_NAME, Stack, StackError
from pipeline.notify import events
from pipeline.runs import clock
from pipeline.runs.states import RunState
from tunedrop_cli.deployment import Deployment, in_words
from tunedrop_cli.listener import listening
from tunedrop_cli.options import RUN_NAME
from tunedrop_cli.output import console, print_facts, print_raw, say
from tunedrop_cli.results import facts_of_end
from tunedrop_cli.sample import CONFIG, DATA, TESTS
from tunedrop_cli.watch import follow

# The parameters with which the stack serves models on this machine, without a pause for alarms.
SERVING = {"EndpointInstanceType": "ml.g5.xlarge", "EndpointBakeMinutes": "0"}
ALMOST_FULL = 64 * 2**20  # bytes left on the disk
# Columns of `up`, in characters: most run ids, and the longest state.
RUN_WIDTH, STATE_WIDTH = 32, 15


def _python(stack: Stack, module: str, *arguments: str) -> str:
    """Run one of our modules against the local stack and return its output. A process of its own loads its large SDKs."""
    done = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-m", module, *arguments], env=stack.environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise StackError(f"`python -m {module}` failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip()


def _parameters(_context: click.Context, _option: click.Parameter, pairs: tuple[str, ...]) -> dict[str, str]:
    """Read NAME=VALUE options."""
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise click.BadParameter(f"'{wrong[0]}' is not NAME=VALUE")
    return dict(pair.split("=", 1) for pair in pairs)


def _start(state: Path, host: str = "127.0.0.1", parameters: Mapping[str, str] | None = None) -> Stack:
    """Start the servers, deploy the stack, and store its base model and launch plan. Idempotent."""
    stack = Stack(state, host=host, parameters=parameters, progress=say)
    stack.up()
    deployment = Deployment.local(stack)
    say(f"base model: {base_model.NAME}")
    deployment.upload_model(Path(_python(stack, "local_app.base_model", str(PROJECT / ".tunedrop" / "models"))))
    say("launch plan: python -m release")
    _python(stack, "release", "--stack", STACK_NAME, "--region", stack.region)
    return stack


@click.command()
@click.option("--detach", "-d", is_flag=True, help="Return when the application is up; do not follow its runs.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--serve", is_flag=True, help="Serve the champion of each line: ask it with `tunedrop ask`.")
@click.option(
    *("--parameter", "-p", "parameters"),
    multiple=True,
    metavar="NAME=VALUE",
    callback=_parameters,
    help="A parameter of template.yaml.",
)
@click.pass_obj
def up(state: Path, detach: bool, host: str, serve: bool, parameters: dict[str, str]) -> None:
    """Start the application on this machine and follow its runs.

    \b
    Example: tunedrop up -p AllowCodeRewards=true
    """
    stack = _start(state, host, (SERVING if serve else {}) | parameters)
    outputs = stack.outputs
    print_facts(
        [
            ("AWS", f"{stack.endpoint} (AWS_ENDPOINT_URL)"),
            ("SageMaker", f"{stack.sagemaker_endpoint} (AWS_ENDPOINT_URL_SAGEMAKER)"),
            ("data bucket", f"s3://{outputs.data_bucket}"),
            ("artifact bucket", f"s3://{outputs.artifact_bucket}"),
        ]
    )
    if detach:
        say("A page for all of this: `tunedrop console`.")
        return
    from tunedrop_cli.console.server import serving  # its packages are slow to import

    with serving(functools.partial(Deployment.local, stack), f"this machine: {state}") as server:
        print_facts([("console", server.address)])
        console.print(
            "Start a run on that page, or with `tunedrop drop FILE`. Ctrl-C stops following; `tunedrop down` ends the "
            "application."
        )
        _follow_all(Deployment.local(stack), state)


def _follow_all(deployment: Deployment, state: Path) -> None:
    """Print every change of a run's state, and whether the disk is almost full, until Ctrl-C."""
    printed: dict[str, tuple[RunState, int]] = {}
    full = False
    while True:
        if full != (full := shutil.disk_usage(state).free < ALMOST_FULL):
            text = "almost full: uploads may fail. Free some space." if full else "no longer full."
            console.print(f"The disk of {state} is {text}", markup=False)
        for run in reversed(deployment.all_runs()):
            if printed.get(run.run_id) != (run.state, run.attempt):
                printed[run.run_id] = (run.state, run.attempt)
                detail = (run.reason or run.verdict or "").split("\n")[0]
                line = f"{run.updated[11:19]}  {run.run_id:<{RUN_WIDTH}}  {in_words(run.state):<{STATE_WIDTH}}  {detail}"
                console.print(line.rstrip(), markup=False)
        time.sleep(1)


@click.command()
@click.option("--shell", is_flag=True, help="Print the variables by which AWS's tools reach the application, for a shell.")
@click.pass_obj
def env(state: Path, shell: bool) -> None:
    """Print the functions' variables for `sam local invoke`, or (`--shell`) a shell's variables for AWS's tools.

    A container reaches the application at Docker's bridge address: start the application with `tunedrop up --host`. The
    container trusts `ca.pem` in a layer; the README shows how to copy this file.

    \b
    Example: tunedrop env > .tunedrop/env.json
    Example: eval "$(tunedrop env --shell)"
    """
    stack = Stack(state)
    if not shell:
        return print_raw(json.dumps(stack.function_environments("/opt/ca.pem"), indent=1))
    stack.check_running()
    for name, value in stack.variables.items():
        print_raw(f"export {name}={shlex.quote(value)}")
    print_raw("unset AWS_PROFILE AWS_SESSION_TOKEN")
    return None


@click.command()
@click.pass_obj
def down(state: Path) -> None:
    """End the application on this machine. Its state stays in its folder.

    \b
    Example: tunedrop down
    """
    Stack(state, progress=lambda line: console.print(line, markup=False)).down()


@click.command()
@click.argument("run", type=RUN_NAME)
@click.pass_obj
def interrupt(state: Path, run: str) -> None:
    """Interrupt a run's spot job, on this machine only.

    AWS may interrupt a spot job at any time; the job starts again from its checkpoints.

    \b
    Example: tunedrop interrupt cars
    """
    stack = Stack(state)
    match = Deployment.local(stack).find(run)
    job = match.test_job or match.train_job
    if job is None:
        raise StackError(f"{match.run_id} has no job to interrupt: it is {in_words(match.state)}.")
    stack.interrupt(job)
    console.print(f"{job}: interrupted; it starts again from its checkpoints", markup=False)


@click.command()
@click.pass_context
def demo(context: click.Context) -> None:
    """Train and publish a model from the sample dataset.

    Starts the application, drops the dataset, waits for the published model, and ends the application. Prints the verdict,
    the notification that a subscriber of the stack's topic received, and the events on its bus.

    \b
    Example: tunedrop demo
    """
    stack = _start(context.obj)
    try:
        deployment, began = Deployment.local(stack), clock.now()
        with listening(stack) as listener:
            run = follow(deployment, deployment.drop(DATA, CONFIG, TESTS), console)
            facts = facts_of_end(deployment, run)
            if run.state == RunState.PUBLISHED and run.updated < began:
                facts[-1:-1] = [
                    ("published", f"{run.updated[:16].replace('T', ' ')} UTC, by an earlier drop of these files")
                ]
            elif run.state == RunState.PUBLISHED:
                notification, types = listener.heard_of(run.run_id, events.PUBLISHED)
                facts[-1:-1] = [("notification", notification["Subject"]), ("events", ", ".join(types))]
    finally:
        stack.down()
    print_facts(facts)
    if run.state != RunState.PUBLISHED:
        sys.exit(1)
