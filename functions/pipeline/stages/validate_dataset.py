"""A dataset was uploaded: fetch it and its companion files, validate them, and record the run."""

import hashlib
import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from botocore.exceptions import ClientError

from pipeline.aws import Aws, error_code
from pipeline.jobs.plan import current_digest, load_plan
from pipeline.notify import events
from pipeline.notify.announcements import notify
from pipeline.notify.events import RunEvent, Upload
from pipeline.observability import logger
from pipeline.runs import clock
from pipeline.runs.states import RETRYABLE, Run, RunState, UploadDoneError, inputs_digest, run_ids
from pipeline.settings import Settings, ValidateSettings
from pipeline.validation.hub import pin_model
from pipeline.validation.internal import INTERNAL
from pipeline.validation.model_files import READ_FILES, ModelFiles
from pipeline.validation.modules import ALL_LINEAR, HEADER_BYTES, header_bytes
from pipeline.validation.receipt import Receipt
from pipeline.validation.s3_stream import Download
from pipeline.validation.section import Section
from pipeline.validation.start import ADAPTER_FILES, Start, adapter_prefix, nothing_new, resolve_start
from pipeline.validation.terms import Prices, Terms
from pipeline.validation.validate import (
    INPUT_FILES,
    MAX_REWARD_FILE_BYTES,
    Submission,
    read_config,
    reward_files,
    validate,
)
from tunedrop import object_keys
from tunedrop.config.model import RunConfig
from tunedrop.config.parse import MAX_CONFIG_BYTES
from tunedrop.dataset.readers import suffix_of
from tunedrop.inference_tests import MAX_TESTS_BYTES
from tunedrop.rewards import reward_permissions


class InternalError(Exception):
    """Tunedrop failed on a user's files, and has told the user so.

    The error turns on the function's alarm. Lambda's next tries find the upload validated.
    """


class Prepared(NamedTuple):
    """What a dataset is validated with: config, tests, base model, start, and the stack's terms.

    `rewards` is the folder with the files of `python` rewards, which lie beside the dataset, at the location `beside`.
    `plan` is the launch plan's digest, `base` that of the base model's files, `champion` the line's, if it has one.
    `identity` are the parts of the run id that are not the dataset: config, tests, model, launch plan, start, files of
    rewards.
    """

    config: RunConfig
    about_config: Section
    tests: bytes | None
    model: ModelFiles | None
    rewards: Path
    beside: str
    terms: Terms
    plan: str
    base: str
    start: Start
    champion: Run | None
    identity: Sequence[str | bytes]

    def submission(self, name: str, size: int, open_data: Callable[[], io.BufferedReader], folder: Path) -> Submission:
        """Return the submission of a dataset of `size` bytes. `folder` is the folder for the run's input files."""
        return Submission(
            name=name,
            size=size,
            open=open_data,
            config=self.config,
            about_config=self.about_config,
            tests=self.tests,
            model=self.model,
            rewards=self.rewards,
            beside=self.beside,
            folder=folder,
        )


class Fetched(NamedTuple):
    """A submission from S3, with what it was prepared with, and the dataset's download."""

    submission: Submission
    prepared: Prepared
    download: Download


def validate_upload(upload: Upload, settings: ValidateSettings, aws: Aws) -> Run | None:
    """Validate an uploaded dataset and return its run.

    None if the object is not a dataset, is gone, or is older than another upload of its key. None, too, if the run's last
    attempt has not ended: `announce_failure` requests the validation again after the end.

    Raises InternalError after the receipt of files that Tunedrop itself failed on is recorded.
    """
    if not object_keys.is_dataset(upload.key):
        logger.info("ignored an object that is not a dataset")
        return None
    if not aws.runs.claim_upload(upload.key, upload.version_id, upload.sequencer):
        return _announced_again(upload, settings, aws)
    with tempfile.TemporaryDirectory() as folder:
        fetched = fetch(upload, Path(folder), settings, aws)
        if fetched is None:
            logger.info("ignored an upload that is gone")
            aws.runs.finish_upload(upload.key, upload.sequencer, RunState.CANCELLED, run_id="")
            return None
        with fetched.download:
            receipt = validate(fetched.submission, fetched.prepared.terms)
            tests = Path(folder) / "inference_tests.json"
            receipt.warnings += nothing_new(receipt, tests, fetched.prepared.champion, settings.artifact_bucket, aws)
            run = record(receipt, fetched, upload, settings, aws)
    if INTERNAL in receipt.error_counts:
        raise InternalError(
            f"Tunedrop failed on the files of {upload.key}: see the receipt, and the stack trace in this log"
        )
    return run


