"""The command that serves the console."""

import functools
from pathlib import Path

import click

from local_app.stack import StackError
from tunedrop_cli.options import deployment_of, stack_options
from tunedrop_cli.output import print_raw, say


@click.command(name="console")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port on 127.0.0.1.  [default: a free one]")
@click.option("--open", "open_page", is_flag=True, help="Open the page in the browser.")
@stack_options
@click.pass_obj
def console_(state: Path, port: int, open_page: bool, profile: str | None, region: str | None, stack: str | None) -> None:
    """Serve a page on this machine that starts runs, follows them, and shows reports, for a stack here or on AWS.

    Prints the page's address. The address contains a secret: whoever knows it can do what you can do. The page ends with the
    command.

    \b
    Example: tunedrop console --profile work --region eu-west-1 --open
    """
    from tunedrop_cli.console.server import Server  # its packages are slow to import

    make = functools.partial(deployment_of, state, profile, region, stack)
    on_aws = ", ".join(filter(None, (profile, region, stack)))
    try:
        server = Server(make, f"AWS: {on_aws}" if on_aws else f"this machine: {state}", port)
    except OSError as error:
        raise StackError(f"The port {port} cannot be used: {error}. Name another one with --port.") from None
    print_raw(server.address)
    if open_page:
        click.launch(server.address)
    say("Ctrl-C ends the page.")
    server.run()
