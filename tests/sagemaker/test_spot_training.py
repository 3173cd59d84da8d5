"""The real trainer as a spot job: an interrupted job ends with the adapter of an uninterrupted one."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_model

ROOT = Path(__file__).parents[2]
SCRIPT = f"""
export PYTHONPATH={ROOT}:{ROOT}/functions OMP_NUM_THREADS=1 SM_HPS='{{}}'
export SM_MODEL_DIR=/opt/ml/model SM_OUTPUT_FAILURE=/opt/ml/output/failure
for channel in training run models; do export SM_CHANNEL_${{channel^^}}=/opt/ml/input/data/$channel; done
exec {sys.executable} -m trainer.job train
"""
STEPS = 100  # enough to be interrupted in, and learnt slowly enough to have gradients to the end
CONFIG = {
    "model": "tiny",
    "rewards": [{"type": "contains", "text": "e"}],
    "learnability": {"samples": 0},
    "lora": {"r": 4, "lora_dropout": 0.1},
    "grpo": {
        "max_steps": STEPS,
        "save_steps": 1,
        "num_iterations": 2,
        "num_generations": 8,
        "per_device_train_batch_size": 16,
        "max_completion_length": 6,
        "learning_rate": 5e-4,
        "bf16": False,
    },
}


@pytest.mark.soak
def test_an_interrupted_training_ends_bitwise_like_one_that_was_not(start: Callable[..., Any], tmp_path: Path) -> None:
    local = start(grace=60)
    for file in tiny_model.make_tiny_model(tmp_path / "tiny").iterdir():
        local.s3.upload_file(str(file), "art", f"models/tiny/{file.name}")
    rows = [{"id": f"r{i}", "prompt": [{"role": "user", "content": f"say {i}"}], "answer": str(i)} for i in range(12)]
    local.s3.put_object(Bucket="art", Key="data/train.jsonl", Body="".join(json.dumps(row) + "\n" for row in rows))
    local.s3.put_object(Bucket="art", Key="run/config.json", Body=json.dumps(CONFIG))
    sources = {"training": "s3://art/data/", "run": "s3://art/run/config.json", "models": "s3://art/models/tiny/"}

    def train(name: str) -> None:
        code = local.channel("code", f"s3://art/code/{name}/")
        local.create(
            name,
            SCRIPT,
            InputDataConfig=[code, *(local.channel(channel, uri) for channel, uri in sources.items())],
            CheckpointConfig={"S3Uri": f"s3://art/checkpoints/{name}"},
            EnableManagedSpotTraining=True,
            StoppingCondition={"MaxRuntimeInSeconds": 600, "MaxWaitTimeInSeconds": 600},
        )

    def ended(name: str) -> bytes:
        local.until(lambda: local.describe(name)["TrainingJobStatus"] != "InProgress", 300)
        job = local.describe(name)
        assert job["TrainingJobStatus"] == "Completed", job.get("FailureReason")
        summary = json.loads(local.text(f"out/{name}/{name}/output/model/training.json"))
        assert (summary["steps"], summary["ended"]) == (STEPS, "complete")
        key = f"out/{name}/{name}/output/model/adapter/adapter_model.safetensors"
        return bytes(local.s3.get_object(Bucket="art", Key=key)["Body"].read())

    def told(pattern: str) -> list[int]:
        """The numbers that the job's log has told so far."""
        return [int(number) for number in re.findall(pattern, log.read_text())]

    train("interrupted")
    log = tmp_path / "state/jobs/interrupted/job.log"
    local.until(log.exists)
    for runs in (1, 2):
        local.until(lambda runs=runs: len(told(r"from_step=(\d+)")) == runs, 120)
        begun = told(r"from_step=(\d+)")[-1]
        local.until(lambda begun=begun: told(r"step=(\d+) max_steps")[-1:] > [begun + 10], 120)
        assert local.interrupt("interrupted") == 202
    interrupted = ended("interrupted")
    assert local.statuses("interrupted").count("Interrupted") == 2
    first, second, third = told(r"from_step=(\d+)")
    assert first == 0 < second < third < STEPS
    train("quiet")
    assert ended("quiet") == interrupted
