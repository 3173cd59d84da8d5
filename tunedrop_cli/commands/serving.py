"""Commands for models that are served: ask them, list them, and take them down."""

import sys
from io import TextIOWrapper
from typing import Any

import click
import msgspec

from local_app.stack import StackError
from tunedrop.plain import printable
from tunedrop_cli.asking import Manner, Message, Served, Waking, answering, base_of, manner_of, served_run
from tunedrop_cli.asking import ask as parts_of
from tunedrop_cli.deployment import Deployment
from tunedrop_cli.documents import Answers, Endpoints, ModelAnswer, ServedLine, Undeployed, print_document
from tunedrop_cli.endpoints import summaries
from tunedrop_cli.endpoints import undeploy as take_down
from tunedrop_cli.options import JSON, LINE_NAME, RUN_NAME, with_deployment
from tunedrop_cli.output import console, print_facts, print_table

TEMPERATURE = click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 gives the most likely answer."
)
NO_WAIT = click.option("--no-wait", is_flag=True, help="If the model sleeps, wake it and return.")


def _say(text: str) -> None:
    """Print progress beside the answer: on standard error."""
    click.echo(click.style(printable(text), dim=True), err=True)


def _write(text: str) -> None:
    """Print a part of an answer. A model's text must not control the terminal."""
    sys.stdout.write(printable(text))
    sys.stdout.flush()


class Conversation:
    """A conversation with one served model."""

    def __init__(self, deployment: Deployment, served: Served, manner: Manner, temperature: float, wait: bool) -> None:
        self.served = served
        self.messages: list[Message] = []
        self._runtime = deployment.connect("client", served.service)
        self._manner, self._temperature, self._wait = manner, temperature, wait

    def ask(self, question: str, show: bool = True) -> ModelAnswer:
        """Ask the next question, and print the answer as it comes; return the answer and how it ended.

        Raises StackError if the question has bytes that are not UTF-8, which Python keeps as surrogates.
        """
        if any("\ud800" <= char <= "\udfff" for char in question):
            raise StackError("The question is not UTF-8 text.")
        self.messages.append({"role": "user", "content": question})
        body = self._manner.body(self.messages, self._temperature)
        texts, ended = [], None
        for part in parts_of(self._runtime, self.served, body, Waking(_say, self._wait)):
            texts.append(part.text)
            ended = part.finish_reason or ended
            if show:
                _write(part.text)
        if show:
            _write("\n")
        if ended == "length":
            _say(
                f"The limit of {self._manner.limit} tokens cut this answer: tests.max_completion_length of the run's config."
            )
        answer = "".join(texts)
        self.messages.append({"role": "assistant", "content": answer})
        served = self.served
        return ModelAnswer(model=served.name, component=served.component, answer=answer, finish_reason=ended)


@click.command()
@click.argument("line", type=LINE_NAME)
@click.argument("question")
@click.option("--base", is_flag=True, help="Ask the base model too.")
@click.option("--run", type=RUN_NAME, help="Ask the model of another run too: one that is deployed.")
@TEMPERATURE
@NO_WAIT
@JSON
@with_deployment
def ask(
    deployment: Deployment,
    line: str,
    question: str,
    base: bool,
    run: str | None,
    temperature: float,
    no_wait: bool,
    as_json: bool,
) -> None:
    """Ask the model that answers under a line's name.

    Sends the system prompt and the settings of the run that is deployed, and prints the answer as the model writes it.
    A model that sleeps is woken first. With --base and --run, each answer has its model's name above it.

    \b
    Example: tunedrop ask cars "Which colour has a fire engine?" --base
    """
    now = answering(deployment, line)
    manner = manner_of(deployment, now.run)
    asked = [(now.served, manner)]
    if base:
        asked.append((base_of(now.served), manner))
    if run:
        other = deployment.find(run)
        asked.append((served_run(deployment, other), manner_of(deployment, other)))
    answers = []
    for served, own_manner in asked:
        if len(asked) > 1 and not as_json:
            console.print(f"{served.name}:", style="bold", markup=False)
        answers.append(
            Conversation(deployment, served, own_manner, temperature, not no_wait).ask(question, show=not as_json)
        )
    if as_json:
        print_document(Answers(line=line, endpoint=now.served.endpoint, question=question, answers=answers))


