"""The pages of a run in trackers, which its training job opened: links to them, and the verdict and the report on them."""

import re
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from typing import Any

import msgspec
from botocore.exceptions import BotoCoreError

from pipeline.aws import Aws
from pipeline.observability import logger

NAMES = ("MLflow",)
TIMEOUT = 5  # seconds of each call
# Links that e-mails, chat cards and pages may show.
_LINK = re.compile(r"https?://[^\s<>|\"'`\\]+")
_RUN_ID = re.compile(r"[0-9a-f]{32}")
# The artifacts of a run that its server keeps: https://mlflow.org/docs/latest/self-hosting/architecture/artifact-store/
_ARTIFACTS = re.compile(r"mlflow-artifacts:/([0-9]+/[0-9a-f]{32}/artifacts)")
# SageMaker's MLflow by the type of its resource: endpoint, header with the ARN, and service of the signature, as in
# https://github.com/aws/sagemaker-mlflow/blob/main/sagemaker_mlflow/mlflow_sagemaker_helpers.py and auth_provider.py
_MANAGED = {
    "mlflow-tracking-server": (
        "https://{}.experiments.sagemaker.aws",
        "x-mlflow-sm-tracking-server-arn",
        "sagemaker-mlflow",
    ),
    "mlflow-app": ("https://mlflow.sagemaker.{}.app.aws", "x-sm-mlflow-app-arn", "sagemaker"),
}


def links(training: dict[str, Any]) -> dict[str, str]:
    """Return the pages of a run by tracker, from its `training.json`."""
    pages = ((each["name"], each["url"]) for each in training.get("trackers", []))
    return {f"run in {name}": url for name, url in pages if name in NAMES and url and _LINK.fullmatch(url)}


def log_verdict(result: dict[str, Any], report: str, environment: dict[str, str], aws: Aws) -> None:
    """Give the run's page in MLflow the tags `tunedrop.verdict` and `tunedrop.report`, which is the report's S3 URI.

    A server that keeps the files of runs itself gets the report, too. `environment` is that of the run's jobs. A failure is
    logged: the run is published without it.
    """
    uri = environment.get("MLFLOW_TRACKING_URI")
    pages = [each for each in result["training"].get("trackers", []) if each["name"] == "MLflow" and each.get("run_id")]
    if not uri or not pages or not _RUN_ID.fullmatch(pages[0]["run_id"]):
        return
    try:
        for request in _requests(uri, pages[0], result, report, aws):
            urllib.request.urlopen(request, timeout=TIMEOUT).close()  # noqa: S310 - the stack's parameter
    except (OSError, HTTPException, BotoCoreError) as error:
        logger.warning("MLflow did not get the verdict", error=str(error))


def _requests(
    uri: str, page: dict[str, Any], result: dict[str, Any], report: str, aws: Aws
) -> Iterator[urllib.request.Request]:
    tags = {"tunedrop.verdict": result["verdict"], "tunedrop.report": result["artifacts"]["report"]}
    body = msgspec.json.encode(
        {"run_id": page["run_id"], "tags": [{"key": name, "value": value} for name, value in tags.items()]}
    )
    path, headers = "/api/2.0/mlflow/runs/log-batch", {"Content-Type": "application/json"}
    if uri.startswith("arn:"):
        region, resource = uri.split(":")[3], uri.rpartition(":")[2]
        endpoint, header, service = _MANAGED[resource.partition("/")[0]]
        url, headers = endpoint.format(region) + path, headers | {header: uri}
        yield urllib.request.Request(url, body, aws.signed("POST", url, body, headers, service, region))  # noqa: S310
        return
    base = uri.rstrip("/")
    yield urllib.request.Request(base + path, body, headers)  # noqa: S310 - the stack's parameter
    if kept := _ARTIFACTS.fullmatch(page.get("artifacts") or ""):
        url = f"{base}/api/2.0/mlflow-artifacts/artifacts/{kept[1]}/report.html"
        yield urllib.request.Request(url, report.encode(), {"Content-Type": "text/html"}, method="PUT")  # noqa: S310
