"""The commands for models that are served, over moto, with a stub for the endpoint's own doors, which moto lacks."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import msgspec
import pytest
from botocore.client import BaseClient
from botocore.exceptions import ClientError, EndpointConnectionError, EventStreamError, ReadTimeoutError
from click.testing import CliRunner
from fake_stack import PLAN, PREFIX, TABLE, TRAINED_RUN
from urllib3.exceptions import ProtocolError
from world import World

from local_app.serving.protocol import Answers, Written
from pipeline.runs.deployments import Deployment, Stage
from pipeline.runs.states import RunState
from pipeline.runs.table import RUN
from tunedrop.config.parse import parse_run_config
from tunedrop.object_keys import component_name
from tunedrop_cli.commands import local
from tunedrop_cli.main import cli

Command = Callable[..., str]
ENDPOINT = f"{PREFIX}-base-0123abcd"
CARS = component_name(PREFIX, "cars")
ASLEEP = (
    "Inference Component has no capacity to process this request. ApplicationAutoScaling may be in-progress (if configured) "
    "or try to increase the capacity by invoking UpdateInferenceComponentRuntimeConfig API."
)


def refusal(code: str, message: str, operation: str = "InvokeEndpointWithResponseStream", **more: Any) -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": message}, **more}, operation)


@dataclass
class Endpoint:
    """An endpoint with a base component and adapters. Each component answers with its name and the question."""

    requests: list[dict[str, Any]] = field(default_factory=list)
    refusals: list[Exception] = field(default_factory=list)  # of the next invocations
    bytes_at_once: int = 7  # of a part of the stream
    copies: int = 1
    described: dict[str, Any] | None = None

    def invoke(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if self.refusals:
            raise self.refusals.pop(0)
        self.requests.append(arguments | {"Body": json.loads(arguments["Body"])})
        return {"Body": self.stream(arguments["InferenceComponentName"])}

    def invoke_bedrock(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if self.refusals:
            raise self.refusals.pop(0)
        self.requests.append(arguments | {"Body": json.loads(arguments["body"])})
        return {"body": ({"chunk": {"bytes": json.dumps(chunk).encode()}} for chunk in self.chunks("Bedrock"))}

    def chunks(self, component: str) -> list[dict[str, Any]]:
        body, answers = self.requests[-1]["Body"], Answers(component, chat=True)
        words = [component, " said: ", body["messages"][-1]["content"], "\x1b[2J", " é"]
        chunks = [answers.chunk("", role="assistant"), *map(answers.chunk, words)]
        return [*chunks, answers.chunk("", Written("stop" if body["max_tokens"] > 9 else "length", 1, 1).finish_reason)]

    def stream(self, component: str) -> Iterator[dict[str, Any]]:
        chunks = self.chunks(component)
        lines = [f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]
        content = "".join(lines).encode()
        for start in range(0, len(content), self.bytes_at_once):
            yield {"PayloadPart": {"Bytes": content[start : start + self.bytes_at_once]}}

    def describe_component(self, name: str) -> dict[str, Any]:
        if name == ENDPOINT:
            return {"RuntimeConfig": {"CurrentCopyCount": self.copies}}
        if name == CARS:
            return {"Specification": {"BaseInferenceComponentName": ENDPOINT}}
        raise refusal("ValidationException", "Could not find inference component", "DescribeInferenceComponent")

    def describe_endpoint(self, name: str) -> dict[str, Any]:
        if name != ENDPOINT:
            raise refusal("ValidationException", "Could not find endpoint", "DescribeEndpoint")
        scaling = {"Status": "ENABLED", "MinInstanceCount": 0, "MaxInstanceCount": 2}
        variant = {"VariantName": "all", "CurrentInstanceCount": self.copies, "ManagedInstanceScaling": scaling}
        created = datetime.now(UTC) - timedelta(hours=10)
        return {"EndpointName": name, "CreationTime": created, "ProductionVariants": [variant]}


@pytest.fixture
def endpoint(world: World) -> Iterator[Endpoint]:
    endpoint, call = Endpoint(), BaseClient._make_api_call

    def answer(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
        match operation:
            case "InvokeEndpointWithResponseStream":
                return endpoint.invoke(arguments)
            case "InvokeModelWithResponseStream":
                return endpoint.invoke_bedrock(arguments)
            case "DescribeEndpoint":
                return endpoint.describe_endpoint(arguments["EndpointName"])
            case "DescribeInferenceComponent":
                return endpoint.describe_component(arguments["InferenceComponentName"])
        return call(client, operation, arguments)

    with pytest.MonkeyPatch.context() as patch:  # undone before the world's own patch
        patch.setattr(BaseClient, "_make_api_call", answer)
        yield endpoint


def deploy(world: World, line: str, run: str | None = None, **more: Any) -> Deployment:
    values = {"endpoint": ENDPOINT, "component": component_name(PREFIX, line), "instance_type": "ml.g5.xlarge"}
    return world.aws.deployments.write(world.aws.deployments.get(line), run=run, **values | {"model": "base"} | more)


def made(world: World, line: str, **config: Any) -> str:
    """A published run with its line, made here without jobs."""
    run_id = f"{line}-0123456789ab"
    run = msgspec.structs.replace(TRAINED_RUN, run_id=run_id, dataset=line, line=line, state=RunState.PUBLISHED)
    table = boto3.resource("dynamodb").Table(TABLE)
    table.put_item(
        Item={name: value for name, value in msgspec.to_builtins(run).items() if value is not None} | {"id": RUN + run_id}
    )
    item = {"id": f"line#{line}", "line": line, "open": "LINE", "version": 1, "announced": 1, "packages": {"7": run_id}}
    table.put_item(Item=item | {"suite": "", "arrived": run.arrived, "tries": [], "champion": run_id})
    world.write(f"runs/{run_id}/input/config.json", parse_run_config({"model": "base", **config}).model_dump_json().encode())
    return run_id


@pytest.fixture
def cars(world: World, endpoint: Endpoint) -> str:
    """A run of the line `cars` that is deployed."""
    grpo = {"max_completion_length": 40, "chat_template_kwargs": {"enable_thinking": False}}
    run = made(world, "cars", system_prompt="Be brief.", grpo=grpo)
    deploy(world, "cars", run)
    return run


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock of its own: pauses pass at once."""
    clock = [0.0]
    monkeypatch.setattr("tunedrop_cli.asking.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("tunedrop_cli.asking.time.sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    return clock


# --- ask ---


@pytest.mark.parametrize("bytes_at_once", [1, 7, 10_000])
def test_ask_sends_what_the_run_was_trained_with(
    endpoint: Endpoint, cars: str, tunedrop: Command, bytes_at_once: int
) -> None:
    endpoint.bytes_at_once = bytes_at_once
    assert tunedrop("ask", "cars", "red?") == f"{CARS} said: red?[2J é\n"  # without the escape that clears a screen
    (sent,) = endpoint.requests
    assert (sent["EndpointName"], sent["InferenceComponentName"]) == (ENDPOINT, CARS)
    assert sent["Body"] == {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "red?"}],
        "max_tokens": 80,
        "temperature": 0.0,
        "stream": True,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    tunedrop("ask", "cars", "red?", "--temperature", "0.7")
    assert endpoint.requests[-1]["Body"]["temperature"] == 0.7


