"""Training jobs as real processes: their inputs, their results in S3, and every way of ending."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest

from local_app.sagemaker.api import JobError
from local_app.sagemaker.sandbox import Docker, Namespaces, find_sandbox
from local_app.sagemaker.transfer import channel_objects, download
from local_app.stack import Stack, StackError

REPOSITORY = Path(__file__).parents[2]
ODD = """it's "odd" $(touch /tmp/tunedrop-executed) `id` \\n {"a": 1}"""
# Waits for SIGTERM, then saves, as a trainer does. `wait` lets bash handle the signal at once.
WAITS = """
trap 'echo "PID $$" > /opt/ml/output/data/terminated; echo half > /opt/ml/model/half; exit 0' TERM
touch /opt/ml/checkpoints/started
sleep 60 & wait
"""
IGNORES_TERM = "trap '' TERM; touch /opt/ml/checkpoints/started; while :; do sleep 0.1; done"


def checkpoints(name: str) -> dict[str, Any]:
    return {"CheckpointConfig": {"S3Uri": f"s3://art/checkpoints/{name}"}}


def spot(name: str, wait: int = 3600) -> dict[str, Any]:
    condition = {"MaxRuntimeInSeconds": wait, "MaxWaitTimeInSeconds": wait}
    return {"EnableManagedSpotTraining": True, "StoppingCondition": condition, **checkpoints(name)}


def started(local: Any, name: str) -> str:
    local.wait_for_key(f"checkpoints/{name}/started")
    return name


def test_a_job_sees_what_a_container_sees_and_leaves_its_results(local: Any, logs: Any, tmp_path: Path) -> None:
    local.s3.put_object(Bucket="art", Key="data/a/rows.jsonl", Body="1\n2\n")
    local.s3.put_object(Bucket="art", Key="data/a/deep/er.txt", Body="x")
    local.s3.put_object(Bucket="art", Key="data/a/marker/", Body="")
    local.s3.put_object(Bucket="art", Key="runs/config.json", Body="{}")
    local.create(
        "sees",
        """
        set -e
        cd /opt/ml
        files=$(find . -type f | sort); echo "$files" > output/data/files
        cp input/config/*.json output/data/
        printf %s "$ODD" > output/data/odd
        echo "$$ $(command -v python) $(command -v pip3) $(ls /proc | grep -c '^[0-9]*$')" > output/data/self
        env | cut -d= -f1 > output/data/env
        mkdir model/adapter; echo weights > model/adapter/w.bin
        echo "step=1 reward=0.25 loss=nan"; echo "step=2 reward=0.5 loss=nan"
        """,
        HyperParameters={"run-id": "a-1", "odd": ODD},
        Environment={"ODD": ODD},
        InputDataConfig=[
            local.channel("code", "s3://art/code/sees/"),
            local.channel("training", "s3://art/data/a", ContentType="text/jsonl", InputMode="FastFile"),
            local.channel("run", "s3://art/runs/config.json"),
        ],
        specification={
            "MetricDefinitions": [
                {"Name": "reward", "Regex": "reward=([0-9.]+)"},
                {"Name": "loss", "Regex": r"loss=(\S+)"},
            ]
        },
    )
    job = local.wait("sees")

    assert job["SecondaryStatus"] == "Completed", job
    assert local.statuses("sees") == ["Starting", "Downloading", "Training", "Uploading", "Completed"]
    assert all(transition["EndTime"] >= transition["StartTime"] for transition in job["SecondaryStatusTransitions"])
    assert [(m["MetricName"], m["Value"]) for m in job["FinalMetricDataList"]] == [("reward", 0.5)]
    assert job["ModelArtifacts"] == {"S3ModelArtifacts": "s3://art/out/sees/sees/output/model/"}
    assert local.text("out/sees/sees/output/model/adapter/w.bin") == "weights\n"

    def seen(name: str) -> str:
        return local.text(f"out/sees/sees/output/data/{name}")

    files = [f"./input/config/{name}.json" for name in ("hyperparameters", "inputdataconfig", "resourceconfig")]
    data = ["code/run.sh", "run/config.json", "training/deep/er.txt", "training/rows.jsonl"]
    assert seen("files").split() == sorted([*files, *(f"./input/data/{name}" for name in data)])
    assert json.loads(seen("hyperparameters.json")) == {"run-id": "a-1", "odd": ODD}
    assert json.loads(seen("inputdataconfig.json"))["training"] == {
        "ContentType": "text/jsonl",
        "TrainingInputMode": "File",
        "S3DistributionType": "FullyReplicated",
        "RecordWrapperType": "None",
    }
    resources = json.loads(seen("resourceconfig.json"))
    assert (resources["current_host"], resources["hosts"]) == ("algo-1", ["algo-1"])
    assert resources["current_instance_type"] == "ml.g5.4xlarge"
    assert resources["instance_groups"][0]["hosts"] == ["algo-1"]
    assert seen("odd") == ODD
    assert not Path("/tmp/tunedrop-executed").exists()
    pid, python, pip, processes = seen("self").split()
    assert (pid, python, pip) == ("1", f"{sys.prefix}/bin/python", f"{sys.prefix}/bin/pip3")
    assert int(processes) < 6, "the job sees processes that are not its own"
    variables = set(seen("env").split())
    assert {"TRAINING_JOB_NAME", "TRAINING_JOB_ARN", "AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID"} <= variables
    assert not {"PYTEST_CURRENT_TEST", "PYTHONPATH", "VIRTUAL_ENV"} & variables

    stream = logs.describe_log_streams(logGroupName="/aws/sagemaker/TrainingJobs", logStreamNamePrefix="sees/algo-1-")
    lines = logs.get_log_events(
        logGroupName="/aws/sagemaker/TrainingJobs", logStreamName=stream["logStreams"][0]["logStreamName"]
    )
    assert [event["message"] for event in lines["events"]] == ["step=1 reward=0.25 loss=nan", "step=2 reward=0.5 loss=nan"]
    folder = tmp_path / "state/jobs/sees"
    assert (folder / "job.log").read_text().splitlines()[0] == "step=1 reward=0.25 loss=nan"
    assert [path.name for path in folder.iterdir()] == ["job.log"]
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0


