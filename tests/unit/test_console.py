"""The console's parts without a stack: vendored files, stages, and what a log says of progress."""

import hashlib
import re
from types import SimpleNamespace
from typing import Any

import pytest
from fake_stack import TRAINED_RUN
from msgspec.structs import replace

from local_app.stack import PROJECT
from pipeline.runs.states import RunState
from tunedrop_cli.console.live import LOG_LINES, Live, stages
from tunedrop_cli.console.pages import STATIC
from tunedrop_cli.progress import Alert, Note, Progress, read_line

STATIC_FILES = PROJECT / "tunedrop_cli/console/static"


def test_vendored_files_are_those_of_the_table() -> None:
    rows = re.findall(r"^\| `(\S+)` \|.*`([0-9a-f]{64})` \|$", (STATIC_FILES / "VENDORED.md").read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == {path.name for path in STATIC_FILES.glob("*.min.js")}
    for name, digest in rows:
        assert hashlib.sha256((STATIC_FILES / name).read_bytes()).hexdigest() == digest
    assert all(path.is_file() for path in STATIC.values())


@pytest.mark.parametrize(
    ("state", "jobs", "expected"),
    [
        ("VALIDATED", 0, "now later later later later"),
        ("WAITING", 0, "now later later later later"),
        ("REJECTED", 0, "failed later later later later"),
        ("TRAINING", 1, "done now later later later"),
        ("TRAINING_FAILED", 1, "done failed later later later"),
        ("TRAINED", 1, "done done now later later"),
        ("TESTING_FAILED", 2, "done done failed later later"),
        ("CANCELLED", 1, "done failed later later later"),
        ("TESTED", 2, "done done done now later"),
        ("PUBLISHED", 2, "done done done done done"),
    ],
)
def test_the_stages_of_a_run(state: str, jobs: int, expected: str) -> None:
    names = ("train", "test")[:jobs]
    run = replace(TRAINED_RUN, state=RunState(state), **{f"{name}_job": name for name in names})
    assert [stage.status for stage in stages(run)] == expected.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "INFO step=3 max_steps=9 reward=0.5 loss=-0.1 kl=0.1 eta_seconds=72",
            Progress(3, 9, None, {"reward": "0.5", "loss": "-0.1"}, 72),
        ),
        ("phase=sft step=3 max_steps=9 loss=1.2", Progress(3, 9, None, {"loss": "1.2"}, None, "sft")),
        ("INFO note=asking the model", Note("asking the model")),
        ("tested=4 total=30 model=tuned", Progress(4, 30, "tuned", {}, None)),
        ("alert=PLATEAU step=12 the reward has stayed", Alert("PLATEAU", 12, "the reward has stayed")),
        ("loading the model", None),
        ("model=step=", None),
    ],
)
def test_what_a_line_says(line: str, expected: Progress | Note | Alert | None) -> None:
    assert read_line(line) == expected


def test_a_job_that_began_anew_replaces_its_figures() -> None:
    """A spot job that resumes from step 2 logs step 3 again; the test job's answers follow."""
    written = ["step=1 max_steps=4 reward=0.1", "step=2 max_steps=4 reward=0.2", "step=3 max_steps=4 reward=0.3"]
    written += ["alert=PLATEAU step=3 stays", "step=3 max_steps=4 reward=0.5", "alert=PLATEAU step=3 stays", "\x1b[31mred"]
    run = replace(TRAINED_RUN, state=RunState.TRAINED, train_job="train")
    deployment: Any = SimpleNamespace(
        find=lambda _: run,
        log_events=lambda job, _positions: [(f"{job}/1", line) for line in written] if job == "train" else [],
        outputs=SimpleNamespace(artifact_bucket="artifact-bucket"),
        read=lambda *_: None,
    )
    live = Live(run)
    live.look(deployment)
    assert live.rewards == {1: 0.1, 2: 0.2, 3: 0.5}
    assert [alert.code for alert in live.alerts] == ["PLATEAU"]
    assert live.lines[-1] == "[31mred"
    chart = live.chart()
    assert chart is not None
    assert len(chart["lines"][0]["path"].split()) == 3
    written[:] = [f"line {number}" for number in range(3 * LOG_LINES)]
    live.look(deployment)
    assert live.lines == written[-LOG_LINES:]
