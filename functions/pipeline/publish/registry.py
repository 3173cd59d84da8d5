"""The model package of a published run in SageMaker's model registry."""

import re
from typing import Any

from botocore.exceptions import ClientError

from pipeline.aws import NO_SUCH, Aws, error_code
from pipeline.observability import logger
from pipeline.runs.lines import Line
from pipeline.runs.states import Run
from pipeline.settings import PublishSettings
from tunedrop.plain import one_line

_UNREGISTRABLE = re.compile(r"[^\w .:/=+\-@]")  # in a model package's CustomerMetadataProperties
# The approval status of each verdict.
APPROVAL = {"APPROVED": "Approved", "PENDING": "PendingManualApproval", "REJECTED": "Rejected"}


def register(
    run: Run, trained: str, result: dict[str, Any], plan: dict[str, Any], settings: PublishSettings, aws: Aws
) -> str:
    """Register the merged model in the model package group, once per attempt; return the package's ARN.

    The client token makes a repeated registration return the first package
    (https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_CreateModelPackage.html).
    """
    comparison, artifacts = result["comparison"], result["artifacts"]
    description = f"{run.model} tuned with GRPO + LoRA on {run.dataset}: {' '.join(result['reasons'])}"
    limit = result["config"]["max_seq_length"]
    # By default vLLM serves fp32 weights in fp16, which would round the adapter away
    # (https://docs.vllm.ai/en/latest/configuration/engine_args/).
    dtype = result["training"]["proofs"]["merge_parity"]["dtype"]
    properties = {
        "run_id": run.run_id,
        "line": run.line,
        "attempt": str(run.attempt),
        "verdict": result["verdict"],
        "base_model": run.model,
        "base_model_license": result["base_model_license"] or "not stated",
        "base_score": f"{comparison['base_score']:.6f}",
        "tuned_score": f"{comparison['tuned_score']:.6f}",
        "lift_low": f"{comparison['lift_low']:.6f}",
        "trainer": run.plan,
        "data": result["source"],
        "data_version": run.version_id,
        "config": f"{artifacts['input']}config.json",
        "adapter": artifacts["adapter"],
        "report": artifacts["report"],
    }
    _create_group(settings.model_package_group, aws)
    answer = aws.sagemaker.create_model_package(
        ModelPackageGroupName=settings.model_package_group,
        ModelPackageDescription=one_line(description)[:1024],
        ModelApprovalStatus=APPROVAL[result["verdict"]],
        ClientToken=f"{run.run_id}-{run.attempt}"[-36:],  # long names differ at their end
        Domain="NATURAL_LANGUAGE_PROCESSING",
        Task="TEXT_GENERATION",
        InferenceSpecification={
            "Containers": [
                ({"Image": plan["inference_image"]} if plan["inference_image"] else {})
                | {
                    # vLLM behind SageMaker's /invocations: each SM_VLLM_* variable is a flag of vLLM.
                    "Environment": {"SM_VLLM_MODEL": "/opt/ml/model", "SM_VLLM_DTYPE": dtype}
                    | ({"SM_VLLM_MAX_MODEL_LEN": str(limit)} if limit else {}),
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
        ModelMetrics={
            "ModelQuality": {"Statistics": {"ContentType": "application/json", "S3Uri": artifacts["model_quality"]}}
        },
        CustomerMetadataProperties={name: metadata_value(value) for name, value in properties.items()},
    )
    arn = str(answer["ModelPackageArn"])
    aws.lines.add_package(run.line, version_of(arn), run.run_id, arn)
    return arn


def approved_packages(line: Line, settings: PublishSettings, aws: Aws) -> list[str]:
    """Return the ARNs of a line's approved model packages, oldest first.

    The registry's list may lag behind: the champion's package is looked up by itself.
    """
    pages = aws.sagemaker.get_paginator("list_model_packages").paginate(
        ModelPackageGroupName=settings.model_package_group, ModelApprovalStatus="Approved"
    )
    try:
        arns = {item["ModelPackageArn"] for page in pages for item in page["ModelPackageSummaryList"]}
    except ClientError as error:
        if error_code(error) not in NO_SUCH:
            raise
        arns = set()  # without a group, no package was ever registered
    if line.champion_package:
        arns -= {line.champion_package}
        arns |= {line.champion_package} if approval(line.champion_package, aws) == "Approved" else set()
    return sorted((arn for arn in arns if version_of(arn) in line.packages), key=lambda arn: int(version_of(arn)))


def approval(arn: str, aws: Aws) -> str | None:
    """Return a model package's approval status, None for a package that was deleted."""
    try:
        status: str = aws.sagemaker.describe_model_package(ModelPackageName=arn)["ModelApprovalStatus"]
    except ClientError as error:
        if error_code(error) not in NO_SUCH:
            raise
        return None
    return status


def version_of(arn: str) -> str:
    """Return the version of a model package: the last part of its ARN."""
    return arn.rpartition("/")[2]


def metadata_value(text: str) -> str:
    """Return a text as CustomerMetadataProperties takes it: 1 to 256 characters of a limited set."""
    return _UNREGISTRABLE.sub("_", text)[:256] or "_"


def _create_group(name: str, aws: Aws) -> None:
    """Create the model package group unless it exists. CloudFormation cannot create it in every region.

    The group comes before the package, as in the SageMaker SDK: no document says how CreateModelPackage fails without a
    group. The error code for an existing group has changed over time; both codes are those of the SDK's
    `_is_resource_already_exists_error`. Any other cause of a ValidationException shows at the package.
    """
    try:
        aws.sagemaker.create_model_package_group(
            ModelPackageGroupName=name,
            ModelPackageGroupDescription="Models tuned by Tunedrop, one version per published run.",
        )
    except ClientError as error:
        if error_code(error) not in {"ValidationException", "ResourceInUse"}:
            raise
        logger.info("the model package group was not created", detail=str(error))