@click.command()
@click.argument("line", type=LINE_NAME)
@TEMPERATURE
@NO_WAIT
@with_deployment
def chat(deployment: Deployment, line: str, temperature: float, no_wait: bool) -> None:
    """Talk with the model that answers under a line's name. Ctrl-D ends the conversation.

    Each line of the input is a question; the model gets the conversation so far with it.

    \b
    Example: tunedrop chat cars
    """
    now = answering(deployment, line)
    conversation = Conversation(deployment, now.served, manner_of(deployment, now.run), temperature, not no_wait)
    typed = sys.stdin.isatty()
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    if typed:
        _say(f"{now.served.name} on {now.served.place}. Ctrl-D ends the conversation.")
    while True:
        if typed:
            _write("> ")
        question = sys.stdin.readline()
        if not question:
            return
        if question.strip():
            conversation.ask(question.rstrip("\n"))


@click.command()
@JSON
@with_deployment
def endpoints(deployment: Deployment, as_json: bool) -> None:
    """List what the stack serves: state, model, instances, requests and cost of each line.

    An endpoint serves all lines of a base model, and its instances and costs are shared. Prices are US dollars an hour of
    one instance. "at most" is what the endpoint has cost if it never slept. A line on Bedrock has its model's ARN as its
    endpoint, another one after each deployment.

    \b
    Example: tunedrop endpoints
    """
    found = summaries(deployment)
    if as_json:
        print_document(Endpoints(endpoints=msgspec.convert(found, list[ServedLine])))
        return
    if not found:
        console.print(
            "Nothing is served. Serve the champion of each line with `tunedrop up --serve`, or on AWS with the parameter "
            "EndpointInstanceType of the stack."
        )
        return
    header = ["line", "state", "run", "version", "endpoint", "instances", "requests in 24 h", "busy", "idle", "at most"]
    print_table([_row(each) for each in found], header=header)
    for each in found:
        notes = [(name, each[name]) for name in ("next", "reason") if each[name]]
        notes += [("refused", f"{run}: {reason}") for run, reason in each["refused"].items() if reason != each["reason"]]
        if notes:
            console.print(f"\n{printable(each['line'])}", markup=False)
            print_facts(notes)
    if any(each["price"] == "training" for each in found):
        console.print("\nThe launch plan has no prices of endpoints: those of training are shown.", style="dim")


def _row(each: dict[str, Any]) -> list[str]:
    """Return a line's row of the table. Unknown values are empty."""

    def text(value: object, form: str = "{}") -> str:
        return "" if value is None else form.format(value)

    instances = text(each["instances"]) + text(each["instance_type"], " x {}" if each["instances"] is not None else "{}")
    return [
        *(
            each["line"],
            each["state"],
            each["run"] or "none",
            text(each["package_version"]),
            each["endpoint"] or each["component"] or "",
        ),
        *(instances, text(each["requests_24h"]), text(each["busy_usd_per_hour"], "${:.2f}")),
        *(text(each["idle_usd_per_hour"], "${:.2f}"), text(each["at_most_usd"], "${:.2f}")),
    ]


@click.command()
@click.argument("line", type=LINE_NAME)
@JSON
@with_deployment
def undeploy(deployment: Deployment, line: str, as_json: bool) -> None:
    """Take down the model that answers under a line's name.

    Nothing answers there until the line has another champion. An endpoint without lines is deleted.

    \b
    Example: tunedrop undeploy cars
    """
    item = take_down(deployment, line)
    if as_json:
        return print_document(Undeployed(line=item.line, ended=item.run is None))
    return console.print(f"{printable(item.line)}: {'is being taken down' if item.run else 'taken down'}", markup=False)
