"""SageMaker Runtime: answers, event streams, errors, permissions and metrics."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError, EventStreamError
from components import CONTAINER, Serving

from local_app.sagemaker import passing
from local_app.sagemaker.permissions import RequiredPermission, required_permissions
from local_app.sagemaker.server import serve as serve_http

ARN = "arn:aws:sagemaker:us-east-1:000000000000"
BASE = {"InferenceComponentName": "base"}


def invoke(serving: Serving, body: dict[str, Any] | bytes, **parameters: Any) -> Any:
    data = body if isinstance(body, bytes) else json.dumps(body)
    request = {"EndpointName": "ep", "ContentType": "application/json", "Body": data} | BASE | parameters
    return serving.runtime.invoke_endpoint(**request)


def stream(serving: Serving, name: str = "base", **body: Any) -> Any:
    return serving.runtime.invoke_endpoint_with_response_stream(
        EndpointName="ep",
        InferenceComponentName=name,
        ContentType="application/json",
        Body=json.dumps(body | {"stream": True}),
    )


def metrics_of(serving: Serving, name: str, component: str = "base", statistic: str = "Sum") -> float | None:
    found = serving.local.metrics.statistics(name, {"InferenceComponentName": component}, 0, time.time() + 1)
    return found.get(statistic) if found else None


def test_an_answer_has_the_containers_body_and_type_and_the_variant(shared: Serving) -> None:
    answer = invoke(shared, {}, CustomAttributes="route=/v1/completions", InferenceId="42", Accept="application/json")
    assert (answer["ContentType"], answer["InvokedProductionVariant"]) == ("application/json", "AllTraffic")
    headers = {name.lower(): value for name, value in json.loads(answer["Body"].read())["headers"].items()}
    assert headers["x-amzn-sagemaker-custom-attributes"] == "route=/v1/completions"
    assert headers["x-amzn-sagemaker-inference-id"] == "42"
    assert "x-amzn-sagemaker-inference-component" not in headers


def test_a_stream_comes_as_it_is_written(shared: Serving) -> None:
    """https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_runtime_InvokeEndpointWithResponseStream.html"""
    answer = stream(shared, parts=4, pause=0.3)
    assert (answer["ContentType"], answer["InvokedProductionVariant"]) == ("text/event-stream", "AllTraffic")
    arrived = []
    text = b""
    for event in answer["Body"]:
        arrived.append(time.monotonic())
        text += event["PayloadPart"]["Bytes"]
    assert text.decode() == "base 0\nbase 1\nbase 2\nbase 3\n"
    assert len(arrived) == 4
    assert arrived[-1] - arrived[0] > 0.6  # and not all at the end


def test_a_stream_that_breaks_ends_with_a_model_stream_error(hosted: Callable[..., Serving]) -> None:
    serving = hosted()
    serving.base()
    pid = serving.ask("base")["pid"]
    answer = stream(serving, parts=50, pause=0.2)
    events = iter(answer["Body"])
    next(events)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EventStreamError, match="ModelStreamError"):
        list(events)


def test_a_client_that_goes_ends_its_stream(hosted: Callable[..., Serving]) -> None:
    serving = hosted()
    serving.base()
    answer = stream(serving, parts=100, pause=0.1)
    next(iter(answer["Body"]))
    answer["Body"].close()
    before = time.monotonic()
    serving.gone("base")  # a component goes after its open requests
    assert time.monotonic() - before < 5


@pytest.mark.parametrize(
    ("status", "side"),
    [(400, "client"), (404, "client"), (500, "server"), (503, "server")],
)
def test_a_containers_error_is_a_model_error(shared: Serving, status: int, side: str) -> None:
    """https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_runtime_InvokeEndpoint.html#API_runtime_InvokeEndpoint_Errors"""
    with pytest.raises(ClientError) as error:
        invoke(shared, {"status": status})
    answer = error.value.response
    assert (answer["Error"]["Code"], answer["ResponseMetadata"]["HTTPStatusCode"]) == ("ModelError", 424)
    assert answer["Error"]["Message"].startswith(f"Received {side} error ({status}) from primary with message")
    assert answer["OriginalStatusCode"] == status
    assert "version" in answer["OriginalMessage"]


@pytest.mark.breaks_the_model
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"EndpointName": "none"}, "Endpoint none of account 000000000000 not found"),
        ({"InferenceComponentName": "none"}, "Inference Component none of account 000000000000 not found"),
        ({"InferenceComponentName": "-bad"}, "at 'inferenceComponentName' failed"),
        ({"TargetModel": "a.tar.gz"}, "does not have TargetModel"),
        ({"Body": b"x" * 6_291_457}, "at most 6291456"),
    ],
)
def test_what_an_invocation_may_not_be(shared: Serving, parameters: dict[str, Any], message: str) -> None:
    body = parameters.pop("Body", b"{}")
    with pytest.raises(ClientError, match=message) as error:
        invoke(shared, body, **parameters)
    answer = error.value.response
    assert (answer["Error"]["Code"], answer["ResponseMetadata"]["HTTPStatusCode"]) == ("ValidationError", 400)


