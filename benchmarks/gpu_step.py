"""Measures a GRPO step on a GPU: correctness, rollout, loss and whole step, of stock TRL and the shared-prefix trainer.

    .venv/bin/python -m benchmarks.gpu_step --out build           # about 8 minutes on an H100; nothing is downloaded
    .venv/bin/python -m benchmarks.gpu_step --tiny                # a dry run on a CPU

The models have random weights in real shapes, and no completion ends early, because no token of the vocabulary is an end.
Every figure is printed as it is measured, and written to gpu_step.json. A decoded token's floor is the time to read the
weights, the keys and values, and the logits once, at the bandwidth that the card itself reaches when it copies.
"""

import argparse
import contextlib
import gc
import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PretrainedConfig, Qwen3Config
from trl import GRPOConfig, GRPOTrainer

from trainer import shared_prefix
from trainer.cuda_graph import captured
from trainer.run_trainer import SharedPrefixGRPOTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/support"))
from tiny_model import make_tiny_model  # its tokenizer has a token for each character

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
TRAINERS = {"stock TRL": GRPOTrainer, "shared prefix": SharedPrefixGRPOTrainer}
QWEN: dict[str, Any] = {
    "vocab_size": 151936, "head_dim": 128, "num_attention_heads": 16, "num_key_value_heads": 8, "num_hidden_layers": 28,
    "tie_word_embeddings": True, "max_position_embeddings": 40960,
}  # fmt: skip
TINY = Qwen3Config(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, tie_word_embeddings=True,
)  # fmt: skip
MODELS: dict[str, PretrainedConfig] = {
    "Qwen3-0.6B": Qwen3Config(hidden_size=1024, intermediate_size=3072, **QWEN),
    "Llama-3.1-8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, rope_theta=5e5, max_position_embeddings=131072,
    ),
    "Qwen3-1.7B": Qwen3Config(hidden_size=2048, intermediate_size=6144, **QWEN),
}  # fmt: skip


class Shape(NamedTuple):
    """Tokens of a prompt and of a completion, completions of a prompt, and completions of a step."""

    prompt: int
    completion: int
    group: int
    total: int


SHAPES = [Shape(200, 256, 8, 64), Shape(1024, 256, 8, 64)]


class Figures:
    """Prints figures and keeps them for the JSON file."""

    def __init__(self, seconds: float):
        self.found: list[dict[str, Any]] = []
        self._began, self._seconds = time.monotonic(), seconds

    def say(self, **values: Any) -> None:
        """Print and keep a line of figures."""
        values["at"] = round(time.monotonic() - self._began, 1)
        self.found.append(values)
        print(
            " ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items())
        )
        sys.stdout.flush()

    def late(self) -> bool:
        """Return whether the time is up."""
        return time.monotonic() - self._began > self._seconds


