"""Commands that need no stack: print or propose a run config, and validate a dataset."""

import json
import sys
import tempfile
from pathlib import Path

import click

from local_app.stack import Stack, StackError
from tunedrop import object_keys
from tunedrop.config.reference import config_defaults, config_schema
from tunedrop.dataset.readers import refuse
from tunedrop.problems import RejectedError
from tunedrop_cli.check import check_file, receipt_json, receipt_text
from tunedrop_cli.init import config_text, from_champion, propose
from tunedrop_cli.options import FILE, FOLDER, JSON, deployment_of, stack_options
from tunedrop_cli.output import print_raw
from tunedrop_cli.translate import translate, written


@click.command()
@click.option("--defaults", "what", flag_value="defaults", default=True, help="Print commented YAML (the default).")
@click.option(
    "--schema", "what", flag_value="schema", help="Print the JSON Schema with which editors complete a run config."
)
@click.option(
    *("--from", "source"),
    type=FILE,
    help="Translate a config of TRL, Axolotl, verl, ms-swift or Unsloth (YAML), or SageMaker's hyperparameters (JSON).",
)
def config(what: str, source: Path | None) -> None:
    """Print a run config: every key, or a translated config.

    A comment explains each key, and each key has its default value. With --from, the config goes to standard output, and
    each key of FILE that it leaves out, with the reason, to standard error.

    \b
    Example: tunedrop config --defaults > cars.yaml
    Example: tunedrop config --from axolotl.yaml > cars.yaml
    """
    if source is not None:
        _translate(source)
        return
    print_raw(json.dumps(config_schema(), indent=1) if what == "schema" else config_defaults())


def _translate(source: Path) -> None:
    try:
        translation = translate(source.read_bytes())
    except RejectedError as error:
        raise click.BadParameter(str(error), param_hint="--from") from None
    print_raw(written(translation, source.name).rstrip("\n"))
    for name, reason in translation.left_out.items():
        click.echo(f"left out: {name}: {reason}", err=True)


@click.command()
@click.argument("file", type=FILE)
@click.option("--config", type=FILE, help="Run config (YAML) for this dataset.")
@click.option("--tests", type=FILE, help="Inference tests for this dataset.")
@click.option("--model", type=FOLDER, help="Base model folder: also checked, and its tokenizer counts tokens.")
@JSON
def check(file: Path, config: Path | None, tests: Path | None, model: Path | None, as_json: bool) -> None:
    """Validate a dataset locally; no running stack needed.

    Exit codes: 0 valid, 1 rejected, 2 wrong usage.

    \b
    Example: tunedrop check cars.jsonl --config cars.yaml --tests cars.tests.json
    """
    if problem := refuse(file.name, size=0):
        raise click.BadParameter(f"{file.name}: {problem}", param_hint="FILE")
    try:
        receipt = check_file(file, config, tests, model)
    except StackError as error:
        raise click.UsageError(str(error)) from None
    print_raw(receipt_json(receipt) if as_json else "\n".join(receipt_text(receipt, file, config, tests)))
    if not receipt.ok:
        sys.exit(1)


@click.command()
@click.argument("file", type=FILE)
@click.option("--model", type=FOLDER, help="Base model folder: its tokenizer counts tokens.")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Where to write.  [default: FILE's name, .yaml]"
)
@click.option("--yes", is_flag=True, help="Take every proposal, without questions.")
@stack_options
@click.pass_obj
def init(state: Path, /, file: Path, model: Path | None, output: Path | None, yes: bool, **named: str | None) -> None:
    """Look at a dataset, and write a commented run config and first tests for it.

    The config says which columns the model sees, the reward and the reason for it, the form of an answer, limits from token
    counts, and the learning rate. The tests are rows of the dataset, in FILE's name with .tests.json; the run does not train
    on these rows. Where such a file exists, it stays, and its tests count. Where the dataset leaves something open, the
    command asks. If the line of FILE has a champion in the application on this machine, or in a stack that the options name,
    the config goes on from it. Exit codes: 0 written, 1 rejected, 2 wrong usage.

    \b
    Example: tunedrop init cars.jsonl && tunedrop drop cars.jsonl --config cars.yaml --tests cars.tests.json
    """
    if problem := refuse(file.name, size=0):
        raise click.BadParameter(f"{file.name}: {problem}", param_hint="FILE")
    target = output or file.with_name(f"{file.name.removesuffix('.gz').rpartition('.')[0]}.yaml")
    if target.exists():
        raise click.UsageError(f"{target} exists: remove it, or pass --output")
    tests = target.with_suffix(".tests.json")
    own_tests = tests if tests.exists() else None
    with tempfile.TemporaryDirectory() as folder:
        proposal = propose(
            file, model, Path(folder), lambda decision: yes or click.confirm(decision.question, default=True), own_tests
        )
    print_raw("\n".join(receipt_text(proposal.receipt, file, target, tests)))
    if not proposal.receipt.ok:
        sys.exit(1)
    line = object_keys.line_of(object_keys.dataset_of(file.name))
    if any(named.values()) or Stack(state).running:
        deployment = deployment_of(state, **named)
        if found := deployment.lines.get(line).champion:
            champion = deployment.find(found)
            proposal = from_champion(proposal, champion, deployment.read_json(champion, "input/config.json"))
    target.write_text(config_text(proposal, file.name))
    if own_tests is None:
        tests.write_text(proposal.tests)
    click.echo(f"wrote {target}" + (f" and {tests}" if own_tests is None else f", for the tests in {tests}"))
