"""Checkpoints: torn ones, other runs' ones, and killed runs that end like an uninterrupted run."""

import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from trainer import checkpoints, dataset, train
from trainer.bounds import Bounds
from trainer.job import JobError
from tunedrop.config.model import RunConfig

from .conftest import Job

# Rollouts are used for two steps of two micro-batches each, and an epoch is six steps: checkpoints fall in the middle of
# both. LoRA dropout takes random numbers in the loss, sampling takes them in the rollout.
GRPO = {
    "max_steps": 10,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "num_iterations": 2,
    "save_steps": 1,
    "bf16": False,
}


def prepare(job: Job, **config: Any) -> Job:
    job.config(**{"grpo": GRPO, "lora": {"r": 4, "lora_dropout": 0.1}, "learnability": {"samples": 0}} | config)
    job.rows()
    job.heldout()
    return job


@pytest.fixture
def durable(job) -> Job:
    return prepare(job)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny) -> Job:
    """A run that nobody disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        job = prepare(Job(tmp_path_factory.mktemp("uninterrupted"), patch, tiny))
        train.train(train.parse_flags([]))
        # A rollout is used for four steps. Only the first one logs rewards.
        steps = [f"step-{point['step']:06d}.jsonl.gz" for point in job.metrics()]
        panel = [f"panel-{step:06d}.jsonl.gz" for step in (5, 10)]
        assert sorted(results(job)[3]) == sorted([*steps, *panel, "index.json"])
        return job


def results(job: Job) -> tuple[bytes, list[dict[str, Any]], dict[str, Any], dict[str, bytes]]:
    """The final adapter, the metrics but for times and memory, what training.json says of the checkpoints, the rollouts."""
    metrics = [
        {name: value for name, value in point.items() if name not in {"seconds", "memory_gb"}} for point in job.metrics()
    ]
    result = json.loads((job.model / "training.json").read_text())
    adapter = (job.model / "adapter/adapter_model.safetensors").read_bytes()
    return (
        adapter,
        metrics,
        {name: result[name] for name in ("steps", "ended", "checkpoint", "evaluations", "bounded", "sampling")},
        {path.name: path.read_bytes() for path in (job.model / "rollouts").iterdir()},
    )


def start() -> multiprocessing.process.BaseProcess:
    """Train in a process that can be killed: a fork of this one, which has the libraries loaded."""

    def run() -> None:
        import torch

        torch.set_num_threads(1)  # makes a thread pool: the one of before is not in this process
        logging.disable()
        train.train(train.parse_flags([]))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def train_to_the_end() -> None:
    process = start()
    process.join()
    assert process.exitcode == 0


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and send SIGTERM in this step."""

    def interrupt(_self, _args, state, _control, **_):
        if state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Bounds, "on_substep_end", interrupt)
        train_to_the_end()


def kill(job: Job, after: float) -> None:
    """Train, and kill -9 so many seconds after the first step, if that is not the end."""
    process = start()
    while process.is_alive() and not (job.model / "metrics.jsonl").exists():
        time.sleep(0.001)
    process.join(after)
    process.kill()
    process.join()
    (job.model / "metrics.jsonl").unlink()


@pytest.mark.parametrize("seed", range(1))  # `make soak` has 20
def test_killed_at_a_random_moment_a_run_ends_as_if_nothing_had_happened(durable, uninterrupted, seed):
    kill(durable, random.Random(seed).uniform(0, 0.6))
    assert not (durable.model / "training.json").exists()
    train_to_the_end()
    assert results(durable) == results(uninterrupted)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_many_random_moments_a_run_ends_as_if_nothing_had_happened(durable, uninterrupted, seed):
    generator = random.Random(seed)
    for _ in range(3):
        kill(durable, generator.uniform(0, 0.8))
    train_to_the_end()
    assert results(durable) == results(uninterrupted)


# Where a run may be killed while it saves, by the function that is being called then.
MOMENTS = {
    "before anything is written": ("trainer.checkpoints.shutil.rmtree", 1),
    "before the files are hashed": ("trainer.checkpoints.hashes", 4),
    "between manifest and rename": ("pathlib.Path.rename", 4),
    "before the old ones are removed": ("trainer.checkpoints.clean", 4),
    "in an evaluation": ("trainer.evaluation.sample_completions", 2),
    "when the model is saved": ("trainer.results.save", 1),
}


OFTEN = {"between manifest and rename", "when the model is saved"}  # `make soak` has them all


@pytest.mark.parametrize(
    "moment", [each if each in OFTEN else pytest.param(each, marks=pytest.mark.soak) for each in MOMENTS]
)
def test_killed_at_the_worst_moments_a_run_ends_as_if_nothing_had_happened(durable, uninterrupted, moment, monkeypatch):
    name, call = MOMENTS[moment]
    module, _, function = name.rpartition(".")
    calls = []

    def die(*_args, **_kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*_args, **_kwargs)

    with monkeypatch.context() as patch:
        import importlib

        owner = shutil if "shutil" in module else Path if "pathlib" in module else importlib.import_module(module)
        original = getattr(owner, function)
        patch.setattr(owner, function, die)
        process = start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    train_to_the_end()
    assert results(durable) == results(uninterrupted)


