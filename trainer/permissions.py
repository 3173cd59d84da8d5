"""What the rewards of this job may use: its stack's parameters, which the launch plan put into its environment."""

import functools
import os
from typing import Any

from trainer import folders
from tunedrop.rewards import RewardPermissions, reward_permissions


def job_permissions() -> RewardPermissions:
    """Return what this job allows, `python` rewards from the channel `rewards`; in a shell, what is exported there."""

    @functools.cache
    def client(service: str) -> Any:
        import boto3

        return boto3.client(service, region_name=os.environ.get("AWS_REGION"))  # as SageMaker calls it

    return reward_permissions(os.environ, client, folders.channel("rewards"))
