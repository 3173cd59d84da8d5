"""A test job ended: evaluate the tuned model, write the report, register the model, and announce the results."""

import msgspec

from pipeline.aws import Aws
from pipeline.jobs.launch import wait_for_next_attempt
from pipeline.jobs.training_job import TrainingJob, run_of_job
from pipeline.notify import events
from pipeline.notify.announcements import announce_failure, notify
from pipeline.notify.events import RunEvent
from pipeline.publish.decide import decide
from pipeline.publish.evidence import Evidence, read, read_evidence
from pipeline.publish.index import add_to_index, indexed_run
from pipeline.publish.registry import register
from pipeline.publish.report import render_report
from pipeline.publish.result import model_quality, run_result, summary
from pipeline.publish.trackers import links as tracker_links
from pipeline.publish.trackers import log_verdict
from pipeline.runs.states import Run, RunState
from pipeline.settings import PublishSettings
from pipeline.stages.champions import announce_champion, settle
from tunedrop import object_keys


def testing_ended(name: str, settings: PublishSettings, aws: Aws) -> Run | None:
    """Publish a run after the end of its test job and return it; None for a running job or an earlier attempt's job."""
    pair = run_of_job(name, settings, aws)
    if pair is None or not pair[1].final:
        return None
    run, job = pair
    if run.state == RunState.TRAINED:
        # The job ended before its creation was recorded: record the creation first.
        run = aws.runs.move(run, RunState.TESTING, test_job=name, reason=None, not_before=None)
    if run.state == RunState.TESTING:
        run = _after_tests(run, job, settings, aws)
    if run.state == RunState.TESTED:
        run = decide_and_publish(run, settings, aws)
    if run.state == RunState.PUBLISHED:
        announce(run, settings, aws)
    elif run.failed:
        announce_failure(run, settings, aws)
    return run


def _after_tests(run: Run, job: TrainingJob, settings: PublishSettings, aws: Aws) -> Run:
    """Move a run to the state that its ended test job leads to."""
    if job.TrainingJobStatus == "Completed":
        return aws.runs.move(run, RunState.TESTED)
    if job.no_capacity:  # only the tests begin another attempt: the training stays valid
        return wait_for_next_attempt(run, RunState.TRAINED, job.no_capacity, settings, aws)
    if job.TrainingJobStatus == "Stopped" and not job.at_limit:
        return aws.runs.move(run, RunState.CANCELLED, reason="the inference tests were stopped")
    reason = f"the inference tests {job.TrainingJobStatus.lower()}: {job.FailureReason or job.SecondaryStatus}"
    return aws.runs.move(run, RunState.TESTING_FAILED, reason=reason[:1024])


def decide_and_publish(run: Run, settings: PublishSettings, aws: Aws) -> Run:
    """Write a tested run's verdict, then publish the run. Without a verdict, the run is returned as `decide` left it.

    The line is settled first: the event of a package that a person approved or rejected may be late, and the verdict counts
    against the champion that the registry has.
    """
    evidence = read_evidence(run, settings.artifact_bucket, aws)
    if run.verdict is None:
        settle(run.line, settings, aws)
        run = decide(run, evidence, settings, aws)
    return publish(run, evidence, settings, aws) if run.state == RunState.TESTED and run.verdict else run


def publish(run: Run, evidence: Evidence, settings: PublishSettings, aws: Aws) -> Run:
    """Write the report, register the model package, write `result.json`, index the run and tell the tracker: in order.

    `result.json` is the commit mark: the index lists only runs with one. The jobs' files and the run's tries determine every
    byte: publishing twice writes the same bytes.
    """
    bucket = settings.artifact_bucket
    result = run_result(run, evidence, settings)
    html = render_report(
        result,
        receipt=evidence.receipt,
        metrics=evidence.metrics,
        tests=evidence.tests,
        suite=evidence.suite,
        probe=evidence.probe,
        alerts=evidence.alerts,
        rollouts=evidence.rollouts,
    )
    _write(aws, bucket, object_keys.run_key(run.run_id, "report.html"), html.encode(), "text/html; charset=utf-8")
    quality = msgspec.json.format(msgspec.json.encode(model_quality(result)))
    _write(aws, bucket, object_keys.run_key(run.run_id, "model_quality.json"), quality, "application/json")
    result["model_package"] = register(run, evidence.trained, result, evidence.plan, settings, aws)
    body = msgspec.json.format(msgspec.json.encode(result))
    _write(aws, bucket, object_keys.run_key(run.run_id, "result.json"), body, "application/json")
    add_to_index(aws, bucket, indexed_run(result, evidence.metrics, run.updated, run.rows))
    log_verdict(result, html, evidence.plan["train"].get("Environment", {}), aws)
    return aws.runs.move(run, RunState.PUBLISHED, model_package=result["model_package"])


def _write(aws: Aws, bucket: str, key: str, body: bytes, kind: str, **condition: str) -> None:
    aws.s3.put_object(Bucket=bucket, Key=key, Body=body, ContentType=kind, **condition)


def announce(run: Run, settings: PublishSettings, aws: Aws) -> None:
    """Free a published run's slot, announce its results and close the run. Idempotent."""
    if run.open is None:
        return
    aws.runs.release(run)
    report = object_keys.run_key(run.run_id, "report.html")
    folder = f"s3://{settings.artifact_bucket}/{object_keys.run_key(run.run_id)}"
    result = msgspec.json.decode(read(aws, settings.artifact_bucket, object_keys.run_key(run.run_id, "result.json")))
    event = RunEvent(
        detail_type=events.PUBLISHED,
        run=run,
        links={
            "report": f"s3://{settings.artifact_bucket}/{report}",
            "result": folder + "result.json",
            "model": result["artifacts"]["merged_model"],
        },
        extra=summary(result),
    )
    events.put_event(aws.events, settings.event_bus, event)
    if result["config"]["notify"]["sns"]:
        link = None
        if settings.report_link_hours:
            link = aws.s3.generate_presigned_url(
                "get_object",
                Params={"Bucket": settings.artifact_bucket, "Key": report},
                ExpiresIn=settings.report_link_hours * 3600,
            )
        notify(aws, settings.topic_arn, event, link, tracker_links(result["training"]))
    announce_champion(aws.lines.get(run.line), settings, aws)
    aws.runs.close(run)
