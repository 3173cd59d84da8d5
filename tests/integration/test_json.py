"""What commands print with `--json`. The fixture `tunedrop` holds each document against its type."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped] # as in the rewards
from world import GOOD_DATA, World

from pipeline.runs.states import Run
from tunedrop_cli.deployment import Deployment
from tunedrop_cli.documents import DOCUMENTS, page
from tunedrop_cli.main import cli

PAGE = Path(__file__).parents[2] / "docs/json.md"
# Commands that print no facts: files, logs, events (which are JSON), a conversation, and the application's own life.
WITHOUT = {
    *("config", "init", "completion", "logs", "open", "event", "chat", "console"),
    *("up", "down", "env", "interrupt", "demo"),
}


def test_the_page_is_up_to_date_and_has_schemas() -> None:
    assert PAGE.read_text() == page(), "python -m tunedrop_cli.documents > docs/json.md"
    schemas = [part.partition("```")[0] for part in page().split("```json\n")[1:]]
    assert len(schemas) == len(DOCUMENTS)
    for schema in schemas:
        Draft202012Validator.check_schema(json.loads(schema))


def test_every_command_that_prints_facts_has_json() -> None:
    documented = {name for names in DOCUMENTS for name in names.split(", ")}
    with_option = {name for name, command in cli.commands.items() if any(p.name == "as_json" for p in command.params)}
    assert documented == with_option
    assert set(cli.commands) - with_option == WITHOUT


@pytest.fixture
def dropped(world: World, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that waits for its start, and that `drop` and `stop` find: no function handles their events here."""
    run = world.drop()
    monkeypatch.setattr(Deployment, "drop", lambda *_: run)
    monkeypatch.setattr(Deployment, "stop", lambda *_: run)
    return run


def test_drop_and_stop(dropped: Run, tunedrop: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "cars.jsonl").write_bytes(GOOD_DATA)
    document = json.loads(tunedrop("drop", str(tmp_path / "cars.jsonl"), "--json"))
    assert (document["run"]["run_id"], document["receipt"]["ok"], document["result"]) == (dropped.run_id, True, None)
    assert json.loads(tunedrop("stop", "cars", "--json", code=1)) == document  # it is not cancelled


def test_a_rejected_drop_has_its_receipt(world: World, tunedrop: Callable[..., str], tmp_path: Path, monkeypatch) -> None:
    run = world.drop("training_data/broken.jsonl", b"nothing\n")
    monkeypatch.setattr(Deployment, "drop", lambda *_: run)
    (tmp_path / "broken.jsonl").write_bytes(b"nothing\n")
    document = json.loads(tunedrop("drop", str(tmp_path / "broken.jsonl"), "--json", code=1))
    assert (document["run"]["state"], document["receipt"]["ok"]) == ("REJECTED", False)


def test_redrive(world: World, tunedrop: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Deployment, "redrive", lambda _: iter(["tunedrop-TestModel", "tunedrop-TestModel"]))
    assert json.loads(tunedrop("redrive", "--json"))["functions"] == ["tunedrop-TestModel"] * 2
