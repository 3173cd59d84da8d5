"""The commands that look at runs, against a stack on (emulated) AWS."""

import json
import re

import boto3
import pytest
from botocore.exceptions import ConnectionClosedError, EndpointConnectionError, ReadTimeoutError
from click.testing import CliRunner
from fake_stack import ARTIFACTS
from rich.console import Console
from world import WON

from local_app.stack import StackError
from pipeline.publish.index import read_index
from pipeline.runs.states import RunState
from tunedrop_cli.deployment import LOG_GROUP
from tunedrop_cli.main import cli, main


def published(world, name="cars", config=b""):
    world.put(f"training_data/{name}.yaml", b"rewards: [{type: exact_match}]\n" + config)
    return world.tested(world.trained(world.drop(f"training_data/{name}.jsonl")))


def test_compare(world, tunedrop):
    one, two = published(world), published(world, "faq", b"grpo: {learning_rate: 1.0e-4}\nmax_prompt_length: 99\n")
    lines = [line.split() for line in tunedrop("compare", one.run_id, "faq").splitlines()]
    assert lines[0] == [one.run_id, two.run_id]
    assert ["tuned", "score", "1", "1"] in lines
    assert ["config:", "grpo.learning_rate", "1e-05", "0.0001"] in lines
    assert ["config:", "max_prompt_length", "512", "99"] in lines
    assert not any("num_generations" in line for row in lines for line in row)


def test_compare_says_what_to_do_for_a_run_without_results(world, tunedrop):
    done, waiting = published(world), world.drop("training_data/faq.jsonl")
    assert f"{waiting.run_id} has no results: it is validated. Follow it with `tunedrop watch" in tunedrop(
        "compare", done.run_id, "faq"
    )
    assert "There is no run 'nothing'. List the runs with `tunedrop runs`." in tunedrop("compare", "nothing", "faq")


def test_open_saves_reports_that_the_index_links_to(world, tunedrop, tmp_path):
    assert "No run has been published yet" in tunedrop("open")
    run = published(world)
    path = tmp_path / "reports" / run.run_id / "report.html"
    assert tunedrop("open", "cars").strip() == str(path)
    assert "<title>APPROVED: cars</title>" in path.read_text()
    path.unlink()
    index = tmp_path / "reports" / "index.html"
    assert tunedrop("open").strip() == str(index)
    assert [each.run_id for each in read_index(index.read_text())] == [run.run_id]
    assert path.is_file()
    assert "has no report: it is validated" in tunedrop("open", world.drop("training_data/faq.jsonl").run_id)


def test_show_as_json_is_one_document_with_receipt_and_result(world, tunedrop):
    run = published(world)
    shown = json.loads(tunedrop("show", "cars", "--json"))
    assert (shown["run"]["run_id"], shown["run"]["state"]) == (run.run_id, "PUBLISHED")
    assert (shown["result"]["verdict"], shown["receipt"]["rows"], shown["line"]["champion"]) == ("APPROVED", 30, run.run_id)
    assert json.loads(tunedrop("watch", "cars", "--json")) | {"line": shown["line"]} == shown
    assert [each["run_id"] for each in json.loads(tunedrop("runs", "--json"))["runs"]] == [run.run_id]


def test_watch_shows_steps_time_left_cost_and_what_the_trainer_noticed(world, tunedrop, monkeypatch):
    """A run whose log goes on while it is watched, in a pipe: plain lines, the verdict at the end."""
    prices = {"dated": "2026-01-01", "region": "us-east-1", "on_demand": {"ml.g6e.4xlarge": 3600.0}}
    plan = world.read_json("launch_plans/f00d.json") | {"prices": prices}
    world.write("launch_plans/f00d.json", json.dumps(plan).encode())
    world.put("training_data/cars.yaml", b"rewards: [{type: exact_match}]\ncompute: {spot: true}\n")
    run = world.start(world.drop())
    logs = boto3.client("logs")
    logs.create_log_group(logGroupName=LOG_GROUP)
    log(logs, run.train_job, "note=asking the model what it can learn")
    log(logs, run.train_job, "phase=sft step=2 max_steps=4 loss=0.7")
    log(logs, run.train_job, "step=3 max_steps=9 reward=0.5 kl=0.1 step_seconds=2 eta_seconds=72")
    log(logs, run.train_job, "alert=ENTROPY_COLLAPSE step=3 The model stopped exploring.")
    ends = iter([lambda: world.trained(run), lambda: world.tested(world.run(run.run_id))])
    monkeypatch.setattr("time.sleep", lambda _seconds: next(ends)())
    printed = tunedrop("watch", run.run_id)
    assert f"{run.run_id}: training\n" in printed
    assert "  asking the model what it can learn\n  sft step 2/4  loss=0.7 " in printed
    assert "  step 3/9  reward=0.5       1:12 left  $" in printed
    assert "ENTROPY_COLLAPSE at step 3: The model stopped exploring." in printed
    assert f"{run.run_id}: testing base and tuned model\n" in printed
    assert re.search(r"^verdict +APPROVED\nscore +base 0\.000 → tuned 1\.000 over 30 tests$", printed, re.MULTILINE)


