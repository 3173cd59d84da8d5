"""Asks a served model: what is sent, the answer part by part, and the wait for a model that sleeps.

An endpoint without requests has no instance, and a model on Bedrock no copy. A request is refused then, and wakes it:
https://docs.aws.amazon.com/sagemaker/latest/dg/endpoint-auto-scaling-zero-instances.html
https://docs.aws.amazon.com/bedrock/latest/userguide/invoke-imported-model.html
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import msgspec
from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from local_app.stack import StackError
from pipeline.aws import error_code
from pipeline.runs import deployments
from pipeline.runs.deployments import Stage
from pipeline.runs.states import Run
from tunedrop.config.parse import parse_run_config
from tunedrop.config.schedule import limit_of_tests
from tunedrop_cli.deployment import Deployment
from tunedrop_cli.lines import find_line

# The longest wait for a model that sleeps, and the pause between two tries, in seconds.
WAKING_SECONDS, RETRY_SECONDS = 15 * 60, 5.0
# Seconds between two lines of progress.
PROGRESS_SECONDS = 30.0

Message = dict[str, str]


class Served(NamedTuple):
    """A model that answers: `name` for people, and a component of an endpoint. Without an endpoint, it is Bedrock's ARN."""

    name: str
    endpoint: str | None
    component: str

    @property
    def place(self) -> str:
        """Where the model answers, for people."""
        return self.endpoint or "Bedrock"

    @property
    def service(self) -> str:
        """The service whose client asks the model."""
        return "sagemaker-runtime" if self.endpoint else "bedrock-runtime"


class Manner(NamedTuple):
    """How a run's model is asked: as in training and in its tests."""

    system: str | None
    template: dict[str, Any]
    limit: int

    def body(self, messages: list[Message], temperature: float) -> dict[str, Any]:
        """Return the request for a streamed chat completion (OpenAI's API). The system prompt comes first."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        template = {"chat_template_kwargs": self.template} if self.template else {}
        return {
            "messages": [*system, *messages],
            "max_tokens": self.limit,
            "temperature": temperature,
            "stream": True,
            **template,
        }


class Part(NamedTuple):
    """A part of an answer. The last part has the reason for the end: `stop`, or `length` for the limit of tokens."""

    text: str
    finish_reason: str | None


# --- what answers ---


class Answering(NamedTuple):
    """What answers under a line's name: the model, and the run that made it."""

    served: Served
    run: Run


def answering(deployment: Deployment, line: str) -> Answering:
    """Return what answers under a line's name. Raises StackError, with the reason, if nothing does."""
    item = deployment.deployments.get(line)
    if item.run and item.component:
        run = deployment.find(item.run)
        return Answering(Served(run.run_id, item.endpoint, item.component), run)
    if item.version == 0:
        find_line(deployment, line)
    raise StackError(f"The line '{line}' is not served: {_why(item)}")


def _why(item: deployments.Deployment) -> str:
    """Return why nothing answers under a line's name, and what to do."""
    if item.stage == Stage.REMOVING:
        return "it is being taken down."
    if item.stage != Stage.IDLE:
        return f"{item.target} is being deployed. `tunedrop endpoints` shows how far it is."
    advice = (
        "The champion of each line is served if the stack's parameter EndpointInstanceType is set, on this machine with "
        "`tunedrop up --serve`, until the next champion comes or `tunedrop undeploy` takes it down."
    )
    return f"{item.reason or 'none of its models is deployed'}. {advice}"


def base_of(served: Served) -> Served:
    """Return the base model of a line's endpoint: its inference component has the endpoint's name.

    Raises StackError on Bedrock, which has the tuned model only.
    """
    if served.endpoint is None:
        raise StackError(f"{served.name} answers on Bedrock, which does not have the base model: leave --base out.")
    return Served("base model", served.endpoint, served.endpoint)


def served_run(deployment: Deployment, run: Run) -> Served:
    """Return where a run's model answers. Raises StackError if it is not deployed."""
    for item in deployment.deployments.all():
        if item.run == run.run_id and item.component:
            return Served(run.run_id, item.endpoint, item.component)
    raise StackError(
        f"{run.run_id} is not deployed: each line has one model that answers, its champion. Make it the champion with "
        f"`tunedrop approve {run.run_id}`, or give it a line of its own (`line` in its config) and train it there. "
        "`tunedrop endpoints` lists what answers."
    )


def manner_of(deployment: Deployment, run: Run) -> Manner:
    """Return how a run's model is asked."""
    config = parse_run_config(deployment.read_json(run, "input/config.json"))
    return Manner(config.system_prompt, config.grpo.get("chat_template_kwargs") or {}, limit_of_tests(config, 0))