def test_log_lines_arrive_while_the_job_runs(local: Any, logs: Any) -> None:
    local.create("live", "echo first; sleep 60")
    group = {"logGroupName": "/aws/sagemaker/TrainingJobs"}

    def first_line() -> bool:
        streams = logs.describe_log_streams(**group, logStreamNamePrefix="live/")["logStreams"]
        return any(
            event["message"] == "first"
            for stream in streams
            for event in logs.get_log_events(**group, logStreamName=stream["logStreamName"])["events"]
        )

    local.wait("live", "Training")
    local.until(first_line, 4)
    assert local.describe("live")["TrainingJobStatus"] == "InProgress"


def test_archives_are_made_when_no_compression_type_is_given(local: Any) -> None:
    local.create(
        "packed",
        "echo m > /opt/ml/model/m; echo d > /opt/ml/output/data/d",
        OutputDataConfig={"S3OutputPath": "s3://art/out/packed/"},
    )
    job = local.wait("packed")
    assert job["ModelArtifacts"]["S3ModelArtifacts"] == "s3://art/out/packed/packed/output/model.tar.gz"
    for archive, member in (("model.tar.gz", "m"), ("output.tar.gz", "d")):
        body = local.s3.get_object(Bucket="art", Key=f"out/packed/packed/output/{archive}")["Body"].read()
        with tarfile.open(fileobj=io.BytesIO(body)) as contents:
            assert contents.getnames() == [member]


