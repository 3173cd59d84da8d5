"""The console over a stack in memory: admitted and refused requests, receipts, pages, and changes."""

import http.client
import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import msgspec
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from browser import drag
from fake_stack import OUTPUTS
from world import GOOD_DATA, World

from local_app.stack import Outputs
from pipeline.jobs.plan import NoLaunchPlanError
from tunedrop import object_keys
from tunedrop_cli.console.live import Live
from tunedrop_cli.console.pages import Pages
from tunedrop_cli.console.server import serving
from tunedrop_cli.deployment import Deployment

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">'
OTHERS = "https://example.com"
# The stack's parameters, as its functions have them in their environment (fake_stack.py).
PARAMETERS = {
    "BaseModel": "base",
    "InstanceTypes": "ml.g6e.4xlarge,ml.g5.4xlarge",
    "UseSpot": "true",
    "MaxRunCostUsd": "0",
    "EndpointInstanceType": "ml.g5.xlarge",
}


@dataclass
class Answer:
    """An answer of the console."""

    status: int
    headers: http.client.HTTPMessage
    text: str


@dataclass
class Page:
    """The console as a browser reaches it."""

    host: str
    secret: str
    deployment: Deployment

    def ask(self, path: str, method: str = "GET", body: bytes = b"", **headers: str) -> Answer:
        connection = http.client.HTTPConnection(self.host, timeout=60)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        with connection.getresponse() as response:
            return Answer(response.status, response.headers, response.read().decode())

    def get(self, path: str) -> Answer:
        return self.ask(f"/{self.secret}/{path}")

    def send(self, path: str, files: dict[str, tuple[str, bytes]] | None = None, **headers: str) -> Answer:
        """Send files by field, each with its name, as the page's own form does."""
        boundary = uuid.uuid4().hex
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'.encode() + content
            for field, (name, content) in (files or {}).items()
        ]
        body = b"\r\n".join([*parts, f"--{boundary}--\r\n".encode()])
        own = {"origin": f"http://{self.host}", "content_type": f"multipart/form-data; boundary={boundary}"}
        return self.ask(f"/{self.secret}/{path}", "POST", body, **own | headers)


@pytest.fixture
def page(world: World, tmp_path: Path) -> Iterator[Page]:
    queue = boto3.client("sqs").create_queue(QueueName="dead")["QueueUrl"]
    values: dict[str, Any] = {re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(): value for name, value in OUTPUTS.items()}
    values["sagemaker_role_arn"] = values.pop("sage_maker_role_arn")
    outputs = Outputs(**values | {"dead_letter_queue_url": queue, "parameters": PARAMETERS})

    def make() -> Deployment:
        return Deployment(lambda kind, service: getattr(boto3, kind)(service), outputs, tmp_path)

    with serving(make, "a stack in memory") as server:
        address = urlsplit(server.address)
        yield Page(address.netloc, address.path.strip("/"), make())


def test_strangers_and_other_pages_get_nothing(page: Page, world: World) -> None:
    run = world.drop()
    path = f"/{page.secret}/runs/{run.run_id}"
    assert page.ask(path).status == 200
    port = page.host.partition(":")[2]
    refused = [
        page.ask("/"),
        page.ask("/static/console.js"),
        page.ask("*", "OPTIONS"),
        page.ask(f"/{page.secret[:-1]}/"),
        page.ask(f"/{page.secret}x/"),
        page.ask(f"//{page.secret}/"),
        page.ask(path, host=f"evil.example:{port}"),
        page.ask(path, host="127.0.0.1"),
        page.send(f"runs/{run.run_id}/stop", origin=OTHERS),
        page.send(f"runs/{run.run_id}/stop", origin="null"),
        page.send("drop", {"data": ("new.jsonl", GOOD_DATA)}, origin=f"http://127.0.0.1:{int(port) + 1}"),
        page.ask(f"{path}/stop", "POST", b""),
        page.ask(f"{path}/stop", "POST", b"", origin=f"http://{page.host}", host="evil.example"),
    ]
    assert [answer.status for answer in refused] == [403] * len(refused)
    assert not any(run.run_id in answer.text for answer in refused)
    assert world.run(run.run_id) == run
    assert [each.dataset for each in page.deployment.all_runs()] == ["cars"]


def test_every_page_is_protected_and_no_page_changes_anything_when_it_is_read(page: Page, world: World) -> None:
    run = world.drop()
    for path in ("", "standing", f"runs/{run.run_id}", "static/console.js", "nothing"):
        headers = page.get(path).headers
        assert "script-src 'self'" in headers["content-security-policy"], path
        assert headers["x-content-type-options"] == "nosniff"
    for path in ("check", "drop", "redrive", f"runs/{run.run_id}/stop"):
        assert page.get(path).status in {404, 405}, path


