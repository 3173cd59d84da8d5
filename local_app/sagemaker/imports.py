"""Bedrock's Custom Model Import: jobs that copy a model's files from S3 and check them, each in a thread.

https://docs.aws.amazon.com/bedrock/latest/userguide/model-customization-import-model.html
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import uuid
from pathlib import Path

from botocore.exceptions import ClientError, EndpointConnectionError

from local_app.common import IMPORT_SESSION, Json
from local_app.sagemaker.api import JobError, ServiceError
from local_app.sagemaker.artifacts import fetch_model
from local_app.sagemaker.copies import Closed
from local_app.sagemaker.imported_models import KIND as MODEL_KIND
from local_app.sagemaker.imported_models import ImportedModels, now, page_of
from local_app.sagemaker.services import Services
from local_app.sagemaker.store import Store
from pipeline.validation.bedrock import refusals

logger = logging.getLogger(__name__)

KIND = "model-import-job"
# "Imported models per account" (https://docs.aws.amazon.com/general/latest/gr/bedrock.html#limits_bedrock).
MOST_MODELS = 3
RETRY_SECONDS = 1.0  # between two tries while S3 is not there
JOB_OPERATIONS = ("CreateModelImportJob", "GetModelImportJob", "ListModelImportJobs")
MODEL_OPERATIONS = ("GetImportedModel", "ListImportedModels", "DeleteImportedModel")


class ModelImports:
    """The import jobs of one account and region. `arn_prefix` is `arn:aws:bedrock:<region>:<account>`.

    A record has the members of GetModelImportJob, the request's `clientRequestToken`, and `importedModelTags`.
    """

    def __init__(self, store: Store, models: ImportedModels, services: Services, arn_prefix: str) -> None:
        self._store, self._models, self._services, self._arn_prefix = store, models, services, arn_prefix
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []

    # -------------------------------------------------------------------------------------------------- operations

    def create_model_import_job(self, request: Json) -> Json:
        """Check a request and begin to import. Returns at once, as AWS does.

        "If this token matches a previous request, Amazon Bedrock ignores the request, but does not return an error"
        (https://docs.aws.amazon.com/bedrock/latest/APIReference/API_CreateModelImportJob.html). Raises ServiceError.
        """
        key, identifier = request.get("importedModelKmsKeyId"), uuid.uuid4().hex[:12]
        if "s3DataSource" not in request["modelDataSource"]:
            raise ServiceError("ValidationException", "modelDataSource must have an s3DataSource.")
        if key and ":key/" not in key:
            raise ServiceError("ValidationException", "The local application takes an importedModelKmsKeyId that is an ARN.")
        created = now()
        job = request | {
            "jobArn": f"{self._arn_prefix}:{KIND}/{identifier}",
            "status": "InProgress",
            "creationTime": created,
            "lastModifiedTime": created,
            **({"importedModelKmsKeyArn": key} if key else {}),
        }
        if earlier := self._earlier(request):
            return earlier
        services = self._role_of(job)
        with self._store.transaction():
            if earlier := self._earlier(request):  # meanwhile
                return earlier
            self._check_new(request)
            self._store.put(KIND, request["jobName"], job)
        self._start(job, services)
        return job

    def get_model_import_job(self, request: Json) -> Json:
        """Return a job, by its ARN or its name. Raises ServiceError."""
        for job in self._store.all(KIND):
            if request["jobIdentifier"] in (job["jobArn"], job["jobName"]):
                return job
        raise ServiceError("ResourceNotFoundException", f"Could not find the import job {request['jobIdentifier']}.", 404)

    def list_model_import_jobs(self, request: Json) -> Json:
        """Return the jobs that a request asks for. Raises ServiceError for a token of another service."""
        status = request.get("statusEquals")
        jobs = [job for job in self._store.all(KIND) if status in (None, job["status"])]
        return page_of(jobs, request, "jobName", "modelImportJobSummaries")

    def resume(self) -> None:
        """Go on with the jobs of an earlier emulator."""
        for job in self._in_progress():
            self._start(job, self._services_of(job))

    def close(self) -> None:
        """Stop the jobs between two files. resume() goes on with them."""
        self._closing.set()
        for thread in self._threads:
            thread.join(5)

    # -------------------------------------------------------------------------------------------------- checks

    def _earlier(self, request: Json) -> Json | None:
        """Return the job of an earlier request with the same token, None without one."""
        token = request.get("clientRequestToken")
        jobs = self._store.all(KIND) if token else []
        return next((job for job in jobs if job.get("clientRequestToken") == token), None)

    def _check_new(self, request: Json) -> None:
        """Raise ServiceError unless the names are new and another model fits into the quota.

        Assumption: a model that is being imported counts, and its name is taken.
        """
        taken = [*self._models.all(), *({"modelName": job["importedModelName"]} for job in self._in_progress())]
        if self._store.get(KIND, request["jobName"]):
            raise ServiceError("ConflictException", f"The job name {request['jobName']} is already in use.")
        if request["importedModelName"] in [model["modelName"] for model in taken]:
            raise ServiceError("ConflictException", f"The model name {request['importedModelName']} is already in use.")
        if len(taken) >= MOST_MODELS:
            raise ServiceError(
                "ServiceQuotaExceededException",
                f"You have reached the limit of {MOST_MODELS} imported models per account. Delete one, and try again.",
            )

    def _role_of(self, job: Json) -> Services:
        """Return the services with a job's role. Raises ServiceError unless Bedrock can assume it.

        The words are those of CreateModelCustomizationJob
        (https://github.com/aws-samples/amazon-bedrock-workshop/issues/367).
        """
        services = self._services_of(job)
        try:
            _ = services.credentials
        except ClientError as error:
            raise ServiceError("ValidationException", "Could not assume provided IAM role.") from error
        return services

    def _services_of(self, job: Json) -> Services:
        return self._services.assume(job["roleArn"], IMPORT_SESSION + job["jobArn"].rpartition("/")[2])

    def _in_progress(self) -> list[Json]:
        return [job for job in self._store.all(KIND) if job["status"] == "InProgress"]

    # -------------------------------------------------------------------------------------------------- the import

    def _start(self, job: Json, services: Services) -> None:
        thread = threading.Thread(target=self._import, args=(job, services), name=f"import of {job['jobName']}", daemon=True)
        self._threads = [each for each in self._threads if each.is_alive()] + [thread]
        thread.start()

    def _import(self, job: Json, services: Services) -> None:
        """Import a model, and write how the job ended."""
        arn = f"{self._arn_prefix}:{MODEL_KIND}/{job['jobArn'].rpartition('/')[2]}"
        try:
            model = self._model(job, arn, services)
        except Closed:
            return
        except Exception as error:  # whatever the reason, the job must end, and say it
            if not isinstance(error, JobError):
                logger.exception("import of %s", job["jobName"])
            shutil.rmtree(self._models.folder(arn), ignore_errors=True)
            with self._store.transaction():
                self._end(job | {"status": "Failed", "failureMessage": str(error)[:2048]})
        else:
            with self._store.transaction():
                self._store.put(MODEL_KIND, arn, model)
                self._end(job | {"status": "Completed", "importedModelArn": arn})

    def _model(self, job: Json, arn: str, services: Services) -> Json:
        """Fetch a model's files with the job's role, and return the model's record. Raises JobError and Closed."""
        uri = job["modelDataSource"]["s3DataSource"]["s3Uri"].rstrip("/") + "/"
        while True:
            try:
                fetch_model(services.s3, uri, {}, self._models.folder(arn), self._check_closing)
                break
            except JobError as error:
                if not isinstance(error.__cause__, EndpointConnectionError):
                    raise
                self._closing.wait(RETRY_SECONDS)  # the AWS emulator starts later
        return {
            "modelArn": arn,
            "modelName": job["importedModelName"],
            "jobName": job["jobName"],
            "jobArn": job["jobArn"],
            "modelDataSource": job["modelDataSource"],
            "creationTime": now(),
            "modelArchitecture": architecture_of(self._models.folder(arn) / "model"),
            **({"modelKmsKeyArn": job["importedModelKmsKeyArn"]} if "importedModelKmsKeyArn" in job else {}),
            "tags": {tag["key"]: tag["value"] for tag in job.get("importedModelTags", [])},
        }

    def _end(self, job: Json) -> None:
        """Write a job's end (inside a transaction)."""
        ended = now()
        self._store.put(KIND, job["jobName"], job | {"lastModifiedTime": ended, "endTime": ended})
        logger.info("import job %s: %s %s", job["jobName"], job["status"], job.get("failureMessage", ""))

    def _check_closing(self) -> None:
        if self._closing.is_set():
            raise Closed


def architecture_of(folder: Path) -> str:
    """Return the architecture of a model whose files are complete, and which Bedrock imports. Raises JobError.

    "The model files must be in the Hugging Face weights format": config.json, .safetensors files, tokenizer_config.json, and
    tokenizer.json or tokenizer.model
    (https://docs.aws.amazon.com/bedrock/latest/userguide/model-customization-import-model.html).
    """
    for patterns in (
        ("config.json",),
        ("*.safetensors",),
        ("tokenizer_config.json",),
        ("tokenizer.json", "tokenizer.model"),
    ):
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            raise JobError(f"The model's files are incomplete: there is no {' and no '.join(patterns)}.")
    try:
        config = json.loads((folder / "config.json").read_bytes())
        reasons = refusals(config)
    except (ValueError, AttributeError) as error:
        raise JobError(f"The model's config.json cannot be read: {error}") from error
    if reasons:
        raise JobError(f"The model cannot be imported: {'; '.join(reasons)}")
    architecture: str = config["architectures"][0]
    return architecture
