"""SageMaker's quotas of instances: for each instance type, those of endpoints, of spot training and of training on demand.

The names are AWS's (https://docs.aws.amazon.com/general/latest/gr/sagemaker.html). AWS does not document the message; users
quote it, for example in https://github.com/zenml-io/zenml/issues/847.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from local_app.common import Json
from local_app.sagemaker.api import ServiceError


def quota_name(instance_type: str, spot: bool) -> str:
    """Return Service Quotas' name for the quota of an instance type, for spot training or for training on demand."""
    return f"{instance_type} for {'spot ' if spot else ''}training job usage"


def check_quotas(request: Json, running: Iterable[Json], limit: Callable[[str], int]) -> None:
    """Raise ServiceError(ResourceLimitExceeded) if a CreateTrainingJob request exceeds a quota.

    `running` are the open jobs, as requests or descriptions. `limit` returns the value of a quota by its name. "Each type's
    quota must cover the instance count you request for it. If any type falls short, the request is rejected"
    (https://docs.aws.amazon.com/sagemaker/latest/dg/train-instance-preferences.html).
    """
    used: dict[str, int] = {}
    for job in running:
        # Assumption: a job with several types counts for the selected type, and before the selection for its first.
        [name, count], *_ = _instances(job)
        used[name] = used.get(name, 0) + count
    for name, count in _instances(request):
        check_quota(name, used.get(name, 0), count, limit(name))


def check_quota(name: str, used: int, count: int, limit: int) -> None:
    """Raise ServiceError(ResourceLimitExceeded) if `count` more instances exceed the quota `name`."""
    if used + count > limit:
        raise ServiceError(
            "ResourceLimitExceeded",
            f"The account-level service limit '{name}' is {limit} Instances, with current utilization of {used} Instances "
            f"and a request delta of {count} Instances. Please use AWS Service Quotas to request an increase for this "
            "quota. If AWS Service Quotas is not available, contact AWS support to request an increase for this quota.",
        )


def _instances(job: Json) -> list[tuple[str, int]]:
    """Return the names of the quotas that a job uses, each with its number of instances."""
    resources, spot = job["ResourceConfig"], job.get("EnableManagedSpotTraining", False)
    preferences = resources.get("InstancePreferences", [])
    selected = resources.get("SelectedInstanceType")
    types = [each for each in preferences if selected in {None, each["InstanceType"]}] or [resources]
    count = resources.get("InstanceCount", 1)
    return [(quota_name(each["InstanceType"], spot), each.get("InstanceCount", count)) for each in types]
