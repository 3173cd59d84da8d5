"""Stopping the jobs of a run that has ended."""

from datetime import timedelta

from pipeline.aws import Aws
from pipeline.jobs.training_job import stop
from pipeline.notify.announcements import announce_failure
from pipeline.runs import clock
from pipeline.runs.states import Run
from pipeline.settings import Settings
from tunedrop.object_keys import JobName

# Lambda's longest invocation: after it, no function still works on an event that it got before
# (https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html).
LONGEST_INVOCATION = timedelta(minutes=15)


def end_stopped(run: Run, settings: Settings, aws: Aws) -> None:
    """Stop the jobs of a run that has ended, and announce its end.

    The announcement waits while a job still runs: the event of that job's end announces then. It also waits while a function
    may be creating the run's job: that function stops the job, or `reconcile` comes back to the run.
    """
    jobs = [stop(str(JobName(settings.job_prefix, kind, run.run_id, run.attempt)), aws) for kind in ("train", "test")]
    if any(job is not None and not job.final for job in jobs):
        return
    recent = run.updated > clock.ago(LONGEST_INVOCATION)
    if run.train_job is None and jobs[0] is None and recent and aws.runs.has_slot(run):
        return
    announce_failure(run, settings, aws)


def stop_if_over(run: Run, settings: Settings, aws: Aws) -> None:
    """Stop a new job whose run ended during the job's creation."""
    current = aws.runs.get(run.run_id)
    if current is not None and current.failed and current.attempt == run.attempt:
        end_stopped(current, settings, aws)
