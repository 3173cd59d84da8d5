"""Reward permissions: a stack says what its rewards may use, and its jobs read the permissions from their environment."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tunedrop.rewards.aws import Clients, HostTokens


@dataclass(frozen=True)
class RewardPermissions:
    """The resources that rewards may use. The default allows only rewards that need nothing but the completion and its row.

    `client` returns an AWS client for a service name, as `functools.cache(boto3.client)` does. Rewards call `client` for
    every batch, and the client's own timeouts and retries apply. `functions` are the ARNs that `lambda` rewards may call.
    `judge_model` is the model on Bedrock that may judge. `hosts` are the hosts of `http` rewards and of other judges, and
    `tokens` are the hosts' tokens. `allow_code` lets rewards run programs that a model wrote. `python_folder` holds the
    files of `python` rewards; None forbids them.
    """

    client: Clients | None = None
    functions: tuple[str, ...] = ()
    judge_model: str = ""
    hosts: tuple[str, ...] = ()
    tokens: HostTokens | None = None
    allow_code: bool = False
    python_folder: Path | None = None


NO_PERMISSIONS = RewardPermissions()
# Environment variable of a job → stack parameter. `release` writes the variables into the launch plan. validate_dataset
# reads the same plan, which is why validation accepts exactly the rewards that the job may run.
REWARD_ENVIRONMENT = {
    "REWARD_FUNCTION_ARNS": "RewardFunctionArns",
    "REWARD_JUDGE_MODEL": "RewardJudgeModel",
    "REWARD_HTTP_HOSTS": "RewardHttpHosts",
    "REWARD_HTTP_SECRET_ARN": "RewardHttpSecretArn",
    "ALLOW_CODE_REWARDS": "AllowCodeRewards",
    "ALLOW_PYTHON_REWARDS": "AllowPythonRewards",
}


def reward_permissions(
    environment: Mapping[str, str], client: Clients | None = None, python_folder: Path | None = None
) -> RewardPermissions:
    """Read the permissions from a job's environment (`REWARD_ENVIRONMENT`). A missing variable allows nothing."""

    def names(variable: str) -> tuple[str, ...]:
        return tuple(name for name in environment.get(variable, "").split(",") if name)

    secret = environment.get("REWARD_HTTP_SECRET_ARN", "")
    return RewardPermissions(
        client,
        functions=names("REWARD_FUNCTION_ARNS"),
        judge_model=environment.get("REWARD_JUDGE_MODEL", ""),
        hosts=names("REWARD_HTTP_HOSTS"),
        tokens=HostTokens(client, secret) if secret else None,
        allow_code=environment.get("ALLOW_CODE_REWARDS") == "true",
        python_folder=python_folder if environment.get("ALLOW_PYTHON_REWARDS") == "true" else None,
    )