def untimed(value: Any) -> Any:
    """Return a receipt without the times that its rewards took."""
    if isinstance(value, dict):
        return {key: untimed(each) for key, each in value.items() if key not in {"p50_ms", "p95_ms", "run_seconds"}}
    return [untimed(each) for each in value] if isinstance(value, list) else value


TESTS = b'{"evaluations": [{"prompt": "1+1?", "description": "2"}]}'


@pytest.mark.parametrize(
    ("config", "tests"),
    [
        (None, None),
        (b"grpo: {max_steps: 3}\nrewards: [{type: exact_match}]\n", TESTS),
        (b"grpo: {max_stepz: 3}\n", None),
    ],
    ids=["the dataset alone", "with config and tests", "with a wrong config"],
)
def test_the_receipt_before_a_drop_is_the_receipt_of_the_drop(
    page: Page, world: World, tmp_path: Path, config: bytes | None, tests: bytes | None
) -> None:
    from tunedrop_cli.console.preview import preview

    data = tmp_path / "cars.jsonl"
    data.write_bytes(GOOD_DATA)
    before = msgspec.to_builtins(preview(page.deployment, data, config, tests))
    for key, content in ((object_keys.config_key("cars"), config), (object_keys.tests_keys("cars")[0], tests)):
        if content is not None:
            world.put(key, content)
    run = world.drop(body=GOOD_DATA)
    recorded = page.deployment.read_json(run, "validation.json")
    assert untimed({name: recorded[name] for name in before}) == untimed(before)
    # Once dropped, config and tests of the bucket count where none is sent.
    assert untimed(msgspec.to_builtins(preview(page.deployment, data, None, None))) == untimed(before)


def test_a_file_is_checked_then_dropped(page: Page, world: World) -> None:
    files = {"data": ("cars.jsonl", GOOD_DATA), "config": ("mine.yaml", b"grpo: {max_steps: 3}\n")}
    checked = page.send("check", files)
    assert checked.status == 200
    assert "valid" in checked.text
    assert "Start the run" in checked.text
    assert "0+1?" in checked.text  # the first row as the model reads it
    assert page.deployment.all_runs() == []
    rejected = page.send("check", {**files, "config": ("mine.yaml", b"grpo: {max_stepz: 3}\n")})
    assert re.search(r"mine\.yaml(:1)?: CONFIG_", rejected.text), rejected.text
    assert "Start the run" not in rejected.text
    assert page.send("check").status == 400
    assert "cars.exe" in page.send("check", {"data": ("cars.exe", GOOD_DATA)}).text


def test_a_file_name_leads_nowhere_else(page: Page, tmp_path: Path) -> None:
    answer = page.send("check", {"data": ("../../../../tmp/evil.jsonl", GOOD_DATA)})
    assert answer.status == 200
    assert "evil.jsonl" in answer.text
    assert not Path("/tmp/evil.jsonl").exists()


@pytest.mark.parametrize("name", ["..", ".", "a\0b.jsonl", f"{'x' * 300}.jsonl", ".hidden.csv", "_SUCCESS.csv"], ids=repr)
def test_a_name_that_starts_no_run_is_a_message(page: Page, name: str) -> None:
    for path in ("check", "drop"):
        assert page.send(path, {"data": (name, GOOD_DATA)}).status == 400


def test_hostile_text_is_text(page: Page, world: World) -> None:
    row = json.dumps({"question": HOSTILE, "answer": HOSTILE}).encode() + b"\n"
    checked = page.send("check", {"data": (f"x{HOSTILE.replace('/', '')}.jsonl", row * 3 + GOOD_DATA)})
    assert "&lt;script&gt;" in checked.text
    run = world.tested(world.trained(world.start(world.drop("training_data/x.jsonl", GOOD_DATA))))
    for path in ("", "standing", f"runs/{run.run_id}"):
        page_text = page.get(path).text
        assert "<script>alert" not in page_text
        assert "<img" not in page_text
    assert "<script>alert" not in checked.text
    assert "<img" not in checked.text


def test_a_published_run_its_files_and_its_line(page: Page, world: World) -> None:
    run = world.tested(world.trained(world.start(world.drop())))
    shown = page.get(f"runs/{run.run_id}")
    assert "Open the report" in shown.text
    report = page.get(f"runs/{run.run_id}/report.html")
    assert report.status == 200
    assert report.headers["content-security-policy"].startswith("sandbox allow-scripts")
    assert "allow-same-origin" not in report.headers["content-security-policy"]
    assert page.get(f"runs/{run.run_id}/result.json").headers["content-type"] == "application/json"
    index = page.get("runs/index.html")
    assert f"{run.run_id}" in index.text
    assert run.run_id in page.get("lines/cars").text
    standing = page.get("standing").text
    assert "cars" in standing
    for missing in (
        f"runs/{run.run_id}/nothing.html",
        "runs/nothing",
        "lines/nothing",
        "static/../pages.py",
        "compare?run=x",
    ):
        assert page.get(missing).status == 404, missing


