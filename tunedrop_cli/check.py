"""`tunedrop check`: validates a dataset locally, as validate_dataset does; no running stack needed."""

import os
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import boto3
import click
import msgspec
import yaml

from pipeline.validation.candidates import GOLD, PARAPHRASES
from pipeline.validation.model_files import ModelFiles
from pipeline.validation.receipt import Receipt
from pipeline.validation.terms import Terms
from pipeline.validation.validate import Submission, read_config, validate
from tunedrop.plain import one_line
from tunedrop.problems import Problem
from tunedrop.rewards import reward_permissions
from tunedrop_cli.deployment import with_model

TEMPLATE = Path(__file__).parents[1] / "template.yaml"
SHOWN = 20
NOT_CHECKED = "base model and token counts not checked; pass --model DIR"


class _TemplateLoader(yaml.SafeLoader):
    """Reads a CloudFormation template without its functions (`!Ref`, `!Sub`, …)."""


_TemplateLoader.add_multi_constructor("!", lambda _loader, _tag, _node: None)


@cache
def template_defaults() -> dict[str, Any]:
    """Return the defaults of the template's parameters: what a stack decides unless its deployment sets a parameter."""
    template = yaml.load(TEMPLATE.read_text(), Loader=_TemplateLoader)  # noqa: S506 - a SafeLoader
    return {name: parameter.get("Default") for name, parameter in template["Parameters"].items()}


def check_file(data: Path, config: Path | None, tests: Path | None, model: Path | None) -> Receipt:
    """Validate a dataset as `tunedrop drop` would upload it, under the template's default parameters.

    `model` is the base model's folder. Raises StackError if the config names another model.
    """
    defaults = template_defaults()
    raw = with_model(config.read_bytes() if config else b"", model.resolve().name if model else None)
    parsed, about_config = read_config(raw, defaults["BaseModel"])
    if model is None:
        about_config.warnings.append(NOT_CHECKED)
    terms = Terms(
        instance_types=defaults["InstanceTypes"].split(","),
        spot=defaults["UseSpot"] == "true",
        # As in `python -m trainer.train`: the shell's environment allows rewards, and their files lie beside the dataset.
        permissions=reward_permissions(os.environ, cache(boto3.client), data.parent),
        endpoint_instance_type=defaults.get("EndpointInstanceType") or "",
    )
    with tempfile.TemporaryDirectory() as folder, data.open("rb") as file:
        submission = Submission(
            name=data.name,
            size=data.stat().st_size,
            open=lambda: file,
            config=parsed,
            about_config=about_config,
            tests=tests.read_bytes() if tests else None,
            model=_model_files(model) if model else None,
            rewards=data.parent,
            beside=f"{data.parent}/",
            folder=Path(folder),
        )
        return validate(submission, terms)


def _model_files(folder: Path) -> ModelFiles:
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return ModelFiles(sizes, folder, str(folder))


def receipt_json(receipt: Receipt) -> str:
    """Return the receipt as `validation.json` has it, without `run_id`, `dataset` and `source`."""
    return msgspec.json.format(msgspec.json.encode(receipt)).decode()


def receipt_text(receipt: Receipt, data: Path, config: Path | None, tests: Path | None) -> list[str]:
    """Return the receipt's lines for people: facts in columns, errors, warnings, corrections, and whether it is valid."""
    facts = [(name, one_line(value)) for name, value in facts_of_receipt(receipt)]
    width = max(len(name) for name, _ in facts) + 2
    lines = [f"{name + ':':{width}}{value}" for name, value in facts]
    lines += [_colour(one_line(problem_text(problem, data, config, tests)), "red") for problem in receipt.errors[:SHOWN]]
    total = sum(receipt.error_counts.values())
    if (rest := total - sum(problem.count for problem in receipt.errors[:SHOWN])) > 0:
        by_code = ", ".join(f"{code} {count}" for code, count in receipt.error_counts.items())
        lines.append(_colour(f"{rest} more errors; all errors by code: {by_code}", "red"))
    lines += [_colour(one_line(f"warning: {warning}"), "yellow") for warning in receipt.warnings]
    if receipt.fixes:
        lines += ["Automatic corrections:", *(f"  {fix}" for fix in receipt.fixes)]
    counts = [
        f"{receipt.rows} rows",
        f"{receipt.heldout} held out",
        _count(receipt.inference_tests, "inference test"),
        _count(total, "error"),
        _count(len(receipt.warnings), "warning"),
    ]
    valid = _colour("valid", "green") if receipt.ok else _colour("rejected", "red")
    return [*lines, f"{valid}: {', '.join(counts)}"]