FAILURE = "/opt/ml/output/failure"
SILENT = "The entry point failed and wrote no failure file"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (f"printf 'ValueError: it broke' > {FAILURE}; exit 3", "ValueError: it broke, exit code: 3"),
        ("exit 1", f"{SILENT}, exit code: 1"),
        (f"head -c 9000 /dev/zero | tr '\\0' x > {FAILURE}; exit 1", "x" * 994 + ", exit code: 1"),
    ],
    ids=["failure file", "silent", "long"],
)
def test_a_failed_job_says_why(local: Any, script: str, reason: str) -> None:
    reason = f"AlgorithmError: {reason}"
    local.create("fails", f"echo weights > /opt/ml/model/w; echo seen > /opt/ml/output/data/d; {script}")
    job = local.wait("fails")
    assert (job["TrainingJobStatus"], job["SecondaryStatus"]) == ("Failed", "Failed")
    assert job["FailureReason"] == reason
    assert local.keys("out/fails/fails/output/data/") == ["out/fails/fails/output/data/d"]
    local.until(lambda: local.events and local.events[-1]["detail"]["TrainingJobStatus"] == "Failed")
    assert local.events[-1]["detail"]["FailureReason"] == reason


def test_a_missing_entry_point_and_missing_data_fail_the_job(local: Any) -> None:
    local.create("no-entry", "", specification={"ContainerEntrypoint": ["/opt/ml/no-such-program"]})
    local.create("no-data", "true", InputDataConfig=[local.channel("training", "s3://art/nothing/here")])
    assert "exit code: 127" in local.wait("no-entry")["FailureReason"]
    job = local.wait("no-data")
    assert job["FailureReason"].startswith("ClientError: Data download failed:No S3 objects found under S3 URL")
    assert "s3://art/nothing/here" in job["FailureReason"]
    assert local.statuses("no-data") == ["Starting", "Downloading", "Failed"]


def test_stop_sends_sigterm_to_pid_1_and_keeps_what_was_saved(local: Any) -> None:
    local.create("stops", WAITS, **checkpoints("stops"))
    started(local, "stops")
    local.client.stop_training_job(TrainingJobName="stops")
    assert local.describe("stops")["TrainingJobStatus"] in ("Stopping", "Stopped")
    job = local.wait("stops")
    assert (job["TrainingJobStatus"], job["SecondaryStatus"]) == ("Stopped", "Stopped")
    assert "FailureReason" not in job
    assert local.statuses("stops") == ["Starting", "Downloading", "Training", "Stopping", "Uploading", "Stopped"]
    assert local.text("out/stops/stops/output/data/terminated") == "PID 1\n"
    assert local.text("out/stops/stops/output/model/half") == "half\n"
    with pytest.raises(local.client.exceptions.ClientError, match="is in status Stopped"):
        local.client.stop_training_job(TrainingJobName="stops")


def test_a_job_that_ignores_sigterm_is_killed_after_the_grace_time(start: Callable[..., Any], tmp_path: Path) -> None:
    local = start(grace=0.3)
    local.create("stubborn", IGNORES_TERM, **checkpoints("stubborn"))
    started(local, "stubborn")
    local.client.stop_training_job(TrainingJobName="stubborn")
    assert local.wait("stubborn")["SecondaryStatus"] == "Stopped"
    assert "SIGKILL: still running 0.3 seconds after SIGTERM" in (tmp_path / "state/jobs/stubborn/job.log").read_text()


def test_max_runtime_and_max_wait_time_stop_a_job(local: Any) -> None:
    local.create("too-long", WAITS, StoppingCondition={"MaxRuntimeInSeconds": 1}, **checkpoints("too-long"))
    local.create("waits-long", WAITS, **spot("waits-long", wait=1))
    job = local.wait("too-long")
    assert (job["TrainingJobStatus"], job["SecondaryStatus"]) == ("Stopped", "MaxRuntimeExceeded")
    assert 1 <= job["TrainingTimeInSeconds"] <= 5
    assert local.statuses("too-long")[-3:] == ["Stopping", "Uploading", "MaxRuntimeExceeded"]
    assert local.text("out/too-long/too-long/output/model/half") == "half\n"
    job = local.wait("waits-long")
    assert (job["TrainingJobStatus"], job["SecondaryStatus"]) == ("Stopped", "MaxWaitTimeExceeded")


