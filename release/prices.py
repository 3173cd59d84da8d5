"""Reads a region's prices and its image for serving tuned models, at release time."""

import json
import os
import re
import sys
from datetime import UTC, datetime
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError


def inference_image(region: str) -> str | None:
    """Return the image that serves a tuned model on an endpoint: the newest of AWS's vLLM images in the region.

    Regions and versions come from the SDK's registry. None for a region without such an image. Its runs are still published.
    """
    from sagemaker.core import image_uris

    versions = image_uris.config_for_framework("vllm")["inference"]["versions"]
    available = [version for version, image in versions.items() if region in image["registries"]]
    if not available:
        return None
    # Any instance type with a GPU selects the GPU image.
    uri: str = image_uris.retrieve("vllm", region, available[-1], image_scope="inference", instance_type="ml.g5.xlarge")
    return uri


def instance_prices(region: str) -> dict[str, Any] | None:
    """Return a region's prices of instances: `{"dated", "region", "on_demand": {type: USD per hour}, "hosting": {…}}`.

    `on_demand` are the prices of training jobs, `hosting` those of endpoints. They come from AWS's Price List API, which has
    endpoints in few regions of a partition:
    https://docs.aws.amazon.com/aws-cost-management/latest/APIReference/API_pricing_GetProducts.html
    None if the API cannot be reached or has no training prices in USD. A launch plan works without prices.
    """
    session = boto3.Session()
    serving = session.get_available_regions("pricing", session.get_partition_for_region(region))
    if "AWS_ENDPOINT_URL" in os.environ or not serving:  # an emulator has no price list
        return None
    few_tries = Config(connect_timeout=5, retries={"total_max_attempts": 2})
    client = session.client("pricing", region_name=serving[-1], config=few_tries)
    try:
        training, hosting = (_hourly(client, region, *kind) for kind in (("Training", "Train"), ("Hosting", "Host")))
    except (BotoCoreError, ClientError) as error:
        sys.stderr.write(f"Prices could not be read: {error}. Receipts will have no cost estimates.\n")
        return None
    dated = datetime.now(UTC).date().isoformat()
    return {"dated": dated, "region": region, "on_demand": training, "hosting": hosting} if training else None


def _hourly(client: Any, region: str, component: str, usage: str) -> dict[str, float]:
    """Return the on-demand prices of a component of SageMaker, in USD per hour by instance type."""
    wanted = {"regionCode": region, "component": component}
    filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in wanted.items()]
    prices: dict[str, float] = {}
    for page in client.get_paginator("get_products").paginate(ServiceCode="AmazonSageMaker", Filters=filters):
        for product in map(json.loads, page.get("PriceList", [])):
            # The usage type has a prefix for the region. Profilers and reserved capacity have other usage types.
            name = re.fullmatch(rf"(?:\w+-)?{usage}:(ml\..+)", product["product"]["attributes"].get("usagetype", ""))
            terms = product["terms"].get("OnDemand", {}).values()
            hourly = [each for term in terms for each in term["priceDimensions"].values() if each["unit"] == "Hrs"]
            if name and hourly and "USD" in hourly[0]["pricePerUnit"]:
                prices[name[1]] = float(hourly[0]["pricePerUnit"]["USD"])
    return prices
