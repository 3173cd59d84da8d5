"""A stack's decisions for every run, and the config that these decisions complete."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from tunedrop.config.model import ResolvedCompute, ResolvedConfig, RunConfig
from tunedrop.rewards import NO_PERMISSIONS, RewardPermissions


class Prices(NamedTuple):
    """SageMaker's prices in US dollars an hour by instance type, with their date and region.

    `on_demand` are the prices of training jobs, `hosting` those of endpoints.
    """

    dated: str
    region: str
    on_demand: dict[str, float]
    hosting: Mapping[str, float] = MappingProxyType({})


class Terms(NamedTuple):
    """A stack's decisions: parameters of the template, the released jobs' container image, and prices if known.

    A stack with an `endpoint_instance_type` serves approved models.
    """

    instance_types: Sequence[str]
    spot: bool = False
    max_run_cost_usd: float | None = None
    image: str = ""
    permissions: RewardPermissions = NO_PERMISSIONS
    prices: Prices | None = None
    endpoint_instance_type: str = ""


def resolve(config: RunConfig, terms: Terms) -> ResolvedConfig:
    """Return the config, completed with the stack's instance types, spot and cost limit. The lower cost limit applies."""
    limits = [limit for limit in (config.compute.max_cost_usd, terms.max_run_cost_usd) if limit is not None]
    compute = {
        "instance_type": config.compute.instance_type or list(terms.instance_types),
        "spot": terms.spot if config.compute.spot is None else config.compute.spot,
        "max_cost_usd": min(limits, default=None),
    }
    resolved = ResolvedCompute.model_validate(dict(config.compute) | compute)
    return ResolvedConfig.model_validate(dict(config) | {"compute": resolved})
