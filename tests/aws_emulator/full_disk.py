"""Fills the disk of an AWS emulator, kills and restarts it, and prints what it acknowledged and what it kept.

`test_full_disk.py` runs this in a mount namespace. Usage: python full_disk.py FOLDER
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError
from conftest import Emulators  # type: ignore[import-not-found]  # of this folder

BUCKET = "bucket"


def kept(s3: Any, acknowledged: dict[str, tuple[str, bytes]]) -> list[Any]:
    """Return how many acknowledged versions are whole, and whether each key's newest one is its current object."""

    def body(**which: str) -> bytes:
        content: bytes = s3.get_object(Bucket=BUCKET, **which)["Body"].read()
        return content

    whole = [body(Key=key, VersionId=version) == content for version, (key, content) in acknowledged.items()]
    newest = dict(acknowledged.values())
    keys = [item["Key"] for item in s3.list_objects_v2(Bucket=BUCKET)["Contents"]]
    return [sum(whole), {key: body(Key=key) for key in keys} == newest]


def main(folder: Path) -> None:
    """Run the scenario."""
    (folder / "aws").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder / "aws"], check=True)
    emulators = Emulators(folder)
    emulators.start("aws")
    s3 = emulators.client("s3")
    s3.create_bucket(Bucket=BUCKET)
    s3.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    acknowledged: dict[str, tuple[str, bytes]] = {}
    refused: list[tuple[int, str, str]] = []
    for n in range(30):
        for key in (f"new-{n}", "same"):
            content = b"%05d" % n * 12_000
            try:
                acknowledged[s3.put_object(Bucket=BUCKET, Key=key, Body=content)["VersionId"]] = (key, content)
            except ClientError as error:
                status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                refused.append((status, error.response["Error"]["Code"], str(error)))
    before = kept(s3, acknowledged)
    emulators.kill("aws")
    said = (folder / "aws.log").read_text().count("cannot write to its disk")
    for file in (folder / "aws" / "tmp").rglob("*"):  # files of functions: the emulator needs some space to start
        if file.is_file():
            file.unlink()
    emulators.start("aws")
    after = kept(emulators.client("s3"), acknowledged)
    emulators.stop()
    counts = {"acknowledged": len(acknowledged), "refused": refused, "said": said}
    print(json.dumps(counts | {"before": before, "after": after}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
