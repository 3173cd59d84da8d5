"""The suite of a line, in the artifact bucket: `lines/<line>/suite/<digest>/suite.json`, with the files of its rewards."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from pipeline.aws import Aws
from pipeline.observability import logger
from pipeline.runs.states import Run
from tunedrop import object_keys
from tunedrop.suite import Suite, SuitePart, question_of, select

# The newest approved runs whose tests are in a suite, and the most tests of a suite before `suite.max` selects some.
MOST_RUNS, MOST_TESTS = 50, 5000


def store_suite(line: str, run_ids: Sequence[str], bucket: str, aws: Aws) -> str:
    """Store the suite of a line whose approved runs are `run_ids`, oldest first; return its digest.

    The digest names the folder: two writers write the same bytes, or to two folders.
    """
    runs = [run for run_id in run_ids[-MOST_RUNS:] if (run := aws.runs.get(run_id))]
    suite = select(Suite(parts=[part for run in runs for part in _part(run, bucket, aws)]), MOST_TESTS)
    raw = msgspec.json.encode(suite)
    digest = hashlib.sha256(raw).hexdigest()[:32]
    folder = suite_prefix(line, digest)
    for part in suite.parts:
        if any(reward["type"] == "python" for reward in part.rewards):
            _copy_rewards(part.run_id, f"{folder}rewards/{part.run_id}/", bucket, aws)
    aws.s3.put_object(Bucket=bucket, Key=f"{folder}suite.json", Body=raw, ContentType="application/json")
    return digest


def suite_prefix(line: str, digest: str) -> str:
    """Return the folder of a line's suite in the artifact bucket."""
    return object_keys.line_key(line, f"suite/{digest}/")


def questions_of_run(run_id: str, bucket: str, aws: Aws) -> list[str]:
    """Return the questions of a run's judging tests."""
    raw = aws.read(bucket, object_keys.run_key(run_id, "input/inference_tests.json"))
    return [] if raw is None else list(dict.fromkeys(question_of(test) for test in _judging(raw)))


def _judging(raw: bytes) -> list[dict[str, Any]]:
    return [test for test in msgspec.json.decode(raw)["evaluations"] if test.get("judges", True)]


def _part(run: Run, bucket: str, aws: Aws) -> Iterator[SuitePart]:
    """Yield a run's part of the suite; nothing if its files are no longer there."""
    tests = aws.read(bucket, object_keys.run_key(run.run_id, "input/inference_tests.json"))
    tested = aws.read(bucket, object_keys.run_key(run.run_id, f"inference/{run.test_job}/output/model/inference.json"))
    if tests is None or tested is None:
        logger.warning("the suite lacks the tests of a run whose files are gone", run_id=run.run_id)
        return
    job = msgspec.json.decode(tested)
    yield SuitePart(
        run_id=run.run_id,
        decoding={name: value for name, value in job["generation"].items() if name != "dtype"},
        rewards=job["rewards"],
        chat_template_kwargs=job["chat_template_kwargs"],
        tests=_judging(tests),
    )


def _copy_rewards(run_id: str, folder: str, bucket: str, aws: Aws) -> None:
    """Copy the files of a run's `python` rewards."""
    prefix = object_keys.run_key(run_id, "input/rewards/")
    for item in aws.s3.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", []):
        name = item["Key"].removeprefix(prefix)
        aws.s3.copy_object(Bucket=bucket, Key=f"{folder}{name}", CopySource={"Bucket": bucket, "Key": item["Key"]})
