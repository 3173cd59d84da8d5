"""SageMaker's quotas of training instances: one per instance type and way to buy it.

Names and words are AWS's (https://docs.aws.amazon.com/general/latest/gr/sagemaker.html; the message is not documented, it
is what users quote, for example in https://github.com/zenml-io/zenml/issues/847).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from local_app.common import Json
from local_app.sagemaker.api import ServiceError


def quota_name(instance_type: str, spot: bool) -> str:
    """Return what Service Quotas calls the quota of an instance type, for spot training or for training on demand."""
    return f"{instance_type} for {'spot ' if spot else ''}training job usage"


def check_quotas(request: Json, running: Iterable[Json], limit: Callable[[str], int]) -> None:
    """Raise ServiceError(ResourceLimitExceeded) if a CreateTrainingJob request is above a quota; `limit` is asked by name.

    `running` are the jobs that have not ended, as requested or described. "Each type's quota must cover the instance count
    you request for it. If any type falls short, the request is rejected"
    (https://docs.aws.amazon.com/sagemaker/latest/dg/train-instance-preferences.html).
    """
    used: dict[str, int] = {}
    for job in running:
        # Assumption: a job of several types counts for the one that was selected, and before that for its first.
        [name, count], *_ = _instances(job)
        used[name] = used.get(name, 0) + count
    for name, count in _instances(request):
        if used.get(name, 0) + count > limit(name):
            raise ServiceError(
                "ResourceLimitExceeded",
                f"The account-level service limit '{name}' is {limit(name)} Instances, with current utilization of "
                f"{used.get(name, 0)} Instances and a request delta of {count} Instances. Please use AWS Service Quotas to "
                "request an increase for this quota. If AWS Service Quotas is not available, contact AWS support to request "
                "an increase for this quota.",
            )


def _instances(job: Json) -> list[tuple[str, int]]:
    """Return the quotas that a job counts for, each with its number of instances."""
    resources, spot = job["ResourceConfig"], job.get("EnableManagedSpotTraining", False)
    preferences = resources.get("InstancePreferences", [])
    selected = resources.get("SelectedInstanceType")
    types = [each for each in preferences if selected in {None, each["InstanceType"]}] or [resources]
    count = resources.get("InstanceCount", 1)
    return [(quota_name(each["InstanceType"], spot), each.get("InstanceCount", count)) for each in types]
