"""The whole application as a user runs it: the `tunedrop` command, a real deploy, real jobs with a tiny model."""

import json
import os
import re
import ssl
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser import drag
from hostile import good_parquet
from neighbour import as_nobody, attempts, readable, send
from tiny_model import make_tiny_model

from benchmarks.chaos import bring_up
from local_app.stack import STACK_NAME
from pipeline.runs.states import RunState
from tunedrop_cli.deployment import Deployment
from tunedrop_cli.listener import listening

# The kind of file people have: several pretty-printed objects one after another, curly quotes in the texts.
FAQ = [
    {"Index": n, "Question": f"Say “{letter}” again", "Answer": f"{letter}", "Reasoning": f"It’s “{letter}”"}
    for n, letter in enumerate("abcdefgh", 1)
]
TESTS = {
    "evaluations": [{"id": f"t{n}", "prompt": f"Say {letter}", "description": letter} for n, letter in enumerate("abcd")]
}
SYSTEM_PROMPT = "It's a \"test\" of $(touch /tmp/tunedrop-pwned) and `id`;\nanswer 'short' \\n"
REWARDS = "rewards: [{type: contains}, {type: length, maximum: 8, unit: characters, weight: 0.1}]"
CONFIG = f"""
model: tiny
system_prompt: {json.dumps(SYSTEM_PROMPT)}
{REWARDS}
lora: {{r: 4, lora_alpha: 8}}
grpo: {{max_steps: 2, num_generations: 4, per_device_train_batch_size: 8, max_completion_length: 8, learning_rate: 1e-2}}
max_prompt_length: 200
"""


class App:
    """The local app in a folder of its own, used through its command."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.stack = bring_up(folder / "state", {"BaseModel": "tiny"})
        self.deployment = Deployment.local(self.stack)
        self.model = make_tiny_model(folder / "tiny")

    def tunedrop(self, *arguments: str | Path, code: int = 0) -> str:
        """Run the command and return what it printed."""
        command = [str(Path(sys.executable).with_name("tunedrop")), "--state", str(self.stack.folder), *map(str, arguments)]
        done = subprocess.run(command, check=False, cwd=self.folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + (done.stderr if code else "")

    def write(self, name: str, content: str) -> Path:
        """Write a file for the command to upload."""
        (self.folder / name).write_text(content)
        return self.folder / name

    def job_request(self, job: str) -> dict[str, Any]:
        """Return a job as SageMaker describes it."""
        return self.stack.client("sagemaker").describe_training_job(TrainingJobName=job)


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("OMP_NUM_THREADS", "1")  # a tiny model's jobs only lose time on more threads
        app = App(tmp_path_factory.mktemp("app"))
        yield app
        app.stack.down()


@pytest.fixture(scope="module")
def listener(app):
    """What an HTTP subscriber of the stack's topic and a rule on its bus receive."""
    with listening(app.stack) as listener:
        yield listener


@pytest.fixture(scope="module")
def published(app, listener):
    """A run that was dropped with its config, tests and model, and followed to its end: what was printed, and the run."""
    data = app.write("faq.json", "\n".join(json.dumps(record, indent=2, ensure_ascii=False) for record in FAQ))
    config, tests = app.write("faq.yaml", CONFIG), app.write("tests.json", json.dumps(TESTS))
    printed = app.tunedrop("drop", data, "--config", config, "--tests", tests, "--model", app.model, "--wait")
    return printed, app.deployment.find("faq")


def test_a_dropped_file_becomes_a_published_model(app, published):
    printed, run = published
    assert run.state == RunState.PUBLISHED
    (path,) = re.findall(r"^report +(.+)$", printed, re.MULTILINE)
    page = Path(path).read_text()
    assert "<svg" in page
    assert 'id="all-rollouts"' in page
    assert len(page.encode()) <= 2_000_000
    groups = [json.loads(line) for line in app.tunedrop("rollouts", "faq", "--step", "2", "--json").splitlines()]
    assert {group["step"] for group in groups} == {2}
    assert all({"score", "rewards", "tokens", "cut"} <= answer.keys() for group in groups for answer in group["answers"])
    assert re.search(r"  asking the model what it can learn\n  of \d+ prompts, the model solves \d+%", printed)
    assert re.search(r"step 2/2  reward=", printed)
    assert re.search(r"tuned 4/4", printed)
    result = app.deployment.read_json(run, "result.json")
    assert (result["comparison"]["tests"], result["verdict"]) == (4, run.verdict)
    bucket, prefix = result["artifacts"]["merged_model"].removeprefix("s3://").split("/", 1)
    names = {
        item["Key"].removeprefix(prefix)
        for item in app.deployment.s3.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]
    }
    assert names >= {"config.json", "model.safetensors", "tokenizer.json"}
    package = app.stack.client("sagemaker").describe_model_package(ModelPackageName=result["model_package"])
    assert package["ModelApprovalStatus"] in {"PendingManualApproval", "Rejected"}  # four tests never approve