def _fine_tuning(warm_start: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if warm_start.get("usable"):
        yield "fine-tuning", warm_start["plan"]


def facts_of_receipt(receipt: Receipt) -> Iterator[tuple[str, str]]:
    """Yield the facts of a receipt for people: columns, rows, lengths, rewards, and cost."""
    if receipt.columns:
        yield "columns", ", ".join(f"{part} from '{column}'" for part, column in receipt.columns.items())
    if receipt.reward_columns:
        yield "only rewards see", ", ".join(receipt.reward_columns)
    if receipt.unused_columns:
        yield "not used", ", ".join(receipt.unused_columns)
    aside = f", {receipt.rejected.rows} set aside" if receipt.rejected.rows else ""
    aside += f", {receipt.left_out} left out because a test asks their question" if receipt.left_out else ""
    yield "rows", f"{receipt.rows} usable, {receipt.heldout} held out{aside}"
    for name in ("prompt", "answer"):
        if length := receipt.stats.get(f"{name}_characters"):
            yield f"{name}s", f"{length['min']:.0f} to {length['max']:.0f} characters, median {length['p50']:.0f}"
    if receipt.rewards:
        yield from _reward_facts(receipt.rewards)
    yield from _fine_tuning(receipt.warm_start)
    yield from _cost_facts(receipt.cost)


def _cost_facts(cost: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, each in cost.get("services", {}).items():
        low, high = each["tokens"]
        yield "requests", f"{each['requests']:,} to the service of '{name}', {low:,} to {high:,} tokens"
    for each in cost.get("instances", []):
        if each["hours"]:
            dollars = "" if each["usd"] is None else ", ${:.2f} to ${:.2f}".format(*each["usd"])
            yield "cost", "{}, {:.1f} to {:.1f} hours".format(each["instance_type"], *each["hours"]) + dollars
    if serving := cost.get("serving"):
        busy = (
            "at an unknown price"
            if serving["busy_usd_per_hour"] is None
            else "${busy_usd_per_hour:.2f} an hour".format(**serving)
        )
        yield "serving", f"{serving['instance_type']}, {busy} while it is asked, nothing while it is not"


def _reward_facts(rewards: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if reason := rewards.get("reason"):
        yield "reward", f"{_specs(rewards['chosen'])}, because {reason}"
    means = {each["kind"]: each["mean"] for each in rewards["answers"]}
    yield "rewards", f"the dataset's answers score {means[GOLD]:.2f} on average"
    if paraphrases := [f"{words} {means[kind]:.2f}" for kind, words in PARAPHRASES.items() if kind in means]:
        yield "paraphrases", ", ".join(paraphrases)
    for name, each in rewards["by_reward"].items():
        if "consistency" in each:
            yield (
                "consistency",
                f"'{name}' ranked the same answers twice, with a rank correlation of {each['consistency']:.2f}",
            )
    best = rewards["best_wrong"]
    kind = best["kind"].replace("_", " ")
    yield "best wrong answer", f"{kind}, {best['score']:.2f} vs {best['gold_score']:.2f} ({best['row']})"


def _specs(specs: list[dict[str, Any]]) -> str:
    """Return rewards as a config writes them."""
    return ", ".join("{" + ", ".join(f"{name}: {value}" for name, value in spec.items()) + "}" for spec in specs)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _colour(text: str, colour: str) -> str:
    """Return the text in a colour for a terminal, plain for a pipe."""
    return click.style(text, fg=colour) if sys.stdout.isatty() else text


def problem_text(problem: Problem, data: Path, config: Path | None, tests: Path | None) -> str:
    """Return a problem as compilers print it: file, line, code, message."""
    if problem.code.startswith("CONFIG_"):
        file = config or Path("config")
    elif "TEST" in problem.code and tests:
        file = tests
    else:
        file = data
    place = f"{file}:{problem.line}" if problem.line else f"{file}, row {problem.row}" if problem.row else str(file)
    extent = f" [{problem.extent}]" if problem.extent else ""
    return f"{place}: {problem.code}: {problem.message}" + (f" ({problem.hint})" if problem.hint else "") + extent