def validate_again(key: str, settings: ValidateSettings, aws: Aws) -> Run | None:
    """Validate the newest known upload of a key, unless it is validated; return its run, None for an unknown key."""
    item = aws.runs.upload(key)
    if item is None:
        logger.info("ignored a request for an object that was never uploaded")
        return None
    return validate_upload(Upload(key=key, version_id=item["version_id"], sequencer=item["sequencer"]), settings, aws)


def fetch(upload: Upload, folder: Path, settings: ValidateSettings, aws: Aws) -> Fetched | None:
    """Fetch a dataset's companion files into a folder, and begin to fetch the dataset; None if the dataset is gone."""
    config, tests = companions(upload.key, settings, aws)
    prepared = prepare(upload.key, config, tests, folder, settings, aws)
    version = {} if upload.version_id == "null" else {"VersionId": upload.version_id}
    try:
        answer = aws.s3.get_object(Bucket=settings.data_bucket, Key=upload.key, **version)
    except ClientError as error:
        if error_code(error) not in {"NoSuchKey", "NoSuchVersion"}:
            raise
        return None
    download = Download(upload.key, answer, folder)
    return Fetched(prepared.submission(upload.key, download.size, download.open, folder), prepared, download)


def companions(key: str, settings: Settings, aws: Aws) -> tuple[bytes, bytes | None]:
    """Return the config file and the test file of the dataset at a key; an empty config without one."""
    dataset = object_keys.dataset_of(key)
    # `read` cuts a file one byte above its parser's limit, and the parser rejects it.
    config = aws.read(settings.data_bucket, object_keys.config_key(dataset), MAX_CONFIG_BYTES) or b""
    candidates = (aws.read(settings.data_bucket, name, MAX_TESTS_BYTES) for name in object_keys.tests_keys(dataset))
    return config, next((content for content in candidates if content is not None), None)


def prepare(key: str, raw: bytes, tests: bytes | None, folder: Path, settings: ValidateSettings, aws: Aws) -> Prepared:
    """Fetch what a dataset at a key is validated with into a folder. `raw` is its config file, empty without one."""
    plan_digest = current_digest(aws, settings.artifact_bucket)
    plan = load_plan(aws, settings.artifact_bucket, plan_digest)
    config, about_config = read_config(raw, settings.default_model)
    environment = plan["train"].get("Environment", {})
    pinned, problems = pin_model(config.model, environment)
    line = config.line or object_keys.line_of(object_keys.dataset_of(key))
    config = config.model_copy(update={"model": pinned, "line": line})
    about_config.problems.extend(problems)
    model, model_identity = _fetch_model(config, folder / "model", settings, aws)
    base = hashlib.sha256(model_identity.encode()).hexdigest()
    champion = aws.lines.get(line).champion
    start, problems, warnings = resolve_start(config, base, champion, settings.artifact_bucket, aws)
    config = config.model_copy(update={"start_from": start.run.run_id if start.run else "base"})
    about_config.problems.extend(problems)
    about_config.warnings.extend(warnings)
    rewards, beside = folder / "rewards", f"{key.rpartition('/')[0]}/"
    reward_contents = _fetch_rewards(config, beside, rewards, settings, aws)
    terms = Terms(
        instance_types=settings.instance_types,
        spot=settings.use_spot,
        max_run_cost_usd=settings.max_run_cost_usd or None,
        image=plan["train"]["AlgorithmSpecification"]["TrainingImage"],
        # The jobs' environment: rewards have the same permissions here as in a job.
        permissions=reward_permissions(environment, aws.client, rewards),
        prices=Prices(**plan["prices"]) if plan.get("prices") else None,
        endpoint_instance_type=settings.endpoint_instance_type,
    )
    return Prepared(
        config=config,
        about_config=about_config,
        tests=tests,
        model=model,
        rewards=rewards,
        beside=f"s3://{settings.data_bucket}/{beside}",
        terms=terms,
        plan=plan_digest,
        base=base,
        start=start,
        champion=aws.runs.get(champion) if champion else None,
        identity=[raw, tests or b"", model_identity, plan_digest, start.identity, *reward_contents],
    )


