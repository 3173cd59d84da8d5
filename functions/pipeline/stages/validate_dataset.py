"""An upload arrived: check it, write the receipt and the run's input, and announce the run."""

import io
import shutil
import tempfile
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import msgspec
from botocore.exceptions import ClientError

from pipeline.aws import Aws, error_code
from pipeline.jobs.plan import current_digest, load_plan
from pipeline.notify import events
from pipeline.notify.announcements import notify
from pipeline.notify.events import RunEvent, Upload
from pipeline.observability import logger
from pipeline.runs import clock
from pipeline.runs.states import RETRYABLE, Run, RunState, run_id
from pipeline.settings import Settings, ValidateSettings
from pipeline.validation.cost import Prices, Terms
from pipeline.validation.model_files import READ_FILES, check_model
from pipeline.validation.receipt import Check, check_config, check_dataset
from pipeline.validation.s3_stream import CHUNK_BYTES, S3Stream
from tunedrop import object_keys
from tunedrop.config.model import MAX_CONFIG_BYTES
from tunedrop.dataset.readers import BLOCK_BYTES, refuse, suffix_of
from tunedrop.inference_tests import MAX_TESTS_BYTES
from tunedrop.problems import Problem
from tunedrop.rewards import reward_permissions

INPUT_FILES = ("config.json", "train.jsonl", "heldout.jsonl", "inference_tests.json")
MAX_REWARD_FILE_BYTES = 1024**2


def validate_upload(upload: Upload, settings: ValidateSettings, aws: Aws) -> Run | None:
    """Validate an uploaded dataset; return its run, or None if the upload is not a dataset or a newer one was seen.

    None as well if it is to begin the next attempt of a run whose last one has not ended yet: `announce_failure` has it
    validated again then.

    The run's input folder and its receipt are written before the run exists, and the run before it is announced, so that
    a second delivery of the event completes whatever the first one left undone.
    """
    dataset = object_keys.dataset_of(upload.key)
    if not object_keys.is_dataset(upload.key):
        logger.info("ignored an object that is no dataset")
        return None
    if not aws.runs.claim_upload(upload.key, upload.version_id, upload.sequencer):
        return _announced_again(upload, settings, aws)
    digest_of_plan = current_digest(aws, settings.artifact_bucket)
    plan = load_plan(aws, settings.artifact_bucket, digest_of_plan)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        try:
            stored = _get(upload, settings, aws)
        except ClientError as error:
            if error_code(error) not in {"NoSuchKey", "NoSuchVersion"}:
                raise
            logger.info("ignored an upload that is gone")
            aws.runs.finish_upload(upload.key, upload.sequencer, RunState.CANCELLED, run_id="")
            return None
        body = stack.enter_context(closing(stored["Body"]))
        # What is larger than its parser takes is not read to its end.
        config_raw = aws.read(settings.data_bucket, object_keys.config_key(dataset), MAX_CONFIG_BYTES) or b""
        tests_raw = next(
            (
                raw
                for key in object_keys.tests_keys(dataset)
                if (raw := aws.read(settings.data_bucket, key, MAX_TESTS_BYTES)) is not None
            ),
            None,
        )
        check = check_config(config_raw, settings.default_model)
        model, identity, weights = _fetch_model(check, folder / "model", settings, aws)
        reward_files = _fetch_reward_files(check, upload.key, folder / "rewards", settings, aws)
        prices = Prices(**plan["prices"]) if plan.get("prices") else None
        source = {
            "bucket": settings.data_bucket,
            "key": upload.key,
            "version_id": upload.version_id,
            "bytes": stored["ContentLength"],
        }
        suffix = suffix_of(upload.key)
        if refused := refuse(upload.key, stored["ContentLength"]):
            check.add(refused)
            digest = f"not read: {stored['ETag']}"
        else:
            stream = stack.enter_context(S3Stream(body))
            data: io.BufferedReader = (
                _seekable(stream, folder) if suffix == ".parquet" else io.BufferedReader(stream, BLOCK_BYTES)
            )
            check_dataset(
                check,
                data,
                suffix,
                tests_raw,
                folder,
                instance_types=settings.instance_types,
                image=plan["train"]["AlgorithmSpecification"]["TrainingImage"],
                model=model,
                weights=weights,
                # The environment that the jobs will have: what is accepted here is what they may do.
                permissions=reward_permissions(plan["train"].get("Environment", {}), aws.client, folder / "rewards"),
                terms=Terms(prices, settings.use_spot, settings.max_run_cost_usd or None),
            )
            stream.drain()
            digest = source["sha256"] = stream.sha256
        this = run_id(dataset, [suffix, digest, config_raw, tests_raw or b"", identity, digest_of_plan, *reward_files])
        run = Run(
            run_id=this,
            dataset=dataset,
            state=RunState.VALIDATED if check.ok else RunState.REJECTED,
            attempt=1,
            trigger=f"{upload.key}@{upload.sequencer}",
            key=upload.key,
            version_id=upload.version_id,
            arrived=clock.now(),
            updated=clock.now(),
            model=check.config.model,
            plan=digest_of_plan,
            rows=check.rows,
            reason=None if check.ok else _reason(check),
        )
        _write(run, check, source, folder, settings, aws)
    there = aws.runs.create(run, upload.sequencer)
    if there.state == RunState.REJECTED and there.open is not None and there.trigger != run.trigger:
        announce(there, settings, aws)  # nobody has yet, and only then can it begin the next attempt
        there = aws.runs.create(run, upload.sequencer)
    if there.state in RETRYABLE and there.open is not None and there.trigger != run.trigger:
        logger.info("the run's last attempt has not ended yet", run_id=run.run_id)
        return None
    aws.runs.finish_upload(upload.key, upload.sequencer, run.state, run.run_id)
    announce(there, settings, aws)
    return there


