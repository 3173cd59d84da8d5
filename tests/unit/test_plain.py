"""Hostile text of users through every renderer: terminals, e-mails, chat cards, the model registry."""

import io
import json
from pathlib import Path

import pytest
from botocore.session import get_session
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from local_app.sagemaker.constraints import violations
from pipeline.notify import events, messages
from pipeline.publish.registry import metadata_value
from pipeline.runs.states import Run, RunState
from pipeline.validation.receipt import Receipt
from tunedrop.plain import one_line, printable, without_markup
from tunedrop.problems import Problem
from tunedrop_cli import output
from tunedrop_cli.check import receipt_text

HOSTILE = st.text() | st.sampled_from(
    [
        "\x1b[2J\x1b[31m",
        "a\nVerdict: APPROVED",
        "<!channel> [free](http://x)",
        "می\u200cخواهم",
        "soft\u00adhyphen",
        "\u202egnp",
        "\x7f",
        "[red]",
    ]
)
REGISTRY = get_session().get_service_model("sagemaker").operation_model("CreateModelPackage").input_shape


@given(HOSTILE)
def test_printable_text_controls_nothing(text):
    assert printable(text).replace("\n", "").replace("\t", "").isprintable() or not printable(text).isascii()
    assert "\x1b" not in printable(text)
    assert len(one_line(text).splitlines()) <= 1
    assert not {"<", ">"} & set(without_markup(text))


@given(HOSTILE)
def test_the_model_registry_takes_every_name(text):
    description = one_line(f"tuned on {text}")[:1024]
    assert list(violations(REGISTRY.members["ModelPackageDescription"], description)) == []
    assert list(violations(REGISTRY.members["CustomerMetadataProperties"], {"data": metadata_value(text)})) == []


@settings(max_examples=50)
@given(HOSTILE, HOSTILE)
def test_a_message_has_the_lines_that_it_should_have(dataset, reason):
    run = Run(
        run_id="cars-0123456789ab", dataset=dataset, state=RunState.TRAINING_FAILED, attempt=1, trigger="t", key="k",
        version_id="v", arrived="2026", updated="2026", model="m", plan="p", reason=reason or "r",
    )  # fmt: skip
    made = messages.message(events.RunEvent(detail_type="Training Failed", run=run))
    assert made["Subject"].isascii()
    assert (len(made["Subject"]) < 100, len(made["Subject"].splitlines())) == (True, 1)
    forms = json.loads(made["Message"])
    assert len(forms["default"].splitlines()) <= 5
    assert "<" not in json.loads(forms["https"])["content"]["title"] + json.loads(forms["https"])["content"]["description"]
    assert len(made["Message"].encode()) < 256 * 1024


def test_a_message_about_a_huge_event_points_to_its_documents():
    run = Run(
        run_id="cars-0123456789ab", dataset="cars", state=RunState.REJECTED, attempt=1, trigger="t", key="k",
        version_id="v", arrived="2026", updated="2026", model="m", plan="p", reason="r",
    )  # fmt: skip
    event = events.RunEvent(
        detail_type=events.REJECTED,
        run=run,
        links={"receipt": "s3://b/validation.json"},
        extra={"errors": ["x" * 1000] * 200},
    )
    made = messages.message(event)
    assert len(made["Message"].encode()) < 256 * 1024
    assert json.loads(json.loads(made["Message"])["sqs"])["receipt"] == "s3://b/validation.json"


@settings(max_examples=50)
@given(HOSTILE)
def test_a_terminal_shows_hostile_text_as_text(text):
    with pytest.MonkeyPatch.context() as patch:
        written = io.StringIO()
        patch.setattr(output, "console", Console(file=written, highlight=False, soft_wrap=True))
        output.print_table([["name", text]])
        output.say(text)
    assert "\x1b" not in written.getvalue()
    receipt = Receipt(
        ok=False, errors=[Problem("X", text, text)], error_counts={"X": 1}, warnings=[text], columns={"prompt": text}
    )
    lines = receipt_text(receipt, Path("t.jsonl"), None, None)
    assert len("\n".join(lines).splitlines()) == len(lines)
    assert "\x1b" not in "\n".join(lines)
