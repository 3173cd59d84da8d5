"""What a run emits (logs, events, notifications, metrics, job requests) has no dataset text, no credentials, no variables.

Marked values are planted wherever something of a user's or of the process goes in, and looked for in everything that
comes out. Receipts, inputs, reports and results are the user's own objects, and not emitted.
"""

import io
import json
import logging
import re

import pytest
from hostile import GOOD

from pipeline.observability import logger
from pipeline.runs.states import RunState

MARK = "CaNaRy"
DATA = b"".join(
    b'{"question": "CaNaRy-prompt %d", "answer": "CaNaRy-answer %d", "extra": "CaNaRy-extra"}\n' % (n, n) for n in range(30)
)
CONFIG = b'system_prompt: "CaNaRy-system"\n'
TESTS = json.dumps(
    {"evaluations": [{"id": f"t{n}", "prompt": "CaNaRy-test", "description": "CaNaRy-reference"} for n in range(30)]}
).encode()
BROKEN = {
    "a row that is not closed": GOOD + b'{"question": "CaNaRy", "ans',
    "no JSON": GOOD + b"CaNaRy: 1\n",
    "a number among texts": GOOD + b'{"question": "CaNaRy", "answer": 1e999999}\n',
    "columns with other names": b'{"CaNaRy": "CaNaRy"}\n',
    "an unknown role": GOOD + b'{"messages": [{"role": "CaNaRy", "content": "CaNaRy"}]}\n',
    "no message": GOOD + b'{"messages": [{"CaNaRy": "CaNaRy"}]}\n',
}


@pytest.fixture
def emitted(world, monkeypatch, capfd):
    """Everything that was emitted until the moment it is called, as one text."""
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "SOMEBODYS_PASSWORD"):
        monkeypatch.setenv(name, f"{MARK}-{name}")
    logs, root = io.StringIO(), logging.getLogger()
    handler, level = logging.StreamHandler(logs), root.level
    handler.setFormatter(logger.registered_formatter)
    root.setLevel(logging.INFO)  # what libraries log at DEBUG is theirs
    root.addHandler(handler)
    logger.addHandler(handler)

    def read() -> str:
        printed = capfd.readouterr()
        sent = json.dumps([world.sent_events, world.notifications, world.job_requests], default=str)
        # The link to the report, where a stack asks for one, names the session that signed it. Its token signs nothing.
        return re.sub("X-Amz-Security-Token=[^&]*", "", printed.out + printed.err + logs.getvalue() + sent)

    yield read
    root.setLevel(level)
    root.removeHandler(handler)
    logger.removeHandler(handler)  # type: ignore[attr-defined] # passed on to its logging.Logger


def test_a_run_to_the_end(world, emitted):
    world.put("training_data/cars.yaml", CONFIG)
    world.put("inference_test/cars.json", TESTS)
    run = world.tested(world.trained(world.drop(body=DATA)))
    assert run.state == RunState.PUBLISHED
    world.handle("test_model", world.load_event("test_model.train_completed"))
    found = emitted()
    assert "ignored a job of an earlier attempt" in found  # logs are looked at,
    assert "CloudWatchMetrics" in found  # and metrics
    assert [found[max(0, m.start() - 150) : m.end() + 40] for m in re.finditer(MARK, found)] == []


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
def test_a_rejected_dataset(world, emitted, body):
    run = world.drop(body=body)
    assert run.state == RunState.REJECTED
    assert run.reason
    assert world.notifications
    assert MARK not in emitted()
    assert MARK in json.dumps(world.read_json(f"runs/{run.run_id}/validation.json")) or body.startswith(GOOD)


@pytest.mark.parametrize(
    ("key", "body"),
    [
        ("training_data/cars.yaml", b"system_prompt: [CaNaRy]\n"),
        ("training_data/cars.yaml", b"CaNaRy: 1\n"),
        ("training_data/cars.yaml", b"model: {CaNaRy\n"),
        ("inference_test/cars.json", b'{"evaluations": [{"id": "CaNaRy"}]}'),
        ("inference_test/cars.json", b"CaNaRy"),
    ],
)
def test_a_rejected_config_or_test_file(world, emitted, key, body):
    world.put(key, body)
    assert world.drop().state == RunState.REJECTED
    assert MARK not in emitted()


def test_a_function_that_fails(world, emitted, monkeypatch):
    """What an exception says goes to the log: so it must not quote what it fails on."""
    run = world.drop(body=DATA)
    world.aws.s3.delete_object(Bucket="artifact-bucket", Key="launch_plans/f00d.json")
    with pytest.raises(Exception, match="launch_plans"):
        world.start(run)
    assert MARK not in emitted()
