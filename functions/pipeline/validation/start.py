"""What a run's adapter starts from, and whether a dataset has anything new for its line."""

from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from pipeline.aws import Aws
from pipeline.runs.states import Run
from pipeline.validation.modules import HEADER_BYTES, header_bytes
from pipeline.validation.receipt import Receipt
from tunedrop import object_keys
from tunedrop.config.model import Lora, RunConfig
from tunedrop.problems import Problem
from tunedrop.suite import question_of

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# PEFT's fields of `LoraConfig` that may differ between a run and its start: they do not change what the adapter computes.
FREE = {"lora_dropout", "init_lora_weights"}


class Start(NamedTuple):
    """The run whose adapter a run starts from, None for the base model. `identity` pins the adapter by its files' ETags."""

    run: Run | None = None
    identity: str = ""


def resolve_start(
    config: RunConfig, base: str, champion: str | None, bucket: str, aws: Aws
) -> tuple[Start, list[Problem], list[str]]:
    """Return the start that a config names, with the problems and the warnings about it.

    `base` is the digest of the base model's files, `champion` the run id of the line's champion.
    """
    if config.start_from == "base":
        return Start(), [], []
    name = champion if config.start_from == "champion" else config.start_from
    if name is None:
        return Start(), [], [f"the line '{config.line}' has no champion yet: the run starts from the base model"]
    run = aws.runs.get(name)
    if run is None or run.verdict is None or run.artifacts is None:  # a champion is in use before its publication ends
        message = f"start_from: there is no published run '{name}'"
        return Start(), [_problem("START_UNKNOWN", message, "name a run that `tunedrop runs` lists as published")], []
    problems = [*_other_model(run, config, base), *_other_lora(run, config, bucket, aws)]
    folder = adapter_prefix(run, bucket)
    tags = [_tag(f"{folder}{file}", bucket, aws) for file in ADAPTER_FILES]
    hint = f"restore the file, or set start_from to base or another run instead of {name}"
    for file, tag in zip(ADAPTER_FILES, tags, strict=True):
        if tag is None:
            message = f"start_from: the adapter of run '{name}' is gone: s3://{bucket}/{folder}{file} is missing"
            problems.append(_problem("START_GONE", message, hint))
    if tags[1] is not None and not _has_header(f"{folder}{ADAPTER_FILES[1]}", bucket, aws):
        message = f"start_from: s3://{bucket}/{folder}{ADAPTER_FILES[1]} is not a whole safetensors file"
        problems.append(_problem("START_BROKEN", message, hint))
    return Start(run, f"{name} {tags}"), problems, []


def adapter_prefix(run: Run, bucket: str) -> str:
    """Return the folder of a published run's adapter in the artifact bucket."""
    assert run.artifacts is not None
    return object_keys.folder_key(run.artifacts, bucket) + "adapter/"


def _problem(code: str, message: str, hint: str) -> Problem:
    return Problem(code, message, hint, key="start_from")


def _other_model(run: Run, config: RunConfig, base: str) -> list[Problem]:
    if run.model != config.model:
        message = (
            f"start_from: run '{run.run_id}' tuned the model '{run.model}', and this config's model is '{config.model}'"
        )
        return [_problem("START_MODEL", message, f"set model to {run.model}, or start_from to base")]
    if run.base != base:
        message = f"start_from: the files of the model '{run.model}' have changed since run '{run.run_id}'"
        return [_problem("START_MODEL", message, "upload the same files again, or set start_from to base")]
    return []


def _other_lora(run: Run, config: RunConfig, bucket: str, aws: Aws) -> list[Problem]:
    raw = aws.read(bucket, object_keys.run_key(run.run_id, "input/config.json")) or b"{}"
    before = Lora.model_validate(msgspec.json.decode(raw).get("lora", {})).peft_kwargs()
    now = config.lora.peft_kwargs()
    return [
        _problem(
            "START_LORA",
            f"start_from: lora.{key} is {now.get(key)}, and the adapter of run '{run.run_id}' has {before.get(key)}",
            f"set lora.{key} to {before.get(key)}, or start_from to base",
        )
        for key in sorted((before.keys() | now.keys()) - FREE)
        if before.get(key) != now.get(key)
    ]


def _tag(key: str, bucket: str, aws: Aws) -> str | None:
    """Return an object's ETag, None for a missing object."""
    found = aws.s3.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents", [])
    return str(found[0]["ETag"]) if found and found[0]["Key"] == key else None


def _has_header(key: str, bucket: str, aws: Aws) -> bool:
    """Whether a safetensors file begins with its header. The job itself reads the tensors."""
    length = header_bytes(aws.read(bucket, key, 7) or b"")
    header = (aws.read(bucket, key, length - 1) or b"")[8:] if 8 < length <= HEADER_BYTES else b""
    try:
        return bool(msgspec.json.decode(header, type=dict[str, Any]))
    except msgspec.DecodeError:
        return False


def nothing_new(receipt: Receipt, tests: Path, champion: Run | None, bucket: str, aws: Aws) -> list[str]:
    """Return warnings about a dataset that cannot improve a line: the champion's own rows, or tests that it passes already.

    `tests` is the run's file of inference tests.
    """
    if champion is None or not receipt.ok:
        return []
    warnings = []
    before = msgspec.json.decode(aws.read(bucket, object_keys.run_key(champion.run_id, "validation.json")) or b"{}")
    if before.get("stats", {}).get("duplicates", {}).get("rows") == receipt.stats["duplicates"]["rows"]:
        warnings.append(f"these are the rows that the line's champion, {champion.run_id}, was trained on: they add nothing")
    key = object_keys.run_key(champion.run_id, f"inference/{champion.test_job}/output/model/inference.json")
    outcomes = msgspec.json.decode(aws.read(bucket, key) or b'{"tests": []}')["tests"]
    passed = {question_of({"messages": test["prompt"]}) for test in outcomes if test["tuned"].get("passed")}
    asked = {question_of(test) for test in msgspec.json.decode(tests.read_bytes())["evaluations"] if test["judges"]}
    if asked and asked <= passed:
        warnings.append(
            f"the line's champion, {champion.run_id}, passes all {len(asked)} inference tests already: no model can be "
            "better on them. Add tests that it fails"
        )
    return warnings
