"""A run's SageMaker jobs as DescribeTrainingJob shows them. Both kinds of job are training jobs for SageMaker."""

from typing import Any

from botocore.exceptions import ClientError
from pydantic import BaseModel, ConfigDict

from pipeline.aws import NO_SUCH, Aws, error_code
from pipeline.notify.announcements import announce_waiting
from pipeline.observability import logger
from pipeline.runs.states import Run
from pipeline.settings import Settings
from tunedrop.object_keys import JobName

# SageMaker reports missing capacity in two places: as an error code at once, or later as the reason of a failed job
# (https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_CreateTrainingJob.html#API_CreateTrainingJob_Errors).
NO_CAPACITY = ("ResourceLimitExceeded", "CapacityError", "InsufficientCapacityError")
# SageMaker's error codes for an unknown job, and for a job that has ended.


class TrainingJob(BaseModel):
    """The fields of DescribeTrainingJob's answer that the pipeline reads."""

    model_config = ConfigDict(extra="ignore")

    class _Transition(BaseModel):
        Status: str

    class _Artifacts(BaseModel):
        S3ModelArtifacts: str

    TrainingJobName: str
    TrainingJobStatus: str
    SecondaryStatus: str = ""
    FailureReason: str = ""
    ModelArtifacts: _Artifacts | None = None
    ResourceConfig: dict[str, Any] = {}
    SecondaryStatusTransitions: list[_Transition] = []

    @property
    def artifacts(self) -> str | None:
        """The S3 URI of the job's /opt/ml/model."""
        return self.ModelArtifacts.S3ModelArtifacts if self.ModelArtifacts else None

    @property
    def started(self) -> bool:
        """Whether an instance ever ran the job's container."""
        return any(transition.Status == "Training" for transition in self.SecondaryStatusTransitions)

    @property
    def final(self) -> bool:
        """Whether the job has ended."""
        return self.TrainingJobStatus in {"Completed", "Failed", "Stopped"}

    @property
    def at_limit(self) -> bool:
        """Whether SageMaker stopped the job at its time limit."""
        return self.SecondaryStatus in {"MaxRuntimeExceeded", "MaxWaitTimeExceeded"}

    @property
    def no_capacity(self) -> str | None:
        """Why the job never got an instance; None for a job that got one."""
        if self.TrainingJobStatus == "Failed" and self.FailureReason.startswith(NO_CAPACITY):
            return self.FailureReason[:1024]
        if self.SecondaryStatus == "MaxWaitTimeExceeded" and not self.started:
            return "no instance came within the waiting time"
        return None

    @property
    def instance_type(self) -> str | None:
        """The job's instance type; of several on demand, the type that SageMaker selected. None before the selection."""
        return self.ResourceConfig.get("SelectedInstanceType") or self.ResourceConfig.get("InstanceType")


def describe(name: str, aws: Aws) -> TrainingJob | None:
    """Return a job as SageMaker describes it, None for an unknown job."""
    try:
        return TrainingJob.model_validate(aws.sagemaker.describe_training_job(TrainingJobName=name))
    except ClientError as error:
        if error_code(error) not in NO_SUCH:
            raise
        return None


def stop(name: str, aws: Aws) -> TrainingJob | None:
    """Ask a job to stop and return its description, None for an unknown job."""
    try:
        aws.sagemaker.stop_training_job(TrainingJobName=name)
    except ClientError as error:
        if error_code(error) not in NO_SUCH:
            raise
    return describe(name, aws)


def run_of_job(name: str, settings: Settings, aws: Aws) -> tuple[Run, TrainingJob] | None:
    """Return a job and its run; None for a job of another stack or of an earlier attempt.

    A job without capacity begins the run's next attempt. A second delivery of that job's event announces again that the run
    waits: the first delivery may have ended before its announcement. Raises LookupError for a job unknown to SageMaker.
    """
    try:
        parsed = JobName.parse(name, settings.job_prefix)
    except ValueError as error:
        logger.warning("ignored a job", reason=str(error))
        return None
    run = aws.runs.get(parsed.run_id)
    if run is not None and run.waits and run.attempt == parsed.attempt + 1:
        announce_waiting(run, settings, aws)
    if run is None or run.attempt != parsed.attempt:
        logger.info("ignored a job of an earlier attempt", job=name)
        return None
    job = describe(name, aws)
    if job is None:
        raise LookupError(f"SageMaker has no training job '{name}'")
    return run, job
