"""A component's files between S3 and this machine: its model's folder, or its adapter's archive."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from local_app.sagemaker.api import JobError, ServiceError
from local_app.sagemaker.services import AWS_ERRORS, Services
from local_app.sagemaker.transfer import channel_objects, download, split_s3_uri

ENVIRONMENT = "environment.json"  # of a version's container, beside its model


def check_model_data(services: Services, uri: str) -> None:
    """Raise ServiceError unless there are objects under an S3 prefix, and its role can list them."""
    try:
        found = any(channel_objects(services.s3, uri))
    except (*AWS_ERRORS, JobError):
        found = False
    if not found:
        raise ServiceError(
            "ValidationException",
            f"Could not find model data at {uri}. Please ensure that the role has the permission s3:ListBucket and that "
            "objects exist under that S3 prefix.",
        )


def check_adapter(services: Services, uri: str) -> None:
    """Raise ServiceError unless the object exists, as one archive.

    ArtifactUrl "must point to a single gzip compressed tar archive (.tar.gz suffix)"
    (https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_InferenceComponentContainerSpecification.html).
    """
    if not uri.endswith(".tar.gz"):
        raise ServiceError(
            "ValidationException", f"ArtifactUrl {uri} must be a gzip compressed tar archive (.tar.gz suffix)."
        )
    try:
        bucket, key = split_s3_uri(uri)
        services.s3.head_object(Bucket=bucket, Key=key)
    except (ClientError, JobError) as error:
        raise ServiceError("ValidationException", f"Could not find model data at {uri}: {error}") from error


def fetch_model(s3: Any, uri: str | None, environment: dict[str, str], folder: Path, check: Callable[[], None]) -> Path:
    """Copy every object under an S3 prefix into `folder`/model, unless that is done already.

    The container's environment is noted beside them. A model of the hub has no `uri`. `check` may raise before each object.
    Raises JobError.
    """

    def fill(draft: Path) -> None:
        (draft / ENVIRONMENT).write_text(json.dumps(environment))
        if uri and not download(s3, uri, draft / "model", check):
            raise JobError(f"No S3 objects found under {uri}")

    return _complete(folder, fill)


def fetch_adapter(s3: Any, uri: str, folder: Path) -> Path:
    """Unpack the adapter's archive into `folder`, unless that is done already. Raises JobError."""

    def unpack(draft: Path) -> None:
        bucket, key = split_s3_uri(uri)
        archive = draft.with_suffix(".tar.gz")
        s3.download_file(bucket, key, str(archive))
        try:
            with tarfile.open(archive, "r:gz") as members:
                members.extractall(draft, filter="data")
        finally:
            archive.unlink()

    return _complete(folder, unpack)


def _complete(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Return a folder that is filled completely or not at all."""
    draft = folder.with_suffix(".part")
    if not folder.exists():
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        try:
            fill(draft)
        except (*AWS_ERRORS, OSError, tarfile.TarError) as error:
            raise JobError(f"Failed to download model data: {error}") from error
        draft.rename(folder)
    return folder
