"""Training jobs: their operations, and the state machine behind DescribeTrainingJob.

A job's record is its DescribeTrainingJob response. Every change of status writes the record and its event in one
transaction. One thread per open job drives the job from Starting to its end, through interruptions.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from local_app.common import Json
from local_app.sagemaker.api import ServiceError, fitting, not_found, page
from local_app.sagemaker.job_process import JobProcess, Outcome
from local_app.sagemaker.job_requests import check_request, new_job
from local_app.sagemaker.quotas import check_quotas
from local_app.sagemaker.sandbox import find_sandbox
from local_app.sagemaker.services import Services
from local_app.sagemaker.store import Store
from pipeline.notify.job_events import state_change_event

logger = logging.getLogger(__name__)

FINAL = ("Completed", "Failed", "Stopped")
MESSAGES = {
    "Starting": "Preparing the instances for training",
    "Downloading": "Downloading input data",
    "Training": "Training image download completed. Training in progress.",
    "Uploading": "Uploading generated training model",
    "Completed": "Training job completed",
    "Stopping": "Stopping the training job",
    "Stopped": "Training job stopped",
    "MaxRuntimeExceeded": "Resource released as training job exceeded max runtime",
    "MaxWaitTimeExceeded": "Training job stopped as it exceeded the max wait time",
    "Interrupted": "Training job interrupted: Spot capacity was taken back",
}


class TrainingJobs:
    """The training jobs of one account and region, and the processes that run them."""

    def __init__(
        self,
        store: Store,
        folder: Path,
        services: Services,
        arn_prefix: str,
        *,
        max_instances: int,
        quotas: Mapping[str, int],
        without_capacity: Collection[str],
        grace: float,
        checkpoint_interval: float,
        private: Path | None,
    ) -> None:
        self._store, self._folder, self._services, self._arn_prefix = store, folder, services, arn_prefix
        self._max_instances, self._quotas = max_instances, quotas
        self._without_capacity, self._grace = without_capacity, grace
        self._checkpoint_interval = checkpoint_interval
        self._sandbox = find_sandbox(private)
        self._lock = threading.Lock()  # taken before the store's; guards _processes together with a job's status
        self._processes: dict[str, JobProcess] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._closing = False

    # -------------------------------------------------------------------------------------------------- operations

    def create_training_job(self, request: Json) -> Json:
        """Check, store and start a job. Returns at once, as AWS does."""
        check_request(request, self._services.region)
        self._services.check_role(request["RoleArn"])
        name = request["TrainingJobName"]
        with self._lock, self._store.transaction():
            if self._store.get("job", name):
                raise ServiceError(
                    "ResourceInUse",
                    f"Training job names must be unique within an AWS account and region, "
                    f"and {self._arn(name)} exists already.",
                )
            running = [job for job in self._store.all("job") if job["TrainingJobStatus"] not in FINAL]
            check_quotas(request, running, lambda quota: self._quotas.get(quota, self._max_instances))
            job = new_job(request, self._arn(name))
            self._store.put("tags", job["TrainingJobArn"], {tag["Key"]: tag["Value"] for tag in request.get("Tags", [])})
            self._record(job, "Starting", "InProgress", "Starting the training job")
        self._start(name)
        return {"TrainingJobArn": job["TrainingJobArn"]}

    def describe_training_job(self, request: Json) -> Json:
        """Return the job's record."""
        return self._get(request["TrainingJobName"])

    def list_training_jobs(self, request: Json) -> Json:
        """Return summaries, filtered and paged."""
        jobs = [
            job
            for job in self._store.all("job")
            if request.get("StatusEquals", job["TrainingJobStatus"]) == job["TrainingJobStatus"]
        ]
        result = page(jobs, request, "TrainingJobName")
        result["TrainingJobSummaries"] = [fitting("TrainingJobSummary", job) for job in result.pop("items")]
        return result

    def stop_training_job(self, request: Json) -> Json:
        """Stop a job: its process gets SIGTERM, and SIGKILL after the grace time."""
        name = request["TrainingJobName"]
        with self._lock:
            job = self._get(name)
            if job["TrainingJobStatus"] in FINAL:
                raise ServiceError(
                    "ValidationException",
                    f"The request was rejected because the training job is in status {job['TrainingJobStatus']}.",
                )
            if job["TrainingJobStatus"] != "Stopping":
                self._move(name, "Stopping")
            if name in self._processes:
                self._processes[name].stop("Stopped")
        return {}

    def interrupt(self, name: str) -> None:
        """Take a spot job's instance away, as AWS does. Raises ServiceError (409) for a job that has no instance."""
        with self._lock:
            job = self._get(name)
            if not job.get("EnableManagedSpotTraining") or job["SecondaryStatus"] not in ("Downloading", "Training"):
                kind = "spot" if job.get("EnableManagedSpotTraining") else "on-demand"
                raise ServiceError(
                    "Conflict",
                    f"Only a spot job that is Downloading or Training can be interrupted; {name} is {kind} and in status "
                    f"{job['TrainingJobStatus']}/{job['SecondaryStatus']}.",
                    409,
                )
            self._processes[name].stop("Interrupted")

    def counts(self) -> dict[str, int]:
        """Return the number of jobs in each status."""
        result: dict[str, int] = {}
        for job in self._store.all("job"):
            result[job["TrainingJobStatus"]] = result.get(job["TrainingJobStatus"], 0) + 1
        return result

    # --------------------------------------------------------------------------------------------------- lifecycle

    def resume(self) -> None:
        """Start the open jobs of an earlier emulator again. Their processes died with it, as in a spot interruption."""
        for job in self._store.all("job"):
            name = job["TrainingJobName"]
            if job["TrainingJobStatus"] in FINAL:
                continue
            logger.warning(
                "%s was %s when the emulator ended; it continues from its checkpoints", name, job["SecondaryStatus"]
            )
            if job["TrainingJobStatus"] == "InProgress" and job["SecondaryStatus"] != "Starting":
                self._move(name, "Interrupted", message="The machine that ran the training job went away")
                self._move(name, "Starting")
            self._start(name)

    def close(self) -> None:
        """End all processes (SIGTERM, SIGKILL within five seconds). The jobs stay open and continue after resume()."""
        with self._lock:
            self._closing = True
            processes, threads = list(self._processes.values()), list(self._threads.values())
            for process in processes:
                process.stop("Shutdown")
        deadline = time.monotonic() + min(5, self._grace)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for process in processes:
            process.kill()
        for thread in threads:
            thread.join(5)

    def _start(self, name: str) -> None:
        """Start the thread that drives the job."""
        thread = threading.Thread(target=self._drive, args=(name,), name=name, daemon=True)
        with self._lock:
            self._threads[name] = thread
        thread.start()

    def _drive(self, name: str) -> None:
        """Run a job to its end, with a new process after each interruption."""
        try:
            while self._run_once(name):
                pass
        except Exception as error:  # no job may stay without a final status
            logger.exception("%s", name)
            self._end(name, Outcome("Failed", f"InternalServerError: We encountered an internal error. {error!r}"[:1024]))
        finally:
            with self._lock:
                self._processes.pop(name, None)
                self._threads.pop(name, None)

    def _run_once(self, name: str) -> bool:
        """Run the job's process once. Returns True when it was interrupted and must run again."""
        with self._lock:
            if self._closing:
                return False
            job = self._get(name)
            process = JobProcess(
                job,
                self._folder / name,
                self._services.assume(job["RoleArn"]),
                self._sandbox,
                lambda secondary: self._move(name, secondary),
                network=self._has_network(job),
                grace=self._grace,
                checkpoint_interval=self._checkpoint_interval,
            )
            self._processes[name] = process
            if job["TrainingJobStatus"] == "Stopping":
                process.stop("Stopped")
        if self._find_capacity(job):
            (self._folder / name).mkdir(mode=0o700, exist_ok=True)
            outcome = process.run()
        else:
            outcome = Outcome(
                "Failed",
                "CapacityError: Unable to provision requested ML compute capacity. Please retry using a different ML "
                "instance type or after some time.",
            )
        with self._lock:
            if outcome.status == "Shutdown":
                return False
            job = self._get(name)
            if outcome.status == "Interrupted" and job["TrainingJobStatus"] == "InProgress":
                self._move(name, "Interrupted", **training_time(job, outcome))
                self._move(name, "Starting")
                return True
            if job["TrainingJobStatus"] == "Stopping" and outcome.status in ("Completed", "Interrupted"):
                outcome.status = "Stopped"
            self._end(name, outcome)
            process.discard()
            return False

    def _find_capacity(self, job: Json) -> bool:
        """Return whether an instance type of the job has capacity; of a preference list, select the first that has."""
        resources = job["ResourceConfig"]
        preferences = [choice["InstanceType"] for choice in resources.get("InstancePreferences", [])]
        choices = preferences or [resources["InstanceType"]]
        available = [choice for choice in choices if choice not in self._without_capacity]
        if available and preferences:
            resources["SelectedInstanceType"] = available[0]
            self._change(job["TrainingJobName"], ResourceConfig=resources)
        return bool(available)

    def _has_network(self, job: Json) -> bool:
        if job.get("EnableNetworkIsolation"):
            return False
        return "VpcConfig" not in job or self._services.reach_internet(job["VpcConfig"]["Subnets"])

    def _end(self, name: str, outcome: Outcome) -> None:
        """Move the job to its final status."""
        job = self._get(name)
        final: Json = training_time(job, outcome)
        if outcome.failure_reason:
            final["FailureReason"] = outcome.failure_reason
        if outcome.metrics:
            final["FinalMetricDataList"] = outcome.metrics
        if "TrainingStartTime" in job:
            final["TrainingEndTime"] = time.time()
        status = outcome.status if outcome.status in ("Completed", "Failed") else "Stopped"
        self._move(name, outcome.status, status, outcome.failure_reason, **final)

    def _move(self, name: str, secondary: str, status: str = "", message: str = "", **changes: Any) -> None:
        """Enter a secondary status: write its transition and its event."""
        with self._store.transaction():
            job = self._get(name) | changes
            if job["TrainingJobStatus"] == "Stopping" and secondary in ("Downloading", "Training"):
                return  # a stop was requested meanwhile, and ends the process
            if not status:
                status = "Stopping" if secondary == "Stopping" else job["TrainingJobStatus"]
            if secondary == "Downloading":
                job.setdefault("TrainingStartTime", time.time())
            self._record(job, secondary, status, message or MESSAGES[secondary])

    def _change(self, name: str, **changes: Any) -> None:
        with self._store.transaction():
            self._store.put("job", name, self._get(name) | changes)

    def _record(self, job: Json, secondary: str, status: str, message: str) -> None:
        now = time.time()
        transitions = job["SecondaryStatusTransitions"]
        if transitions:
            transitions[-1]["EndTime"] = now
        transitions.append({"Status": secondary, "StartTime": now, "StatusMessage": message})
        if status in FINAL:
            transitions[-1]["EndTime"] = now
        job |= {"TrainingJobStatus": status, "SecondaryStatus": secondary, "LastModifiedTime": now}
        self._store.put("job", job["TrainingJobName"], job)
        self._store.enqueue(state_change_event(job, self._store.get("tags", job["TrainingJobArn"]) or {}))
        logger.info("%s: %s/%s %s", job["TrainingJobName"], status, secondary, job.get("FailureReason", ""))

    def _get(self, name: str) -> Json:
        job = self._store.get("job", name)
        if job is None:
            raise not_found()
        return job

    def _arn(self, name: str) -> str:
        return f"{self._arn_prefix}:training-job/{name}"


def training_time(job: Json, outcome: Outcome) -> Json:
    """Return the job's training seconds over all its processes. As on AWS, absent (not 0) before the first second."""
    seconds = job.get("TrainingTimeInSeconds", 0) + outcome.seconds
    return {"TrainingTimeInSeconds": seconds, "BillableTimeInSeconds": seconds} if seconds else {}