def test_a_stack_that_is_gone_is_said(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_self: Deployment) -> None:
        raise EndpointConnectionError(endpoint_url="https://127.0.0.1:1")

    monkeypatch.setattr(Deployment, "all_runs", gone)
    answer = page.get("")
    assert answer.status == 503
    assert "AWS does not answer: Could not connect to the endpoint URL" in answer.text


def test_what_aws_refuses_and_a_missing_launch_plan_are_said(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> Any:
        raise error

    refusal = ClientError({"Error": {"Code": "AccessDenied", "Message": "no Scan"}}, "Scan")
    monkeypatch.setattr(Deployment, "find", lambda *_: fail(refusal))
    answer = page.get("runs/cars")
    assert (answer.status, "AWS refuses the request" in answer.text, "no Scan" in answer.text) == (502, True, True)
    monkeypatch.setattr("tunedrop_cli.console.preview.prepare", lambda *_: fail(NoLaunchPlanError("run python -m release")))
    answer = page.send("check", {"data": ("new.jsonl", GOOD_DATA)})
    assert (answer.status, "run python -m release" in answer.text) == (400, True)


def test_an_answer_cannot_end_a_stream(page: Page, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.drop()
    monkeypatch.setattr(Live, "ended", True)
    monkeypatch.setattr(Pages, "parts", lambda *_: {"answers": "a\rb\r\revent: over\rdata:"})
    stream = page.get(f"runs/{run.run_id}/live").text
    assert "\r" not in stream
    assert stream.startswith("event: answers\ndata: a\ndata: b\ndata: \ndata: event: over\ndata: data:\n\n")


def test_runs_are_compared(page: Page, world: World) -> None:
    runs = [
        world.tested(world.trained(world.start(world.drop(f"training_data/{name}.jsonl", GOOD_DATA * n))))
        for n, name in enumerate(("cars", "trucks"), 1)
    ]
    compared = page.get("compare?" + "&".join(f"run={run.run_id}" for run in runs)).text
    assert all(run.run_id in compared for run in runs)
    assert "verdict" in compared
    assert page.get(f"compare?run={runs[0].run_id}").status == 404


def test_a_run_is_stopped_and_undelivered_events_are_sent_again(
    page: Page, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world.start(world.drop())
    stopped = replace_run(page.deployment, monkeypatch)
    answer = page.send(f"runs/{run.run_id}/stop")
    assert (answer.status, stopped) == (200, [run.run_id])
    assert page.send("redrive").text == "0 events were sent again."
    ended = world.tested(world.trained(world.start(world.drop("training_data/x.jsonl"))))
    monkeypatch.undo()
    assert "has ended already" in page.send(f"runs/{ended.run_id}/stop").text


def replace_run(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note the runs that are stopped: no function handles the event here."""
    stopped: list[str] = []

    def stop(_self: Deployment, run: Any) -> Any:
        stopped.append(run.run_id)
        return run

    monkeypatch.setattr(Deployment, "stop", stop)
    return stopped


def test_a_run_is_followed_to_its_end(page: Page, world: World) -> None:
    """The stream has each part once, and ends with the run."""
    run = world.tested(world.trained(world.start(world.drop())))
    stream = page.get(f"runs/{run.run_id}/live")
    assert stream.headers["content-type"].startswith("text/event-stream")
    names = re.findall(r"^event: (\w+)$", stream.text, re.MULTILINE)
    assert sorted(names) == ["alerts", "answers", "chart", "end", "log", "over", "state"]
    assert names[-1] == "over"


def test_a_file_is_dragged_into_a_browser(page: Page, world: World, browser: Any, tmp_path: Path) -> None:
    """Scripts, styles and the stream work under the pages' own policy. The whole way is tests/e2e's."""
    (tmp_path / "cars.jsonl").write_bytes(GOOD_DATA)
    (tmp_path / "cars.yaml").write_bytes(b"grpo: {max_steps: 3}\n")
    run = world.start(world.drop("training_data/trucks.jsonl"))
    shown, complaints = browser.new_page(), []
    shown.on("console", lambda message: complaints.append(message.text))
    shown.on("pageerror", lambda error: complaints.append(str(error)))
    shown.goto(f"http://{page.host}/{page.secret}/")
    drag(shown, [tmp_path / "cars.jsonl", tmp_path / "cars.yaml"])
    shown.get_by_role("button", name="Start the run").wait_for(timeout=60_000)
    assert "0+1?" in shown.locator("figure.example").first.inner_text()
    late = world.drop("training_data/late.jsonl", GOOD_DATA)
    shown.get_by_role("link", name=late.run_id).wait_for(timeout=60_000)  # by the stream
    shown.get_by_role("link", name=run.run_id).first.click()
    shown.get_by_role("button", name="Stop the run").wait_for(timeout=60_000)
    assert complaints == []
    shown.close()
