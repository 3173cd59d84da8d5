"""The `tunedrop` command: run the whole application on this machine, and use it, here or on AWS.

`tunedrop_cli.commands` has the commands: `local` (the application on this machine), `inputs` (config and dataset, without a
stack), `runs`, `lines`, `serving` (ask and list the models that answer), `console` (a page for all of this), and
`operations` (events, dead letters, doctor).
"""

import sys
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from local_app.stack import StackError
from tunedrop_cli.commands import console as page
from tunedrop_cli.commands import inputs, lines, local, operations, runs, serving
from tunedrop_cli.location import UNREACHABLE
from tunedrop_cli.options import DEFAULT_FOLDER
from tunedrop_cli.output import print_error, print_raw


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    default=DEFAULT_FOLDER,
    envvar="TUNEDROP_STATE",
    help="Folder of the local app. The variable TUNEDROP_STATE sets it, too.",
)
@click.pass_context
def cli(context: click.Context, state: Path) -> None:
    """Drop a dataset, get back a model tuned with GRPO + LoRA, tested against its base, and a report."""
    context.obj = state


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a shell's completion script.

    The script completes commands, options and runs.

    \b
    Example: tunedrop completion bash > ~/.local/share/bash-completion/completions/tunedrop
    """
    kind = get_completion_class(shell)
    assert kind is not None  # click has these three
    print_raw(kind(cli, {}, "tunedrop", "_TUNEDROP_COMPLETE").source())


for command in (
    *(local.up, local.down, local.env, local.interrupt, local.demo),
    *(inputs.config, inputs.check, inputs.init),
    *(runs.drop, runs.runs, runs.show, runs.watch, runs.rollouts, runs.compare, runs.open_, runs.logs, runs.stop),
    *(lines.lines, lines.approve, lines.reject, lines.rollback),
    *(serving.ask, serving.chat, serving.endpoints, serving.undeploy),
    *(page.console_, operations.event, operations.redrive, operations.doctor, completion),
):
    cli.add_command(command)


def main() -> None:
    """Run the command. An error that a person can fix is a message and exit code 1."""
    try:
        cli()
    except UNREACHABLE as error:
        print_error(
            f"AWS does not answer: {error}. If the application on this machine has ended, start it with `tunedrop up`."
        )
        sys.exit(1)
    except StackError as error:
        print_error(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
