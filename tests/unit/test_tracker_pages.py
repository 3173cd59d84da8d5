"""The links to a run's pages in trackers, and what MLflow gets after the verdict."""

import io
from typing import Any

import boto3
import pytest

from pipeline.aws import Aws
from pipeline.publish import trackers

REPORT = "s3://artifacts/runs/cars-0123456789ab/report.html"
APP = "arn:aws:sagemaker:eu-central-1:111122223333:mlflow-app/app-ABC"
TRACKING_SERVER = "arn:aws-us-gov:sagemaker:us-gov-west-1:111122223333:mlflow-tracking-server/ours"
ID = "0123456789abcdef" * 2
AWS = Aws("table", boto3.Session("AKIDEXAMPLE", "secret", region_name="us-east-1"))


def result(**page: Any) -> dict[str, Any]:
    about = {"name": "MLflow", "url": None, "run_id": ID} | page
    return {"verdict": "APPROVED", "artifacts": {"report": REPORT}, "training": {"trackers": [about]}}


@pytest.mark.parametrize(
    "url",
    [
        *(
            None,
            "",
            "javascript:alert(1)",
            "file:///etc/passwd",
            "s3://a/b",
            "https://a.org/ b",
            "https://a.org/\nreport: x",
        ),
        *("https://a.org/<!channel>", "https://a.org/|x", 'https://a.org/"onclick=', "https://a.org/'", "HTTPS:evil"),
    ],
)
def test_only_web_addresses_without_markup_are_links(url):
    assert trackers.links(result(url=url)["training"]) == {}


def test_links_are_of_the_known_trackers():
    page = "https://mlflow.example.com/#/experiments/1/runs/2"
    assert trackers.links(result(url=page)["training"]) == {"run in MLflow": page}
    assert trackers.links(result(url=page, name="<!channel>")["training"]) == {}
    assert trackers.links({}) == {}


def test_mlflow_gets_verdict_and_report(server):
    server.results(lambda _: {})
    environment = {"MLFLOW_TRACKING_URI": server.url + "/"}
    trackers.log_verdict(result(), "<html>", environment, AWS)
    tags = [{"key": "tunedrop.verdict", "value": "APPROVED"}, {"key": "tunedrop.report", "value": REPORT}]
    assert server.asked == [{"run_id": ID, "tags": tags}]


@pytest.mark.parametrize(
    ("environment", "page"),
    [({}, {}), ({"MLFLOW_TRACKING_URI": "x"}, {"run_id": None}), ({"MLFLOW_TRACKING_URI": "x"}, {"run_id": "../../a"})],
)
def test_nothing_is_sent_without_parameter_or_page(environment, page, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("it called"))
    trackers.log_verdict(result(**page), "<html>", environment, AWS)


@pytest.mark.parametrize(
    "artifacts", ["s3://bucket/1", f"mlflow-artifacts:/../{ID}/artifacts", f"mlflow-artifacts:/1/{ID}/x"]
)
def test_only_a_server_that_keeps_files_gets_the_report(server, artifacts):
    server.results(lambda _: {})
    trackers.log_verdict(result(artifacts=artifacts), "<html>", {"MLFLOW_TRACKING_URI": server.url}, AWS)
    assert len(server.asked) == 1


def test_a_server_that_refuses_does_not_keep_the_run_from_being_published(server):
    server.reply = lambda _: (403, {}, {"error_code": "PERMISSION_DENIED"})
    trackers.log_verdict(result(), "<html>", {"MLFLOW_TRACKING_URI": server.url}, AWS)
    trackers.log_verdict(result(), "<html>", {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, AWS)


@pytest.mark.parametrize(
    ("arn", "host", "header", "scope"),
    [
        (APP, "mlflow.sagemaker.eu-central-1.app.aws", "X-sm-mlflow-app-arn", "eu-central-1/sagemaker"),
        (
            TRACKING_SERVER,
            "us-gov-west-1.experiments.sagemaker.aws",
            "X-mlflow-sm-tracking-server-arn",
            "us-gov-west-1/sagemaker-mlflow",
        ),
    ],
)
def test_a_request_to_sagemakers_mlflow_is_signed_as_its_plugin_signs(arn, host, header, scope, monkeypatch):
    sent: list[Any] = []

    def urlopen(request, timeout):
        sent.append(request)
        return io.BytesIO()

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    trackers.log_verdict(result(), "<html>", {"MLFLOW_TRACKING_URI": arn}, AWS)
    (request,) = sent
    assert request.full_url == f"https://{host}/api/2.0/mlflow/runs/log-batch"
    assert request.get_header(header) == arn
    authorization = request.get_header("Authorization")
    assert f"/{scope}/aws4_request" in authorization
    assert header.lower() in authorization
    assert "secret" not in str(request.headers)
