"""A stack's resources in moto, in process or behind its server: what template.yaml creates that the functions touch."""

import json
from typing import Any

import boto3

DATA, ARTIFACTS, TABLE, BUS, PREFIX = "data-bucket", "artifact-bucket", "runs", "tunedrop-bus", "tunedrop"
PLAN = "f00d"
IMAGE = "763104351884.dkr.ecr.us-east-1.amazonaws.com/pytorch-training:2.9.0-gpu-py312-cu130-ubuntu22.04-sagemaker"


def plan_request(kind: str) -> dict[str, Any]:
    """What trainer/release.py captures of ModelTrainer, in the parts that the functions read or replace."""
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


def create_resources() -> dict[str, str]:
    """Create the resources, a base model and a launch plan; return the environment of a function."""
    s3 = boto3.client("s3")
    for bucket in (DATA, ARTIFACTS):
        s3.create_bucket(Bucket=bucket)
        s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    boto3.client("dynamodb").create_table(
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
    boto3.client("events").create_event_bus(Name=BUS)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        s3.put_object(Bucket=DATA, Key=f"models/base/{name}", Body=b"x")
    plan = {"digest": PLAN, "train": plan_request("train"), "test": plan_request("test")}
    s3.put_object(Bucket=ARTIFACTS, Key=f"launch_plans/{PLAN}.json", Body=json.dumps(plan).encode())
    s3.put_object(Bucket=ARTIFACTS, Key="launch_plans/current.json", Body=json.dumps({"digest": PLAN}).encode())
    boto3.client("sagemaker").create_model_package_group(ModelPackageGroupName="models")
    topic = boto3.client("sns").create_topic(Name="topic")["TopicArn"]
    return {
        "DATA_BUCKET": DATA,
        "ARTIFACT_BUCKET": ARTIFACTS,
        "RUN_TABLE": TABLE,
        "EVENT_BUS": BUS,
        "JOB_PREFIX": PREFIX,
        "INSTANCE_TYPES": "ml.g6e.4xlarge,ml.g5.4xlarge",
        "USE_SPOT": "true",
        "MAX_CONCURRENT_JOBS": "2",
        "DEFAULT_MODEL": "base",
        "TOPIC_ARN": topic,
        "MODEL_PACKAGE_GROUP": "models",
        "POWERTOOLS_SERVICE_NAME": "test",
    }