def test_a_component_must_be_named(shared: Serving) -> None:
    with pytest.raises(ClientError, match="Inference Component Name header is required for endpoints"):
        shared.ask(None)


def test_without_a_copy_the_answer_comes_at_once_and_is_counted(hosted: Callable[..., Serving]) -> None:
    """https://docs.aws.amazon.com/sagemaker/latest/dg/endpoint-auto-scaling-zero-instances.html"""
    serving = hosted()
    serving.base(copies=0)
    serving.adapter("line", "one")
    for call in (lambda: serving.ask("line"), lambda: stream(serving, "line", parts=1, pause=0)):
        begin = time.monotonic()
        with pytest.raises(ClientError, match="Inference Component has no capacity to process this request") as error:
            call()
        assert time.monotonic() - begin < 1
        assert (error.value.response["Error"]["Code"], error.value.response["ResponseMetadata"]["HTTPStatusCode"]) == (
            "ValidationError",
            400,
        )
    for component in ("line", "base"):  # an adapter's requests count for its base
        assert metrics_of(serving, "NoCapacityInvocationFailures", component) == 2
        assert metrics_of(serving, "Invocations", component) is None


def test_invocations_are_counted_for_the_component_and_its_base(hosted: Callable[..., Serving]) -> None:
    """https://docs.aws.amazon.com/sagemaker/latest/dg/monitoring-cloudwatch.html"""
    serving = hosted()
    serving.base()
    serving.adapter("line", "one")
    serving.ask("line", sleep=0.2)
    serving.ask("base")
    for status in (400, 500):
        with pytest.raises(ClientError):
            serving.ask("line", status=status)
    list(stream(serving, "line", parts=1, pause=0)["Body"])
    counted = {
        name: (metrics_of(serving, name, "line"), metrics_of(serving, name, "base"))
        for name in ("Invocations", "Invocation4XXErrors", "Invocation5XXErrors")
    }
    assert counted == {"Invocations": (4, 5), "Invocation4XXErrors": (1, 1), "Invocation5XXErrors": (1, 1)}
    # "If the model returned an error, a value of 1 is sent; otherwise, 0 is sent": the average is the share.
    assert metrics_of(serving, "Invocation5XXErrors", "line", "Average") == 0.25
    assert 200_000 < (metrics_of(serving, "ModelLatency", "line", "Maximum") or 0) < 5_000_000  # microseconds


def test_an_invocation_times_out_as_on_aws(shared: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "A customer's model containers must respond to requests within 60 seconds."
    https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_runtime_InvokeEndpoint.html
    """
    assert passing.RESPONSE_SECONDS == 60
    monkeypatch.setattr(passing, "RESPONSE_SECONDS", 0.3)
    with pytest.raises(ClientError, match=r"Received server error \(0\) from primary.*Your invocation timed out"):
        shared.ask("base", sleep=1)


# ---- permissions ---------------------------------------------------------------------------------------------------------


def test_an_invocation_needs_its_permission_on_the_endpoint_and_on_the_component() -> None:
    """https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazonsagemakerai.html"""
    both = [f"{ARN}:endpoint/ep", f"{ARN}:inference-component/base"]
    parameters = {"EndpointName": "ep", "InferenceComponentName": "base"}
    invoking = [RequiredPermission("sagemaker:InvokeEndpoint", resource) for resource in both]
    assert required_permissions("InvokeEndpoint", parameters, ARN) == invoking
    # The API reference: "your IAM permissions must allow the sagemaker:InvokeEndpoint action".
    assert required_permissions("InvokeEndpointWithResponseStream", parameters, ARN) == [
        *(RequiredPermission("sagemaker:InvokeEndpointWithResponseStream", resource) for resource in both),
        *invoking,
    ]


def test_an_invocation_is_signed_and_authorized_like_everything_else(start: Callable[..., Any]) -> None:
    from local_app.sagemaker.api import ServiceError

    asked: list[tuple[str, list[str]]] = []

    def authorize(signed: dict[str, Any], permissions: list[RequiredPermission]) -> None:
        assert signed["headers"]["authorization"].startswith("AWS4-HMAC-SHA256 ")
        asked.append((signed["path"], [permission.resource for permission in permissions]))
        raise ServiceError("AccessDeniedException", "User is not authorized to perform: sagemaker:InvokeEndpoint", 403)

    local = start(server_command=CONTAINER)
    with serve_http(local.emulator, authorize=authorize) as server:
        client = boto3.client("sagemaker-runtime", endpoint_url=f"http://127.0.0.1:{server.port}")
        with pytest.raises(ClientError, match=r"AccessDeniedException.*not authorized to perform: sagemaker:Inv"):
            client.invoke_endpoint(EndpointName="ep", InferenceComponentName="base", Body=b"{}")
    assert asked == [("/endpoints/ep/invocations", [f"{ARN}:endpoint/ep", f"{ARN}:inference-component/base"])]