def test_the_jobs_are_the_launch_plans(app, published):
    _, run = published
    for kind, job in (("train", run.train_job), ("test", run.test_job)):
        request = app.job_request(job)
        channels = {c["ChannelName"]: c["DataSource"]["S3DataSource"]["S3Uri"] for c in request["InputDataConfig"]}
        assert f"/trainer/{run.plan}/{kind}/" in channels["sm_drivers"]
        assert "sm_train.sh" in " ".join(request["AlgorithmSpecification"]["ContainerArguments"])
        assert f"+ exec python -m trainer.job {kind}" in "\n".join(app.deployment.log_lines(job, {}))


def test_hostile_text_arrives_unchanged_and_runs_nothing(app, published):
    _, run = published
    trained = app.deployment.read_json(run, f"training/{run.train_job}/output/model/run_config.json")
    assert trained["system_prompt"] == SYSTEM_PROMPT
    assert not Path("/tmp/tunedrop-pwned").exists()


def test_iam_was_enforced_and_denied_nothing(app, published):
    """Which permissions of these roles are needed is for tests/integration and tests/sagemaker to find."""
    calls = [json.loads(line) for line in (app.stack.folder / "aws" / "calls.jsonl").read_text().splitlines()]
    roles = {call["principal"].split("/")[1] for call in calls}
    for name in ("ValidateDataset", "StartTraining", "TestModel", "PublishResults", "SageMaker"):
        assert any(f"-{name}Role-" in role for role in roles), name
    assert {"s3:PutObject", "sagemaker:CreateTrainingJob", "iam:PassRole"} <= {call["action"] for call in calls}
    assert [call for call in calls if not call["allowed"]] == []


def test_a_shell_with_the_printed_variables_reaches_the_application_and_nothing_else(app, published):
    variables = app.write("shell.sh", app.tunedrop("env", "--shell"))
    program = "import boto3; print(*(bucket['Name'] for bucket in boto3.client('s3').list_buckets()['Buckets']))"
    environment = {"PATH": os.environ["PATH"], "AWS_PROFILE": "somebody", "AWS_SESSION_TOKEN": "old"}
    command = ["sh", "-c", f'. {variables}; exec {sys.executable} -c "{program}"']
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert app.stack.outputs.data_bucket in done.stdout.split()


def test_another_user_of_this_machine_can_do_nothing(app, published):
    stack, trust = app.stack, ssl.create_default_context(cafile=app.stack.tls.authority)
    requests = list(
        attempts(stack.endpoint, stack.sagemaker_endpoint, stack.outputs.artifact_bucket, stack.credentials.access_key_id)
    )
    answers = as_nobody(lambda: {attempt.name: send(attempt, trust) for attempt in requests})
    assert len(answers) == len(requests)
    # SNS's own answer to a link without a subscription: the bucket in the host has no part in it.
    assert b"<UnsubscribeResponse" in answers.pop("Action=Unsubscribe to a bucket's host")[1]
    assert {name: answer for name, answer in answers.items() if answer[0] not in (400, 403, 404)} == {}
    unsigned = {name for name, (status, _) in answers.items() if status != 403}
    assert unsigned <= {name for name in answers if "SageMaker" in name or "interr" in name or "Confirm" in name}
    assert stack.folder.stat().st_mode & 0o777 == 0o700
    for private in (stack.folder / "credentials", stack.folder / "aws" / "calls.jsonl", stack.folder / "tls" / "server.key"):
        assert private.stat().st_mode & 0o077 == 0, private
    if os.geteuid() == 0:
        assert as_nobody(lambda: readable(stack.folder)) == []
    assert app.deployment.find("faq").state == RunState.PUBLISHED  # and nothing was reset


