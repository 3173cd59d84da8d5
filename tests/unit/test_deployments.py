"""What the bus and the topic get about a line's deployment."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from fake_stack import ARTIFACTS, BUS, SETTINGS, TRAINED_RUN
from msgspec import structs

from pipeline.notify import events
from pipeline.notify.deployments import STATUSES, announce_deployment
from pipeline.notify.messages import PROGRAMS
from pipeline.runs.deployments import Deployment

RUN = structs.replace(TRAINED_RUN, dataset="Größe\n& Co", line="Größe\nof all", model_package="arn:package/7")
FOLDER = f"s3://{ARTIFACTS}/runs/{RUN.run_id}/"
ROLLED_BACK = Deployment(
    line=RUN.line,
    version=25,
    number=12,
    run="cars-ba9876543210",
    target=RUN.run_id,
    endpoint="tunedrop-base-0a1b2c3d",
    component="tunedrop-Gr-e-0a1b2c3d",
    answered="3 of 20",
    reason="17 of 20 tests were not answered\nas recorded",
)
DEPLOYED = structs.replace(ROLLED_BACK, run=RUN.run_id, target=None, answered="20 of 20", reason=None)


class Sent:
    """The clients that an announcement needs, and what they sent. `result` is the run's `result.json`."""

    def __init__(self, result: Any) -> None:
        self.entries: list[dict[str, Any]] = []
        self.messages: list[dict[str, Any]] = []
        self.events = SimpleNamespace(put_events=self.put_events)
        self.sns = SimpleNamespace(publish=lambda **arguments: self.messages.append(arguments))
        self.runs = SimpleNamespace(get={RUN.run_id: RUN}.get)
        files = {f"runs/{RUN.run_id}/result.json": json.dumps(result).encode() if result else None}
        self.read = lambda bucket, key: files[key]

    def put_events(self, **request: Any) -> dict[str, int]:
        self.entries += request["Entries"]
        return {"FailedEntryCount": 0}


def announce(deployment: Deployment, detail_type: str, result: Any = None) -> Sent:
    sent = Sent(result)
    announce_deployment(deployment, detail_type, SETTINGS, sent)  # type: ignore[arg-type]
    return sent


def test_the_event_names_the_run_what_serves_and_the_reason():
    (entry,) = announce(ROLLED_BACK, events.ROLLED_BACK).entries
    assert (entry["EventBusName"], entry["Source"], entry["DetailType"]) == (BUS, "tunedrop", "Model Rolled Back")
    assert json.loads(entry["Detail"]) == {
        "id": "Größe\nof all/12/Model Rolled Back",
        "line": "Größe\nof all",
        "run_id": RUN.run_id,
        "dataset": "Größe\n& Co",
        "status": "ROLLED_BACK",
        "serving": "cars-ba9876543210",
        "endpoint": "tunedrop-base-0a1b2c3d",
        "component": "tunedrop-Gr-e-0a1b2c3d",
        "model_package": "arn:package/7",
        "answered": "3 of 20",
        "reason": "17 of 20 tests were not answered\nas recorded",
        "report": f"{FOLDER}report.html",
        "result": f"{FOLDER}result.json",
    }


def test_a_deployed_model_is_the_one_that_serves_and_has_no_reason():
    (entry,) = announce(DEPLOYED, events.DEPLOYED).entries
    detail = json.loads(entry["Detail"])
    assert (detail["run_id"], detail["serving"], detail["status"]) == (RUN.run_id, RUN.run_id, "DEPLOYED")
    assert "reason" not in detail


def test_a_line_whose_first_deployment_failed_serves_nothing():
    first = structs.replace(ROLLED_BACK, run=None, answered=None)
    sent = announce(first, events.DEPLOYMENT_FAILED)
    assert json.loads(sent.entries[0]["Detail"]).keys().isdisjoint({"serving", "answered"})
    assert "answers now: no model" in json.loads(sent.messages[0]["Message"])["default"]


@pytest.mark.parametrize("detail_type", STATUSES)
@pytest.mark.parametrize(("notify", "messages"), [(True, 1), (False, 0), (None, 1)])  # None: the run's files are gone
def test_a_message_follows_if_the_runs_config_asks_for_messages(detail_type, notify, messages):
    sent = announce(ROLLED_BACK, detail_type, None if notify is None else {"config": {"notify": {"sns": notify}}})
    assert (len(sent.entries), len(sent.messages)) == (1, messages)


def test_each_subscriber_gets_its_form():
    (message,) = announce(ROLLED_BACK, events.ROLLED_BACK).messages
    assert message["TopicArn"] == SETTINGS.topic_arn
    assert message["Subject"] == "Model rolled back: Gr??e of all"
    forms = json.loads(message["Message"])
    assert forms["default"].splitlines() == [
        "Model rolled back: Größe of all",
        "run cars-0123456789ab",
        "",
        "17 of 20 tests were not answered as recorded",
        "",
        "answers under: tunedrop-Gr-e-0a1b2c3d",
        "endpoint: tunedrop-base-0a1b2c3d",
        "answers now: cars-ba9876543210",
        "tests answered as recorded: 3 of 20",
        "",
        f"report: {FOLDER}report.html",
        f"result: {FOLDER}result.json",
    ]
    for protocol in PROGRAMS:
        assert json.loads(forms[protocol])["verdict"] == "ROLLED_BACK"
    attributes = {name: value["StringValue"] for name, value in message["MessageAttributes"].items()}
    assert (attributes["line"], attributes["verdict"], attributes["run_id"]) == ("Größe of all", "ROLLED_BACK", RUN.run_id)
    assert json.loads(forms["https"])["metadata"]["eventType"] == "Model Rolled Back"


def test_a_line_without_a_printable_character_is_announced():
    """SNS refuses a message with an empty attribute, and the deployment would wait for its announcement for ever."""
    (message,) = announce(structs.replace(ROLLED_BACK, line="\u200b"), events.ROLLED_BACK).messages
    assert "line" not in message["MessageAttributes"]
    assert all(each["StringValue"] for each in message["MessageAttributes"].values())


def test_a_deployment_of_no_known_run_is_an_error():
    with pytest.raises(LookupError, match="does not have cars-unknown, the run of the deployment of Größe"):
        announce(structs.replace(ROLLED_BACK, target="cars-unknown"), events.ROLLED_BACK)
