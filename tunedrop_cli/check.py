"""`tunedrop check`: what validate_dataset would say of a dataset, without AWS."""

import os
import re
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import boto3
import msgspec

from local_app.stack import PROJECT
from pipeline.validation.candidates import GOLD, WRONG
from pipeline.validation.cost import Terms
from pipeline.validation.model_files import check_model
from pipeline.validation.receipt import Receipt, check_config, check_dataset
from tunedrop.dataset.readers import refuse, suffix_of
from tunedrop.problems import Problem
from tunedrop.rewards import reward_permissions
from tunedrop_cli.deployment import with_model

SHOWN = 20


def parameter(name: str) -> str:
    """Return the default of one of the template's parameters: what a deployment has that says nothing else."""
    template = (PROJECT / "template.yaml").read_text()
    found = re.search(rf"^  {name}:\n(?:    .*\n)*?    Default: (.*)$", template, re.MULTILINE)
    assert found is not None, name
    return found[1].strip('"')


def check_file(data: Path, config: Path | None, tests: Path | None, model: Path | None) -> Receipt:
    """Check a dataset as `tunedrop drop` would upload it, to a deployment with the template's own defaults.

    Without `model`, the base model's folder, what depends on it is not checked. Raises StackError when the config names
    another model.
    """
    raw = with_model(config.read_bytes() if config else b"", model.name if model else None)
    check = check_config(raw, parameter("BaseModel"))
    weights = 0
    if model:
        sizes = {path.relative_to(model).as_posix(): path.stat().st_size for path in model.rglob("*") if path.is_file()}
        weights = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
        check.add(*check_model(check.config, sizes, model, str(model)))
    else:
        check.warnings.append("the base model was not looked at, nor tokens counted: give its folder with --model")
    suffix = suffix_of(data.name)
    if refused := refuse(data.name, data.stat().st_size):
        check.add(refused)
        return check.receipt()
    with tempfile.TemporaryDirectory() as folder, data.open("rb") as file:
        check_dataset(
            check,
            file,
            suffix,
            tests.read_bytes() if tests else None,
            Path(folder),
            instance_types=parameter("InstanceTypes").split(","),
            model=model,
            weights=weights,
            # As `python -m trainer.train` in a shell: what is exported is allowed, and files lie beside the dataset.
            permissions=reward_permissions(os.environ, cache(boto3.client), data.parent),
            terms=Terms(spot=parameter("UseSpot") == "true"),
        )
    return check.receipt()


def receipt_json(receipt: Receipt) -> str:
    """Return the receipt as `validation.json` has it, but for what tells one run from another."""
    return msgspec.json.format(msgspec.json.encode(receipt)).decode()


def receipt_text(receipt: Receipt, data: Path, config: Path | None, tests: Path | None) -> list[str]:
    """Return the receipt's lines for people; problems begin with the file and line that they are about."""
    lines = [_line(problem, data, config, tests) for problem in receipt.errors[:SHOWN]]
    if (more := sum(receipt.error_counts.values()) - len(lines)) > 0:
        counts = ", ".join(f"{code} {count}" for code, count in receipt.error_counts.items())
        lines.append(f"and {more} more; all by code: {counts}")
    lines += [f"fixed: {fix}" for fix in receipt.fixes]
    lines += [f"warning: {warning}" for warning in receipt.warnings]
    if receipt.columns:
        lines.append("columns: " + ", ".join(f"{part} from '{column}'" for part, column in receipt.columns.items()))
    for name, unit in (("prompt_characters", "characters"), ("answer_characters", "characters")):
        if length := receipt.stats.get(name):
            part = name.partition("_")[0]
            lines.append(
                f"{part}s: {length['min']:.0f} to {length['max']:.0f} {unit}, half of them up to {length['p50']:.0f}"
            )
    lines += [*_rewards(receipt), *_cost(receipt)]
    verdict = "valid" if receipt.ok else "rejected"
    return [*lines, f"{verdict}: {receipt.rows} rows, {receipt.heldout} held out, {receipt.inference_tests} inference tests"]


def _rewards(receipt: Receipt) -> Iterator[str]:
    if receipt.rewards:
        (gold,) = (each["mean"] for each in receipt.rewards["answers"] if each["kind"] == GOLD)
        best = receipt.rewards["best_wrong"]
        yield (
            f"rewards: the dataset's answers score {gold:.2f} on average; {WRONG[best['kind']]} comes closest to one, "
            f"with {best['score']:.2f} for the {best['gold_score']:.2f} of {best['row']}"
        )


def _cost(receipt: Receipt) -> Iterator[str]:
    for each in receipt.cost.get("instances", []):
        if each["hours"]:
            dollars = "" if each["usd"] is None else ", ${:.2f} to ${:.2f}".format(*each["usd"])
            yield "{}: {:.1f} to {:.1f} hours".format(each["instance_type"], *each["hours"]) + dollars


def _line(problem: Problem, data: Path, config: Path | None, tests: Path | None) -> str:
    """Return a problem with its place first, as compilers write it."""
    if problem.code.startswith("CONFIG_"):
        file = config or Path("config")
    elif "TEST" in problem.code and tests:
        file = tests
    else:
        file = data
    place = f"{file}:{problem.line}" if problem.line else f"{file}, row {problem.row}" if problem.row else str(file)
    return f"{place}: {problem.code}: {problem.message}" + (f" ({problem.hint})" if problem.hint else "")
