"""The outputs of a run's numbers: TensorBoard files, a progress bar, and valid JSON."""

import json
import math
import struct
from pathlib import Path

import pytest

from release.plan import METRIC_NAMES
from trainer import progress, train


@pytest.fixture
def short(job):
    job.config(grpo={"max_steps": 2}, learnability={"samples": 0})
    job.rows()
    job.heldout()
    return job


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """The numbers in TensorBoard event files: records of a length, two checksums and an Event."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[tuple[str, int], float] = {}
    for path in folder.glob("events.out.tfevents.*"):
        raw = path.read_bytes()
        while raw:
            (length,) = struct.unpack("<Q", raw[:8])
            event = Event.FromString(raw[12 : 12 + length])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            raw = raw[12 + length + 4 :]
    return found


def test_every_number_is_in_tensorboards_files_and_in_the_log_for_sagemaker(short, monkeypatch):
    lines = []
    monkeypatch.setattr("trainer.progress.log.info", lambda text, *args: lines.append(text % args if args else text))
    train.train(train.parse_flags([]))
    shown = scalars(short.model / "tensorboard")
    for point in short.metrics():
        for name, value in point.items():
            if isinstance(value, float):
                assert shown[name, point["step"]] == pytest.approx(value, rel=1e-5)
        assert shown["rewards/contains", point["step"]] == pytest.approx(point["rewards"]["contains"])
    last = next(line for line in lines if line.startswith("step=2 "))
    named = {pair.partition("=")[0] for pair in last.split()} - {"step", "max_steps", "answers"}
    assert {"reward", "heldout_reward", "reward_best", "memory_gb", "eta_seconds"} <= named
    assert named <= set(METRIC_NAMES)
    assert len(METRIC_NAMES) <= 40


def test_a_terminal_gets_a_bar_instead_of_lines(short, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    train.train(train.parse_flags([]))
    said = capsys.readouterr().out
    assert "2/2" in said
    assert "reward=" in said
    assert "step=1 " not in said


def test_numbers_that_are_none_are_null_in_json():
    said = progress.as_json({"loss": math.nan, "grad_norm": math.inf, "reward": 0.5, "kl": None, "rewards": {"a": None}})
    assert json.loads(said, parse_constant=pytest.fail) == {
        "loss": None,
        "grad_norm": None,
        "reward": 0.5,
        "kl": None,
        "rewards": {"a": None},
    }
