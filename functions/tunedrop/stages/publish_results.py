"""A test job ended: judge the tuned model, write the report, register the model, and tell everyone."""

from typing import Any

import msgspec

from tunedrop import events, layout
from tunedrop.announcements import AnnounceSettings, announce_failure, notify
from tunedrop.aws import Aws
from tunedrop.events import JobDetail, RunEvent
from tunedrop.inference_tests import Comparison, Verdict, compare, judge
from tunedrop.report import render_report
from tunedrop.run_config import RunConfig
from tunedrop.runs import Run, State
from tunedrop.stages.test_model import run_of_job

# How the registry says what the gate decided.
APPROVAL = {"APPROVED": "Approved", "PENDING": "PendingManualApproval", "REJECTED": "Rejected"}


class PublishSettings(AnnounceSettings):
    """The environment of publish_results."""

    model_package_group: str


def testing_ended(job: JobDetail, settings: PublishSettings, aws: Aws) -> Run | None:
    """Publish a run after its test job ended; return it, or None if the job is of no current attempt."""
    found = run_of_job(job.TrainingJobName, settings.job_prefix, aws)
    if found is None or not job.final:
        return None
    run, _ = found
    if run.state == State.TRAINED:
        # The job ended before the move that followed its creation was written: write that move first.
        run = aws.runs.move(run, State.TESTING, test_job=job.TrainingJobName)
    if run.state == State.TESTING:
        if job.TrainingJobStatus != "Completed":
            reason = f"the inference tests {job.TrainingJobStatus.lower()}: {job.FailureReason or job.SecondaryStatus}"
            run = aws.runs.move(run, State.TESTING_FAILED, reason=reason[:1024])
        else:
            run = aws.runs.move(run, State.TESTED)
    if run.state == State.TESTED:
        run = publish(run, settings, aws)
    if run.state == State.PUBLISHED:
        announce(run, settings, aws)
    elif run.failed:
        announce_failure(run, settings, aws)
    return run


def publish(run: Run, settings: PublishSettings, aws: Aws) -> Run:
    """Write the report, register the model package and write `result.json`, in this order: it is the commit mark.

    Everything is made of what the jobs left behind, so that doing it twice writes the same bytes.
    """
    bucket = settings.artifact_bucket
    assert run.train_job is not None
    assert run.test_job is not None
    assert run.artifacts is not None
    trained = run.artifacts.removeprefix(f"s3://{bucket}/").rstrip("/")
    tested = layout.run_key(run.run_id, f"inference/{run.test_job}/output/model")
    config = RunConfig.model_validate_json(_read(aws, bucket, layout.run_key(run.run_id, "input/config.json")))
    inference = msgspec.json.decode(_read(aws, bucket, f"{tested}/inference.json"))
    training = msgspec.json.decode(_read(aws, bucket, f"{trained}/training.json"))
    metrics = [msgspec.json.decode(line) for line in _read(aws, bucket, f"{trained}/metrics.jsonl").splitlines()]
    receipt = msgspec.json.decode(_read(aws, bucket, layout.run_key(run.run_id, "validation.json")))
    comparison = compare(inference["tests"], config.gate.confidence)
    verdict = judge(inference["tests"], comparison, config.gate)
    result = _result(run, config, training, comparison, verdict, settings)
    html = render_report(result, receipt=receipt, metrics=metrics, tests=inference["tests"])
    aws.s3.put_object(
        Bucket=bucket,
        Key=layout.run_key(run.run_id, "report.html"),
        Body=html.encode(),
        ContentType="text/html; charset=utf-8",
    )
    result["model_package"] = _register(run, trained, result, verdict, settings, aws)
    aws.s3.put_object(
        Bucket=bucket,
        Key=layout.run_key(run.run_id, "result.json"),
        Body=msgspec.json.format(msgspec.json.encode(result)),
        ContentType="application/json",
    )
    return aws.runs.move(run, State.PUBLISHED, verdict=verdict.status, model_package=result["model_package"])


