"""What a receipt shows of a dataset is what the trainer's model reads: every shape in tests/samples, trained in one run."""

import json
from pathlib import Path
from typing import Any

from pipeline.validation.receipt import Receipt
from trainer import train
from trainer.run_trainer import SharedPrefixRunTrainer
from tunedrop.config.model import RunConfig
from tunedrop.dataset.rows import read_rows
from tunedrop_cli.check import check_file

SAMPLES = Path(__file__).parents[1] / "samples"


def test_the_receipts_examples_are_what_the_model_reads(job, tiny, tmp_path, monkeypatch):
    job.patch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(f"model: {tiny.name}\nmax_prompt_length: 480\ngrpo: {{max_completion_length: 32}}\n")
    files = sorted(path for path in SAMPLES.iterdir() if path.name not in {"broken.jsonl", "repeated.jsonl"})
    receipts: list[Receipt] = [check_file(path, tmp_path / "run.yaml", None, tiny) for path in files]
    assert [(path.name, receipt.errors) for path, receipt in zip(files, receipts, strict=True) if receipt.errors] == []
    first: list[Any] = [next(read_rows(path, RunConfig(model="tiny"))) for path in files]
    tokenized: list[list[int]] = []

    def spy(self: Any, prompts: Any) -> Any:
        found = original(self, prompts)
        tokenized.extend(found[0])
        return found

    original = SharedPrefixRunTrainer._tokenize_prompts
    monkeypatch.setattr(SharedPrefixRunTrainer, "_tokenize_prompts", spy)
    rows = [row | {"id": str(number)} for number, row in enumerate(first)]
    job.channel("training", "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "{prompt}", "answer": "answer"}
    grpo = {
        "max_steps": 2,
        "num_generations": 2,
        "per_device_train_batch_size": 2 * len(rows),
        "generation_batch_size": 2 * len(rows),
    }
    job.config(columns=columns, grpo=grpo, learnability={"samples": 0}, lora={"r": 4}, max_prompt_length=480)
    train.train(train.parse_flags([]))

    from trainer.models import load_tokenizer

    read = {load_tokenizer(str(tiny)).decode(ids) for ids in tokenized}
    assert {receipt.examples[0]["prompt"] for receipt in receipts} <= read
