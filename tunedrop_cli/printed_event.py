"""Builds the events of existing objects, validated runs, ended jobs and model packages, as EventBridge delivers them.

With these events, `sam local invoke --event` drives a whole run by hand, one function after the other.
"""

import uuid
from datetime import UTC, datetime
from typing import Any

from botocore.exceptions import ClientError

from local_app.stack import StackError
from pipeline.aws import NO_SUCH, error_code
from pipeline.notify import events
from pipeline.notify.job_events import state_change_event
from pipeline.notify.package_events import package_event
from pipeline.runs.states import RunState
from tunedrop import event_bus
from tunedrop.object_keys import JobName
from tunedrop_cli.deployment import Deployment, in_words
from tunedrop_cli.registry import describe_package

Json = dict[str, Any]
# The length of S3's sequencers, which are hexadecimal.
DIGITS = 18


def event_of(deployment: Deployment, name: str, stage: str | None) -> Json:
    """Return the event of an object (`name` is its key), a job (its name), a package (its ARN), or a run's next `stage`.

    Raises StackError for an unknown object, job, model package or run, and for a stage that cannot begin yet.
    """
    if stage is not None:
        return _run_event(deployment, name, stage)
    if ":model-package/" in name:
        return _package_event(deployment, name)
    try:
        JobName.parse(name, deployment.outputs.job_prefix)
    except ValueError:
        return _upload_event(deployment, name)
    return _job_event(deployment, name)


def _envelope(deployment: Deployment, source: str, detail_type: str, time: datetime, detail: Json) -> Json:
    _, _, _, region, account, _ = deployment.outputs.topic_arn.split(":")
    return {
        "version": "0",
        "id": str(uuid.uuid4()),
        "detail-type": detail_type,
        "source": source,
        "account": account,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "region": region,
        "resources": [],
        "detail": detail,
    }


def _upload_event(deployment: Deployment, key: str) -> Json:
    """Return S3's "Object Created" (https://docs.aws.amazon.com/AmazonS3/latest/userguide/ev-events.html) of an object.

    Its sequencer follows the last processed sequencer of this key: the event counts as new, and every later upload as newer.
    """
    bucket = deployment.outputs.data_bucket
    try:
        head = deployment.s3.head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error_code(error) not in {"404", "NoSuchKey"}:
            raise
        raise StackError(f"There is no object s3://{bucket}/{key}. Upload a dataset with `tunedrop drop`.") from None
    last = (deployment.runs.upload(key) or {}).get("sequencer", "")
    etag = head["ETag"].strip('"')
    detail = {
        "version": "0",
        "bucket": {"name": bucket},
        "object": {
            "key": key,
            "size": head["ContentLength"],
            "etag": etag,
            "version-id": head["VersionId"],
            "sequencer": f"{int(last.ljust(DIGITS, '0')[:DIGITS], 16) + 1:0{DIGITS}X}",
        },
        "request-id": head["ResponseMetadata"]["RequestId"],
        "requester": deployment.outputs.topic_arn.split(":")[4],
        "source-ip-address": "127.0.0.1",
        "reason": "CompleteMultipartUpload" if "-" in etag else "PutObject",
    }
    event = _envelope(deployment, "aws.s3", "Object Created", head["LastModified"], detail)
    partition = deployment.outputs.topic_arn.split(":")[1]
    return event | {"resources": [f"arn:{partition}:s3:::{bucket}"]}


def _run_event(deployment: Deployment, name: str, stage: str) -> Json:
    """Return the event that starts a stage of a run: "Dataset Validated", or the end of the run's last job."""
    run = deployment.find(name)
    if stage == "start":
        if run.state == RunState.REJECTED:
            raise StackError(f"{run.run_id} was rejected and cannot start.")
        event = events.validated(run, deployment.outputs.artifact_bucket)
        return _envelope(deployment, event_bus.SOURCE, event.detail_type, datetime.now(UTC), event.detail)
    job = {"test": run.train_job, "publish": run.test_job}[stage]
    if job is None:
        before = {"test": "training", "publish": "test"}[stage]
        raise StackError(f"{run.run_id} has no {before} job yet: it is {in_words(run.state)}.")
    return _job_event(deployment, job)


def _job_event(deployment: Deployment, job: str) -> Json:
    """Return SageMaker's "Training Job State Change" of a job that has ended."""
    sagemaker = deployment.connect("client", "sagemaker")
    try:
        described = sagemaker.describe_training_job(TrainingJobName=job)
    except ClientError as error:
        if error_code(error) not in NO_SUCH:
            raise
        raise StackError(f"There is no job '{job}'. `tunedrop show RUN` lists a run's jobs.") from None
    if described["TrainingJobStatus"] not in {"Completed", "Failed", "Stopped"}:
        raise StackError(f"{job} is {described['TrainingJobStatus']}. Its event exists when the job has ended.")
    return state_change_event(_in_seconds(described), _tags(sagemaker, described["TrainingJobArn"]))


def _package_event(deployment: Deployment, arn: str) -> Json:
    """Return SageMaker's "Model Package State Change" of a package, with the package's present status."""
    sagemaker = deployment.connect("client", "sagemaker")
    package = describe_package(sagemaker, arn)
    group = arn.replace(":model-package/", ":model-package-group/").rpartition("/")[0]  # a version has its group's tags
    return package_event(_in_seconds(package), _tags(sagemaker, group), ["ModelApprovalStatus"])


def _tags(sagemaker: Any, arn: str) -> dict[str, str]:
    pages = sagemaker.get_paginator("list_tags").paginate(ResourceArn=arn)
    return {tag["Key"]: tag["Value"] for page in pages for tag in page["Tags"]}


def _in_seconds(value: Any) -> Any:
    """Return a response of boto3 with its times in seconds since 1970, as in the HTTP response."""
    if isinstance(value, datetime):
        return value.timestamp()
    if isinstance(value, dict):
        return {name: _in_seconds(part) for name, part in value.items()}
    return [_in_seconds(part) for part in value] if isinstance(value, list) else value
