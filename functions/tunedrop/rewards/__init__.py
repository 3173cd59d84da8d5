"""Rewards: a run config names them, TRL calls them during training, and the inference tests score with them.

`registry` has the decorator that registers a reward, `spec` the config's entry, `reward` the way from an entry to scores.
Each of the modules imported first registers its rewards; their order is the order of the config reference.
"""

# isort: off
from tunedrop.rewards import text, structured, openai, code, judges, remote  # noqa: F401
# isort: on

from tunedrop.rewards.permissions import NO_PERMISSIONS, REWARD_ENVIRONMENT, RewardPermissions, reward_permissions
from tunedrop.rewards.registry import REWARDS, RewardType
from tunedrop.rewards.reward import Reward, build_rewards, score
from tunedrop.rewards.sample import RewardError, Sample, text_of
from tunedrop.rewards.spec import OnlyIf, RewardSpec, check_names

__all__ = [
    "NO_PERMISSIONS",
    "REWARDS",
    "REWARD_ENVIRONMENT",
    "OnlyIf",
    "Reward",
    "RewardError",
    "RewardPermissions",
    "RewardSpec",
    "RewardType",
    "Sample",
    "build_rewards",
    "check_names",
    "reward_permissions",
    "score",
    "text_of",
]
