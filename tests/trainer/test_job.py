"""The container's entry point: commands, hyperparameters, failure reasons, and signals to a real process."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from trainer import checkpoints, train
from trainer import job as entry
from tunedrop.problems import Problem, RejectedError


def test_hyperparameters_become_flags():
    given = {"model-name": "m", "max-seq-length": 2048, "lora-rank": 32, "num-train-epochs": 3, "learning-rate": 5e-3}
    command = entry.command("train", given, gpus=0, hosts=["algo-1"], host="algo-1")
    assert command[:3] == [sys.executable, "-m", "trainer.train"]
    config = train.read_config(train.parse_flags(command[3:]))
    assert (config.model, config.max_seq_length, config.lora.r) == ("m", 2048, 32)
    assert (config.grpo["num_train_epochs"], config.grpo["learning_rate"]) == (3.0, 0.005)


@pytest.mark.parametrize(
    ("stage", "gpus", "hosts", "expected"),
    [
        ("train", 1, ["algo-1"], None),
        ("train", 4, ["algo-1"], ["--nproc-per-node=4", "--nnodes=1", "--node-rank=0", "--master-addr=algo-1"]),
        ("train", 0, ["algo-2", "algo-1"], ["--nproc-per-node=1", "--nnodes=2", "--node-rank=1", "--master-addr=algo-1"]),
        ("test", 4, ["algo-1"], None),
    ],
)
def test_torchrun_starts_when_there_is_more_than_one_rank(stage, gpus, hosts, expected):
    command = entry.command(stage, {}, gpus=gpus, hosts=hosts, host=hosts[0])
    if expected is None:
        assert command == [sys.executable, "-m", entry.MODULES[stage]]
    else:
        assert command[2] == "torch.distributed.run"
        assert set(expected) <= set(command)
        assert command[-2:] == ["-m", "trainer.train"]


def test_hyperparameters_come_from_the_driver_or_from_sagemakers_file(tmp_path, monkeypatch):
    monkeypatch.setattr(entry, "INPUT_CONFIG", tmp_path)
    monkeypatch.delenv("SM_HPS", raising=False)
    assert entry.read_hyperparameters() == {}
    (tmp_path / "hyperparameters.json").write_text('{"lora-rank": "8"}')
    assert entry.read_hyperparameters() == {"lora-rank": "8"}
    monkeypatch.setenv("SM_HPS", '{"lora-rank": 16}')
    assert entry.read_hyperparameters() == {"lora-rank": 16}


def test_a_users_error_is_its_message_and_a_bug_its_last_frames():
    assert entry.describe(entry.JobError("no rows")) == "no rows"
    assert entry.describe(RejectedError([Problem("X", "bad", line=3)])) == "line 3: bad"
    try:
        raise KeyError("x" * 5000)
    except KeyError as error:
        reason = entry.describe(error)
    assert reason.startswith("KeyError: 'xxx")
    assert "in test_a_users_error_is_its_message_and_a_bug_its_last_frames" in reason
    assert len(reason) <= entry.REASON_CHARACTERS


def test_the_first_reason_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("SM_OUTPUT_FAILURE", str(tmp_path / "output/failure"))
    entry.report("first")
    entry.report("second")
    assert (tmp_path / "output/failure").read_text() == "first"


@pytest.mark.parametrize(
    ("program", "code", "reason"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            137,
            "killed by SIGKILL: the machine probably ran out",
        ),
        ("raise SystemExit(3)", 3, "ended with exit code 3"),
        ("pass", 0, None),
    ],
)
def test_a_process_that_dies_silently_still_leaves_a_reason(tmp_path, monkeypatch, program, code, reason):
    monkeypatch.setenv("SM_OUTPUT_FAILURE", str(tmp_path / "failure"))
    monkeypatch.setattr(entry, "command", lambda *_, **__: [sys.executable, "-c", program])
    assert entry.run("train") == code
    assert (reason in (tmp_path / "failure").read_text()) if reason else not (tmp_path / "failure").exists()


def test_sigterm_reaches_the_trainer_which_saves_a_checkpoint_and_its_model(job):
    job.config(grpo={"max_steps": 500})
    job.rows()
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.job", "train"],
        env=os.environ | {"SM_HPS": '{"run-id": "r"}', "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = iter(process.stdout)
    assert next(line for line in lines if line.startswith("step=2 "))
    process.send_signal(signal.SIGTERM)  # to trainer.job only, as in a container
    started = time.monotonic()
    rest = list(lines)
    assert process.wait(timeout=60) == entry.STOPPED, rest
    assert time.monotonic() - started < 60
    summary = json.loads((job.model / "training.json").read_text())
    assert summary["stopped"]
    assert (job.model / "merged/model.safetensors").exists()
    assert not (job.root / "failure").exists()
    found = checkpoints.whole(job.root / "output/checkpoints")
    assert [each.step for each in found] == [summary["steps"]]