def _fetch_model(config: RunConfig, folder: Path, settings: ValidateSettings, aws: Aws) -> tuple[ModelFiles | None, str]:
    """Fetch the base model's small files; return its files, and the text that pins the model: its files' ETags.

    A model of the hub is pinned by its commit (`pin_model`), and its files are not here.
    """
    if "/" in config.model:
        return None, config.model
    prefix = object_keys.model_prefix(config.model)
    pages = aws.s3.get_paginator("list_objects_v2").paginate(Bucket=settings.data_bucket, Prefix=prefix)
    items = {item["Key"].removeprefix(prefix): item for page in pages for item in page.get("Contents", [])}
    folder.mkdir()
    for name, limit in READ_FILES.items():
        if name in items:
            (folder / name).write_bytes(aws.read(settings.data_bucket, f"{prefix}{name}", limit) or b"")
    if config.lora.target_modules != ALL_LINEAR:
        for name in items:
            if name.endswith(".safetensors") and "/" not in name:
                (folder / name).write_bytes(_read_header(aws, settings.data_bucket, f"{prefix}{name}"))
    sizes = {name: item["Size"] for name, item in items.items()}
    tags = {name: item["ETag"] for name, item in items.items()}
    model = ModelFiles(sizes, folder, f"s3://{settings.data_bucket}/{prefix}")
    return model, msgspec.json.encode(tags, order="deterministic").decode()


def _read_header(aws: Aws, bucket: str, key: str) -> bytes:
    """Return the header of a safetensors file; the file itself may have many gigabytes."""
    start = aws.read(bucket, key, 8) or b""
    length = min(header_bytes(start), HEADER_BYTES)
    return aws.read(bucket, key, length) or b""


def _fetch_rewards(config: RunConfig, beside: str, folder: Path, settings: ValidateSettings, aws: Aws) -> list[bytes]:
    """Fetch the files of `python` rewards, which lie beside the dataset; return the contents of those that can be used."""
    folder.mkdir()
    contents = []
    for name in reward_files(config):
        raw = aws.read(settings.data_bucket, f"{beside}{name}", MAX_REWARD_FILE_BYTES)
        if raw is not None:
            (folder / name).write_bytes(raw)
            contents.append(raw)
    return [raw for raw in contents if len(raw) <= MAX_REWARD_FILE_BYTES]


def record(receipt: Receipt, fetched: Fetched, upload: Upload, settings: ValidateSettings, aws: Aws) -> Run | None:
    """Store the run's input files and receipt, then create the run, then announce it. Return the run as it is stored.

    Because of this order, a second delivery of the event completes what the first delivery left undone. None if the run's
    last attempt has not ended. An upload has one run, although its config may mean another champion by now: what a late
    delivery stored for another run stays unused.
    """
    dataset, prepared = object_keys.dataset_of(upload.key), fetched.prepared
    digest = inputs_digest(dataset, [suffix_of(upload.key), fetched.download.identity, *prepared.identity])
    known = ((name, aws.runs.get(name)) for name in run_ids(dataset, digest))
    name, existing = next((name, run) for name, run in known if run is None or run.digest == digest)
    run = Run(
        run_id=name,
        digest=digest,
        dataset=dataset,
        state=RunState.VALIDATED if receipt.ok else RunState.REJECTED,
        attempt=1,
        trigger=f"{upload.key}@{upload.sequencer}",
        key=upload.key,
        version_id=upload.version_id,
        arrived=clock.now(),
        updated=clock.now(),
        line=str(prepared.config.line),
        start=prepared.start.run.run_id if prepared.start.run else None,
        base=prepared.base,
        model=prepared.config.model,
        plan=prepared.plan,
        rows=receipt.rows,
        reason=None if receipt.ok else _reason(receipt),
    )
    if existing is None or existing.failed:  # the jobs of a run that goes on may be reading its input
        _store(run, receipt, fetched, settings, aws)
    try:
        stored = aws.runs.create(run, upload.sequencer)
    except UploadDoneError as error:
        logger.info("another delivery of the event was faster", detail=str(error))
        return _announced_again(upload, settings, aws)
    if stored.state == RunState.REJECTED and stored.open is not None and stored.trigger != run.trigger:
        announce(stored, settings, aws)  # only an announced run can begin its next attempt
        stored = aws.runs.create(run, upload.sequencer)
    if stored.state in RETRYABLE and stored.open is not None and stored.trigger != run.trigger:
        logger.info("the run's last attempt has not ended yet", run_id=run.run_id)
        return None
    aws.runs.finish_upload(upload.key, upload.sequencer, run.state, run.run_id)
    announce(stored, settings, aws)
    return stored


