"""Compares GRPO, supervised fine-tuning (SFT), and both, a warm start and then GRPO, where the base model is lost.

    .venv/bin/python -m benchmarks.warm_start
    .venv/bin/python -m benchmarks.warm_start --seeds 1 --methods "warm start + GRPO"     # a quick look

The task: additions of two two-digit numbers. Between `<think>` tags, the model writes each column's sum, and adds the carry;
then it writes the result. The rewards pay for the right number and for the form. All rows have the answer, and a few the
reasoning, which people must write.

Each run is a training job of its own, `python -m trainer.train`, that ends within the same minutes: start, learnability
gate, evaluations, merge and proofs included. Runs at the same time share the machine's cores equally. Then the merged model
answers additions that are in no row, greedily, and the run's rewards score the answers. The table has the mean share of
right answers in the right form, its standard deviation over the seeds, and the shares of dead, learnable and solved prompts
before and after each phase.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from trainer import models
from trainer.dataset import chat_ids
from trainer.engines import Decoding, Engine
from tunedrop.config.parse import parse_run_config
from tunedrop.rewards import build_rewards, score

ROOT = Path(__file__).parents[1]
MODEL = "SmolLM2-135M-Instruct"
ROWS, SOLVED, HELDOUT = 600, 12, 16  # SOLVED of the ROWS have the reasoning
NO_GRADIENT = "so that no group had a gradient"  # of the reason why a job fails that learned nothing
METHODS: dict[str, dict[str, Any]] = {
    "GRPO alone": {"warm_start": {"policy": "never"}},
    "SFT alone": {"method": "sft"},
    "warm start + GRPO": {},
}
CONFIG: dict[str, Any] = {
    "model": MODEL,
    "system_prompt": "Add.",
    "rewards": [{"type": "think_format", "weight": 0.2}, {"type": "numeric", "only_if": "think_format"}],
    "lora": {"r": 16, "lora_alpha": 32},
    "max_prompt_length": 64,
    "learnability": {"samples": 4, "policy": "go_on"},
    "warm_start": {"max_share": 0.5},
    "alerts": {"stop_on": ["NON_FINITE"]},
    "sft": {"learning_rate": 6e-4, "num_train_epochs": 60, "rows_per_step": 8},
    "grpo": {
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "scale_rewards": "batch",
        "num_train_epochs": 2,
        "num_generations": 8,
        "per_device_train_batch_size": 48,
        "max_completion_length": 48,
        "activation_checkpointing": False,
    },
}


def row(first: int, second: int) -> dict[str, Any]:
    """Return the row of an addition, with its carried steps as reasoning."""
    ones, tens = first % 10 + second % 10, first // 10 + second // 10
    steps = [
        f"{first % 10}+{second % 10}={ones}",
        f"{first // 10}+{second // 10}={tens}",
        f"{tens}+{ones // 10}={tens + ones // 10}",
    ]
    prompt = [{"role": "system", "content": CONFIG["system_prompt"]}, {"role": "user", "content": f"{first} + {second}"}]
    return {"id": f"{first}+{second}", "prompt": prompt, "answer": str(first + second), "reasoning": ", ".join(steps)}


def additions(seed: int, tests: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return different additions: rows to train on, held-out rows and tests."""
    pairs = [(first, second) for first in range(10, 100) for second in range(10, 100)]
    random.Random(seed).shuffle(pairs)
    rows = [row(*pair) for pair in pairs[: ROWS + HELDOUT + tests]]
    for each in rows[SOLVED:ROWS]:
        each["reasoning"] = None
    return rows[:ROWS], rows[ROWS : ROWS + HELDOUT], rows[ROWS + HELDOUT :]


def train(method: str, seed: int, minutes: float, tests: int) -> tuple[float, dict[str, Any] | None]:
    """Train by a method, with as many threads as this process; return the share of right answers, and training.json."""
    with tempfile.TemporaryDirectory() as path:
        return train_in(Path(path), method, seed, minutes, tests)


