"""Bedrock's Custom Model Import: merged models imported, asked and deleted. Every function looks first, and can be repeated.

Bedrock has no stable name: each imported model has an ARN of its own. Bedrock sends events about customization and batch
jobs, and none about import jobs (https://docs.aws.amazon.com/bedrock/latest/userguide/
monitoring-eventbridge-how-it-works.html), so a job that is not done raises NotYetError.
"""

import re
from typing import Any

import msgspec
from botocore.exceptions import ClientError

from pipeline.aws import Aws, error_code
from pipeline.serving import identity
from pipeline.serving.served import Served
from pipeline.serving.waiting import DeploymentFailedError, NotYetError
from pipeline.settings import DeploySettings

MOST_CHARACTERS = 63  # of a job's name, and of a model's (CreateModelImportJob)


def import_name(wanted: Served, number: int) -> str:
    """Return the name of a run's import in the line's deployment of this number; the imported model has the same.

    A job's name is never free again, and a run may be imported again. `importedModelName` has the pattern
    `([0-9a-zA-Z][_-]?)+`, no two dashes one after the other.
    """
    end = f"-{wanted.run_id.rpartition('-')[2][:8]}-{number}"
    beginning = re.sub("-+", "-", wanted.component)[: MOST_CHARACTERS - len(end)]
    return beginning.rstrip("-") + end


def import_model(name: str, wanted: Served, settings: DeploySettings, aws: Aws) -> str:
    """Import a merged model, and return its ARN. Raises NotYetError until it is imported, and DeploymentFailedError.

    Bedrock recognizes the architecture by the model's files
    (https://docs.aws.amazon.com/bedrock/latest/userguide/model-customization-import-model.html).
    """
    job = _job(name, aws)
    if job is None:
        _create(name, wanted, settings, aws)
        raise NotYetError(f"the import job {name} is created")
    if job["status"] == "Failed":
        raise DeploymentFailedError(f"the import job {name} failed: {job.get('failureMessage', 'no reason')}")
    if job["status"] != "Completed":
        raise NotYetError(f"the import job {name} is {job['status']}")
    return str(job["importedModelArn"])


def invoke(model: str, body: dict[str, Any], aws: Aws) -> identity.Answer:
    """Ask an imported model, by its ARN, and return its answer.

    Raises NotYetError if it does not answer now, and DeploymentFailedError if its answer is no chat completion.
    Models imported since 11 November 2025 take OpenAI's chat completions. One without a copy answers ModelNotReadyException
    until it has one (https://docs.aws.amazon.com/bedrock/latest/userguide/invoke-imported-model.html).
    """
    try:
        answer = aws.bedrock_runtime.invoke_model(
            modelId=model, contentType="application/json", accept="application/json", body=msgspec.json.encode(body)
        )
    except ClientError as error:
        raise NotYetError(f"{model} does not answer: {error_code(error)}: {error.response['Error']['Message']}") from None
    try:
        return identity.answer_of(answer["body"].read(), model)
    except NotYetError as error:  # Bedrock's own servers answer, and answer so for ever
        raise DeploymentFailedError(str(error)) from None


def remove_import(name: str, aws: Aws) -> None:
    """Delete the model that a job imports. Raises NotYetError while the job goes on: Bedrock cannot stop it."""
    job = _job(name, aws)
    if job is None:
        return
    if job["status"] == "InProgress":
        raise NotYetError(f"the import job {name} goes on, and Bedrock cannot stop it")
    if model := job.get("importedModelArn"):
        remove_model(model, aws)


def remove_model(model: str, aws: Aws) -> None:
    """Delete an imported model, by its ARN, if it is there."""
    try:
        aws.bedrock.get_imported_model(modelIdentifier=model)
    except aws.bedrock.exceptions.ResourceNotFoundException:
        return
    aws.bedrock.delete_imported_model(modelIdentifier=model)


def _job(name: str, aws: Aws) -> dict[str, Any] | None:
    """Return GetModelImportJob's answer, None without such a job. Assumption: a name without one is not found."""
    try:
        answer: dict[str, Any] = aws.bedrock.get_model_import_job(jobIdentifier=name)
    except aws.bedrock.exceptions.ResourceNotFoundException:
        return None
    return answer


def _create(name: str, wanted: Served, settings: DeploySettings, aws: Aws) -> None:
    """Create an import job. Raises NotYetError at a quota, of jobs at a time or of models, and DeploymentFailedError."""
    tags = [{"key": "tunedrop:prefix", "value": settings.job_prefix}]
    try:
        aws.bedrock.create_model_import_job(
            jobName=name,
            importedModelName=name,
            roleArn=settings.import_role_arn,
            modelDataSource={"s3DataSource": {"s3Uri": wanted.merged}},
            clientRequestToken=name,
            jobTags=tags,
            importedModelTags=tags,
            **({"importedModelKmsKeyId": settings.kms_key_arn} if settings.kms_key_arn else {}),
        )
    except ClientError as error:
        reason = f"Bedrock does not import {name}: {error_code(error)}: {error.response['Error']['Message']}"
        if error_code(error) == "ServiceQuotaExceededException":
            raise NotYetError(reason) from None
        if error_code(error) == "ValidationException":
            raise DeploymentFailedError(reason) from None
        raise