def now() -> float:
    """Return the time after the device has finished its work."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def free_memory() -> None:
    """Free what is unused, and begin a new peak."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float:
    """Return the peak of the GPU's memory in GB, 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0


def ceilings(figures: Figures) -> tuple[float, float]:
    """Return the operations a second of bf16 matrix products, and the bytes a second of copies."""
    size, repeats = (8192, 20) if CUDA else (256, 2)
    one, other = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**30 if CUDA else 2**20, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    rates = []
    for work, run in ((2 * size**3, lambda: one @ other), (2 * len(source), lambda: target.copy_(source))):
        run()
        began = now()
        for _ in range(repeats):
            run()
        rates.append(work * repeats / (now() - began))
    figures.say(part="ceilings", card=torch.cuda.get_device_name() if CUDA else "CPU", tflops=rates[0] / 1e12,
                tb_per_s=rates[1] / 1e12)  # fmt: skip
    return rates[0], rates[1]


class Floors(NamedTuple):
    """What a model costs at least: seconds of a decoded token, and operations of a loss without recomputation."""

    token: float
    loss: float

    @classmethod
    def of(cls, config: Any, shape: Shape, bandwidth: float) -> "Floors":
        """Return the floors of a step of this shape, in bf16."""
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        q, kv = size * config.num_attention_heads, size * config.num_key_value_heads
        layers = config.num_hidden_layers * config.hidden_size * (2 * q + 2 * kv + 3 * config.intermediate_size)
        head, prompts = config.vocab_size * config.hidden_size, shape.total // shape.group
        cached = 4 * kv * config.num_hidden_layers * (prompts * shape.prompt + shape.total * shape.completion / 2)
        logits = 8 * shape.total * config.vocab_size
        tokens = prompts * shape.prompt + shape.total * shape.completion
        # Forward and backward through frozen weights: twice two operations for each weight and token.
        work = 4 * (tokens * layers + shape.total * shape.completion * head)
        return cls((2 * (layers + head) + cached + logits) / bandwidth, work)


def build(
    kind: str, folder: Path, config: PretrainedConfig, shape: Shape, micro: int, dtype: torch.dtype, **settings: Any
) -> Any:
    """Return a trainer with random weights, the same for each kind and type, and an adapter that changes the model."""
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    draw = torch.Generator(DEVICE.type).manual_seed(0)
    for each in model.parameters():
        if each.ndim > 1:
            each.data.copy_((0.02 * torch.randn(each.shape, generator=draw, device=DEVICE)).bfloat16())
    rewards = torch.Generator().manual_seed(0)
    trainer = TRAINERS[kind](
        model=model,
        reward_funcs=lambda completions, **_: torch.rand(len(completions), generator=rewards).tolist(),
        args=GRPOConfig(
            output_dir=str(folder), num_generations=shape.group, max_completion_length=shape.completion,
            per_device_train_batch_size=micro, gradient_accumulation_steps=shape.total // micro, max_steps=2,
            learning_rate=1e-5, bf16=dtype == torch.bfloat16, use_cpu=not CUDA, disable_tqdm=True, save_strategy="no",
            report_to=[], logging_steps=1, **settings,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 64}),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
    )  # fmt: skip
    trainer.generation_config.eos_token_id = trainer.eos_token_ids = [config.vocab_size]
    trainer.generation_config.pad_token_id = 0
    if settings.get("activation_checkpointing", False):
        trainer.model.activation_checkpointing_enable()  # `train` would do so
    draw = torch.Generator(DEVICE.type).manual_seed(1)
    for each in trainer.model.parameters():
        if each.requires_grad:
            each.data += 0.02 * torch.randn(each.shape, generator=draw, device=DEVICE, dtype=each.dtype)
    return trainer


def sequences(config: Any, shape: Shape, *, ragged: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random sequences (total, prompt + completion) and their mask; `ragged` completions have different lengths."""
    draw = torch.Generator().manual_seed(2)
    prompts = torch.randint(5, config.vocab_size, (shape.total // shape.group, shape.prompt), generator=draw)
    completions = torch.randint(5, config.vocab_size, (shape.total, shape.completion), generator=draw)
    mask = torch.ones(shape.total, shape.prompt + shape.completion, dtype=torch.long)
    if ragged:
        lengths = torch.randint(shape.completion // 4, shape.completion + 1, (shape.total,), generator=draw)
        mask[:, shape.prompt :] = torch.arange(shape.completion)[None] < lengths[:, None]
    ids = torch.cat([prompts.repeat_interleave(shape.group, 0), completions], 1)
    return ids.to(DEVICE), mask.to(DEVICE)


def loss_pass(
    trainer: Any, ids: torch.Tensor, mask: torch.Tensor, completion: int, micro: int
) -> tuple[float, torch.Tensor]:
    """Do the forward and backward of all micro-batches; return the seconds and the log-probabilities."""
    trainer.model.train()
    trainer.model.zero_grad(set_to_none=True)
    weights = torch.randn(len(ids), completion, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    found = []
    began = now()
    for start in range(0, len(ids), micro):
        part = slice(start, start + micro)
        real = mask[part, -completion:]
        with trainer.compute_loss_context_manager():
            log_probs = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids[part], mask[part], completion, compute_entropy=True
            )[0]
        (log_probs * weights[part] * real).sum().backward()
        found.append((log_probs.detach() * real).float())
    return now() - began, torch.cat(found)


def gradient(trainer: Any) -> torch.Tensor:
    """Return the adapter's gradient as one vector."""
    return torch.cat([each.grad.flatten().float() for each in trainer.model.parameters() if each.requires_grad])


def correctness(figures: Figures, folder: Path, config: PretrainedConfig, shape: Shape) -> None:
    """Compare log-probabilities, gradients and greedy rollouts of both trainers in fp32 and bf16 with stock's in fp32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    found: dict[Any, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for kind in TRAINERS:
            trainer = build(kind, folder, config, shape, shape.total, dtype, top_k=1)
            for ragged in (False, True):
                ids, mask = sequences(config, shape, ragged=ragged)
                _, log_probs = loss_pass(trainer, ids, mask, shape.completion, shape.total)
                found[dtype, kind, ragged] = log_probs, gradient(trainer)
            prompts = ids[:, : shape.prompt].tolist()
            found[dtype, kind] = trainer._generate_single_turn(prompts, None, {}, shape.group)[0]
            del trainer
            free_memory()
    for ragged in (False, True):
        right, right_gradient = found[torch.float32, "stock TRL", ragged]
        off = {}
        for dtype in (torch.float32, torch.bfloat16):
            for kind in TRAINERS:
                log_probs, grad = found[dtype, kind, ragged]
                off[dtype, kind] = (
                    float((log_probs - right).abs().max()), float((grad - right_gradient).norm() / right_gradient.norm())
                )  # fmt: skip
                figures.say(part="correct", dtype=str(dtype)[6:], trainer=kind, ragged=ragged,
                            log_prob_off=off[dtype, kind][0], gradient_off=off[dtype, kind][1])  # fmt: skip
        half, fp32 = torch.bfloat16, torch.float32
        holds = all(each <= 1e-4 for each in off[fp32, "shared prefix"]) and all(
            ours <= 1.5 * stock for ours, stock in zip(off[half, "shared prefix"], off[half, "stock TRL"], strict=True)
        )
        figures.say(part="correct", ragged=ragged, holds=holds)
    same = [one == other for one, other in zip(*(found[torch.float32, kind] for kind in TRAINERS), strict=True)]
    figures.say(part="greedy", fp32_equal=f"{sum(same)}/{len(same)}", graph=captured(), varlen=bool(shared_prefix.CHECKED))


def rollout(figures: Figures, trainer: Any, kind: str, name: str, shape: Shape, floors: Floors) -> None:
    """Measure a rollout. Stock TRL samples a quarter of the tokens, since its tokens all take about the same time."""
    config = trainer.model.config
    prompts = sequences(config, shape)[0][:, : shape.prompt].tolist()
    tokens = shape.completion // 4 if kind == "stock TRL" else shape.completion
    trainer.generation_config.max_new_tokens = 4
    trainer._generate_single_turn(prompts, None, {}, shape.group)  # warms up
    trainer.generation_config.max_new_tokens = tokens
    free_memory()
    began = now()
    ids = trainer._generate_single_turn(prompts, None, {}, shape.group)[0]
    seconds = now() - began
    assert {len(each) for each in ids} == {tokens}
    figures.say(
        part="rollout", model=name, trainer=kind, prompt=shape.prompt, ms_per_token=1e3 * seconds / tokens,
        tokens_per_s=shape.total * tokens / seconds, share_of_floor=floors.token * tokens / seconds,
        s_for_all=seconds * shape.completion / tokens, peak_gb=peak_gb(), graph=captured(),
    )  # fmt: skip


def kernels(figures: Figures, trainer: Any, kind: str, name: str, shape: Shape, micro: int) -> None:
    """Count the kernels of one micro-batch's loss, and name the longest and those of attention."""
    activities = [torch.profiler.ProfilerActivity.CUDA if CUDA else torch.profiler.ProfilerActivity.CPU]
    ids, mask = sequences(trainer.model.config, shape)
    with torch.profiler.profile(activities=activities) as profile:
        seconds, _ = loss_pass(trainer, ids[:micro], mask[:micro], shape.completion, micro)
    time_of = "self_device_time_total" if CUDA else "self_cpu_time_total"
    events = sorted(
        (each for each in profile.key_averages() if getattr(each, time_of) > 0), key=lambda e: -getattr(e, time_of)
    )
    attention = [each.key[:80] for each in events if any(word in each.key.lower() for word in ("fmha", "flash", "cudnn"))]
    figures.say(part="kernels", model=name, trainer=kind, micro=micro, launches=sum(each.count for each in events),
                launches_per_layer=sum(each.count for each in events) / trainer.model.config.num_hidden_layers,
                busy=sum(getattr(each, time_of) for each in events) / 1e6 / seconds, attention=attention[:4])  # fmt: skip
    for each in events[:8]:
        print(f"    {getattr(each, time_of) / 1e3:9.2f} ms {each.count:6d}x {each.key[:110]}")


def loss(
    figures: Figures, trainer: Any, kind: str, name: str, shape: Shape, floors: Floors, micros: list[int], flops: float
) -> None:
    """Measure the loss with each micro-batch size, and count its kernels with the largest one that fits."""
    ids, mask = sequences(trainer.model.config, shape)
    fitting = None
    for micro in micros:
        try:
            free_memory()
            loss_pass(trainer, ids[:micro], mask[:micro], shape.completion, micro)
            seconds, _ = loss_pass(trainer, ids, mask, shape.completion, micro)
        except torch.OutOfMemoryError:
            figures.say(part="loss", model=name, trainer=kind, prompt=shape.prompt, micro=micro, s="out of memory")
            continue
        fitting = micro
        figures.say(part="loss", model=name, trainer=kind, prompt=shape.prompt, micro=micro, s=seconds,
                    share_of_peak=floors.loss / seconds / flops, peak_gb=peak_gb())  # fmt: skip
    if fitting is not None:
        kernels(figures, trainer, kind, name, shape, fitting)


def model_figures(
    figures: Figures, folder: Path, name: str, config: PretrainedConfig, shape: Shape, flops: float, bandwidth: float
) -> None:
    """Measure a model in one shape with both trainers, ours first."""
    dtype = torch.bfloat16 if CUDA else torch.float32
    floors = Floors.of(config, shape, bandwidth)
    figures.say(part="floor", model=name, prompt=shape.prompt, token_ms=1e3 * floors.token,
                step_s=floors.token * shape.completion + floors.loss / flops)  # fmt: skip
    for kind in reversed(TRAINERS):
        # Without checkpointing where memory allows it, as the memory probe decides.
        for checkpointing in (False, True) if kind == "shared prefix" else (True,):
            if figures.late():
                figures.say(part="skipped", model=name, trainer=kind, prompt=shape.prompt)
                continue
            free_memory()
            trainer = build(kind, folder, config, shape, shape.total, dtype, activation_checkpointing=checkpointing)
            if not checkpointing or kind == "stock TRL":
                rollout(figures, trainer, kind, name, shape, floors)
            label = f"{kind}, checkpointing" if checkpointing else kind
            micros = [size for size in (16, 64) if size <= shape.total] or [shape.total]
            loss(figures, trainer, label, name, shape, floors, micros, flops)
            del trainer


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a dry run with a tiny model")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--seconds", type=float, default=480, help="begin nothing after this time")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for gpu_step.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    figures = Figures(arguments.seconds)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.callback(lambda: arguments.out.joinpath("gpu_step.json").write_text(json.dumps(figures.found, indent=1)))
        make_tiny_model(Path(folder))
        flops, bandwidth = ceilings(figures)
        small = (
            TINY
            if arguments.tiny
            else Qwen3Config(hidden_size=1024, intermediate_size=3072, **QWEN | {"num_hidden_layers": 4})
        )
        correctness(figures, Path(folder), small, Shape(24, 12, 4, 8) if arguments.tiny else Shape(70, 48, 8, 16))
        shapes = [Shape(12, 8, 4, 16)] if arguments.tiny else SHAPES
        models = {"tiny": TINY} if arguments.tiny else {name: MODELS[name] for name in arguments.models.split(",")}
        for shape in shapes:
            for name, config in models.items():
                model_figures(figures, Path(folder), name, config, shape, flops, bandwidth)
        figures.say(part="done")


if __name__ == "__main__":
    main()