def test_an_interrupted_spot_job_goes_on_from_its_checkpoints(local: Any) -> None:
    local.create(
        "spot",
        """
        trap 'echo saved > /opt/ml/checkpoints/step-7; exit 0' TERM
        echo run >> /opt/ml/checkpoints/runs
        if [ -e /opt/ml/checkpoints/step-7 ]; then cp /opt/ml/checkpoints/* /opt/ml/model/; exit 0; fi
        touch /opt/ml/checkpoints/started /opt/ml/model/lost
        sleep 60 & wait
        """,
        **spot("spot"),
    )
    started(local, "spot")
    assert local.interrupt("spot") == 202
    job = local.wait("spot")
    assert job["SecondaryStatus"] == "Completed", job
    again = ["Starting", "Downloading", "Training"]
    assert local.statuses("spot") == [*again, "Interrupted", *again, "Uploading", "Completed"]
    model = "out/spot/spot/output/model/"
    assert [key.removeprefix(model) for key in local.keys(model)] == ["runs", "started", "step-7"]
    assert local.text(f"{model}runs") == "run\nrun\n"
    assert local.interrupt("spot") == 409


def test_the_command_interrupts_the_spot_job_of_a_run_and_says_why_not(local: Any, tmp_path: Path) -> None:
    stack = Stack(tmp_path / "app")
    stack.folder.mkdir(exist_ok=True)
    (tmp_path / "app/address.json").write_text(
        json.dumps({"host": "127.0.0.1", "sagemaker": int(local.url.rpartition(":")[2])})
    )
    local.create("spot-too", IGNORES_TERM, **spot("spot-too"))
    stack.interrupt(started(local, "spot-too"))
    local.until(lambda: "Interrupted" in local.statuses("spot-too"))
    local.create("not-spot", WAITS, **checkpoints("not-spot"))
    with pytest.raises(StackError, match=r"Only a spot job .* not-spot is on-demand"):
        stack.interrupt(started(local, "not-spot"))


def test_only_spot_jobs_are_interrupted_and_stop_ends_an_interrupted_one(start: Callable[..., Any]) -> None:
    local = start(grace=1)
    local.create("on-demand", WAITS, **checkpoints("on-demand"))
    local.create("both", IGNORES_TERM, **spot("both"))
    assert local.interrupt(started(local, "on-demand")) == 409
    assert local.interrupt("unknown") == 400
    assert local.interrupt(started(local, "both")) == 202
    local.client.stop_training_job(TrainingJobName="both")
    assert local.wait("both")["SecondaryStatus"] == "Stopped"
    assert "Interrupted" not in local.statuses("both")


def test_an_isolated_job_reaches_itself_and_nothing_else(local: Any) -> None:
    script = """
    import os, socket, sys
    with socket.create_server(("127.0.0.1", 0)) as own:
        socket.create_connection(own.getsockname(), 1).close()
    try:
        socket.create_connection(("127.0.0.1", int(os.environ["PORT"])), 1)
    except OSError as error:
        sys.exit(f"unreachable: {error}; credentials: {'AWS_ACCESS_KEY_ID' in os.environ}")
    """
    port = local.url.rpartition(":")[2]
    for name, isolated in (("isolated", True), ("open", False)):
        local.create(
            name,
            "python - 2> /opt/ml/output/failure <<'END'\n" + textwrap.dedent(script) + "END",
            EnableNetworkIsolation=isolated,
            Environment={"PORT": port},
        )
    assert "unreachable: [Errno 111] Connection refused; credentials: False" in local.wait("isolated")["FailureReason"]
    assert "FailureReason" not in local.wait("open"), local.wait("open")["FailureReason"]