def _reason(check: Check) -> str:
    """Say why a dataset was rejected, for events and notifications: code and place, no word of the user's files."""
    first, more = check.errors.listed[0], check.errors.counts.total() - 1
    place = f" in line {first.line}" if first.line else f" in row {first.row}" if first.row else ""
    return f"{first.code}{place}" + (f", and {more} more" if more else "") + ": see the receipt"


def _announced_again(upload: Upload, settings: ValidateSettings, aws: Aws) -> Run | None:
    """Announce the run of an upload that was validated before, if that is still to be done, and return it.

    Another validation might read another config by now, and make another run. None for an upload older than the newest.
    """
    item = aws.runs.upload(upload.key)
    run = aws.runs.get(item["run_id"]) if item and item["sequencer"] == upload.sequencer and item["run_id"] else None
    if run is None:
        logger.info("ignored an upload older than the one seen last")
    elif run.open is not None:
        announce(run, settings, aws)
    return run


def announce(run: Run, settings: Settings, aws: Aws) -> None:
    """Say that a run was validated or rejected; nothing if it is further on."""
    if run.state == RunState.VALIDATED:
        events.put_event(aws.events, settings.event_bus, events.validated(run, settings.artifact_bucket))
    elif run.state == RunState.REJECTED:
        links = events.receipt_link(run, settings.artifact_bucket)
        event = RunEvent(detail_type=events.REJECTED, run=run, links=links)
        events.put_event(aws.events, settings.event_bus, event)
        notify(aws, settings.topic_arn, event)
        aws.runs.close(run)


def _get(upload: Upload, settings: Settings, aws: Aws) -> dict[str, Any]:
    """Begin to read the version that the event names."""
    version = {} if upload.version_id == "null" else {"VersionId": upload.version_id}
    answer: dict[str, Any] = aws.s3.get_object(Bucket=settings.data_bucket, Key=upload.key, **version)
    return answer