def train_in(folder: Path, method: str, seed: int, minutes: float, tests: int) -> tuple[float, dict[str, Any] | None]:
    """As `train`, in this folder. A job that learned nothing fails and has no training.json: the answers are the base's."""
    values = CONFIG | METHODS[method] | {"columns": {"prompt": "{prompt}", "answer": "answer"}}
    values |= {"grpo": values["grpo"] | {"seed": seed}, "compute": {"max_runtime": round(60 * minutes)}}
    learn, heldout, asked = additions(seed, tests)
    files = {
        "run/config.json": json.dumps(values),
        "training/train.jsonl": "".join(json.dumps(each) + "\n" for each in learn),
        "training/heldout.jsonl": "".join(json.dumps(each) + "\n" for each in heldout),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    environment = os.environ | {
        "SM_CHANNEL_RUN": str(folder / "run"),
        "SM_CHANNEL_TRAINING": str(folder / "training"),
        "SM_CHANNEL_MODELS": str(ROOT / ".tunedrop/models"),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'functions'}",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    with (folder / "log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-m", "trainer.train"], cwd=folder, env=environment, stdout=log, stderr=log, check=False
        )
    if done.returncode:
        said = (folder / "log").read_text()
        if NO_GRADIENT not in said:
            raise RuntimeError(said[-4000:])
        return right(values, ROOT / ".tunedrop/models" / MODEL, asked), None
    training: dict[str, Any] = json.loads((folder / "output/model/training.json").read_text())
    return right(values, folder / "output/model/merged", asked), training


def right(values: dict[str, Any], merged: Path, rows: list[dict[str, Any]]) -> float:
    """Return the share of rows that a model answers rightly and in the right form, greedily."""
    config = parse_run_config(values)
    tokenizer = models.load_tokenizer(str(merged))
    engine = Engine(str(merged), tokenizer, Decoding.of(config), models.test_dtype(str(merged)))
    prompts = [chat_ids(each["prompt"], tokenizer, {}) for each in rows]
    texts = [""] * len(rows)
    for batch in engine.batches(prompts, [1] * len(rows), [False] * len(rows)):
        for index, (completion,) in zip(batch, engine.write([prompts[index] for index in batch], 1), strict=True):
            texts[index] = completion.text
    engine.close()
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    columns = {name: [each[name] for each in rows] for name in ("id", "answer", "reasoning")}
    scored = score(build_rewards(config.rewards), [each["prompt"] for each in rows], completions, columns)
    return statistics.fmean(each["rewards"]["numeric"] or 0.0 for each in scored)


def in_words(training: dict[str, Any] | None) -> str:
    """Return the steps of a run, and the shares of dead, learnable and solved prompts by phase."""
    if training is None:
        return "no group had a gradient: the job failed, and says so"
    warm = training["warm_start"]
    steps = f"{warm['steps']} steps of warm start ({warm['ended']}), " if warm else ""
    shares = "; ".join(
        f"{phase}: {each['dead']:.0%} dead, {each['learnable']:.0%} learnable, {each['solved']:.0%} solved"
        for phase, each in training["shares"].items()
    )
    return f"{steps}{training['steps']} steps ({training['ended']})\n    {shares}"


def main() -> None:
    """Print each run, and the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="of each run, from its start to its saved model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tests", type=int, default=128)
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--at-once", type=int, default=os.cpu_count(), help="runs at a time (default: one for each core)")
    arguments = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // arguments.at_once)
    jobs = [(method, seed) for method in arguments.methods.split(",") for seed in range(arguments.seeds)]
    results: dict[str, list[float]] = {}
    with ProcessPoolExecutor(
        arguments.at_once, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        runs = {
            pool.submit(train, method, seed, arguments.minutes, arguments.tests): (method, seed) for method, seed in jobs
        }
        for run in as_completed(runs):
            (method, seed), (found, training) = runs[run], run.result()
            results.setdefault(method, []).append(found)
            print(f"{method}  seed {seed}  right {found:.3f}  {in_words(training)}", flush=True)
    cores = f"{threads} core" + "s" * (threads > 1)
    print(f"\n{arguments.minutes:g} minutes of {cores} each, {arguments.tests} tests")
    print("method             right  standard deviation")
    for method, values in results.items():
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{method:17}  {statistics.fmean(values):5.3f}  {deviation:18.3f}")


if __name__ == "__main__":
    main()
