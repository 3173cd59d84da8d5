"""The permissions of this job's rewards. The launch plan writes the stack's parameters into the job's environment."""

import functools
import os
from pathlib import Path
from typing import Any

from trainer import folders
from tunedrop.rewards import RewardPermissions, reward_permissions


def job_permissions(files: Path | None = None) -> RewardPermissions:
    """Read the permissions from the environment. The folder `files` holds the files of `python` rewards.

    Without it, the channel `rewards` does.
    """

    @functools.cache
    def client(service: str) -> Any:
        import boto3

        return boto3.client(service, region_name=os.environ.get("AWS_REGION"))  # SageMaker sets AWS_REGION

    return reward_permissions(os.environ, client, files or folders.channel("rewards"))
