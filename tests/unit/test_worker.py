"""The processes that read what cannot be trusted."""

import json
import subprocess

import pytest

from pipeline.validation.tokens import TokenCounter
from tunedrop.dataset.parquet import read_parquet
from tunedrop.sandboxed_process import Worker, WorkerKilledError


def test_a_worker_gets_no_credentials_but_finds_its_libraries(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/var/lang/lib")
    file = tmp_path / "worker.py"
    file.write_text("import json, os, msgspec\nprint(json.dumps(dict(os.environ)), flush=True)\n")
    worker = Worker(file, seconds=30)
    assert worker.process.stdout is not None
    try:
        environment = json.loads(worker.process.stdout.readline())
    finally:
        worker.close()
    assert environment["LD_LIBRARY_PATH"] == "/var/lang/lib"
    assert not [name for name in environment if name.startswith("AWS")]


def test_a_worker_is_ended_when_its_time_is_over(tmp_path):
    file = tmp_path / "worker.py"
    file.write_text("while True: pass\n")
    worker = Worker(file, seconds=0.2)
    assert worker.process.stdout is not None
    try:
        assert worker.process.stdout.read() == b""
        assert worker.process.wait() < 0
        worker.blame()  # the file made it run for too long
    finally:
        worker.close()


@pytest.mark.parametrize(("code", "blamed"), [("os.kill(os.getpid(), 9)", True), ("os.abort()", False), ("1 / 0", False)])
def test_a_worker_that_the_machine_killed_is_not_the_files_fault(tmp_path, code, blamed):
    """Such work is done again. A dataset was once rejected, because something had killed its tokenizer's process."""
    file = tmp_path / "worker.py"
    file.write_text(f"import os\n{code}\n")
    worker = Worker(file, seconds=30)
    try:
        if blamed:
            with pytest.raises(WorkerKilledError):
                worker.blame()
        else:
            worker.blame()
    finally:
        worker.close()


def test_its_callers_ask(tmp_path, monkeypatch):
    popen = subprocess.Popen

    def killed(*args, **kwargs):
        process = popen(*args, **kwargs)
        process.kill()
        return process

    monkeypatch.setattr(subprocess, "Popen", killed)
    with pytest.raises(WorkerKilledError):
        TokenCounter(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with (tmp_path / "a.parquet").open("rb") as file, pytest.raises(WorkerKilledError):
        list(read_parquet(file))
