"""The configuration files that SageMaker writes under /opt/ml, and the file in which a job reports its failure."""

from __future__ import annotations

from pathlib import Path

from local_app.common import Json


def host_names(job: Json) -> list[str]:
    """Return the names of a job's instances, `algo-1` and so on."""
    return [f"algo-{number + 1}" for number in range(job["ResourceConfig"].get("InstanceCount", 1))]


def config_files(job: Json, host: str) -> dict[str, Json]:
    """Return the content of /opt/ml/input/config/*.json, as SageMaker writes them for a host.

    Source: "How Amazon SageMaker AI Provides Training Information" in the developer guide. FastFile shows as File.
    """
    instance_type = job["ResourceConfig"].get("SelectedInstanceType") or job["ResourceConfig"]["InstanceType"]
    channels = {
        channel["ChannelName"]: {
            **({"ContentType": channel["ContentType"]} if "ContentType" in channel else {}),
            "TrainingInputMode": "File",
            "S3DistributionType": channel["DataSource"]["S3DataSource"].get("S3DataDistributionType", "FullyReplicated"),
            "RecordWrapperType": channel.get("RecordWrapperType", "None"),
        }
        for channel in job.get("InputDataConfig", [])
    }
    hosts = host_names(job)
    group = {"instance_group_name": "homogeneousCluster", "instance_type": instance_type, "hosts": hosts}
    return {
        "hyperparameters.json": job.get("HyperParameters", {}),
        "inputdataconfig.json": channels,
        "resourceconfig.json": {
            "current_host": host,
            "current_instance_type": instance_type,
            "current_group_name": "homogeneousCluster",
            "hosts": hosts,
            "instance_groups": [group],
            "network_interface_name": "lo",  # the one interface that every machine, and an isolated job, has
        },
    }


def failure_reason(failure_file: Path, exit_code: int) -> str:
    """Return a FailureReason in AWS's form: the failure file's text and the exit code, 1,024 characters at most."""
    text = ""
    if failure_file.is_file():
        with failure_file.open(errors="replace") as file:
            text = file.read(1024).strip()
    ending = f", exit code: {exit_code}"
    return f"AlgorithmError: {text or 'The entry point failed and wrote no failure file'}"[: 1024 - len(ending)] + ending
