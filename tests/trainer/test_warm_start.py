"""The warm start: when it begins and ends, that it survives interruptions, and its share of time and money."""

import importlib
import json
import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from trainer import checkpoints, train, warm_start
from trainer.bounds import Bounds
from trainer.checkpoints import Record
from trainer.job import JobError
from trainer.learnability import Learnability, estimate
from tunedrop.config.parse import parse_run_config

from .conftest import Job
from .test_bounds import Clock
from .test_checkpoints import results, start, train_to_the_end

GRPO = {
    "max_steps": 4,
    "save_steps": 1,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_completion_length": 12,
    "learning_rate": 1e-3,
    "bf16": False,
}


def prepare(job: Job, *, rows: int = 48, reasoning: bool = True, **config: Any) -> Job:
    """A task on which the tiny model is lost: no answer of it is `so 7`."""
    grpo = GRPO | config.pop("grpo", {})
    values = {
        "rewards": [{"type": "exact_match"}],
        "lora": {"r": 8, "lora_dropout": 0.05},
        "max_prompt_length": 40,
        "learnability": {"samples": 4},
        "sft": {"learning_rate": 1e-2, "num_train_epochs": 20, "rows_per_step": 16},
    }
    job.config(**values | config, grpo=grpo)
    more = {"reasoning": "so"} if reasoning else {}
    content = [
        {"id": f"r{i}", "prompt": [{"role": "user", "content": f"say {i}"}], "answer": "so 7\n#### 7"} | more
        for i in range(rows)
    ]
    job.channel("training", "train.jsonl", "".join(json.dumps(row) + "\n" for row in content))
    job.channel("training", "heldout.jsonl", "".join(json.dumps(row) + "\n" for row in content[:4]))
    return job