# In the middle of a rollout; at the end of an epoch and of the run.
@pytest.mark.parametrize("step", [3, *(pytest.param(step, marks=pytest.mark.soak) for step in (6, 10))])
def test_after_sigterm_the_final_adapter_is_bitwise_that_of_an_uninterrupted_run(durable, uninterrupted, step, monkeypatch):
    interrupt_at(step, monkeypatch)
    result = durable.training()
    assert (result["steps"], result["stopped"], result["ended"]) == (step, step < 10, "complete" if step == 10 else None)
    train_to_the_end()
    assert results(durable) == results(uninterrupted)


def test_the_estimates_of_a_curriculum_and_its_draws_survive_interruptions(tmp_path_factory, tiny, monkeypatch):
    """Interrupted in the middle of a rollout, and between two."""
    jobs = []
    for steps in ((), (3, 6)):
        job = prepare(
            Job(tmp_path_factory.mktemp("curriculum"), monkeypatch, tiny),
            sampling={"policy": "teach", "refills": 2},
            learnability={"samples": 4},
        )
        jobs.append(job)
        for step in steps:
            interrupt_at(step, monkeypatch)
            assert job.training()["steps"] == step
        train_to_the_end()
    uninterrupted, interrupted = (results(each) for each in jobs)
    assert interrupted == uninterrupted
    assert uninterrupted[2]["sampling"]["refilled"] > 0


def torn(path: Path, how: str) -> None:
    """Damage a checkpoint as a copy that goes file by file may leave it."""
    adapter = path / "adapter_model.safetensors"
    match how:
        case "no manifest":
            (path / "manifest.json").unlink()
        case "half a manifest":
            (path / "manifest.json").write_text((path / "manifest.json").read_text()[:100])
        case "a file is missing":
            (path / "optimizer.pt").unlink()
        case "a file is cut":
            adapter.write_bytes(adapter.read_bytes()[:-1])
        case "a file is another save's":
            content = bytearray(adapter.read_bytes())
            content[-1] ^= 1
            adapter.write_bytes(content)
        case "nothing":
            shutil.rmtree(path)
            path.mkdir()


@pytest.mark.parametrize(
    "how", ["no manifest", "half a manifest", "a file is missing", "a file is cut", "a file is another save's", "nothing"]
)
def test_a_torn_checkpoint_is_ignored_and_removed(uninterrupted, tmp_path, how):
    folder = shutil.copytree(uninterrupted.root / "output/checkpoints", tmp_path / "checkpoints")
    (folder / "saving/checkpoint-11").mkdir(parents=True)
    new, old = checkpoints.whole(folder)[:2]
    torn(new.path, how)
    newest = checkpoints.newest(folder, new.run)
    assert newest is not None
    assert newest.step == old.step < new.step
    checkpoints.clean(folder)
    assert not new.path.exists()
    assert not (folder / "saving").exists()
    assert checkpoints.whole(folder)[0].step == old.step


def test_the_newest_and_the_best_checkpoint_are_kept(uninterrupted):
    found = checkpoints.whole(uninterrupted.root / "output/checkpoints")
    assert [each.step for each in found][:2] == [10, 9]
    assert len(found) <= 3
    best = checkpoints.best(found)
    result = json.loads((uninterrupted.model / "training.json").read_text())
    assert result["checkpoint"] == {"step": best.step, "heldout_reward": best.record.heldout_reward}
    assert [each["step"] for each in result["evaluations"]] == [5, 10]
    assert best.record.heldout_reward == max(each["heldout_reward"] for each in result["evaluations"])
    adapter = (uninterrupted.model / "adapter/adapter_model.safetensors").read_bytes()
    assert adapter == (best.path / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "rows", "message"),
    [
        ({"grpo": {"max_steps": 11}}, 12, r"grpo.max_steps is 11 now and 10 in the checkpoint. Empty"),
        ({"lora": {"r": 8}}, 12, "lora.r is 8 now and 4 in the checkpoint"),
        ({"system_prompt": "hi"}, 12, "system_prompt is 'hi' now and None in the checkpoint"),
        ({}, 11, "it has other rows"),
        ({"compute": {"max_runtime": 99}, "gate": {"min_lift": 0.5}}, 12, None),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(uninterrupted, change, rows, message):
    given = json.loads((uninterrupted.root / "input/run/config.json").read_text())
    config = RunConfig.model_validate(
        given | {name: given.get(name, {}) | new if isinstance(new, dict) else new for name, new in change.items()}
    )
    run = checkpoints.identity(config, dataset.load_rows(uninterrupted.root / "input/training/train.jsonl", config, rows))
    folder = uninterrupted.root / "output/checkpoints"
    if message is None:
        newest = checkpoints.newest(folder, run)
        assert newest is not None
        assert newest.step == 10
    else:
        with pytest.raises(JobError, match=message):
            checkpoints.newest(folder, run)


def test_no_checkpoint_at_all(tmp_path):
    assert checkpoints.newest(tmp_path / "nowhere", {}) is None