# --- the answer ---


class Waking:
    """Waits for a model that sleeps, and says so with `say`. Without `wait`, it raises StackError."""

    def __init__(self, say: Callable[[str], None], wait: bool = True) -> None:
        self._say, self._wait = say, wait
        self._began: float | None = None
        self._said = 0.0

    def __call__(self, served: Served) -> None:
        """Pause between two tries. Raises StackError after 15 minutes."""
        now = time.monotonic()
        if self._began is None:
            self._began = self._said = now
            if not self._wait:
                raise StackError(
                    f"{served.name} sleeps: nobody has asked {served.place} for a while. This question wakes it, which "
                    "takes some minutes on AWS. Ask again then."
                )
            self._say(f"{served.name} sleeps, and is being woken. On AWS, this takes some minutes.")
        waited = now - self._began
        if waited > WAKING_SECONDS:
            raise StackError(
                f"{served.name} has not woken up within {WAKING_SECONDS // 60} minutes. `tunedrop endpoints` shows the "
                f"state of {served.place}; AWS's console shows whether it finds an instance."
            )
        if now - self._said >= PROGRESS_SECONDS:
            self._said = now
            self._say(f"  still waking after {int(waited) // 60}:{int(waited) % 60:02d}")
        time.sleep(RETRY_SECONDS)


def ask(runtime: Any, served: Served, body: dict[str, Any], waking: Waking) -> Iterator[Part]:
    """Yield the parts of a streamed answer. `runtime` is a client of the model's `service`.

    Raises StackError if the model or the endpoint refuses the question.
    """
    invoke = _on_endpoint if served.endpoint else _on_bedrock
    while True:
        try:
            answer = invoke(runtime, served, msgspec.json.encode(body))
            break
        except ClientError as error:
            if not sleeps(error):
                raise _readable(served, error) from None
        except BotoCoreError as error:
            raise _readable(served, error) from None
        waking(served)
    try:
        yield from map(_part, answer)
    # ModelStreamErrorException and InternalStreamFailure, a connection that breaks, and what no server of models writes.
    except (ClientError, BotoCoreError, HTTPError, msgspec.DecodeError, LookupError, TypeError, AttributeError) as error:
        raise _readable(served, error) from None


def _on_endpoint(runtime: Any, served: Served, body: bytes) -> Iterator[dict[str, Any]]:
    """Ask a component of an endpoint; return the documents of its answer. Raises ClientError."""
    answer = runtime.invoke_endpoint_with_response_stream(
        EndpointName=served.endpoint,
        InferenceComponentName=served.component,
        ContentType="application/json",
        Body=body,
    )
    return documents(event["PayloadPart"]["Bytes"] for event in answer["Body"])


def _on_bedrock(runtime: Any, served: Served, body: bytes) -> Iterator[dict[str, Any]]:
    """Ask an imported model; return the documents of its answer. Raises ClientError.

    Assumption: each event of the stream has one document, as it has from Bedrock's own models.
    https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_InvokeModelWithResponseStream.html
    """
    answer = runtime.invoke_model_with_response_stream(modelId=served.component, contentType="application/json", body=body)
    return (msgspec.json.decode(event["chunk"]["bytes"]) for event in answer["body"])


def sleeps(error: ClientError) -> bool:
    """Return whether a request was refused because no copy of the model runs."""
    no_capacity = error_code(error) == "ValidationError" and "no capacity" in error.response["Error"]["Message"].lower()
    return no_capacity or error_code(error) == "ModelNotReadyException"


def _readable(served: Served, error: Exception) -> StackError:
    """Return the error for an invocation that failed: the container's own message, where there is one."""
    response: dict[str, Any] = getattr(error, "response", None) or {}
    message = response.get("OriginalMessage") or response.get("Error", {}).get("Message") or str(error)
    return StackError(f"{served.name} did not answer ({served.component} on {served.place}): {message}")


def documents(parts: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the documents of server-sent events, up to `[DONE]`. A part of the stream may end within a line.

    https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_runtime_PayloadPart.html
    """
    rest = b""
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield msgspec.json.decode(line.removeprefix(b"data: "))


def _part(document: dict[str, Any]) -> Part:
    """Return the part of an answer that a chunk has. Raises StackError for an error in the middle of an answer."""
    if error := document.get("error"):
        raise StackError(f"The model failed in the middle of its answer: {error.get('message')}")
    choice: dict[str, Any] = next(iter(document.get("choices") or []), {})
    return Part(choice.get("delta", {}).get("content") or "", choice.get("finish_reason"))
