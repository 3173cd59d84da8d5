"""Measures the seconds of training until a held-out reward on the sample `additions`: stock TRL and shared prefix.

    .venv/bin/python -m benchmarks.time_to_reward
    .venv/bin/python -m benchmarks.time_to_reward --target 0.95 --seeds 5 --micro-batches 12,24,48
    .venv/bin/python -m benchmarks.time_to_reward --task mixed --micro-batches 48

The run config is the sample's. Every fifth row is held out. After each step, the model answers these rows greedily, and the
sample's reward scores the completions; this time is not counted. Each trainer runs with its fastest micro-batch size, which
the benchmark first determines with short runs.

The task `mixed` compares the policies of `sampling`, with the trainer of a run. Of the rows that are not held out, a third
gets the sample's reward, a third gets 0 and a third gets 1 whatever the model answers. As in a run, the learnability gate's
completions are known before the first step; their time is not counted.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from trainer import curriculum, dataset, models
from trainer.checkpoints import Record
from trainer.curriculum import Curriculum
from trainer.row_rewards import RowReward
from trainer.run_trainer import SharedPrefixGRPOTrainer, SharedPrefixRunTrainer
from tunedrop.config.model import Sampling
from tunedrop.config.parse import parse_run_config
from tunedrop.config.schedule import FIRST_GATE_PROMPTS
from tunedrop.rewards import build_rewards

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "tunedrop_cli/sample"
TASKS = {"additions": ("stock TRL", "shared prefix"), "mixed": ("uniform", "teach")}
STEP = 48  # completions per step, as in the sample


class HeldOut(TrainerCallback):  # type: ignore[misc] # transformers is untyped here
    """After each step, stops the clock and scores the held-out rows. Ends the training at the target."""

    def __init__(self, rows: list[dict[str, Any]], tokenizer: Any, reward: Any, length: int, target: float):
        self._prompts = tokenizer.apply_chat_template(
            [row["prompt"] for row in rows], add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        self._rows, self._tokenizer, self._reward = rows, tokenizer, reward
        self._length, self._target = length, target
        self.seconds: list[float] = []
        self.rewards: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, _args: Any, _state: Any, control: Any, model: Any, **_: Any) -> None:
        """Stop the clock and score the held-out rows."""
        self.seconds.append(time.perf_counter() - self._began)
        with torch.no_grad(), torch.autocast("cpu", enabled=models.fast_bf16()):
            ids = model.generate(**self._prompts, max_new_tokens=self._length, do_sample=False)
        texts = self._tokenizer.batch_decode(ids[:, self._prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        answers = [[{"role": "assistant", "content": text}] for text in texts]
        columns = {name: [row[name] for row in self._rows] for name in self._rows[0] if name != "prompt"}
        self.rewards.append(statistics.fmean(self._reward([row["prompt"] for row in self._rows], answers, **columns)))
        print(f" {self.rewards[-1]:.2f}", end="", flush=True)
        if self.rewards[-1] >= self._target:
            control.should_training_stop = True


class TwoThirdsFlat(RowReward):
    """The reward of every third row. The others get 0, or 1, whatever the model answers: they are dead, or solved."""

    def __call__(self, prompts: list[Any], completions: list[Any], row: list[int], **trainer: Any) -> list[float | None]:
        """Score completions."""
        scores = super().__call__(prompts, completions, row, **trainer)
        return [(score, 0.0, 1.0)[index % 3] for index, score in zip(row, scores, strict=True)]


def build(kind: str, seed: int, **arguments: Any) -> GRPOTrainer:
    """Return the trainer of this name; `arguments` are `GRPOTrainer`'s."""
    if kind in TASKS["additions"]:
        return (SharedPrefixGRPOTrainer if kind == "shared prefix" else GRPOTrainer)(**arguments)
    record = Record()
    teach = Curriculum(record, seed, Sampling().refills) if kind == "teach" else None
    trainer = SharedPrefixRunTrainer(run={}, record=record, prompt_limit=64, curriculum=teach, **arguments)
    if teach:
        asked = [trainer.train_dataset[index] for index in trainer.row_order()[:FIRST_GATE_PROMPTS]]
        for group in curriculum.sample_groups(trainer, asked):
            teach.observe(group.row["row"], curriculum.scores(group.rewards, trainer.reward_weights))
    return trainer


def run(kind: str, micro_batch: int, seed: int, steps: int, target: float) -> HeldOut:
    """Train until the target, or for at most `steps` steps; return the seconds and the held-out rewards of all steps."""
    config = parse_run_config(yaml.safe_load((SAMPLE / "additions.yaml").read_text()))
    rows = dataset.load_rows(SAMPLE / "additions.jsonl", config, None)
    learn, held_out = [row for index, row in enumerate(rows) if index % 5], rows[::5]
    location = str(ROOT / ".tunedrop/models" / config.model)
    tokenizer = models.load_tokenizer(location)
    [reward] = build_rewards(config.rewards)
    row_reward = (TwoThirdsFlat if kind in TASKS["mixed"] else RowReward)(reward, learn)
    watch = HeldOut(held_out, tokenizer, reward, int(config.grpo["max_completion_length"]), target)
    with tempfile.TemporaryDirectory() as folder:
        grpo = config.grpo | {
            "output_dir": folder,
            "seed": seed,
            "max_steps": steps,
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": STEP // micro_batch,
            "bf16": models.fast_bf16(),
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "report_to": [],
        }
        trainer = build(
            kind,
            seed,
            model=models.load_model(location, dtype=models.weights_dtype()),
            reward_funcs=row_reward,
            args=GRPOConfig(**grpo),
            train_dataset=Dataset.from_list([{"prompt": row["prompt"], "row": index} for index, row in enumerate(learn)]),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", **config.lora.peft_kwargs()),
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return watch


def main() -> None:
    """Print the seconds and steps to the target by trainer and seed, and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", type=float, default=0.9, help="mean held-out reward to reach")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-steps", type=int, default=25)
    parser.add_argument("--micro-batches", default="8,16,24,48", help="micro-batch sizes to try")
    parser.add_argument("--task", choices=TASKS, default="additions")
    parser.add_argument("--trainer", choices=sum(TASKS.values(), ()), action="append", help="run only this trainer")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    sizes = [int(part) for part in arguments.micro_batches.split(",")]
    medians = []
    for kind in arguments.trainer or TASKS[arguments.task]:
        costs = {size: run(kind, size, 0, 2, 2.0).seconds[-1] for size in sizes} if len(sizes) > 1 else {sizes[0]: 0.0}
        size = min(costs, key=lambda each: costs[each])
        print(f"\n{kind}: micro-batch {size} ({', '.join(f'{each}: {cost:.1f} s' for each, cost in costs.items())})")
        totals = []
        for seed in range(arguments.seeds):
            watch = run(kind, size, seed, arguments.max_steps, arguments.target)
            reached = watch.rewards[-1] >= arguments.target
            totals.append(sum(watch.seconds) if reached else float("inf"))
            print(f"  seed {seed}: {totals[-1]:.1f} s, {len(watch.seconds)} steps", flush=True)
        medians.append(statistics.median(totals))
    if len(medians) == 2:
        print(f"median {medians[0]:.1f} s and {medians[1]:.1f} s: {medians[0] / medians[1]:.2f} times faster")


if __name__ == "__main__":
    main()