def test_a_job_reads_the_secret_of_its_rewards(local: Any, endpoint: str) -> None:
    secrets = boto3.client("secretsmanager", endpoint_url=endpoint)
    arn = secrets.create_secret(Name="judges", SecretString='{"judge.example.com": "CaNaRy-token"}')["ARN"]
    script = """
    import os
    from trainer.permissions import job_permissions
    assert job_permissions().tokens.token(["judge.example.com"]) == "CaNaRy-token"
    assert not [value for value in os.environ.values() if "CaNaRy" in value]
    """
    local.create(
        "judged",
        f"cd {REPOSITORY}; PYTHONPATH=functions python - 2> /opt/ml/output/failure <<'END'\n{textwrap.dedent(script)}END",
        Environment={"REWARD_HTTP_SECRET_ARN": arn},
    )
    assert local.wait("judged")["TrainingJobStatus"] == "Completed", local.wait("judged")["FailureReason"]


def test_missing_capacity_fails_a_job_late(start: Callable[..., Any]) -> None:
    local = start(without_capacity=["ml.p5.48xlarge"])
    resources = {"InstanceCount": 1, "VolumeSizeInGB": 50}
    local.create("none-left", "true", ResourceConfig={"InstanceType": "ml.p5.48xlarge", **resources})
    job = local.wait("none-left")
    assert job["FailureReason"].startswith("CapacityError: ")
    assert local.statuses("none-left") == ["Starting", "Failed"]
    assert "TrainingStartTime" not in job
    choices = [{"InstanceType": kind, "InstanceCount": 1} for kind in ("ml.p5.48xlarge", "ml.g5.4xlarge")]
    local.create("second-choice", "true", ResourceConfig={"InstancePreferences": choices, "VolumeSizeInGB": 50})
    job = local.wait("second-choice")
    assert (job["TrainingJobStatus"], job["ResourceConfig"]["SelectedInstanceType"]) == ("Completed", "ml.g5.4xlarge")


def test_the_drivers_of_model_trainer_run_unmodified(local: Any, tmp_path: Path) -> None:
    """sm_train.sh as `sagemaker.train` writes it: environment, pip without a network, exec into PID 1."""
    import sagemaker.core.utils.install_requirements as installer
    from sagemaker.train import constants, templates

    drivers = Path(templates.__file__).parent / "container_drivers"
    for path in drivers.rglob("*.py"):
        local.s3.upload_file(str(path), "art", f"drivers/{path.relative_to(drivers)}")
    local.s3.upload_file(installer.__file__, "art", "drivers/scripts/install_requirements.py")
    command = templates.EXECUTE_BASE_COMMANDS.format(base_command="exec python main.py it\\'s")
    script = templates.TRAIN_SCRIPT_TEMPLATE.format(
        working_dir="cd /opt/ml/input/data/code",
        install_requirements=templates.INSTALL_REQUIREMENTS.format(requirements_file="requirements.txt"),
        execute_driver=command,
    )
    local.s3.put_object(Bucket="art", Key="drivers/sm_train.sh", Body=script)
    local.s3.put_object(Bucket="art", Key="source/requirements.txt", Body="msgspec\nbotocore\n")
    main = "import json, os, sys; print(os.getpid(), json.loads(os.environ['SM_HPS']), os.environ['SM_HOSTS'], sys.argv[1])"
    local.s3.put_object(Bucket="art", Key="source/main.py", Body=main)
    local.create(
        "driven",
        "",
        InputDataConfig=[local.channel("code", "s3://art/source/"), local.channel("sm_drivers", "s3://art/drivers/")],
        HyperParameters={"run-id": "a-1", "epochs": "3"},
        specification={
            "ContainerEntrypoint": constants.DEFAULT_CONTAINER_ENTRYPOINT,
            "ContainerArguments": constants.DEFAULT_CONTAINER_ARGUMENTS,
        },
    )
    job = local.wait("driven")
    log = (tmp_path / "state/jobs/driven/job.log").read_text()
    assert job["TrainingJobStatus"] == "Completed", log
    assert "Requirement already satisfied: msgspec" in log
    assert log.splitlines()[-1] == """1 {'run-id': 'a-1', 'epochs': 3} ["algo-1"] it's"""


