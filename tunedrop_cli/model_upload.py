"""Uploads a base model's folder, so that `models/<name>/` in the data bucket holds exactly its files."""

import hashlib
from pathlib import Path
from typing import Any

from local_app.stack import StackError
from tunedrop import object_keys

# The files of a model: weights, configs, tokenizers (merges.txt, *.model, *.tiktoken), chat templates, and licences.
SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken", ".md")
LICENCES = ("license", "licence", "notice")
# The metadata key of a file's content. An ETag depends on the size of an upload's parts, and tuned weights have the size of
# the base's.
DIGEST = "sha256"


def model_files(folder: Path) -> list[Path]:
    """Return a model's files: those in the folder itself. Raises StackError for a link that leads out of the folder."""
    files = []
    for path in sorted(folder.iterdir()):
        is_model = path.suffix.lower() in SUFFIXES or path.name.lower().startswith(LICENCES)
        if path.name.startswith(".") or not is_model or not path.is_file():
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            raise StackError(
                f"{path} is a link to {path.resolve()}, outside the model's folder. Pass a folder with the files "
                "themselves, such as one of `hf download … --local-dir DIR`."
            )
        files.append(path)
    return files


def upload_model(s3: Any, bucket: str, folder: Path) -> str:
    """Make `models/<the folder's name>/` equal to the folder; return the name.

    Files with the same content are not uploaded again. Objects of files that the folder lacks are deleted. Raises StackError
    for a folder without a model, or with a link that leads out.
    """
    folder = folder.resolve()
    files = model_files(folder)
    if not any(path.suffix == ".safetensors" for path in files):
        raise StackError(f"{folder} is no model: it has no *.safetensors.")
    prefix = object_keys.model_prefix(folder.name)
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    sizes = {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", [])}
    for file in files:
        key, digest = prefix + file.name, _digest(file)
        if sizes.pop(key, None) == file.stat().st_size and _stored_digest(s3, bucket, key) == digest:
            continue
        s3.upload_file(str(file), bucket, key, ExtraArgs={"Metadata": {DIGEST: digest}})
    for key in sizes:
        s3.delete_object(Bucket=bucket, Key=key)
    return folder.name


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _stored_digest(s3: Any, bucket: str, key: str) -> str | None:
    digest: str | None = s3.head_object(Bucket=bucket, Key=key)["Metadata"].get(DIGEST)
    return digest
