"""What AWS says of a region at release time: prices, and the image that serves a tuned model."""

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
    """Return the image that serves a tuned model on an endpoint: AWS's container of vLLM, the newest that the region has.

    Regions and versions are those of the SDK's registry. None for a region without any: its runs are published all the same.
    """
    from sagemaker.core import image_uris

    versions = image_uris.config_for_framework("vllm")["inference"]["versions"]
    there = [version for version, image in versions.items() if region in image["registries"]]
    if not there:
        return None
    # The instance type only says that there is a GPU.
    uri: str = image_uris.retrieve("vllm", region, there[-1], image_scope="inference", instance_type="ml.g5.xlarge")
    return uri


def training_prices(region: str) -> dict[str, Any] | None:
    """Return what training costs in a region, `{"dated", "region", "on_demand": {instance type: USD an hour}}`.

    By AWS's Price List API (https://docs.aws.amazon.com/aws-cost-management/latest/APIReference/API_pricing_GetProducts.html),
    which few regions of a partition serve for all of them. None where it cannot be asked, or has no prices in USD: a plan
    without prices works, and says so.
    """
    session = boto3.Session()
    serving = session.get_available_regions("pricing", session.get_partition_for_region(region))
    if "AWS_ENDPOINT_URL" in os.environ or not serving:  # a stand-in for AWS has no price list either
        return None
    few_tries = Config(connect_timeout=5, retries={"total_max_attempts": 2})
    client = session.client("pricing", region_name=serving[-1], config=few_tries)
    wanted = {"regionCode": region, "component": "Training"}
    filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in wanted.items()]
    prices: dict[str, float] = {}
    try:
        for page in client.get_paginator("get_products").paginate(ServiceCode="AmazonSageMaker", Filters=filters):
            for product in map(json.loads, page.get("PriceList", [])):
                # The region's short name stands before it; profilers and reserved capacity are called otherwise.
                name = re.fullmatch(r"(?:\w+-)?Train:(ml\..+)", product["product"]["attributes"].get("usagetype", ""))
                terms = product["terms"].get("OnDemand", {}).values()
                hourly = [each for term in terms for each in term["priceDimensions"].values() if each["unit"] == "Hrs"]
                if name and hourly and "USD" in hourly[0]["pricePerUnit"]:
                    prices[name[1]] = float(hourly[0]["pricePerUnit"]["USD"])
    except (BotoCoreError, ClientError) as error:
        sys.stderr.write(f"Prices could not be read, so receipts will not say what a run costs: {error}\n")
    return {"dated": datetime.now(UTC).date().isoformat(), "region": region, "on_demand": prices} if prices else None