def test_ask_compares_with_the_base_model_and_another_run(
    world: World, endpoint: Endpoint, cars: str, tunedrop: Command
) -> None:
    faq = made(world, "faq", system_prompt="Be polite.")
    assert f"{faq} is not deployed" in tunedrop("ask", "cars", "red?", "--run", "faq")
    assert f"`tunedrop approve {faq}`" in tunedrop("ask", "cars", "red?", "--run", faq)
    deploy(world, "faq", faq)
    answers = tunedrop("ask", "cars", "red?", "--base", "--run", "faq")
    other = component_name(PREFIX, "faq")
    texts = [
        f"{name}:\n{component} said: red?[2J é\n"
        for name, component in ((cars, CARS), ("base model", ENDPOINT), (faq, other))
    ]
    assert answers == "".join(texts)
    systems = [request["Body"]["messages"][0]["content"] for request in endpoint.requests]
    assert systems == ["Be brief.", "Be brief.", "Be polite."]
    document = json.loads(tunedrop("ask", "cars", "red?", "--base", "--json"))
    assert (document["line"], document["question"], document["endpoint"]) == ("cars", "red?", ENDPOINT)
    assert [answer["model"] for answer in document["answers"]] == [cars, "base model"]
    assert document["answers"][0]["answer"] == f"{CARS} said: red?\x1b[2J é"
    assert document["answers"][0]["finish_reason"] == "stop"


