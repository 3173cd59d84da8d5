"""Prices of jobs and endpoints: hours times USD an hour times instances."""

from typing import Any


def on_demand_prices(plan: dict[str, Any]) -> dict[str, float]:
    """Return a launch plan's prices in USD an hour by instance type; empty when the release found no prices."""
    prices: dict[str, float] = (plan.get("prices") or {}).get("on_demand", {})
    return prices


def hosting_prices(plan: dict[str, Any]) -> dict[str, float]:
    """Return a launch plan's prices of endpoints in USD an hour by instance type; empty when the release found none."""
    prices: dict[str, float] = (plan.get("prices") or {}).get("hosting", {})
    return prices


def job_price(seconds: float | None, resources: dict[str, Any], prices: dict[str, float]) -> float | None:
    """Return the price of a job in USD; None without its seconds or without a price of its instance type.

    `resources` is DescribeTrainingJob's ResourceConfig; `prices` are USD an hour by instance type.
    """
    price = prices.get(instance_type_of(resources))
    if seconds is None or price is None:
        return None
    return seconds * float(resources.get("InstanceCount", 1)) * price / 3600


def instance_type_of(resources: dict[str, Any]) -> str:
    """Return a job's instance type from DescribeTrainingJob's ResourceConfig: the selected type, else all preferences."""
    choices = [each["InstanceType"] for each in resources.get("InstancePreferences", [])]
    return resources.get("SelectedInstanceType") or resources.get("InstanceType") or " or ".join(choices)
