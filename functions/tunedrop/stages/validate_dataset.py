"""An upload arrived: check it, write the receipt and the run's input, and announce the run."""

import hashlib
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
from botocore.exceptions import ClientError

from tunedrop import events, layout
from tunedrop.announcements import AnnounceSettings, notify
from tunedrop.aws import Aws, InstanceTypes, Settings, error_code
from tunedrop.events import RunEvent, Upload
from tunedrop.launch_plan import current_digest
from tunedrop.observability import logger
from tunedrop.problems import Problem
from tunedrop.receipt import Check, check_dataset
from tunedrop.run_config import check_lengths
from tunedrop.runs import Run, State, now, run_id

INPUT_FILES = ("config.json", "train.jsonl", "heldout.jsonl", "inference_tests.json")


class ValidateSettings(AnnounceSettings):
    """The environment of validate_dataset."""

    default_model: str
    instance_types: InstanceTypes


def validate_upload(upload: Upload, settings: ValidateSettings, aws: Aws) -> Run | None:
    """Validate an uploaded dataset; return its run, or None if the upload is not a dataset or a newer one was seen.

    The run's input folder and its receipt are written before the run exists, and the run before it is announced, so that
    a second delivery of the event completes whatever the first one left undone.
    """
    dataset = layout.dataset_of(upload.key)
    if not upload.key.startswith(layout.TRAINING_DATA) or not dataset:
        logger.info("ignored an object that is no dataset")
        return None
    if not aws.runs.claim_upload(upload.key, upload.version_id, upload.sequencer):
        logger.info("ignored an upload older than the one seen last")
        return None
    plan = current_digest(aws, settings.artifact_bucket)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / f"data{Path(upload.key).suffix.lower()}"
        try:
            size, digest = _download(upload, data, settings, aws)
        except ClientError as error:
            if error_code(error) not in {"NoSuchKey", "NoSuchVersion"}:
                raise
            logger.info("ignored an upload that is gone")
            return None
        config_raw = aws.read(settings.data_bucket, layout.config_key(dataset)) or b""
        tests_raw = next(
            (raw for key in layout.tests_keys(dataset) if (raw := aws.read(settings.data_bucket, key)) is not None),
            None,
        )
        check = check_dataset(
            data,
            config_raw,
            tests_raw,
            folder,
            default_model=settings.default_model,
            instance_types=settings.instance_types,
        )
        data.unlink()
        identity = _model_identity(check, settings, aws)
        this = run_id(dataset, [digest, config_raw, tests_raw or b"", identity, plan])
        run = Run(
            run_id=this,
            dataset=dataset,
            state=State.VALIDATED if check.ok else State.REJECTED,
            attempt=1,
            trigger=f"{upload.key}@{upload.sequencer}",
            key=upload.key,
            version_id=upload.version_id,
            arrived=now(),
            updated=now(),
            model=check.config.model,
            plan=plan,
            rows=check.rows,
            reason=str(check.problems[0])[:500] if check.problems else None,
        )
        source = {
            "bucket": settings.data_bucket,
            "key": upload.key,
            "version_id": upload.version_id,
            "bytes": size,
            "sha256": digest,
        }
        _write(run, check, source, folder, settings, aws)
    run = aws.runs.create(run)
    aws.runs.finish_upload(upload.key, upload.sequencer, run.state, run.run_id)
    announce(run, settings, aws)
    return run


def announce(run: Run, settings: ValidateSettings, aws: Aws) -> None:
    """Say that a run was validated or rejected; nothing if it is further on."""
    links = {"receipt": f"s3://{settings.artifact_bucket}/{layout.run_key(run.run_id, 'validation.json')}"}
    if run.state == State.VALIDATED:
        events.put_event(aws.events, settings.event_bus, RunEvent(detail_type=events.VALIDATED, run=run, links=links))
    elif run.state == State.REJECTED:
        event = RunEvent(detail_type=events.REJECTED, run=run, links=links)
        events.put_event(aws.events, settings.event_bus, event)
        notify(aws, settings.topic_arn, event)
        aws.runs.close(run)


def _download(upload: Upload, to: Path, settings: Settings, aws: Aws) -> tuple[int, str]:
    """Download the version that the event names; return its size and its SHA-256 as hex."""
    version = {} if upload.version_id == "null" else {"VersionId": upload.version_id}
    answer = aws.s3.get_object(Bucket=settings.data_bucket, Key=upload.key, **version)
    digest = hashlib.sha256()
    with closing(answer["Body"]) as body, to.open("wb") as out:
        for chunk in iter(lambda: body.read(1024**2), b""):
            digest.update(chunk)
            out.write(chunk)
    return to.stat().st_size, digest.hexdigest()


def _model_identity(check: Check, settings: ValidateSettings, aws: Aws) -> str:
    """Return what pins the base model: its files' keys and ETags, or the hub id; a missing model is a problem."""
    model = check.config.model
    if "/" in model:
        return model
    prefix = layout.model_prefix(model)
    pages = aws.s3.get_paginator("list_objects_v2").paginate(Bucket=settings.data_bucket, Prefix=prefix)
    files = {item["Key"].removeprefix(prefix): item["ETag"] for page in pages for item in page.get("Contents", [])}
    missing = [name for name in ("config.json", "tokenizer.json") if name not in files]
    if not any(name.endswith(".safetensors") for name in files):
        missing.append("*.safetensors")
    if missing:
        message = f"the base model '{model}' lacks {', '.join(missing)} in s3://{settings.data_bucket}/{prefix}"
        check.add(Problem("MODEL_MISSING", message, "upload its files there, or name another model", key="model"))
    elif context := _context(aws.read(settings.data_bucket, f"{prefix}config.json")):
        check.add(*check_lengths(check.config, context))
    return msgspec.json.encode(files, order="deterministic").decode()


def _context(raw: bytes | None) -> int | None:
    """Return how many tokens a model reads at most, from its `config.json`; None where that does not say."""
    try:
        context = msgspec.json.decode(raw or b"").get("max_position_embeddings")
    except (msgspec.DecodeError, AttributeError):
        return None
    return context if isinstance(context, int) else None


def _write(run: Run, check: Check, source: dict[str, Any], folder: Path, settings: ValidateSettings, aws: Aws) -> None:
    """Write the run's input files and, last, its receipt."""
    if check.ok:
        for name in INPUT_FILES:
            aws.s3.upload_file(str(folder / name), settings.artifact_bucket, layout.run_key(run.run_id, f"input/{name}"))
    receipt = {"run_id": run.run_id, "dataset": run.dataset, "source": source} | check.receipt()
    aws.s3.put_object(
        Bucket=settings.artifact_bucket,
        Key=layout.run_key(run.run_id, "validation.json"),
        Body=msgspec.json.format(msgspec.json.encode(receipt)),
        ContentType="application/json",
    )