@pytest.fixture
def lost(job) -> Job:
    return prepare(job)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny) -> Job:
    """A run that begins with a warm start, and that nobody disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        job = prepare(Job(tmp_path_factory.mktemp("warm"), patch, tiny))
        train.train(train.parse_flags([]))
        return job


def all_results(job: Job) -> tuple[Any, ...]:
    """What `results` compares, and what training.json says of the phases."""
    training = json.loads((job.model / "training.json").read_text())
    return *results(job), training["warm_start"], training["shares"], training["alerts"]


def test_where_the_model_is_lost_a_warm_start_ends_as_soon_as_prompts_are_learnable(uninterrupted):
    training = json.loads((uninterrupted.model / "training.json").read_text())
    warm, shares = training["warm_start"], training["shares"]
    assert warm["reason"] == "100% of 8 prompts are dead, more than warm_start.dead_above"
    assert warm["targets"] == {"rows": 48, "usable": 48, "with_reasoning": 48, "left_out": {}}
    assert warm["ended"] == "learnable"
    points = uninterrupted.metrics()
    learned = [point for point in points if point.get("phase") == "sft"]
    assert warm["steps"] == len(learned) < learned[0]["max_steps"] / 2
    assert learned[-1]["loss"] < learned[0]["loss"] / 3
    assert [point["step"] for point in points if "phase" not in point] == [1, 2, 3, 4]
    assert list(shares) == ["before", "after the warm start", "after grpo"]
    assert shares["before"] == {"prompts": 8, "dead": 1.0, "learnable": 0.0, "solved": 0.0}
    assert shares["after the warm start"]["dead"] <= 0.5
    # The last evaluation asked the same prompts as the gate after the warm start.
    last = warm["evaluations"][-1]
    assert {name: last[name] for name in shares["before"]} == shares["after the warm start"]
    assert all(each["dead"] > 0.5 for each in warm["evaluations"][:-1])
    assert training["ended"] == "complete"


# A process is killed at the n-th call of a function: in each phase, and between them.
MOMENTS = {
    "in an evaluation of the warm start": ("trainer.sft_trainer", "RunSftTrainer.heldout_loss", 2),
    "between the phases": ("trainer.warm_start", "summary", 1),
    "in GRPO": ("trainer.checkpoints", "publish", 4),
}


OFTEN = "between the phases"  # `make soak` has them all


@pytest.mark.parametrize(
    "moment", [each if each == OFTEN else pytest.param(each, marks=pytest.mark.soak) for each in MOMENTS]
)
def test_killed_in_either_phase_a_run_ends_as_if_nothing_had_happened(lost, uninterrupted, moment, monkeypatch):
    module, path, call = MOMENTS[moment]
    with monkeypatch.context() as patch:
        owner: Any = importlib.import_module(module)
        *classes, name = path.split(".")
        for each in classes:
            owner = getattr(owner, each)
        original, calls = getattr(owner, name), []

        def die(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        patch.setattr(owner, name, die)
        process = start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    train_to_the_end()
    assert all_results(lost) == all_results(uninterrupted)


@pytest.mark.parametrize("step", [8, pytest.param(14, marks=pytest.mark.soak)])
def test_after_sigterm_in_the_warm_start_its_adapter_is_saved_and_the_run_goes_on(lost, uninterrupted, step, monkeypatch):
    begun = []

    def interrupt(*_: Any, **__: Any) -> None:
        begun.append(1)
        if len(begun) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Bounds, "on_step_begin", interrupt)
        train_to_the_end()
    training = lost.training()
    assert (training["steps"], training["ended"], training["stopped"]) == (0, None, True)
    assert (training["warm_start"]["ended"], training["warm_start"]["steps"]) == (None, step)
    assert (lost.model / "merged/model.safetensors").exists()
    train_to_the_end()
    assert all_results(lost) == all_results(uninterrupted)


@pytest.mark.parametrize(
    ("compute", "flags", "name"),
    [
        ({"max_runtime": 200}, [], "max_runtime"),
        pytest.param({}, ["--max-runtime", "200"], "max_cost_usd", marks=pytest.mark.soak),
    ],
)
def test_both_phases_end_in_time(job, monkeypatch, compute, flags, name):
    """Steps take 10 s on this clock. The warm start may take 30 % of 200 s, less 3 %: 5 steps. GRPO has the rest."""
    prepare(
        job, compute=compute, grpo={"max_steps": 100}, learnability={"samples": 2, "policy": "go_on"}, alerts={"stop_on": []}
    )
    (job.root / "input/training/heldout.jsonl").unlink()
    monkeypatch.setattr(warm_start, "enough", lambda *_: None)
    monkeypatch.setattr(warm_start, "started", lambda: 1_000.0)
    monkeypatch.setattr("trainer.learnability_gate.time", SimpleNamespace(monotonic=lambda: 0.0))
    Clock(monkeypatch)
    train.train(train.parse_flags(flags))
    training = job.training()
    assert training["warm_start"]["ended"] == "warm_start.max_share"
    assert training["warm_start"]["steps"] == 5
    assert (training["ended"], training["bounded"]) == (name, name)
    assert training["steps"] == 14  # 200 s less 3 % and 50 s; the next step may be a quarter slower


def test_a_warm_start_without_time_is_left_out(job, monkeypatch):
    prepare(job, warm_start={"policy": "always"})
    monkeypatch.setattr("trainer.bounds.Bounds.fits", lambda bounds: bounds._limit.name != "warm_start.max_share")
    with pytest.raises(JobError, match="Nothing to learn"):
        train.train(train.parse_flags([]))


def found(dead: float) -> Learnability:
    rewards = [[0.0] * 4] * round(16 * dead) + [[0.0, 1.0] * 2] * round(16 * (1 - dead))
    return estimate(rewards, 4)


@pytest.mark.parametrize(
    ("policy", "dead", "begins"),
    [
        ({}, 1.0, True),
        ({}, 0.5625, True),
        ({}, 0.5, False),  # as many as may be dead
        ({}, 0.0, False),
        ({}, None, False),  # nobody asked
        ({"dead_above": 0.9}, 0.75, False),
        ({"policy": "never"}, 1.0, False),
        ({"policy": "always"}, 0.0, True),
        ({"policy": "always"}, None, True),
    ],
)
def test_a_warm_start_begins_where_too_many_prompts_are_dead(policy, dead, begins):
    config = parse_run_config({"model": "m", "warm_start": policy})
    assert bool(warm_start.why(config, None if dead is None else found(dead))) == begins


@pytest.mark.parametrize(
    ("policy", "evaluations", "reason"),
    [
        ("auto", [], None),
        ("auto", [{"dead": 0.6}], None),
        ("auto", [{"dead": 0.5}], "learnable"),
        ("auto", [{"dead": 0.9, "heldout_loss": 1.0}, {"dead": 0.9, "heldout_loss": 1.1}], "heldout_loss"),
        ("auto", [{"dead": 0.9, "heldout_loss": 1.0}, {"dead": 0.9, "heldout_loss": 0.9}], None),
        ("auto", [{"dead": 0.9, "heldout_loss": 1.0}, {"dead": 0.1, "heldout_loss": 1.1}], "learnable"),
        ("always", [{"heldout_loss": 1.0}], None),
        ("always", [{"heldout_loss": 1.0}, {"heldout_loss": 1.1}], "heldout_loss"),
        ("always", [{}], None),
    ],
)
def test_a_warm_start_ends_when_prompts_are_learnable_or_the_heldout_loss_rises(policy, evaluations, reason):
    config = parse_run_config({"model": "m", "warm_start": {"policy": policy}})
    assert warm_start.enough(config, evaluations) == reason


def test_without_reasoning_the_run_ends_as_before_and_says_what_is_missing(job):
    prepare(job, reasoning=False, rewards=[{"type": "exact_match"}, {"type": "think_format"}])
    rows = (job.root / "input/training/train.jsonl").read_text().replace("so 7\\n#### 7", "7")
    job.channel("training", "train.jsonl", rows)
    with pytest.raises(JobError, match=r"Nothing to learn[\s\S]*a warm start \(a column `reasoning`"):
        train.train(train.parse_flags([]))
    assert not warm_start.folder().exists()


def test_always_without_a_row_to_learn_from_says_why(job):
    prepare(job, warm_start={"policy": "always"}, rewards=[{"type": "exact_match"}, {"type": "xml_format"}])
    rows = (job.root / "input/training/train.jsonl").read_text().replace("#### 7", "7")
    job.channel("training", "train.jsonl", rows.replace('"reasoning": "so"', '"reasoning": "<answer>"'))
    with pytest.raises(JobError, match=r"warm_start.policy is always, but only 0 of 48 rows .*'xml_format': 48"):
        train.train(train.parse_flags([]))


def test_weights_that_are_not_finite_end_the_run(job):
    prepare(job, warm_start={"policy": "always"}, sft={"learning_rate": 1.0}, grpo={"max_grad_norm": 1e6})
    job.patch.setattr("trainer.progress.LARGEST_WEIGHT", 0.1)
    with pytest.raises(JobError, match="The warm start failed: the adapter's weights are not finite"):
        train.train(train.parse_flags([]))
    assert [alert["code"] for alert in job.alerts()] == ["NON_FINITE"]


def test_a_checkpoint_of_another_run_is_refused(uninterrupted, monkeypatch):
    folder = uninterrupted.root / "output/checkpoints/warm_start"
    saved = checkpoints.whole(folder)[0]
    with pytest.raises(JobError, match="it has other rows"):
        checkpoints.newest(folder, saved.run | {"rows": "others"})


def test_a_record_of_before_has_no_warm_start():
    assert Record().warm_start is None
