"""What each kind of subscriber gets."""

import json
from typing import Any

import pytest
from msgspec import structs

from pipeline.notify import events
from pipeline.notify.events import RunEvent
from pipeline.notify.messages import PROGRAMS, message
from pipeline.runs.states import Run, RunState

LINK = "https://artifacts.s3.amazonaws.com/runs/r/report.html?X-Amz-Signature=abc"
COMPARISON = {
    "base_score": 0.321,
    "tuned_score": 0.929,
    "lift": 0.607,
    "lift_low": 0.379,
    "lift_high": 0.786,
    "wins": 17,
    "ties": 11,
    "losses": 0,
}


def run(state: RunState = RunState.PUBLISHED, **more) -> Run:
    given: dict[str, Any] = {
        "run_id": "cars-0123456789ab",
        "dataset": "Größe\n& Co",
        "attempt": 2,
        "trigger": "k@1",
        "key": "k",
        "version_id": "v",
    }
    return Run(**given, state=state, arrived="2026", updated="2026", model="m", plan="p", **more)


def published(**more) -> RunEvent:
    extra = {
        "verdict": "APPROVED",
        "reasons": ["The tuned model is better."],
        "comparison": COMPARISON,
        "cost": {"usd": 3.214},
    }
    links = {"report": "s3://a/report.html", "model": "s3://a/merged/"}
    return RunEvent(detail_type=events.PUBLISHED, run=run(), links=links, extra=extra | more)


def forms(arguments):
    return json.loads(arguments["Message"])


def test_a_person_gets_the_verdict_the_numbers_the_cost_and_a_link():
    arguments = message(published(), LINK)
    assert arguments["Subject"] == "APPROVED: Gr??e & Co, score 0.32 -> 0.93"
    assert forms(arguments)["sms"] == "APPROVED: Größe & Co, score 0.32 -> 0.93"
    assert forms(arguments)["default"].split("\n", 1)[1].splitlines() == [
        "run cars-0123456789ab, attempt 2",
        "",
        "The tuned model is better.",
        "",
        "score: 0.321 (base) -> 0.929 (tuned)",
        "lift: +0.607 (interval +0.379 to +0.786)",
        "tests: 17 won, 11 tied, 0 lost",
        "cost: $3.21",
        "",
        f"report: {LINK}",
        "model: s3://a/merged/",
    ]


def test_a_line_is_named_where_its_name_differs_and_its_champion_where_it_has_one():
    champion = {"run_id": "cars-aaaaaaaaaaaa", "comparison": COMPARISON | {"lift": 0.1, "lift_low": 0.01, "lift_high": 0.2}}
    champion["suite"] = COMPARISON | {"lift": -0.01, "lift_low": -0.019, "lift_high": 0.001}
    event = structs.replace(published(champion=champion), run=run(line="Größe\nof all"))
    arguments = message(event)
    headline = "APPROVED: Größe & Co (line Größe of all), score 0.32 -> 0.93, +0.10 over the champion"
    assert forms(arguments)["sms"] == headline
    assert arguments["Subject"] == headline.replace("ö", "?").replace("ß", "?")
    text = forms(arguments)["default"].splitlines()
    assert text[5:10] == [
        "score: 0.321 (base) -> 0.929 (tuned)",
        "lift: +0.607 (interval +0.379 to +0.786)",
        "tests: 17 won, 11 tied, 0 lost",
        "lift over the champion: +0.100 (interval +0.010 to +0.200)",
        "suite, against the champion: -0.010 (interval -0.019 to +0.001)",
    ]
    assert arguments["MessageAttributes"]["line"]["StringValue"] == "Größe of all"
    failed = RunEvent(detail_type=events.FAILED, run=run(RunState.TRAINING_FAILED, line="lamps"))
    assert forms(message(failed))["sms"] == "Run failed: Größe & Co (line lamps)"
    inside = RunEvent(detail_type=events.FAILED, run=structs.replace(run(line="lamps"), dataset="lamps/july"))
    assert forms(message(inside))["sms"] == "Run failed: lamps/july"
    same = structs.replace(published(champion=None), run=run(line=run().dataset))
    assert forms(message(same))["default"] == forms(message(published()))["default"]


def test_programs_get_the_events_detail():
    event = published()
    for protocol in PROGRAMS:
        body = json.loads(forms(message(event, LINK))[protocol])
        assert body == event.detail | {"report_link": LINK}
    assert "report_link" not in json.loads(forms(message(event))["sqs"])


def test_chat_gets_a_custom_notification():
    """The fields, and which of them are required, are those of Amazon Q Developer's schema, version 1.0."""
    card = json.loads(forms(message(published(), LINK))["https"])
    assert (card["version"], card["source"]) == ("1.0", "custom")
    assert set(card) <= {"version", "source", "id", "content", "metadata"}
    assert set(card["content"]) <= {"textType", "title", "description", "nextSteps", "keywords"}
    assert card["content"]["textType"] == "client-markdown"
    assert card["content"]["nextSteps"][0] == f"<{LINK}|Open the report>"
    assert set(card["metadata"]) <= {"threadId", "summary", "eventType", "relatedResources", "additionalContext"}
    assert card["metadata"]["threadId"] == "cars-0123456789ab"
    assert all(isinstance(value, str) for value in card["metadata"]["additionalContext"].values())
    assert card["metadata"]["additionalContext"]["verdict"] == "APPROVED"


@pytest.mark.parametrize(
    ("detail_type", "state", "verdict", "subject"),
    [
        (events.FAILED, RunState.TRAINING_FAILED, "FAILED", "Run failed: Gr??e & Co"),
        (events.FAILED, RunState.TESTING_FAILED, "FAILED", "Run failed: Gr??e & Co"),
        (events.FAILED, RunState.CANCELLED, "CANCELLED", "Run stopped: Gr??e & Co"),
        (events.REJECTED, RunState.REJECTED, "DATASET_REJECTED", "Dataset rejected: Gr??e & Co"),
    ],
)
def test_other_ends(detail_type, state, verdict, subject):
    event = RunEvent(
        detail_type=detail_type, run=run(state, reason='line 3: not "JSON"'), links={"receipt": "s3://a/validation.json"}
    )
    arguments = message(event)
    assert arguments["Subject"] == subject
    assert 'line 3: not "JSON"' in forms(arguments)["default"]
    attributes = {name: value["StringValue"] for name, value in arguments["MessageAttributes"].items()}
    assert attributes == {
        "id": event.detail["id"],
        "run_id": "cars-0123456789ab",
        "dataset": "Größe & Co",
        "status": state.value,
        "verdict": verdict,
    }


def test_nothing_is_too_long_for_sns():
    event = published(reasons=["x" * 100_000] * 20, comparison=COMPARISON)
    arguments = message(RunEvent(detail_type=event.detail_type, run=run(reason="y" * 1024), extra=event.extra), LINK)
    assert len(arguments["Subject"]) < 100
    assert len(forms(arguments)["default"]) < 50_000
    assert len(forms(arguments)["https"]) < 8_000
    long = structs.replace(published(champion={"comparison": COMPARISON, "suite": None}), run=run(line="l" * 100))
    assert len(message(long)["Subject"]) < 100


def test_pages_in_trackers_are_links():
    page = "https://mlflow.example.com/#/experiments/1/runs/2"
    arguments = message(published(), LINK, {"run in MLflow": page})
    assert f"run in MLflow: {page}" in forms(arguments)["default"].splitlines()
    assert f"<{page}|Open the run in MLflow>" in json.loads(forms(arguments)["https"])["content"]["nextSteps"]