def test_an_answer_that_the_limit_cut_is_marked(world: World, endpoint: Endpoint, cars: str, tunedrop: Command) -> None:
    key = f"runs/{cars}/input/config.json"
    world.write(key, json.dumps(world.read_json(key) | {"tests": {"max_completion_length": 9}}).encode())
    assert "The limit of 9 tokens cut this answer" in tunedrop("ask", "cars", "red?")


def test_a_model_that_sleeps_is_woken(endpoint: Endpoint, cars: str, tunedrop: Command, no_pause: list[float]) -> None:
    endpoint.refusals = [refusal("ValidationError", ASLEEP)] * 20
    said = tunedrop("ask", "cars", "red?")
    assert said.startswith(f"{cars} sleeps, and is being woken.")
    assert [line for line in said.splitlines() if "waking after" in line] == [
        f"  still waking after {text}" for text in ("0:30", "1:00", "1:30")
    ]
    assert said.endswith(f"{CARS} said: red?[2J é\n")
    assert len(endpoint.requests) == 1


def test_a_model_that_does_not_wake_up_is_named(
    endpoint: Endpoint, cars: str, tunedrop: Command, no_pause: list[float]
) -> None:
    endpoint.refusals = [refusal("ValidationError", ASLEEP)] * 1000
    assert f"{cars} has not woken up within 15 minutes" in tunedrop("ask", "cars", "red?")
    assert no_pause[0] == pytest.approx(15 * 60, abs=10)


def test_without_waiting_the_command_wakes_and_ends(endpoint: Endpoint, cars: str, tunedrop: Command) -> None:
    endpoint.refusals = [refusal("ValidationError", ASLEEP)]
    assert f"{cars} sleeps: nobody has asked {ENDPOINT} for a while" in tunedrop("ask", "cars", "red?", "--no-wait")


def test_what_the_model_refuses_is_in_its_own_words(endpoint: Endpoint, cars: str, tunedrop: Command) -> None:
    words = '{"error": {"message": "This model has a context of 512 tokens."}}'
    failed = refusal("ModelError", "Received client error (400) from primary", OriginalStatusCode=400, OriginalMessage=words)
    endpoint.refusals = [failed, refusal("ValidationError", f"Endpoint {ENDPOINT} of account not found.")]
    said = tunedrop("ask", "cars", "red?")
    assert f"{cars} did not answer ({CARS} on {ENDPOINT}): {words}" in said
    assert "of account not found" in tunedrop("ask", "cars", "red?")


