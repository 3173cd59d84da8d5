"""The suite of a line, in the artifact bucket: `lines/<line>/suite/<digest>/suite.json`, with the files of its rewards."""

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec

from pipeline.aws import Aws
from pipeline.jobs.answers import suite_prefix
from pipeline.observability import logger
from pipeline.runs.lines import Line
from pipeline.runs.states import Run
from tunedrop import object_keys
from tunedrop.suite import Suite, SuitePart, question_of, select

# The newest approved runs whose tests are in a suite, and the most tests of a suite before `suite.max` selects some.
MOST_RUNS, MOST_TESTS = 50, 5000


def store_suite(line: Line, run_ids: Sequence[str], bucket: str, aws: Aws) -> str:
    """Store the suite of a line whose approved runs are `run_ids`, oldest first; return its digest.

    A run whose files are gone keeps its part of the line's present suite. The digest names the folder: two writers write the
    same bytes, or to two folders.
    """
    runs = [run for run_id in run_ids[-MOST_RUNS:] if (run := aws.runs.get(run_id))]
    found = {run.run_id: part for run in runs if (part := _part(run, bucket, aws))}
    present = _present_parts(line, bucket, aws) if len(found) < len(runs) else {}
    parts = [part for run in runs if (part := found.get(run.run_id) or present.get(run.run_id))]
    suite = select(Suite(parts=parts), MOST_TESTS)
    raw = msgspec.json.encode(suite)
    digest = hashlib.sha256(raw).hexdigest()[:32]
    folder = suite_prefix(line.line, digest)
    for part in suite.parts:
        if any(reward["type"] == "python" for reward in part.rewards):
            own = object_keys.run_key(part.run_id, "input/rewards/")
            source = own if part.run_id in found else f"{suite_prefix(line.line, str(line.suite))}rewards/{part.run_id}/"
            _copy(source, f"{folder}rewards/{part.run_id}/", bucket, aws)
    aws.s3.put_object(Bucket=bucket, Key=f"{folder}suite.json", Body=raw, ContentType="application/json")
    return digest


def questions_of_run(run_id: str, bucket: str, aws: Aws) -> list[str]:
    """Return the questions of a run's judging tests."""
    raw = aws.read(bucket, object_keys.run_key(run_id, "input/inference_tests.json"))
    return [] if raw is None else list(dict.fromkeys(question_of(test) for test in _judging(raw)))


def _judging(raw: bytes) -> list[dict[str, Any]]:
    return [test for test in msgspec.json.decode(raw)["evaluations"] if test.get("judges", True)]


def _present_parts(line: Line, bucket: str, aws: Aws) -> dict[str, SuitePart]:
    """Return the parts of a line's present suite by run."""
    raw = aws.read(bucket, f"{suite_prefix(line.line, line.suite)}suite.json") if line.suite else None
    return {part.run_id: part for part in msgspec.json.decode(raw, type=Suite).parts} if raw else {}


def _part(run: Run, bucket: str, aws: Aws) -> SuitePart | None:
    """Return a run's part of the suite, None if its files are no longer there."""
    tests = aws.read(bucket, object_keys.run_key(run.run_id, "input/inference_tests.json"))
    tested = aws.read(bucket, object_keys.run_key(run.run_id, f"inference/{run.test_job}/output/model/inference.json"))
    if tests is None or tested is None:
        logger.warning("a run's tests are gone: the suite has those of the suite before it", run_id=run.run_id)
        return None
    job = msgspec.json.decode(tested)
    return SuitePart(
        run_id=run.run_id,
        decoding={name: value for name, value in job["generation"].items() if name != "dtype"},
        rewards=job["rewards"],
        chat_template_kwargs=job["chat_template_kwargs"],
        tests=_judging(tests),
    )


def _copy(prefix: str, folder: str, bucket: str, aws: Aws) -> None:
    """Copy the objects below a prefix to a folder."""
    for item in aws.s3.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", []):
        name = item["Key"].removeprefix(prefix)
        aws.s3.copy_object(Bucket=bucket, Key=f"{folder}{name}", CopySource={"Bucket": bucket, "Key": item["Key"]})