def log(logs, job, line):
    stream = f"{job}/algo-1"
    if not logs.describe_log_streams(logGroupName=LOG_GROUP, logStreamNamePrefix=stream)["logStreams"]:
        logs.create_log_stream(logGroupName=LOG_GROUP, logStreamName=stream)
    event = {"timestamp": 1795522700000, "message": line}
    logs.put_log_events(logGroupName=LOG_GROUP, logStreamName=stream, logEvents=[event])


def test_logs_begin_with_the_job(world, tunedrop):
    run = world.start(world.drop())
    logs = boto3.client("logs")
    logs.create_log_group(logGroupName=LOG_GROUP)
    for line in ("Starting training script", "Requirement already satisfied: peft"):
        log(logs, run.train_job, line)
    assert "already satisfied: peft" in tunedrop("logs", "cars")  # all that there is, of a start that may hang
    quoted = "++ echo 'Executing command: exec python -m trainer.job train'"
    for line in (quoted, "+++ exec python -m trainer.job train", "step=1"):
        log(logs, run.train_job, line)
    assert tunedrop("logs", "cars") == "step=1\n"


def test_watch_ends_with_exit_code_1_for_a_run_that_failed(world, tunedrop):
    run = world.start(world.drop())
    world.handle("test_model", world.job_event("test_model.train_failed", run.train_job))
    assert world.run(run.run_id).state == RunState.TRAINING_FAILED
    assert re.search(r"^state +training failed\nreason +\w", tunedrop("watch", "cars", code=1), re.MULTILINE)


def test_runs_and_show_are_aligned_columns_without_colour_or_wrapping_in_a_pipe(world, tunedrop):
    assert tunedrop("runs") == "No runs. Start one with `tunedrop drop FILE`.\n"
    run, failed = published(world), world.start(world.drop("training_data/faq.jsonl"))
    world.handle("test_model", world.job_event("test_model.train_failed", failed.train_job))
    header, *rows = tunedrop("runs").splitlines()
    starts = [header.index(column) for column in ("run", "state", "attempt", "rows", "arrived (UTC)", "verdict or reason")]
    cells = {row.split()[0]: [row[start:].split("  ")[0] for start in starts] for row in rows}
    assert cells[run.run_id][1:4] == ["published", "1", "30"]
    assert cells[run.run_id][5] == "APPROVED"
    assert cells[failed.run_id][1] == "training failed"
    shown = tunedrop("show", "cars").partition("\n\n")[0].splitlines()  # the history of the line follows
    width = shown[0].index(run.run_id)
    facts = {line[:width].strip(): line[width:] for line in shown}
    expected = {"run": run.run_id, "state": "published", "training job": run.train_job, "verdict": "APPROVED"}
    assert expected.items() <= facts.items()
    assert facts["model package"] == run.model_package
    assert not any("\x1b" in line or line != line.rstrip() for line in [header, *rows, *shown])