def _read(aws: Aws, bucket: str, key: str) -> bytes:
    raw = aws.read(bucket, key)
    if raw is None:
        raise FileNotFoundError(f"s3://{bucket}/{key}")
    return raw


def _result(
    run: Run,
    config: RunConfig,
    training: dict[str, Any],
    comparison: Comparison,
    verdict: Verdict,
    settings: PublishSettings,
) -> dict[str, Any]:
    """Return the content of `result.json`, but for the model package."""
    folder = f"s3://{settings.artifact_bucket}/{layout.run_key(run.run_id)}"
    assert run.artifacts is not None
    return {
        "run_id": run.run_id,
        "dataset": run.dataset,
        "attempt": run.attempt,
        "arrived": run.arrived,
        "verdict": verdict.status,
        "reasons": verdict.reasons,
        "comparison": msgspec.to_builtins(comparison),
        "bounded": run.bounded,
        "training": training,
        "jobs": {"train": run.train_job, "test": run.test_job},
        "source": f"s3://{settings.data_bucket}/{run.key}",
        "source_version": run.version_id,
        "trainer": run.plan,
        "config": config.model_dump(mode="json"),
        "artifacts": {
            "receipt": folder + "validation.json",
            "input": folder + "input/",
            "merged_model": f"{run.artifacts.rstrip('/')}/merged/",
            "adapter": f"{run.artifacts.rstrip('/')}/adapter/",
            "metrics": f"{run.artifacts.rstrip('/')}/metrics.jsonl",
            "inference": f"{folder}inference/{run.test_job}/output/model/inference.json",
            "report": folder + "report.html",
        },
    }


def _register(run: Run, trained: str, result: dict[str, Any], verdict: Verdict, settings: PublishSettings, aws: Aws) -> str:
    """Register the merged model in the model package group, once per attempt, and return the package's ARN.

    The client token makes a second registration answer with the first one's package
    (https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_CreateModelPackage.html).
    """
    job = aws.sagemaker.describe_training_job(TrainingJobName=run.train_job)
    comparison = result["comparison"]
    answer = aws.sagemaker.create_model_package(
        ModelPackageGroupName=settings.model_package_group,
        ModelPackageDescription=f"{run.model} tuned with GRPO + LoRA on {run.run_id}"[:1024],
        ModelApprovalStatus=APPROVAL[verdict.status],
        ClientToken=f"{run.run_id}-{run.attempt}"[:36],
        InferenceSpecification={
            "Containers": [
                {
                    "Image": job["AlgorithmSpecification"]["TrainingImage"],
                    "ModelDataSource": {
                        "S3DataSource": {
                            "S3Uri": f"s3://{settings.artifact_bucket}/{trained}/merged/",
                            "S3DataType": "S3Prefix",
                            "CompressionType": "None",
                        }
                    },
                }
            ],
            "SupportedContentTypes": ["application/json"],
            "SupportedResponseMIMETypes": ["application/json"],
        },
        CustomerMetadataProperties={
            "run_id": run.run_id,
            "verdict": verdict.status,
            "base_score": f"{comparison['base_score']:.6f}",
            "tuned_score": f"{comparison['tuned_score']:.6f}",
            "report": result["artifacts"]["report"],
        },
    )
    return str(answer["ModelPackageArn"])


def announce(run: Run, settings: PublishSettings, aws: Aws) -> None:
    """Say that a run's results are published, give its place back and close it."""
    aws.runs.release(run)
    folder = f"s3://{settings.artifact_bucket}/{layout.run_key(run.run_id)}"
    result = msgspec.json.decode(_read(aws, settings.artifact_bucket, layout.run_key(run.run_id, "result.json")))
    event = RunEvent(
        detail_type=events.PUBLISHED,
        run=run,
        links={"report": folder + "report.html", "result": folder + "result.json"},
        extra={key: result[key] for key in ("verdict", "reasons", "comparison", "model_package")},
    )
    events.put_event(aws.events, settings.event_bus, event)
    if result["config"]["notify"]["sns"]:
        notify(aws, settings.topic_arn, event)
    aws.runs.close(run)
