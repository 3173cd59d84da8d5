"""What deploy_model asks of SageMaker, CloudWatch and Application Auto Scaling is what the emulator takes, and it serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from botocore.exceptions import ClientError
from components import IMAGE, ROLE, Serving
from fake_stack import SETTINGS

from pipeline.aws import Aws
from pipeline.serving import components, endpoint, scaling
from pipeline.serving.served import Served
from pipeline.serving.waiting import DeploymentFailedError, NotYetError
from pipeline.settings import DeploySettings
from tunedrop.config.model import RunConfig


@pytest.fixture
def aws(hosted: Callable[..., Serving], monkeypatch: pytest.MonkeyPatch) -> tuple[Aws, Serving, DeploySettings]:
    """The pipeline's clients, with the emulator behind them, and CloudWatch and S3 in moto."""
    serving = hosted(alarm_interval=0.1)
    for service in ("SAGEMAKER", "SAGEMAKER_RUNTIME", "APPLICATION_AUTO_SCALING"):
        monkeypatch.setenv(f"AWS_ENDPOINT_URL_{service}", serving.local.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", serving.s3.meta.endpoint_url)
    settings = DeploySettings.model_validate(
        {name: getattr(SETTINGS, name) for name in DeploySettings.model_fields if hasattr(SETTINGS, name)}
        | {
            "data_bucket": "art",
            "artifact_bucket": "art",
            "endpoint_instance_type": "ml.g5.xlarge",
            "endpoint_max_instances": 1,
            "endpoint_idle_minutes": 1,
            "endpoint_bake_minutes": 0,
            "serving_role_arn": ROLE,
            "import_role_arn": ROLE,
            "alarm_topic_arn": "arn:aws:sns:us-east-1:123456789012:alarms",
        }
    )
    return Aws("runs"), serving, settings


def until_done(step: Callable[[], None], serving: Serving) -> None:
    """Repeat a step of the pipeline until it is done."""

    def done() -> bool:
        try:
            step()
        except NotYetError:
            return False
        return True

    serving.local.until(done)


def wanted(serving: Serving, version: str, **changes: Any) -> Served:
    serving.s3.put_object(Bucket="art", Key="models/tiny/version", Body="base")
    serving.archive(version, f"runs/{version}/training/adapter.tar.gz")
    fields: dict[str, Any] = {
        "run_id": f"cars-{version}",
        "line": "cars",
        "endpoint": "tunedrop-tiny",
        "component": "tunedrop-cars",
        "instance_type": "ml.g5.xlarge",
        "adapter": f"s3://art/runs/{version}/training/adapter.tar.gz",
        "merged": f"s3://art/runs/{version}/training/merged/",
        "package": "none",
        "image": IMAGE,
        "network": {},
        "model": "tiny",
        "config": RunConfig(model="tiny"),
        "tested": "none",
    }
    return Served(**fields | changes)


def test_a_line_is_served_updated_put_to_sleep_woken_and_taken_down(
    aws: tuple[Aws, Serving, DeploySettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    clients, serving, settings = aws
    first, second = wanted(serving, "one"), wanted(serving, "two")
    until_done(lambda: endpoint.prepare(first, settings, clients), serving)
    until_done(lambda: endpoint.serve(first, first.component, settings, clients), serving)
    ask = {"endpoint": first.endpoint}
    assert serving.ask(first.component, **ask)["version"] == "one"
    assert serving.ask(first.endpoint, **ask)["version"] == "base"

    until_done(lambda: endpoint.prepare(second, settings, clients), serving)
    until_done(lambda: endpoint.serve(second, second.candidate, settings, clients), serving)
    assert (serving.ask(second.candidate, **ask)["version"], serving.ask(second.component, **ask)["version"]) == (
        "two",
        "one",
    )
    until_done(lambda: endpoint.serve(second, second.component, settings, clients), serving)
    assert serving.ask(second.component, **ask)["version"] == "two"
    until_done(lambda: components.remove(second.candidate, clients), serving)

    serving.scale(second.endpoint, 0)
    with pytest.raises(ClientError, match="has no capacity"):
        serving.ask(second.component, **ask)
    # The alarm on the failed request has the policy carried out.
    serving.local.until(lambda: serving.describe(second.endpoint)["RuntimeConfig"]["CurrentCopyCount"] == 1)
    assert serving.ask(second.component, **ask)["version"] == "two"
    # An idle minute, as far as the metrics show: the gauge of a running copy, and no request.
    monkeypatch.setattr("local_app.sagemaker.deployments.FIRST_MINUTE", 0)
    for series in serving.local.metrics._series.values():
        for moment in list(series):
            del series[moment]
    serving.local.until(lambda: serving.describe(second.endpoint)["RuntimeConfig"]["CurrentCopyCount"] == 0)

    monkeypatch.setattr("local_app.sagemaker.deployments.FIRST_MINUTE", 60)

    scaling.forget(second.component, clients)
    until_done(lambda: components.remove(second.component, clients), serving)
    until_done(lambda: endpoint.tear_down(second.endpoint, clients), serving)
    assert serving.client.list_inference_components()["InferenceComponents"] == []
    assert serving.scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"] == []


def test_what_fails_says_why(aws: tuple[Aws, Serving, DeploySettings]) -> None:
    clients, serving, settings = aws
    broken = wanted(serving, "broken")
    until_done(lambda: endpoint.prepare(broken, settings, clients), serving)
    with pytest.raises(DeploymentFailedError, match="Failed to load the adapter"):
        until_done(lambda: endpoint.serve(broken, broken.component, settings, clients), serving)