def test_a_job_has_its_roles_rights_and_does_not_see_the_application(app, published):
    """A job that looks for more: the application's folder, its servers' processes, and root's rights in the container."""
    script = """
import json, os, subprocess, sys
import boto3, botocore.exceptions as e
from pathlib import Path

found = {}
folder = Path(os.environ["AWS_CA_BUNDLE"]).parent.parent
found["files"] = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
found["unmounts"] = [subprocess.run(["umount", str(p)], capture_output=True).returncode == 0 for p in (folder, "/proc")]
inner = f"umount {folder}; ls {folder}"
inside = subprocess.run(["unshare", "-rm", "sh", "-c", inner], capture_output=True, text=True)
found["inside"] = "credentials" in inside.stdout
found["processes"] = [c for p in Path("/proc").glob("[0-9]*/cmdline") if b"local_app" in (c := p.read_bytes())]
found["caller"] = boto3.client("sts").get_caller_identity()["Arn"]
calls = {
    "buckets": lambda: boto3.client("s3").list_buckets(),
    "users": lambda: boto3.client("iam").create_user(UserName="me"),
    "functions": lambda: boto3.client("lambda").list_functions(),
    "test": lambda: boto3.Session("test", "test").client("s3").list_buckets(),
}
for name, call in calls.items():
    try:
        call()
        found[name] = "allowed"
    except e.ClientError as error:
        found[name] = error.response["Error"]["Code"]
print("FOUND", json.dumps(found, default=str))
"""
    request = app.job_request(published[1].train_job)
    kept = ("RoleArn", "ResourceConfig", "OutputDataConfig")
    entry = {"ContainerEntrypoint": ["python"], "ContainerArguments": ["/opt/ml/input/data/code/look.py"]}
    app.deployment.s3.put_object(Bucket=app.stack.outputs.artifact_bucket, Key="trainer/look/look.py", Body=script)
    source = {"S3DataType": "S3Prefix", "S3Uri": f"s3://{app.stack.outputs.artifact_bucket}/trainer/look/"}
    create = {name: request[name] for name in kept} | {
        "TrainingJobName": "tunedrop-train-look-1",
        "StoppingCondition": {"MaxRuntimeInSeconds": 60},
        "InputDataConfig": [{"ChannelName": "code", "DataSource": {"S3DataSource": source}}],
    }
    specification = request["AlgorithmSpecification"]
    create["AlgorithmSpecification"] = {name: specification[name] for name in ("TrainingImage", "TrainingInputMode")} | entry
    sagemaker = app.stack.client("sagemaker")
    sagemaker.create_training_job(**create)
    deadline = time.monotonic() + 120
    while (job := app.job_request("tunedrop-train-look-1"))["TrainingJobStatus"] == "InProgress":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    log = list(app.deployment.log_lines("tunedrop-train-look-1", {}))
    assert job["TrainingJobStatus"] == "Completed", "\n".join(log)
    (line,) = [line for line in log if "FOUND" in line]
    found = json.loads(line.partition("FOUND ")[2])
    role = request["RoleArn"].rpartition("/")[2]
    assert found.pop("caller").split("/")[1] == role
    assert found == {
        "files": ["tls/ca.pem"],
        "unmounts": [False, False],
        "inside": False,
        "processes": [],
        "buckets": "AccessDenied",
        "users": "AccessDenied",
        "functions": "AccessDeniedException",
        "test": "InvalidClientTokenId",
    }


def test_the_end_is_notified_and_every_stage_is_on_the_bus(published, listener):
    _, run = published
    message, types = listener.heard_of(run.run_id, "Results Published")
    assert message["Subject"].startswith(f"{run.verdict}: faq, score 0.")
    assert json.loads(message["Message"])["report"].startswith("s3://")
    assert types[0] == "Dataset Validated"
    assert {"Training Started", "Inference Tests Started"} <= set(types)


def test_the_commands_that_look_at_runs(app, published):
    _, run = published
    assert run.run_id in app.tunedrop("runs")
    assert re.search(rf"^verdict +{run.verdict}$", app.tunedrop("show", "faq"), re.MULTILINE)
    assert json.loads(app.tunedrop("show", run.run_id, "--json"))["result"]["run_id"] == run.run_id
    logs = app.tunedrop("logs", "faq")
    assert "max_steps=2" in logs
    assert "Starting training script" not in logs
    assert "There is no run 'nothing'" in app.tunedrop("show", "nothing", code=1)


