"""The real trainer as a spot job of the emulator: interrupted, it ends with the adapter of a job that was not."""

from __future__ import annotations

import json
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
CONFIG = {
    "model": "tiny",
    "rewards": [{"type": "contains", "text": "e"}],
    "learnability": {"samples": 0},
    "lora": {"r": 4, "lora_dropout": 0.1},
    "grpo": {
        "max_steps": 60,
        "save_steps": 1,
        "num_iterations": 2,
        "num_generations": 8,
        "per_device_train_batch_size": 16,
        "max_completion_length": 6,
        "learning_rate": 2e-2,
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
        told = json.loads(local.text(f"out/{name}/{name}/output/model/training.json"))
        assert (told["steps"], told["ended"]) == (60, "complete")
        key = f"out/{name}/{name}/output/model/adapter/adapter_model.safetensors"
        return bytes(local.s3.get_object(Bucket="art", Key=key)["Body"].read())

    def reached(name: str) -> int:
        """The newest step of which S3 has a part."""
        return max(
            [0, *(int(key.split("checkpoint-")[1].split("/")[0]) for key in local.keys(f"checkpoints/{name}/checkpoint-"))]
        )

    train("interrupted")
    for step in (3, 20):
        local.until(lambda step=step: reached("interrupted") >= step, 120)
        assert local.interrupt("interrupted") == 202
    interrupted = ended("interrupted")
    assert local.statuses("interrupted").count("Interrupted") == 2
    train("quiet")
    assert ended("quiet") == interrupted
