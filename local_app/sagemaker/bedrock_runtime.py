"""Bedrock Runtime: invocations of imported models, how they are counted, and how their errors are worded.

Bodies are OpenAI's chat completions (https://docs.aws.amazon.com/bedrock/latest/userguide/invoke-imported-model.html).
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Mapping

import httpx2

from local_app.asgi import Receive, Send
from local_app.sagemaker import event_stream
from local_app.sagemaker.api import ServiceError
from local_app.sagemaker.imported_models import ImportedModels
from local_app.sagemaker.metrics import Metrics
from local_app.sagemaker.passing import Containers, Question
from local_app.sagemaker.rest import Call

OPERATIONS = ("InvokeModel", "InvokeModelWithResponseStream")
# Parameters that this emulator has no use for, and that change the answer on AWS.
LACKING = ("trace", "guardrailIdentifier", "guardrailVersion", "performanceConfigLatency", "serviceTier")


class BedrockRuntime:
    """Serves invocations in the HTTP server's event loop."""

    def __init__(self, models: ImportedModels, containers: Containers, metrics: Metrics) -> None:
        self._models, self._containers, self._metrics = models, containers, metrics

    async def serve(self, call: Call, receive: Receive, send: Send) -> None:
        """Answer an authorized invocation. Raises ServiceError as long as no part of the answer is sent."""
        model = call.parameters["modelId"]
        if lacking := [member for member in LACKING if member in call.parameters]:
            raise ServiceError("ValidationException", f"The local application does not have {', '.join(lacking)}.")
        lease = await asyncio.to_thread(self._models.lease, model)
        is_stream = call.operation.name == "InvokeModelWithResponseStream"
        question = Question(call.parameters["body"], {"Content-Type": "application/json"}, is_stream)
        await self._containers.pass_on(question, lease, ModelExchange(model, self._metrics), receive, send)


class ModelExchange:
    """One invocation of a model (an `Exchange`), counted under the model's ARN. `Invocations` are those that succeed.

    https://docs.aws.amazon.com/bedrock/latest/userguide/monitoring.html#runtime-cloudwatch-metrics
    """

    type_header = "x-amzn-bedrock-content-type"
    headers: Mapping[str, str] = {}

    def __init__(self, model: str, metrics: Metrics) -> None:
        self._model, self._metrics, self._begin = model, metrics, time.monotonic()

    def end(self, status: int | None) -> None:
        """Count the container's status. InvocationLatency is in milliseconds."""
        if status is not None and status < 400:
            self._add("Invocations", 1)
            self._add("InvocationLatency", (time.monotonic() - self._begin) * 1e3)
        else:
            self._add("InvocationClientErrors" if status and status < 500 else "InvocationServerErrors", 1)

    def error(self, status: int, text: str) -> ServiceError:
        """Return a ValidationException for what the server refuses, else a ModelErrorException.

        Assumption: AWS documents the errors of InvokeModel, and not which one an imported model's server gives.
        """
        if 400 <= status < 500:
            return ServiceError("ValidationException", text)
        members = {"resourceName": self._model} | ({"originalStatusCode": status} if status else {})
        message = f"The request failed due to an error while processing the model: {text}"
        return ServiceError("ModelErrorException", message, 424, members)

    def timed_out(self) -> ServiceError:
        """Return a ModelTimeoutException."""
        message = "The request took too long to process. Processing time exceeded the model timeout length."
        return ServiceError("ModelTimeoutException", message, 408)

    async def events(self, response: httpx2.Response) -> AsyncIterator[bytes]:
        """Yield each document of the server-sent events as a `chunk`.

        Assumption: imported models have one document in each event, as Bedrock's own models have.
        https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_InvokeModelWithResponseStream.html
        """
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                content = {"bytes": base64.b64encode(line.removeprefix("data: ").encode()).decode()}
                yield event_stream.event("chunk", json.dumps(content).encode(), "application/json")

    def broken(self, reason: str) -> bytes:
        """Return a ModelStreamErrorException."""
        return event_stream.exception("modelStreamErrorException", {"message": reason})

    def _add(self, name: str, value: float) -> None:
        self._metrics.add(name, [{"ModelId": self._model}], value)
