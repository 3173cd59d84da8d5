"""A stack's resources in moto, in process or behind its server: what template.yaml creates that the functions touch."""

import json
from collections.abc import Callable
from typing import Any

import boto3
from tiny_tokenizer import tokenizer_files

from pipeline.runs.states import Run, RunState
from pipeline.settings import Settings

DATA, ARTIFACTS, TABLE, BUS, PREFIX = "data-bucket", "artifact-bucket", "runs", "tunedrop-bus", "tunedrop"
STACK_ID = "7fb2c419-8e0a-4f2e-9c2f-0123456789ab"
MODELS = f"{PREFIX}-7fb2c419"  # the model package group
# The rules on our own bus: which function takes which detail types. tests/template holds them against template.yaml.
OWN_RULES = {
    "start_training": {"Dataset Validated", "Stop Requested", "Training Waiting", "Training Failed", "Results Published"},
    "validate_dataset": {"Validation Requested"},
    "deploy_model": {"Champion Changed", "Undeploy Requested"},
}
# What the command reads of the stack.
OUTPUTS = {
    "DataBucket": DATA,
    "ArtifactBucket": ARTIFACTS,
    "EventBusName": BUS,
    "RunTable": TABLE,
    "TopicArn": "arn:aws:sns:us-east-1:123456789012:topic",
    "DeadLetterQueueUrl": "queue",
    "SageMakerRoleArn": "role",
    "ModelPackageGroup": MODELS,
    "TrainingImageUri": "",
    "JobPrefix": PREFIX,
}
PLAN = "f00d"
SETTINGS = Settings(
    data_bucket=DATA, artifact_bucket=ARTIFACTS, run_table=TABLE, event_bus=BUS, job_prefix=PREFIX, topic_arn="topic"
)
# A run whose tests are to be started.
TRAINED_RUN = Run(
    run_id="cars-0123456789ab",
    dataset="cars",
    state=RunState.TRAINED,
    attempt=1,
    trigger="training_data/cars.jsonl@1",
    key="training_data/cars.jsonl",
    version_id="v",
    arrived="2026-01-01T00:00:00.000000+00:00",
    updated="2026-01-01T00:00:00.000000+00:00",
    model="base",
    plan=PLAN,
    artifacts=f"s3://{ARTIFACTS}/runs/cars-0123456789ab/training/{PREFIX}-train-cars-0123456789ab-1/output/model/",
)
IMAGE = "763104351884.dkr.ecr.us-east-1.amazonaws.com/pytorch:2.13-cu133-amzn2023-sagemaker"
SERVING_IMAGE = "763104351884.dkr.ecr.us-east-1.amazonaws.com/vllm:0.30.0-gpu-py312-cu130-ubuntu24.04-sagemaker"


def plan_request(kind: str) -> dict[str, Any]:
    """What release/release.py captures of ModelTrainer, in the parts that the functions read or replace."""
    return {
        "TrainingJobName": "captured",
        "AlgorithmSpecification": {
            "TrainingImage": IMAGE,
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["/bin/bash"],
            "ContainerArguments": ["-c", f"exec python -m trainer.job {kind}"],
        },
        "RoleArn": "arn:aws:iam::123456789012:role/SageMakerRole",
        "InputDataConfig": [],
        "OutputDataConfig": {"S3OutputPath": "s3://captured/", "CompressionType": "NONE"},
        "ResourceConfig": {"InstanceType": "ml.g5.4xlarge", "InstanceCount": 1, "VolumeSizeInGB": 30},
        "StoppingCondition": {"MaxRuntimeInSeconds": 3600},
    }


def create_resources(client: Callable[[str], Any] = boto3.client) -> dict[str, str]:
    """Create the resources, a base model and a launch plan; return the environment of a function."""
    s3 = client("s3")
    for bucket in (DATA, ARTIFACTS):
        s3.create_bucket(Bucket=bucket)
        s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    client("dynamodb").create_table(
        TableName=TABLE,
        BillingMode="PAY_PER_REQUEST",
        KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
        AttributeDefinitions=[{"AttributeName": name, "AttributeType": "S"} for name in ("id", "open", "arrived")],
        GlobalSecondaryIndexes=[
            {
                "IndexName": "open",
                "KeySchema": [
                    {"AttributeName": "open", "KeyType": "HASH"},
                    {"AttributeName": "arrived", "KeyType": "RANGE"},
                ],
                "Projection": {"ProjectionType": "ALL"},
            }
        ],
    )
    client("events").create_event_bus(Name=BUS)
    for name, body in {
        "config.json": b'{"architectures": ["Qwen3ForCausalLM"]}',
        "model.safetensors": b"{}",
        **tokenizer_files(),
    }.items():
        s3.put_object(Bucket=DATA, Key=f"models/base/{name}", Body=body)
    plan = {"digest": PLAN, "inference_image": SERVING_IMAGE, "train": plan_request("train"), "test": plan_request("test")}
    s3.put_object(Bucket=ARTIFACTS, Key=f"launch_plans/{PLAN}.json", Body=json.dumps(plan).encode())
    s3.put_object(Bucket=ARTIFACTS, Key="launch_plans/current.json", Body=json.dumps({"digest": PLAN}).encode())
    topic = client("sns").create_topic(Name="topic")["TopicArn"]
    return {
        "DATA_BUCKET": DATA,
        "ARTIFACT_BUCKET": ARTIFACTS,
        "RUN_TABLE": TABLE,
        "EVENT_BUS": BUS,
        "JOB_PREFIX": PREFIX,
        "INSTANCE_TYPES": "ml.g6e.4xlarge,ml.g5.4xlarge",
        "USE_SPOT": "true",
        "MAX_RUN_COST_USD": "0",
        "MAX_CONCURRENT_JOBS": "2",
        "DEFAULT_MODEL": "base",
        "TOPIC_ARN": topic,
        "MODEL_PACKAGE_GROUP": MODELS,
        "REPORT_LINK_HOURS": "12",
        "ENDPOINT_INSTANCE_TYPE": "ml.g5.xlarge",
        "ENDPOINT_MAX_INSTANCES": "2",
        "ENDPOINT_IDLE_MINUTES": "15",
        "ENDPOINT_BAKE_MINUTES": "5",
        "SERVING_ROLE_ARN": "arn:aws:iam::123456789012:role/ServingRole",
        "IMPORT_ROLE_ARN": "arn:aws:iam::123456789012:role/ImportRole",
        "KMS_KEY_ARN": "arn:aws:kms:us-east-1:123456789012:key/11111111-2222-3333-4444-555555555555",
        "ALARM_TOPIC_ARN": "arn:aws:sns:us-east-1:123456789012:alarms",
        "POWERTOOLS_SERVICE_NAME": "test",
        "POWERTOOLS_METRICS_NAMESPACE": "tunedrop",
    }