def test_answers_that_the_limit_cut_are_in_every_place(world, tunedrop):
    """All thirty tests are won, twelve of them because the base model's answer was cut."""
    world.put("training_data/cars.yaml", b"rewards: [{type: exact_match}]")
    tests = [test | {"base": test["base"] | {"cut": n < 12, "tokens": 9}} for n, test in enumerate(WON)]
    run = world.tested(world.trained(world.drop()), tests)
    result = world.read_json(f"runs/{run.run_id}/result.json")
    assert (result["cut"], result["ended"]["tests"]) == ({"base": 12, "tuned": 0}, 18)
    shown = tunedrop("show", "cars")
    assert re.search(
        r"^cut answers +base 12, tuned 0; the lift without them is \+1\.000 over 18 tests$", shown, re.MULTILINE
    )
    assert "+0.400 of the lift of +1.000 stands on 12 of 30 tests" in shown
    compared = [line.split() for line in tunedrop("compare", "cars", "cars").splitlines()]
    assert ["cut", "answers,", "base", "12", "12"] in compared
    assert "cut after 9 tokens" in world.aws.read(ARTIFACTS, f"runs/{run.run_id}/report.html").decode()
    (sent,) = (event for event in world.sent_events if event["DetailType"] == "Results Published")
    assert json.loads(sent["Detail"])["cut"] == result["cut"]
    assert "cut answers: 12 (base), 0 (tuned)" in json.loads(world.notifications[-1]["Message"])["default"]


def test_a_lift_that_only_the_limit_made_is_pending(world, tunedrop):
    world.put("training_data/cars.yaml", b"rewards: [{type: exact_match}]")
    run = world.tested(world.trained(world.drop()), [test | {"base": test["base"] | {"cut": True}} for test in WON])
    assert run.verdict == "PENDING"
    assert "No lift is left without the tests where the limit of tokens cut an answer" in tunedrop("show", "cars")


def test_a_terminal_gets_colours(world, tunedrop, monkeypatch):
    published(world)
    terminal = Console(force_terminal=True, color_system="standard", soft_wrap=True)
    monkeypatch.setattr("tunedrop_cli.output.console", terminal)
    assert "\x1b[32mpublished\x1b[0m" in tunedrop("runs")


def test_watch_in_a_terminal_shows_a_bar_and_the_alerts(world, tunedrop, monkeypatch):
    run = world.start(world.drop())
    logs = boto3.client("logs")
    logs.create_log_group(logGroupName=LOG_GROUP)
    log(logs, run.train_job, "step=3 max_steps=9 reward=0.5 eta_seconds=72")
    log(logs, run.train_job, "alert=ENTROPY_COLLAPSE step=3 The model stopped [exploring].")
    ends = iter([lambda: world.trained(run), lambda: world.tested(world.run(run.run_id))])
    monkeypatch.setattr("time.sleep", lambda _seconds: next(ends)())
    terminal = Console(force_terminal=True, color_system="standard", soft_wrap=True, width=200)
    monkeypatch.setattr("tunedrop_cli.commands.runs.console", terminal)
    printed = tunedrop("watch", run.run_id)
    assert "ENTROPY_COLLAPSE at step 3: The model stopped [exploring]." in printed
    assert re.search(r"^verdict +APPROVED$", printed, re.MULTILINE)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell):
    script = CliRunner().invoke(cli, ["completion", shell]).output
    assert "_TUNEDROP_COMPLETE" in script


def test_every_command_has_help_with_an_example():
    for name, command in cli.commands.items():
        assert "Example: tunedrop" in (command.help or ""), name


def test_a_mistake_is_a_message(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["tunedrop", "--state", str(tmp_path), "runs"])
    with pytest.raises(SystemExit, match="1"):
        main()
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert not printed.out  # a program may read a document there


@pytest.mark.parametrize(
    "error",
    [
        EndpointConnectionError(endpoint_url="https://127.0.0.1:1"),
        ConnectionClosedError(endpoint_url="https://127.0.0.1:1"),
        ReadTimeoutError(endpoint_url="https://127.0.0.1:1"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_aws_that_does_not_answer_is_a_message(monkeypatch, capsys, error):
    def fail() -> None:
        raise error

    monkeypatch.setattr("tunedrop_cli.main.cli", fail)
    with pytest.raises(SystemExit, match="1"):
        main()
    assert f"error: AWS does not answer: {error}" in capsys.readouterr().err


def test_the_text_of_an_error_does_not_control_the_terminal(monkeypatch, capsys):
    """The reason why a line is not served may quote what a model answered."""

    def fail() -> None:
        raise StackError("'\x1b]0;title\x07\u202eno' instead of '7'")

    monkeypatch.setattr("tunedrop_cli.main.cli", fail)
    with pytest.raises(SystemExit, match="1"):
        main()
    assert capsys.readouterr().err == "error: ']0;titleno' instead of '7'\n"
