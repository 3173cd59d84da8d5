"""`tunedrop rollouts` and the sample answers of `tunedrop watch`, against a stack on (emulated) AWS."""

import json

import boto3
import msgspec
import pytest
from fake_stack import ARTIFACTS
from made_up import HOSTILE, made_rollouts

from pipeline.runs.states import Run
from tunedrop import rollouts
from tunedrop.rollouts import Answer, Group, Index
from tunedrop_cli.deployment import LOG_GROUP

CONFIG = b"rewards: [{type: exact_match}]\n"
GROUPS = made_rollouts(40, steps=4, panel=2)


def store(world, folder: str, groups: list[Group], missing: int | None = None) -> None:
    """Write groups as a job does, below the run's folder; of the step `missing` the index alone."""
    parts = []
    for step, panel in sorted({(group.step, group.panel) for group in groups}):
        raw = rollouts.encode([group for group in groups if (group.step, group.panel) == (step, panel)])
        name = rollouts.part_name("panel" if panel else "step", step)
        parts.append(rollouts.part_of(name, len(raw)))
        if step != missing:
            world.write(f"{folder}rollouts/{name}", raw)
    index = Index(max_mb=1.0, parts=[part for part in parts if part])
    world.write(f"{folder}rollouts/{rollouts.INDEX}", msgspec.json.encode(index))


@pytest.fixture
def training(world) -> Run:
    """A run whose job trains, and has written rollouts beside its checkpoints."""
    world.put("training_data/cars.yaml", CONFIG)
    run = world.start(world.drop())
    store(world, f"runs/{run.run_id}/checkpoints/", GROUPS)
    return run


def test_the_newest_step_of_a_running_job(training, tunedrop):
    printed = tunedrop("rollouts", "cars", "--most", "99")
    newest = [group for group in GROUPS if group.step == 40 and not group.panel]
    assert printed.count("step 40, prompt row-") == len(newest) == 10
    assert HOSTILE.split("&")[0] in printed
    rewards = [line.split()[1] for line in printed.partition("\n\n")[0].splitlines() if line.startswith("reward ")]
    assert rewards == [f"{answer.score:.3f}" for answer in sorted(newest[0].answers, key=lambda each: -(each.score or 0))]
    assert "mean log-probability -0.500 sampled, -0.600 in the loss" in printed
    assert "5 more groups: print them with --most 10." in tunedrop("rollouts", "cars")


def test_a_step_a_prompt_and_the_worst(training, tunedrop):
    def found(*options):
        return [
            msgspec.json.decode(line, type=Group) for line in tunedrop("rollouts", "cars", "--json", *options).splitlines()
        ]

    assert found("--step", "20") == [group for group in GROUPS if group.step == 20]
    assert found("--prompt", "row-7") == [group for group in GROUPS if group.prompt_id == "row-7"]
    assert [group.step for group in found("--prompt", "held-1")] == list(range(30, 301, 30))  # the panel, through the run
    means = [group.mean for group in found("--worst")]
    assert means == sorted(group.mean for group in GROUPS)
    of_step = found("--worst", "--step", "10")
    assert {group.step for group in of_step} == {10}
    assert "evaluation after step 30, prompt held-1" in tunedrop("rollouts", "cars", "--prompt", "held-1")


def test_what_was_not_kept_is_said(world, training, tunedrop):
    message = tunedrop("rollouts", "cars", "--step", "7", "--prompt", "x")
    assert "has kept no answers of step 7 and the prompt 'x'. It has kept 13 steps, 10 to 300." in message
    world.put("training_data/faq.yaml", CONFIG)
    assert "has no rollouts: it is validated" in tunedrop("rollouts", world.drop("training_data/faq.jsonl").run_id)


def test_a_finished_runs_answers_are_those_of_its_model_and_the_report_has_them(world, training, tunedrop):
    world.save_training(training)
    store(world, f"runs/{training.run_id}/training/{training.train_job}/output/model/", GROUPS[:25])
    run = world.tested(world.trained(training))
    lines = tunedrop("rollouts", "cars", "--worst", "--json").splitlines()
    assert len(lines) == 25
    report = world.aws.read(ARTIFACTS, f"runs/{run.run_id}/report.html").decode()
    assert 'id="all-rollouts"' in report
    assert "row-4" in report
    assert json.loads(lines[0])["prompt_id"] in {group.prompt_id for group in GROUPS[:25]}


def test_a_part_that_is_not_copied_yet_is_left_out(world, training, tunedrop):
    store(world, f"runs/{training.run_id}/checkpoints/", GROUPS, missing=20)
    # The object of before is there: an index may be older or newer than its parts.
    boto3.client("s3").delete_object(
        Bucket=ARTIFACTS, Key=f"runs/{training.run_id}/checkpoints/rollouts/{rollouts.part_name('step', 20)}"
    )
    assert "has kept no answers of step 20" in tunedrop("rollouts", "cars", "--step", "20")


def test_text_of_a_model_does_not_control_the_terminal(world, training, tunedrop):
    answer = Answer(text="\x1b]0;pwned\x07ok\u202e", score=1.0, rewards={"a": 1.0}, tokens=2, cut=True)
    group = Group(step=1, prompt_id="\x1b[31m", prompt=[{"role": "user", "content": "\x1b[2J"}], answers=[answer])
    store(world, f"runs/{training.run_id}/checkpoints/", [group])
    printed = tunedrop("rollouts", "cars")
    assert not set("\x1b\x07\u202e") & set(printed)
    assert "2 tokens, cut by the limit" in printed


@pytest.mark.parametrize("quiet", [False, True])
def test_watch_shows_two_answers_of_a_new_step_unless_it_is_quiet(world, training, tunedrop, monkeypatch, quiet):
    boto3.client("logs").create_log_group(logGroupName=LOG_GROUP)
    later = [group for group in GROUPS if group.step <= 20 or group.panel]
    waits = iter(
        [
            lambda: None,
            lambda: store(world, f"runs/{training.run_id}/checkpoints/", later),
            lambda: store(world, f"runs/{training.run_id}/checkpoints/", GROUPS),
            lambda: world.trained(training),
            lambda: world.tested(world.run(training.run_id)),
        ]
    )
    store(world, f"runs/{training.run_id}/checkpoints/", [group for group in GROUPS if group.step == 10])
    monkeypatch.setattr("tunedrop_cli.watch.SAMPLES_EVERY", 0.0)
    monkeypatch.setattr("time.sleep", lambda _seconds: next(waits)())
    printed = tunedrop("watch", training.run_id, *(["--quiet"] if quiet else []))
    for step in (10, 20, 40):
        assert printed.count(f"  two answers of step {step} to: What is row-") == (not quiet)
    if not quiet:
        lines = printed.splitlines()
        at = next(number for number, line in enumerate(lines) if "two answers of step 10" in line)
        best, worst = (float(line.split()[0]) for line in lines[at + 1 : at + 3])
        of_step = [group for group in GROUPS if group.step == 10 and not group.panel]
        differences = [
            (max(scores) - min(scores), max(scores), min(scores))
            for scores in ([answer.score or 0.0 for answer in group.answers] for group in of_step)
        ]
        assert (best, worst) == max(differences)[1:]