def test_the_installed_command_checks_what_needs_processes_of_its_own(app, published, monkeypatch):
    """The processes of the tokenizer, of Parquet and of programs, as the installed command starts them."""
    files = ["--config", app.folder / "faq.yaml", "--tests", app.folder / "tests.json", "--model", app.model]
    assert "valid: 8 rows" in app.tunedrop("check", app.folder / "faq.json", *files)
    (app.folder / "rows.parquet").write_bytes(good_parquet())
    assert "valid: 30 rows" in app.tunedrop("check", app.folder / "rows.parquet")
    rows = [
        {"question": f"Add {n}.", "answer": f"def add(x): return x + {n}", "tests": [f"assert add(1) == {n + 1}"]}
        for n in range(20)
    ]
    data = app.write("programs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("ALLOW_CODE_REWARDS", "true")
    assert "score 1.00" in app.tunedrop(
        "check", data, "--config", app.write("programs.yaml", "rewards: [{type: code_tests}]\n")
    )


def test_the_events_of_what_is_there(app, published):
    _, run = published
    upload = json.loads(app.tunedrop("event", run.key))["detail"]["object"]
    assert (upload["version-id"], upload["size"]) == (run.version_id, (app.folder / "faq.json").stat().st_size)
    assert upload["sequencer"] > app.deployment.runs.upload(run.key)["sequencer"]
    for stage, job in (("test", run.train_job), ("publish", run.test_job)):
        ended = json.loads(app.tunedrop("event", "faq", "--stage", stage))["detail"]
        assert (ended["TrainingJobName"], ended["TrainingJobStatus"]) == (job, "Completed")
        assert ended["ModelArtifacts"]["S3ModelArtifacts"].endswith(f"/{job}/output/model/")


def test_the_doctor_has_nothing_to_say_until_something_is_wrong(app, published):
    assert app.tunedrop("doctor") == "tunedrop: nothing is wrong.\n"
    events = app.stack.client("events")
    (rule,) = events.list_rules(NamePrefix="tunedrop-ReconcileFunctionInterval-")["Rules"]
    events.disable_rule(Name=rule["Name"])
    assert "RULE_DISABLED: The rule tunedrop-ReconcileFunctionInterval-" in app.tunedrop("doctor", code=1)
    events.enable_rule(Name=rule["Name"])


def test_the_same_bytes_again_join_the_run(app, published):
    _, run = published
    assert run.run_id in app.tunedrop("drop", app.folder / "faq.json")
    assert app.deployment.find("faq") == run


@contextmanager
def console(app, *options, **environment):
    """Serve the console by its command; yield the address that it prints."""
    command = [str(Path(sys.executable).with_name("tunedrop")), "--state", str(app.stack.folder), "console", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


@pytest.mark.soak
@pytest.mark.parametrize("place", ["AWS", "here"])
def test_the_console_from_a_file_to_its_report(app, published, browser, place, tmp_path):
    """By the public API of AWS alone, as for a stack in another account, and as for this machine."""
    rows = [row | {"Index": 100 * len(place) + number} for number, row in enumerate(FAQ)]
    files = {
        f"{place.lower()}.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        f"{place.lower()}.yaml": CONFIG.replace("max_steps: 2", "max_steps: 40"),
        f"{place.lower()}.tests.json": json.dumps(TESTS),
    }
    options = ["--region", app.stack.region, "--stack", STACK_NAME] if place == "AWS" else []
    with console(app, *options, **(app.stack.variables if place == "AWS" else {})) as address:
        page, complaints = browser.new_page(), []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        for name, content in files.items():
            (tmp_path / name).write_text(content)
        drag(page, sorted(tmp_path.iterdir()))
        page.get_by_text("The first rows as the model reads them").wait_for(timeout=60_000)
        assert "Say “a” again" in page.locator("figure.example").first.inner_text()
        assert app.deployment.runs.upload(f"training_data/{place.lower()}.jsonl") is None  # nothing starts by itself
        page.get_by_role("button", name="Start the run").click()
        page.wait_for_url("**/runs/*", timeout=60_000)
        page.get_by_text(re.compile(r"step \d+ of 40")).wait_for(timeout=90_000)
        page.locator(".answer").first.wait_for(timeout=90_000)
        assert page.get_by_role("button", name="Stop the run").count() == 1  # it is still training or being tested
        page.get_by_role("link", name="Open the report").click(timeout=120_000)
        page.locator("#rollouts").wait_for()
        run = app.deployment.find(place.lower())
        assert run.state == RunState.PUBLISHED
        page.go_back()
        page.goto(address)
        page.get_by_role("link", name=run.run_id, exact=True).first.wait_for()
        assert complaints == []
        page.close()


def test_a_broken_dataset_is_rejected_with_its_line(app):
    data = app.write("broken.jsonl", '{"question": "a", "answer": "b"}\n{"question": "c", "answer": "d"}\n{oops}\n')
    printed = app.tunedrop("drop", data, "--wait", code=1)
    assert "BAD_JSON: line 3: not valid JSON" in printed
    assert app.deployment.find("broken").state == RunState.REJECTED


@pytest.mark.soak
def test_a_job_that_fails_says_why_and_the_next_drop_tries_again(app):
    broken = make_tiny_model(app.folder / "unreadable")
    (broken / "model.safetensors").write_bytes(b"not safetensors")
    data = app.write("fails.jsonl", "".join(f'{{"question": "Half of {2 * n}?", "answer": "{n}"}}\n' for n in range(20)))
    config = app.write("fails.yaml", "grpo: {max_completion_length: 8}\nmax_prompt_length: 200\n")
    printed = app.tunedrop("drop", data, "--config", config, "--model", broken, "--wait", code=1)
    assert re.search(r"^reason +AlgorithmError: ", printed, re.MULTILINE)
    assert "safetensors" in printed.lower() or "header" in printed.lower()
    run = app.deployment.find("fails")
    assert app.tunedrop("logs", "fails", "--follow")
    again = app.deployment.drop(data)
    assert (again.run_id, again.attempt) == (run.run_id, 2)
    app.tunedrop("stop", "fails")


@pytest.mark.soak
def test_one_job_without_the_pipeline(app, published):
    """`release --submit` with hyperparameters by their well-known names, which the job prints in its resolved config."""
    given = {
        "model-name": "tiny",
        "max-seq-length": 2048,
        "lora-rank": 32,
        "num-train-epochs": 3,
        "learning-rate": 5e-3,
        "max-completion-length": 8,
        "max-samples": 4,
    }
    command = [sys.executable, "-m", "release", "--stack", STACK_NAME, "--region", app.stack.region, "--submit"]
    command += ["--training-data", str(app.folder / "faq.json"), "--models", str(app.model)]
    command += ["--hyperparameters", json.dumps(given), "--config", str(app.write("submit.yaml", REWARDS))]
    done = subprocess.run(command, env=app.stack.environment, check=True, capture_output=True, text=True)
    job = done.stdout.strip()
    sagemaker = app.stack.client("sagemaker")
    deadline = time.monotonic() + 240
    while (status := sagemaker.describe_training_job(TrainingJobName=job)["TrainingJobStatus"]) == "InProgress":
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert status == "Completed", "\n".join(app.deployment.log_lines(job, {}))
    artifacts = sagemaker.describe_training_job(TrainingJobName=job)["ModelArtifacts"]["S3ModelArtifacts"]
    bucket, prefix = artifacts.removeprefix("s3://").split("/", 1)
    config = json.loads(app.deployment.s3.get_object(Bucket=bucket, Key=f"{prefix}run_config.json")["Body"].read())
    assert (config["model"], config["max_seq_length"], config["lora"]["r"]) == ("tiny", 2048, 32)
    assert (config["grpo"]["num_train_epochs"], config["grpo"]["learning_rate"]) == (3, 5e-3)


def test_a_run_that_is_stopped_is_cancelled(app, published):
    data = app.write(
        "stopped.jsonl", "".join(f'{{"question": "Half of {2 * n}?", "answer": "{n}"}}\n' for n in range(20, 40))
    )
    run = app.deployment.drop(data, app.write("stopped.yaml", CONFIG))
    assert f"{run.run_id}: cancelled" in app.tunedrop("stop", "stopped")
    assert "has ended already: cancelled" in app.tunedrop("stop", "stopped", code=1)
    assert app.tunedrop("logs", "stopped", "--follow") is not None  # returns once the end has been announced
    assert app.deployment.find("stopped").state == RunState.CANCELLED


def test_down_ends_everything_and_up_goes_on_with_what_was_there(app, published):
    _, run = published
    app.tunedrop("down")
    assert not app.stack.running
    app.stack.up()
    assert Deployment.local(app.stack).find(run.run_id) == run
