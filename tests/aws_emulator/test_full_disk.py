"""What the AWS emulator acknowledges is on its disk, also when the disk is full."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from local_app.aws import durable

# Mounts a small file system without root.
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode != 0,
    reason="this machine has no user namespaces",
)
def test_a_full_disk_is_an_error_and_what_was_acknowledged_outlives_a_kill(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'functions'}", "AWS_MAX_ATTEMPTS": "1"}
    command = [*NAMESPACE, sys.executable, str(HERE / "full_disk.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["acknowledged"] > 5
    assert len(found["refused"]) > 5
    assert {(status, code) for status, code, _ in found["refused"]} == {(500, "InternalError")}
    assert all("No space left" in message for _, _, message in found["refused"])
    assert found["before"] == found["after"] == [found["acknowledged"], True]
    assert found["said"] == len(found["refused"])


def test_a_file_is_synced_with_its_name_before_it_counts_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_sync(descriptor: int) -> None:
        done.append("sync " + Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> Path:
        done.append("rename")
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    durable.write(tmp_path / "file", b"new")
    assert done == ["sync file.tmp", "rename", f"sync {tmp_path.name}"]


def test_a_refused_write_leaves_the_old_file_and_ends_the_writes_of_its_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    durable.write(file, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with durable.request() as refused:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left"):
                durable.write(file, b"new")
        with pytest.raises(OSError, match="the disk refused another file"):
            durable.write(tmp_path / "other", b"x")
    assert refused[0] == "[Errno 28] No space left on device"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_bytes() == b"old"
    durable.write(file, b"newer")  # another request


def test_the_state_of_services_that_cannot_be_saved_is_said_once_and_saved_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from local_app.aws import hooks
    from local_app.aws.state import State

    saves: list[dict[str, object]] = []
    failures = [["failed to save sqs: No space left on device"]] * 2 + [[]]
    monkeypatch.setattr(hooks, "deploy_in_progress", lambda: False)
    monkeypatch.setattr(hooks, "states_of_services", lambda: {"sqs": dict})

    def save_states(states: dict[str, object]) -> list[str]:
        saves.append(states)
        return failures[len(saves) - 1]

    monkeypatch.setattr(hooks, "save_states", save_states)
    state, finished = State(), []
    state.changed("sqs")
    state.after_save(lambda: finished.append("action"))
    for _ in range(4):
        state.save()
        assert bool(finished) == (len(saves) == 3)
    assert len(saves) == 3
    assert [record.getMessage() for record in caplog.records if "No space left" in record.getMessage()] == [
        "The state of the services is not saved, and a kill would lose it: failed to save sqs: No space left on device"
    ]
