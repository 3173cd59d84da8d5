"""The state survives the emulator's end, in order or by kill -9; the jobs' processes do not."""

from __future__ import annotations

import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from local_app.sagemaker.sandbox import StartupError

COUNTS_RUNS = """
trap 'exit 0' TERM
echo run >> /opt/ml/checkpoints/runs
[ $(wc -l < /opt/ml/checkpoints/runs) = 2 ] && cp /opt/ml/checkpoints/runs /opt/ml/model && exit 0
sleep 61.25 &
touch /opt/ml/checkpoints/started
wait
"""


def job_processes(folder: Path) -> list[str]:
    """Command lines of this test's job processes, and of the processes that started them."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if "sleep 61.25" in line or f"{folder}/state/jobs" in line:
            lines.append(line)
    return lines


def test_kill_9_leaves_no_process_and_the_job_goes_on_after_a_restart(
    command: Callable[..., tuple[subprocess.Popen[bytes], Any]], sink: Any, tmp_path: Path
) -> None:
    process, local = command()
    checkpoints = {"CheckpointConfig": {"S3Uri": "s3://art/checkpoints/survives"}}
    local.create("survives", COUNTS_RUNS, **checkpoints, Tags=[{"Key": "run-id", "Value": "a-1"}])
    local.until((tmp_path / "state/jobs/survives/ml/checkpoints/started").exists)
    local.until(lambda: len(job_processes(tmp_path)) >= 2)
    local.until(lambda: len(sink.events) == 3)  # Starting, Downloading, Training
    process.send_signal(signal.SIGKILL)
    process.wait()
    local.until(lambda: not job_processes(tmp_path), 5)

    _, local = command()
    job = local.wait("survives")
    assert job["SecondaryStatus"] == "Completed", job
    again = ["Starting", "Downloading", "Training"]
    assert local.statuses("survives") == [*again, "Interrupted", *again, "Uploading", "Completed"]
    assert local.text("out/survives/survives/output/model/runs") == "run\nrun\n"
    assert local.client.list_tags(ResourceArn=job["TrainingJobArn"])["Tags"] == [{"Key": "run-id", "Value": "a-1"}]
    local.until(lambda: len(sink.events) == 9)
    assert [event["detail"]["SecondaryStatus"] for event in sink.events] == local.statuses("survives")


def test_sigterm_ends_the_emulator_and_its_jobs_in_order_and_events_are_kept(
    command: Callable[..., tuple[subprocess.Popen[bytes], Any]], sink: Any, tmp_path: Path
) -> None:
    sink.broken = True
    process, local = command()
    local.create("kept", COUNTS_RUNS, CheckpointConfig={"S3Uri": "s3://art/checkpoints/kept"})
    local.until((tmp_path / "state/jobs/kept/ml/checkpoints/started").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert not job_processes(tmp_path)
    assert sink.events == []
    sink.broken = False
    _, local = command()
    assert local.wait("kept")["SecondaryStatus"] == "Completed"
    local.until(lambda: len(sink.events) == 9)
    assert [event["detail"]["SecondaryStatus"] for event in sink.events] == local.statuses("kept")


def test_a_stop_that_was_asked_for_before_a_restart_is_done_after_it(start: Callable[..., Any]) -> None:
    local = start(grace=1)
    script = "trap '' TERM; touch /opt/ml/checkpoints/started; while :; do sleep 0.1; done"
    local.create("stopping", script, CheckpointConfig={"S3Uri": "s3://art/checkpoints/stopping"})
    local.wait_for_key("checkpoints/stopping/started")
    local.client.stop_training_job(TrainingJobName="stopping")
    local.close()
    local = start()
    assert local.wait("stopping")["SecondaryStatus"] == "Stopped"


def test_one_emulator_at_a_time_uses_a_folder(start: Callable[..., Any]) -> None:
    start()
    with pytest.raises(StartupError, match="Another SageMaker emulator uses"):
        start()


def test_the_server_listens_on_loopback_only_and_refuses_browsers(local: Any) -> None:
    assert local.url.startswith("http://127.0.0.1:")
    request = urllib.request.Request(f"{local.url}/_tunedrop/interrupt/a", method="POST", headers={"Origin": "http://evil"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request)
