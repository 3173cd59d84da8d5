"""The warm start: when it begins and ends, that it survives interruptions, and its share of time and money."""

import json
import os
import signal
from typing import Any

import pytest

from trainer import checkpoints, train, warm_start
from trainer.bounds import Bounds
from trainer.checkpoints import Record
from trainer.job import JobError
from trainer.learnability import estimate
from trainer.learnability_gate import Asked
from tunedrop.config.parse import parse_run_config

from .conftest import Job
from .test_bounds import Clock
from .test_checkpoints import results, start, train_to_the_end

GRPO = {
    "max_steps": 4,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_completion_length": 12,
    "max_prompt_length": None,
    "learning_rate": 1e-3,
    "bf16": False,
}


def prepare(job: Job, *, rows: int = 48, reasoning: bool = True, **config: Any) -> Job:
    """A task on which the tiny model is lost: no answer of it is `so 7`."""
    grpo = {name: value for name, value in GRPO.items() if value is not None} | config.pop("grpo", {})
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


def test_explore(job):
    import logging, sys

    logging.basicConfig(stream=sys.stdout, level=logging.INFO, force=True)
    prepare(job)
    train.train(train.parse_flags([]))
    print(json.dumps({k: v for k, v in job.training().items()}, indent=1)[:6000])
    for point in job.metrics():
        print(point)