def _reason(receipt: Receipt) -> str:
    """Return why a dataset was rejected, for events and notifications: code and place, no text of the user's files."""
    first, more = receipt.errors[0], sum(receipt.error_counts.values()) - 1
    place = f" in line {first.line}" if first.line else f" in row {first.row}" if first.row else ""
    return f"{first.code}{place}" + (f", and {more} more" if more else "") + ": see the receipt"


def _store(run: Run, receipt: Receipt, fetched: Fetched, settings: ValidateSettings, aws: Aws) -> None:
    """Store the input files of a valid run, the rows that were set aside and, last, the receipt."""
    bucket, folder = settings.artifact_bucket, fetched.submission.folder
    if receipt.ok:
        for name in INPUT_FILES:
            aws.s3.upload_file(str(folder / name), bucket, object_keys.run_key(run.run_id, f"input/{name}"))
        names = msgspec.json.encode({"run_id": run.run_id, "dataset": run.dataset})  # for the job's own events
        aws.s3.put_object(Bucket=bucket, Key=object_keys.run_key(run.run_id, "input/run.json"), Body=names)
        for file in fetched.submission.rewards.iterdir():
            aws.s3.upload_file(str(file), bucket, object_keys.run_key(run.run_id, f"input/rewards/{file.name}"))
        if start := fetched.prepared.start.run:
            prefix = adapter_prefix(start, bucket)
            for name in ADAPTER_FILES:  # a copy: the start's own files may be deleted
                target = object_keys.run_key(run.run_id, f"start/{name}")
                aws.s3.copy_object(Bucket=bucket, Key=target, CopySource={"Bucket": bucket, "Key": f"{prefix}{name}"})
        if receipt.rejected.rows:
            aws.s3.upload_file(str(folder / "rejected.jsonl"), bucket, object_keys.run_key(run.run_id, "rejected.jsonl"))
    aws.s3.put_object(
        Bucket=bucket,
        Key=object_keys.run_key(run.run_id, "validation.json"),
        Body=msgspec.json.format(msgspec.json.encode(_document(run, receipt, fetched, settings))),
        ContentType="application/json",
    )


def _document(run: Run, receipt: Receipt, fetched: Fetched, settings: ValidateSettings) -> dict[str, Any]:
    """Return the content of `validation.json`: the receipt, and whose it is."""
    source = {
        "bucket": settings.data_bucket,
        "key": run.key,
        "version_id": run.version_id,
        "bytes": fetched.download.size,
    }
    if digest := fetched.download.sha256:
        source["sha256"] = digest
    return {"run_id": run.run_id, "dataset": run.dataset, "line": run.line, "source": source, **msgspec.to_builtins(receipt)}


def _announced_again(upload: Upload, settings: ValidateSettings, aws: Aws) -> Run | None:
    """Return the run of an upload that was validated before; announce the run if it is not announced yet.

    The upload is not validated again: its config may have changed since, and would give another run. None for an upload that
    is older than the newest of its key.
    """
    item = aws.runs.upload(upload.key)
    run = aws.runs.get(item["run_id"]) if item and item["sequencer"] == upload.sequencer and item["run_id"] else None
    if run is None:
        logger.info("ignored an upload that is older than the newest one")
    elif run.open is not None:
        announce(run, settings, aws)
    return run


def announce(run: Run, settings: Settings, aws: Aws) -> None:
    """Announce that a run was validated or rejected. A run in a later state needs no announcement. Idempotent."""
    if run.state == RunState.VALIDATED:
        events.put_event(aws.events, settings.event_bus, events.validated(run, settings.artifact_bucket))
    elif run.state == RunState.REJECTED:
        links = events.receipt_link(run, settings.artifact_bucket)
        event = RunEvent(detail_type=events.REJECTED, run=run, links=links)
        events.put_event(aws.events, settings.event_bus, event)
        notify(aws, settings.topic_arn, event)
        aws.runs.close(run)