def test_an_s3_prefix_is_a_string_and_not_a_folder(s3: Any, tmp_path: Path) -> None:
    for key in ("p/train/a.csv", "p/train/sub/b.csv", "p/train-2/c.csv", "p/train.csv", "p/train/marker/"):
        s3.put_object(Bucket="art", Key=key, Body="x")

    def names(prefix: str) -> list[str]:
        return sorted(name for _, name in channel_objects(s3, f"s3://art/{prefix}"))

    assert names("p/train/") == ["a.csv", "sub/b.csv"]
    assert names("p/train") == ["a.csv", "sub/b.csv", "train-2/c.csv", "train.csv"]
    assert names("p/train.csv") == ["train.csv"]
    assert names("p/train/sub/b.csv") == ["b.csv"]
    assert names("p/tra") == ["train-2/c.csv", "train.csv", "train/a.csv", "train/sub/b.csv"]
    s3.put_object(Bucket="art", Key="evil/../../escaped", Body="x")
    with pytest.raises(JobError, match="leads out of its channel's folder"):
        download(s3, "s3://art/evil", tmp_path / "channel", lambda: None)


def test_the_sandbox_needs_no_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As an ordinary user, in a user namespace: the host's /opt stays visible and does not change."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    sandbox = find_sandbox(None)
    assert isinstance(sandbox, Namespaces)
    before = sorted(path.name for path in Path("/opt").iterdir())
    script = "echo $$ $(id -u) > /opt/ml/seen; ls /opt"
    job = {"AlgorithmSpecification": {"ContainerEntrypoint": ["sh", "-c", script]}}
    command, environment = sandbox.command(job, tmp_path, {}, network=True)
    assert "--map-root-user" in command
    listing = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
    assert sorted({*before, "ml"}) == sorted(listing)
    assert (tmp_path / "seen").read_text() == "1 0\n"
    assert sorted(path.name for path in Path("/opt").iterdir()) == before


def test_the_docker_command_keeps_values_off_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    job = {
        "TrainingJobName": "a",
        "EnableNetworkIsolation": False,
        "AlgorithmSpecification": {
            "TrainingImage": "image:1",
            "ContainerEntrypoint": ["/bin/bash", "-e"],
            "ContainerArguments": ["-c", "it's"],
        },
    }
    given = {"SECRET": "x y", "AWS_ENDPOINT_URL": "http://127.0.0.1:4566", "MLFLOW_TRACKING_URI": "http://localhost:5000"}
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("AWS_CA_BUNDLE", "/state/ca.pem")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: removed.append(command[1:]))
    removed: list[list[str]] = []
    command, environment = Docker().command(job, Path("/state/a/ml"), given, network=True)
    assert removed == [["rm", "--force", "a"]]
    line = " ".join(command[1:])
    authority = "/etc/ssl/tunedrop-ca.pem"
    volumes = f"--volume /state/a/ml:/opt/ml --volume /state/ca.pem:{authority}:ro"
    assert line.startswith(f"run --rm --name a {volumes} --network bridge")
    variables = "--env SECRET --env AWS_ENDPOINT_URL --env MLFLOW_TRACKING_URI --env AWS_CA_BUNDLE"
    assert line.endswith(f"{variables} --entrypoint /bin/bash image:1 -e -c it's")
    assert environment["AWS_CA_BUNDLE"] == authority
    assert environment["SECRET"] == "x y"
    assert environment["AWS_ENDPOINT_URL"] == "http://host.docker.internal:4566"
    assert environment["MLFLOW_TRACKING_URI"] == "http://host.docker.internal:5000"
