"""The memory probe: it fails before the first step with advice that works, and leaves no trace if the memory suffices."""

import json
import multiprocessing
import os
import re
from pathlib import Path

import limited_training
import pytest
import torch

from trainer import memory_probe, shared_prefix_sampling, train
from trainer.memory_probe import Batch, smaller
from trainer.run_trainer import SharedPrefixRunTrainer

ROOM = 550  # megabytes: 8 sequences of HUNGRY need about 500, and 12 more than 600
# Enough sequences of enough tokens for the tiny model to need a few hundred megabytes, with stock TRL's full logits.
HUNGRY = {
    "per_device_train_batch_size": 96,
    "num_generations": 8,
    "max_completion_length": 400,
    "cast_lm_head_to_fp32": True,
}


def limited(megabytes: int) -> int | None:
    """Train with so much more address space than there is in use when the training begins; returns the exit code.

    The process is a fork of a new one: the memory that earlier tests left free in this one's heap would be beside the limit.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["limited_training"])
    process = context.Process(target=limited_training.run, args=(megabytes, dict(os.environ), Path.cwd()))
    process.start()
    process.join()
    return process.exitcode


def test_out_of_memory_comes_first_and_its_advice_holds(job):
    job.config(grpo=HUNGRY, learnability={"samples": 0})
    job.rows(count=40)
    assert limited(ROOM) == 1
    assert job.failure().startswith("Not enough memory for the longest batch: 96 sequences of up to 9 + 400 tokens")
    assert not (job.root / "output/checkpoints/checkpoint-1").exists()
    found = re.search(
        r"(\d+) sequences fit: lower grpo.per_device_train_batch_size from 96 to (\d+) and raise "
        r"grpo.gradient_accumulation_steps from 1 to (\d+)\. The training stays the same\.$",
        job.failure(),
    )
    assert found, job.failure()
    size, _, steps = map(int, found.groups())
    assert size < 96 == size * steps
    job.config(
        grpo=HUNGRY | {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps},
        learnability={"samples": 0},
    )
    assert limited(ROOM) == limited_training.FITS


@pytest.mark.parametrize(
    ("fits", "error", "advice"),
    [
        (
            lambda batch: batch.sequences <= 4,
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            "4 sequences fit: lower grpo.per_device_train_batch_size from 12 to 4 and raise",
        ),
        (
            lambda batch: batch.completion <= 60,
            RuntimeError("could not create a primitive"),
            "One sequence fits with 50 completion tokens: lower grpo.max_completion_length from 200 to 50 and",
        ),
        (
            lambda batch: False,
            MemoryError(),
            "Even one short sequence does not fit: use a smaller model, lora.load_in_4bit, or a larger instance.",
        ),
    ],
)
def test_what_to_lower(job, monkeypatch, fits, error, advice):
    def run(_self, batch):
        if not fits(batch):
            raise error

    monkeypatch.setattr(memory_probe.MemoryProbe, "_run", run)
    grpo = {"per_device_train_batch_size": 12, "num_generations": 4, "max_completion_length": 200}
    job.config(grpo=grpo, learnability={"samples": 0})
    job.rows()
    with pytest.raises(SystemExit):
        train.main([])
    assert advice in job.failure()


def test_another_error_is_not_put_down_to_memory(job, monkeypatch):
    def run(_self, _batch):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(memory_probe.MemoryProbe, "_run", run)
    job.config(learnability={"samples": 0})
    job.rows()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        train.train(train.parse_flags([]))


def test_smaller_batches_keep_the_step_and_then_shorten_it():
    assert [*smaller(Batch(12, 8))] == [Batch(n, 8) for n in (6, 4, 3, 2, 1)] + [Batch(1, n) for n in (4, 2, 1)]
    assert [*smaller(Batch(1, 3))] == [Batch(1, 1)]


@pytest.mark.parametrize("stock", [False, True])
def test_it_leaves_no_trace(job, monkeypatch, stock):
    """Also with LoRA dropout, which takes random numbers, and with old and reference log-probabilities."""
    job.config(
        lora={"r": 4, "lora_dropout": 0.1},
        grpo={"beta": 0.01, "num_iterations": 2, "cast_lm_head_to_fp32": stock},
        learnability={"samples": 0},
    )
    job.rows()

    def result():
        train.train(train.parse_flags([]))
        points = [
            {name: value for name, value in each.items() if name not in {"seconds", "memory_gb"}} for each in job.metrics()
        ]
        (job.root / "output").rename(job.root / f"output-{len(list(job.root.iterdir()))}")
        return points

    probed = result()
    monkeypatch.setattr(memory_probe.MemoryProbe, "on_train_begin", lambda *_, **__: None)
    assert result() == probed


def test_a_rollout_that_does_not_fit_is_named_with_what_to_lower(job, monkeypatch):
    tried = []

    def probe_rollout(_self, prompts):
        tried.append(len(prompts))
        if len(prompts) > 12:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(SharedPrefixRunTrainer, "probe_rollout", probe_rollout)
    grpo = {"per_device_train_batch_size": 4, "num_generations": 4, "gradient_accumulation_steps": 5}
    job.config(grpo=grpo, learnability={"samples": 0})
    job.rows()
    with pytest.raises(SystemExit):
        train.main([])
    assert tried == [20, 16, 12]
    assert "for a rollout: 20 completions of up to 9 + 6 tokens at a time. 12 fit: set grpo.steps_per_generation to 3" in (
        job.failure()
    )


def test_a_probed_rollout_takes_all_its_memory_at_once(job, monkeypatch):
    caches = []
    attend = shared_prefix_sampling.Cache.attend

    def noted(cache, *args):
        caches.append(cache)
        return attend(cache, *args)

    monkeypatch.setattr(shared_prefix_sampling.Cache, "attend", noted)
    monkeypatch.setattr(memory_probe.MemoryProbe, "_fits", lambda *_: 1 / 0)
    job.config(grpo={"max_completion_length": 123}, learnability={"samples": 0})
    job.rows()
    with pytest.raises(ZeroDivisionError):
        train.train(train.parse_flags([]))
    (keys, values), *_ = caches[-1]._own
    assert keys.shape == values.shape == (16, 2, 123, 12)
    assert len(caches) == 2 * 2  # two layers, the prefill and one token


@pytest.mark.parametrize("room", [True, False])
def test_a_gpu_with_room_keeps_all_activations(job, monkeypatch, room):
    """What the probe decides with a GPU, of whose memory it asks for a peak; the job runs on the CPU."""
    states = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    begin, fits = memory_probe.MemoryProbe.on_train_begin, memory_probe.MemoryProbe._fits

    def with_gpu(probe, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "current_device", lambda: 0)
            patch.setattr(torch.cuda, "mem_get_info", lambda: (0, 1000))
            patch.setattr(torch.cuda, "max_memory_reserved", lambda: 800 if room else 950)
            patch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
            patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
            patch.setattr(torch.cuda, "empty_cache", lambda: None)
            patch.setattr(memory_probe, "own_random_numbers", torch.random.fork_rng)
            begin(probe, *args, **kwargs)
        states.append(probe._trainer.model.is_activation_checkpointing)

    def seen(probe, batch):
        states.append(probe._trainer.model.is_activation_checkpointing)
        return fits(probe, batch)

    monkeypatch.setattr(memory_probe.MemoryProbe, "on_train_begin", with_gpu)
    monkeypatch.setattr(memory_probe.MemoryProbe, "_fits", seen)
    job.config(learnability={"samples": 0}, grpo={"max_steps": 1})
    config = json.loads(job.root.joinpath("input/run/config.json").read_text())
    del config["grpo"]["activation_checkpointing"]
    job.channel("run", "config.json", json.dumps(config))
    job.rows()
    train.train(train.parse_flags([]))
    assert states == ([False, False] if room else [False, True, True])
