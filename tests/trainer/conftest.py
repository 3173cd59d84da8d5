"""A job's folders with a tiny model in them; importing TRL is the expensive part, so everything runs in this process."""

import json
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_model

from trainer import proofs

# Small and quick: 16 answers of 6 characters a step.
GRPO = {
    "learning_rate": 2e-2,
    "lr_scheduler_type": "constant",
    "max_steps": 3,
    "num_generations": 8,
    "per_device_train_batch_size": 16,
    "max_completion_length": 6,
    "activation_checkpointing": False,
}


def in_this_process(task: dict[str, Any]) -> dict[str, Any]:
    import torch

    with torch.no_grad():
        return json.loads(json.dumps(proofs.measure(task)))


class Job:
    """The folders and environment of a training or test job."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch, model: Path):
        self.root, self.patch = root, patch
        patch.chdir(root)
        patch.delenv("SM_MODEL_DIR", raising=False)
        patch.setenv("SM_OUTPUT_FAILURE", str(root / "failure"))
        patch.setenv("SM_CHANNEL_MODELS", str(model))
        self.model = root / "output/model"
        # tests/trainer/test_proofs.py has the real one, which takes seconds to import what is here already.
        patch.setattr(proofs, "fresh_process", in_this_process)

    def channel(self, name: str, filename: str, content: str) -> Path:
        path = self.root / "input" / name / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        self.patch.setenv(f"SM_CHANNEL_{name.upper()}", str(path.parent))
        return path

    def config(self, **values: Any) -> None:
        values = {"model": "tiny", "rewards": [{"type": "contains", "text": "e"}]} | values
        values["grpo"] = GRPO | values.get("grpo", {})
        self.channel("run", "config.json", json.dumps(values))

    def rows(self, count: int = 12, filename: str = "train.jsonl", **extra: Any) -> None:
        rows = [
            {"id": f"r{i}", "prompt": [{"role": "user", "content": f"say {i}"}], "answer": str(i), **extra}
            for i in range(count)
        ]
        self.channel("training", filename, "".join(json.dumps(row) + "\n" for row in rows))

    def heldout(self, count: int = 4) -> None:
        """Hold rows out of the training, as validate_dataset does."""
        prompts = [[{"role": "user", "content": f"tell {i}"}] for i in range(count)]
        rows = [{"id": f"h{i}", "prompt": prompt, "answer": str(i)} for i, prompt in enumerate(prompts)]
        self.channel("training", "heldout.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def training(self) -> dict[str, Any]:
        return json.loads((self.model / "training.json").read_text())

    def alerts(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.model / "alerts.jsonl").read_text().splitlines()]

    def failure(self) -> str:
        return (self.root / "failure").read_text()

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.model / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    import torch

    torch.set_num_threads(1)  # on matrices this small threads only wait for each other
    return tiny_model.make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def job(tmp_path, monkeypatch, tiny) -> Job:
    return Job(tmp_path, monkeypatch, tiny)


@pytest.fixture(autouse=True)
def _process_state() -> Iterator[None]:
    """A job owns its process: it sets log handlers and a SIGTERM handler, which the next test should not have."""
    handlers, on_term = logging.root.handlers[:], signal.getsignal(signal.SIGTERM)
    yield
    logging.root.handlers[:] = handlers
    signal.signal(signal.SIGTERM, on_term)