def test_a_stream_that_breaks_is_an_error(endpoint: Endpoint, cars: str, tunedrop: Command, monkeypatch) -> None:
    def broken(_component: str) -> Iterator[dict[str, Any]]:
        yield {"PayloadPart": {"Bytes": b'data: {"choices": [{"delta": {"content": "half"}}]}\n\n'}}
        raise EventStreamError(
            {"Error": {"Code": "ModelStreamError", "Message": "the container is gone"}}, "InvokeEndpointWithResponseStream"
        )

    monkeypatch.setattr(endpoint, "stream", broken)
    assert "the container is gone" in tunedrop("ask", "cars", "red?")
    error = b'data: {"error": {"message": "out of memory"}}\n\ndata: [DONE]\n\n'
    monkeypatch.setattr(endpoint, "stream", lambda _component: iter([{"PayloadPart": {"Bytes": error}}]))
    assert "The model failed in the middle of its answer: out of memory" in tunedrop("ask", "cars", "red?")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"data: {\n", "Input data was truncated"),
        (b"data: []\n", "did not answer"),
        (b'data: {"choices": [{"delta": null}]}\n', "did not answer"),
        (b'data: {"error": "overloaded"}\n', "did not answer"),
        (ProtocolError("Connection broken"), "Connection broken"),
        (ReadTimeoutError(endpoint_url="runtime"), "Read timeout on endpoint URL"),
    ],
)
def test_a_stream_that_breaks_is_a_message(
    endpoint: Endpoint, cars: str, tunedrop: Command, monkeypatch, content: bytes | Exception, words: str
) -> None:
    def stream(_component: str) -> Iterator[dict[str, Any]]:
        if isinstance(content, Exception):
            raise content
        yield {"PayloadPart": {"Bytes": content}}

    monkeypatch.setattr(endpoint, "stream", stream)
    message = tunedrop("ask", "cars", "red?")
    assert message.startswith(f"error: {cars} did not answer ({CARS} on {ENDPOINT}): ")
    assert words in message


@pytest.mark.parametrize(
    ("command", "question", "typed"),
    [("ask", [b"r\xe9d?".decode("utf-8", "surrogateescape")], b""), ("chat", [], b"r\xe9d?\n")],
)
def test_a_question_that_is_no_text_is_a_message(
    endpoint: Endpoint, cars: str, tunedrop: Command, tmp_path, command: str, question: list[str], typed: bytes
) -> None:
    """Bytes of a command line or of an input that are not UTF-8."""
    arguments = ["--state", str(tmp_path), command, "cars", *question, "--region", "us-east-1"]
    done = CliRunner().invoke(cli, arguments, input=typed)
    assert str(done.exception) == "The question is not UTF-8 text."
    assert not endpoint.requests


def test_a_runtime_that_cannot_be_reached_is_a_message(endpoint: Endpoint, cars: str, tunedrop: Command) -> None:
    endpoint.refusals = [EndpointConnectionError(endpoint_url="runtime")]
    assert "Could not connect to the endpoint URL" in tunedrop("ask", "cars", "red?")


def test_a_line_that_nothing_answers_says_why(world: World, endpoint: Endpoint, tunedrop: Command) -> None:
    run = made(world, "cars")
    assert "There is no line 'carts'. Did you mean 'cars'?" in tunedrop("ask", "carts", "red?")
    assert "none of its models is deployed. The champion of each line is served if" in tunedrop("ask", "cars", "red?")
    for changes, words in (
        ({"stage": Stage.TRYING, "target": run}, f"{run} is being deployed"),
        (
            {"stage": Stage.IDLE, "reason": "the answers differ", "refused": {run: "the answers differ"}},
            "the answers differ. ",
        ),
        ({"stage": Stage.REMOVING, "removed": 1}, "it is being taken down."),
        ({"stage": Stage.IDLE, "reason": "undeployed"}, "undeployed. The champion of each line is served"),
    ):
        deploy(world, "cars", **changes)
        assert f"The line 'cars' is not served: {words}" in tunedrop("ask", "cars", "red?")


