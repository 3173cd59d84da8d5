"""Measures the time of a GRPO step: stock TRL and `SharedPrefixGRPOTrainer`, with the same model, data, seed and process.

    .venv/bin/python -m benchmarks.grpo_step                        # the three shapes of docs/benchmarks.md
    .venv/bin/python -m benchmarks.grpo_step --shape 200,20,8 --steps 3 --micro-batches 16,32
    .venv/bin/python -m benchmarks.grpo_step --device cuda --model Qwen/Qwen2.5-1.5B-Instruct

A shape is: tokens of a prompt, tokens of a completion, completions of a prompt. Both trainers run with each micro-batch
size, and the comparison uses each trainer's fastest size. Every completion has the full length, because the end-of-text
token is disabled: both trainers do the same work. The first step of each run is a warm-up and is not counted. If a step
takes minutes, `--warm-up 0` counts it.
"""

import argparse
import ctypes
import gc
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from trainer import models
from trainer.run_trainer import SharedPrefixGRPOTrainer

MODEL = Path(__file__).parents[1] / ".tunedrop/models/SmolLM2-135M-Instruct"
SHAPES = ["50,20,8", "200,20,8", "64,256,8"]
TRAINERS = {"stock TRL": GRPOTrainer, "shared prefix": SharedPrefixGRPOTrainer}
TEXT = "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do. " * 100


class Figures(NamedTuple):
    """Seconds of a step and of its parts (medians), and peak memory in GB."""

    step: float
    rollout: float
    reward: float
    loss: float
    memory: float


class Clock:
    """Adds up the seconds that a trainer spends in some of its methods."""

    def __init__(self, device: str):
        self._device = device
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        """Return the time after the device has finished its work."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def watch(self, trainer: GRPOTrainer, method: str) -> None:
        """Start to time every call of a method."""
        timed: Callable[..., Any] = getattr(trainer, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            began = self.now()
            try:
                return timed(*args, **kwargs)
            finally:
                self.seconds[method] = self.seconds.get(method, 0.0) + self.now() - began

        setattr(trainer, method, call)


def peak_memory(device: str, reset: bool = False) -> float:
    """Return the peak memory since the last reset, in GB: of the GPU, or of this process."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 1e9
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # returns freed memory of the last run
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the resident memory
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e6


def measure(kind: str, shape: tuple[int, int, int], micro_batch: int, arguments: argparse.Namespace) -> Figures:
    """Train for a few steps with one micro-batch size and return the figures."""
    prompt, completion, generations = shape
    tokenizer = models.load_tokenizer(arguments.model)
    tokens = tokenizer(TEXT)["input_ids"]
    steps = arguments.warm_up + arguments.steps
    count = steps * arguments.completions // generations
    prompts = [tokenizer.decode(tokens[start : start + prompt]) for start in range(count)]
    draw = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.weights)
    with tempfile.TemporaryDirectory() as folder:
        trainer = TRAINERS[kind](
            model=model,
            reward_funcs=lambda completions, **_: torch.rand(len(completions), generator=draw).tolist(),
            args=GRPOConfig(
                output_dir=folder,
                num_generations=generations,
                max_completion_length=completion,
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=arguments.completions // micro_batch,
                max_steps=steps,
                learning_rate=1e-5,
                beta=arguments.beta,
                bf16=models.fast_bf16(),
                activation_checkpointing=False,
                use_cpu=arguments.device == "cpu",
                disable_tqdm=True,
                save_strategy="no",
                report_to=[],
            ),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
        )
        trainer.remove_callback(PrinterCallback)
        # The vocabulary's last token now ends a completion; its probability is nearly 0.
        trainer.generation_config.eos_token_id = trainer.eos_token_ids = [len(tokenizer) - 1]
        clock = Clock(arguments.device)
        for method in ("training_step", "_generate_single_turn", "_calculate_rewards"):
            clock.watch(trainer, method)
        timed: list[dict[str, float]] = []
        whole = trainer.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            loss = whole(*args, **kwargs)
            if trainer._step % trainer.args.gradient_accumulation_steps == 0:
                timed.append(dict(clock.seconds))
                clock.seconds.clear()
            return loss

        trainer.training_step = training_step
        gc.collect()
        peak_memory(arguments.device, reset=True)
        trainer.train()
        memory = peak_memory(arguments.device)

    def median(*methods: str) -> float:
        return statistics.median(sum(step[method] for method in methods) for step in timed[arguments.warm_up :])

    step, rollout, reward = (median(name) for name in ("training_step", "_generate_single_turn", "_calculate_rewards"))
    return Figures(step, rollout, reward, step - rollout - reward, memory)


def main() -> None:
    """Print a table per shape: both trainers at each micro-batch size, then the ratio of their fastest times."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", action="append", help="prompt,completion,generations; repeat for several")
    parser.add_argument("--completions", type=int, default=64, help="completions per step")
    parser.add_argument("--steps", type=int, default=1, help="counted steps; the result is their median")
    parser.add_argument("--warm-up", type=int, default=1, help="uncounted steps at the start")
    parser.add_argument("--micro-batches", default="8,16,32,64", help="micro-batch sizes to try")
    parser.add_argument("--trainer", choices=TRAINERS, action="append", help="run only this trainer")
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--weights", type=lambda name: getattr(torch, name), help="float32 or bfloat16; default: as in a job"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    arguments.weights = arguments.weights or models.weights_dtype()
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{Path(arguments.model).name}, LoRA rank 16, {arguments.completions} completions a step, {where}")
    for text in arguments.shape or SHAPES:
        prompt, completion, generations = (int(part) for part in text.split(","))
        print(f"\nprompt {prompt}, completion {completion}, G {generations}")
        print(f"{'':15}{'micro':>6}{'s/step':>9}{'rollout':>9}{'reward':>8}{'loss':>8}{'tokens/s':>10}{'peak GB':>9}")
        best: dict[str, Figures] = {}
        for kind in arguments.trainer or TRAINERS:
            for size in (int(part) for part in arguments.micro_batches.split(",")):
                figures = measure(kind, (prompt, completion, generations), size, arguments)
                rate = arguments.completions * (prompt + completion) / figures.step
                print(
                    f"{kind:15}{size:>6}{figures.step:>9.2f}{figures.rollout:>9.2f}{figures.reward:>8.2f}"
                    f"{figures.loss:>8.2f}{rate:>10.0f}{figures.memory:>9.2f}",
                    flush=True,
                )
                best[kind] = min(best.get(kind, figures), figures)
        if len(best) == 2:
            stock, ours = best.values()
            print(f"{stock.step / ours.step:.2f} times faster (rollout {stock.rollout / ours.rollout:.2f}, loss "
                  f"{stock.loss / ours.loss:.2f}); {ours.memory / stock.memory:.2f} times the memory")  # fmt: skip


if __name__ == "__main__":
    main()