def _seekable(stream: S3Stream, folder: Path) -> io.BufferedReader:
    """Return a file with all that a stream has: a Parquet file is read from its end."""
    with (folder / "data").open("wb") as out:
        shutil.copyfileobj(stream, out, CHUNK_BYTES)
    return (folder / "data").open("rb")


def _fetch_model(check: Check, folder: Path, settings: ValidateSettings, aws: Aws) -> tuple[Path | None, str, int]:
    """Check the base model; return a folder with its small files, what pins it, and the bytes of its weights.

    Its files' keys and ETags pin it. A hub id pins itself, and has no files here.
    """
    model = check.config.model
    if "/" in model:
        return None, model, 0
    prefix = object_keys.model_prefix(model)
    pages = aws.s3.get_paginator("list_objects_v2").paginate(Bucket=settings.data_bucket, Prefix=prefix)
    items = {item["Key"].removeprefix(prefix): item for page in pages for item in page.get("Contents", [])}
    files = {name: item["ETag"] for name, item in items.items()}
    folder.mkdir()
    for name, limit in READ_FILES.items():
        if name in files:
            (folder / name).write_bytes(aws.read(settings.data_bucket, f"{prefix}{name}", limit) or b"")
    check.add(*check_model(check.config, files, folder, f"s3://{settings.data_bucket}/{prefix}"))
    weights = sum(item["Size"] for name, item in items.items() if name.endswith(".safetensors"))
    return folder, msgspec.json.encode(files, order="deterministic").decode(), weights


def _fetch_reward_files(check: Check, key: str, folder: Path, settings: ValidateSettings, aws: Aws) -> list[bytes]:
    """Fetch the files of `python` rewards, which lie beside the dataset, into a folder; return what is in them."""
    folder.mkdir()
    contents = []
    for name in sorted({spec.reward_file for spec in check.config.rewards if spec.reward_file}):
        place = f"{key.rpartition('/')[0]}/{name}"
        raw = aws.read(settings.data_bucket, place, MAX_REWARD_FILE_BYTES)
        if raw is None or len(raw) > MAX_REWARD_FILE_BYTES:
            size = f"is larger than {MAX_REWARD_FILE_BYTES // 1024**2} MiB" if raw else "is not there"
            message = f"the file of a python reward, s3://{settings.data_bucket}/{place}, {size}"
            check.add(Problem("REWARD_FILE", message, "put it beside the dataset, before it", key="rewards"))
        else:
            (folder / name).write_bytes(raw)
            contents.append(raw)
    return contents


def _write(run: Run, check: Check, source: dict[str, Any], folder: Path, settings: ValidateSettings, aws: Aws) -> None:
    """Write the run's input files, the rows that were set aside and, last, the receipt."""
    bucket = settings.artifact_bucket
    if check.ok:
        for name in INPUT_FILES:
            aws.s3.upload_file(str(folder / name), bucket, object_keys.run_key(run.run_id, f"input/{name}"))
        about = msgspec.json.encode({"run_id": run.run_id, "dataset": run.dataset})  # for the job's own events
        aws.s3.put_object(Bucket=bucket, Key=object_keys.run_key(run.run_id, "input/run.json"), Body=about)
        for file in (folder / "rewards").iterdir():
            aws.s3.upload_file(str(file), bucket, object_keys.run_key(run.run_id, f"input/rewards/{file.name}"))
        if check.rejected.counts:
            aws.s3.upload_file(str(folder / "rejected.jsonl"), bucket, object_keys.run_key(run.run_id, "rejected.jsonl"))
    receipt = {"run_id": run.run_id, "dataset": run.dataset, "source": source} | msgspec.to_builtins(check.receipt())
    aws.s3.put_object(
        Bucket=bucket,
        Key=object_keys.run_key(run.run_id, "validation.json"),
        Body=msgspec.json.format(msgspec.json.encode(receipt)),
        ContentType="application/json",
    )