def test_a_chat_keeps_the_conversation(endpoint: Endpoint, cars: str, tunedrop: Command, tmp_path) -> None:
    arguments = ["--state", str(tmp_path), "chat", "cars", "--region", "us-east-1"]
    done = CliRunner().invoke(cli, arguments, input="red?\n\nblue?\n")
    assert done.exit_code == 0, done.exception
    assert done.output == f"{CARS} said: red?[2J é\n{CARS} said: blue?[2J é\n"
    assert [message["role"] for message in endpoint.requests[-1]["Body"]["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    assert endpoint.requests[-1]["Body"]["messages"][2]["content"].startswith(f"{CARS} said: red?")


def invocations(namespace: str, dimension: str, value: str) -> None:
    """Have CloudWatch say 12 requests. They were a minute ago: GetMetricStatistics takes times by the second."""
    metric = {"MetricName": "Invocations", "Dimensions": [{"Name": dimension, "Value": value}], "Value": 4}
    data = [metric | {"Timestamp": datetime.now(UTC) - timedelta(minutes=1)}] * 3
    boto3.client("cloudwatch").put_metric_data(Namespace=namespace, MetricData=data)


# --- Bedrock ---

MODEL_ARN = "arn:aws:bedrock:us-east-1:123456789012:imported-model/0123456789ab"
ON_BEDROCK = {"endpoint": None, "component": MODEL_ARN, "instance_type": None}


def test_a_line_on_bedrock_is_asked_by_its_arn_and_woken(
    world: World, endpoint: Endpoint, tunedrop: Command, no_pause: list[float]
) -> None:
    run = made(world, "cars", serve={"target": "bedrock"}, system_prompt="Be brief.")
    deploy(world, "cars", run, **ON_BEDROCK)
    not_ready = refusal("ModelNotReadyException", "Model is not ready for inference.", "InvokeModelWithResponseStream")
    endpoint.refusals = [not_ready] * 2
    said = tunedrop("ask", "cars", "red?")
    assert said.startswith(f"{run} sleeps, and is being woken.")
    assert said.endswith("Bedrock said: red?[2J é\n")
    (sent,) = endpoint.requests
    assert (sent["modelId"], sent["Body"]["messages"][0]) == (MODEL_ARN, {"role": "system", "content": "Be brief."})
    endpoint.refusals = [not_ready]
    assert f"{run} sleeps: nobody has asked Bedrock for a while" in tunedrop("ask", "cars", "red?", "--no-wait")
    assert "answers on Bedrock, which does not have the base model" in tunedrop("ask", "cars", "red?", "--base")
    endpoint.refusals = [refusal("ValidationException", "too long", "InvokeModelWithResponseStream")]
    assert f"{run} did not answer ({MODEL_ARN} on Bedrock): too long" in tunedrop("ask", "cars", "red?")


def test_endpoints_shows_the_arn_of_a_line_on_bedrock(world: World, endpoint: Endpoint, tunedrop: Command) -> None:
    run = made(world, "cars", serve={"target": "bedrock"})
    deploy(world, "cars", run, **ON_BEDROCK)
    invocations("AWS/Bedrock", "ModelId", MODEL_ARN)
    _, row = (re.split(r"  +", line) for line in tunedrop("endpoints").splitlines())
    assert row == ["cars", "deployed", run, "7", MODEL_ARN, "12"]
    (found,) = json.loads(tunedrop("endpoints", "--json"))["endpoints"]
    assert (found["endpoint"], found["component"], found["idle_usd_per_hour"]) == (None, MODEL_ARN, None)


# --- endpoints, undeploy ---


def plan_with(world: World, **prices: dict[str, float]) -> None:
    key = f"launch_plans/{PLAN}.json"
    plan = world.read_json(key) | {"prices": {"dated": "2026-11-24", "region": "us-east-1", "on_demand": {}, **prices}}
    world.write(key, json.dumps(plan).encode())


def test_endpoints_lists_what_is_served(world: World, endpoint: Endpoint, cars: str, tunedrop: Command) -> None:
    plan_with(world, on_demand={"ml.g5.xlarge": 1.5}, hosting={"ml.g5.xlarge": 1.75})
    invocations("AWS/SageMaker", "InferenceComponentName", CARS)
    header, row = (re.split(r"  +", line) for line in tunedrop("endpoints").splitlines())
    assert header == [
        "line",
        "state",
        "run",
        "version",
        "endpoint",
        "instances",
        "requests in 24 h",
        "busy",
        "idle",
        "at most",
    ]
    assert row == ["cars", "answers", cars, "7", ENDPOINT, "1 x ml.g5.xlarge", "12", "$1.75", "$0.00", "$35.00"]
    (found,) = json.loads(tunedrop("endpoints", "--json"))["endpoints"]
    assert found["component"] == CARS
    assert (found["copies"], found["requests_24h"], found["at_most_usd"], found["price"]) == (1, 12, 35.0, "hosting")


def test_endpoints_says_what_is_unknown_and_what_was_refused(
    world: World, endpoint: Endpoint, cars: str, tunedrop: Command
) -> None:
    plan_with(world, on_demand={"ml.g5.xlarge": 1.5})
    endpoint.copies = 0
    deploy(world, "cars", cars, refused={"cars-000000000000": "3 of 20 answers\ndiffer"})
    nothing = dict.fromkeys(("endpoint", "component", "instance_type"))
    deploy(world, "gone", None, removed=3, reason="undeployed", **nothing)
    deploy(world, "lost", None, target="lost-0", reason="no capacity", refused={"lost-0": "no capacity"}, **nothing)
    deploy(world, "new", None, stage=Stage.TRYING, target="new-000000000001", endpoint="elsewhere")
    table, *notes = tunedrop("endpoints").split("\n\n")
    rows = [re.split(r"  +", line) for line in table.splitlines()[1:]]
    assert [row[:2] for row in rows] == [
        ["cars", "asleep"],
        ["gone", "not served"],
        ["lost", "refused"],
        ["new", "trying"],
    ]
    assert rows[0][5:] == ["0 x ml.g5.xlarge", "$1.50", "$0.00", "$30.00"]
    assert notes[0].startswith("cars\nrefused  cars-000000000000: 3 of 20 answers\n")
    assert notes[1:4] == ["gone\nreason  undeployed", "lost\nreason  no capacity", "new\nnext  new-000000000001"]
    assert "prices of endpoints: those of training are shown" in notes[4]
    found = {each["line"]: each for each in json.loads(tunedrop("endpoints", "--json"))["endpoints"]}
    assert (found["cars"]["requests_24h"], found["gone"]["endpoint"], found["new"]["copies"]) == (None, None, None)


def test_without_deployments_the_list_says_how_to_begin(endpoint: Endpoint, tunedrop: Command) -> None:
    assert "Serve the champion of each line with `tunedrop up --serve`" in tunedrop("endpoints")
    assert json.loads(tunedrop("endpoints", "--json")) == {"version": 1, "endpoints": []}


def test_undeploy_asks_the_stack(world: World, endpoint: Endpoint, cars: str, tunedrop: Command, monkeypatch) -> None:
    assert "The line 'trucks' is not served: there is nothing to take down" in tunedrop("undeploy", "trucks")
    monkeypatch.setattr("tunedrop_cli.endpoints.time.sleep", lambda _: deploy(world, "cars", cars, stage=Stage.REMOVING))
    assert tunedrop("undeploy", "cars") == "cars: is being taken down\n"
    world.sent_events.clear()
    deploy(world, "cars", cars)
    assert json.loads(tunedrop("undeploy", "cars", "--json")) == {"version": 1, "line": "cars", "ended": False}
    (event,) = [event for event in world.sent_events if event["DetailType"] == "Undeploy Requested"]
    assert (json.loads(event["Detail"]), event["Source"]) == ({"line": "cars"}, "tunedrop")


def test_up_serves_with_the_parameters_of_a_small_endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    class StartedError(Exception):
        pass

    def stop(_state: Any, _host: str, parameters: dict[str, str]) -> None:
        raise StartedError(parameters)

    monkeypatch.setattr(local, "_start", stop)
    for options, expected in (
        ([], {}),
        (["--serve"], {"EndpointInstanceType": "ml.g5.xlarge", "EndpointBakeMinutes": "0"}),
        (["--serve", "-p", "EndpointBakeMinutes=1"], {"EndpointInstanceType": "ml.g5.xlarge", "EndpointBakeMinutes": "1"}),
    ):
        done = CliRunner().invoke(cli, ["--state", str(tmp_path), "up", *options])
        assert isinstance(done.exception, StartedError)
        assert done.exception.args == (expected,)
