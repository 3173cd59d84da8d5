"""Runs the largest possible micro-batch before the first step, to find out early whether the memory suffices.

The longest prompts, each with a group of completions of full length, go forward and backward once, as in the loss. If they
do not fit, the probe tries smaller batches until one fits, and the job fails with the values to write into the config. The
probe leaves no trace: it drops its gradients, adds no metrics, and does not use the trainer's random numbers.

The probe does not measure weights that FSDP or DeepSpeed shard, nor a rollout's key-value cache (docs/sizing.md has its
formula).
"""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.job import JobError
from trainer.progress import memory_gb

if TYPE_CHECKING:
    from trainer.run_trainer import RunTrainer

log = logging.getLogger("trainer")

# Texts of torch's errors when a CPU runs out of memory; for a GPU torch has an exception class. oneDNN's texts do not name
# the cause: https://github.com/uxlfoundation/oneDNN/blob/main/include/oneapi/dnnl/dnnl.hpp
OUT_OF_MEMORY = (
    "can't allocate memory",
    "bad_alloc",
    "Cannot allocate memory",
    "could not create a primitive",
    "could not execute a primitive",
)


class Batch(NamedTuple):
    """A micro-batch of the loss: its number of sequences, and the tokens of each completion."""

    sequences: int
    completion: int


class MemoryProbe(TrainerCallback):  # type: ignore[misc] # transformers is untyped here
    """Probes when the training begins. `lengths` are the lengths of the prompts in tokens.

    Raises JobError if the memory does not suffice; the message says which limits to lower.
    """

    def __init__(self, trainer: "RunTrainer", lengths: Sequence[int]):
        self._trainer, self._lengths = trainer, sorted(lengths, reverse=True)

    def on_train_begin(self, args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Probe. Each rank probes by itself and waits for no other rank."""
        if args.deepspeed or args.fsdp:
            return
        began = time.monotonic()
        worst = Batch(args.per_device_train_batch_size, args.max_completion_length)
        if not self._fits(worst):
            raise JobError(self._advice(worst, next(filter(self._fits, smaller(worst)), None)))
        seconds = time.monotonic() - began
        log.info(
            "memory probe: %d sequences of %d + %d tokens fit, peak %.2f GB, in %.1f s",
            *(worst.sequences, self._lengths[0], worst.completion, memory_gb(), seconds),
        )
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def _fits(self, batch: Batch) -> bool:
        """Return whether a batch fits, forward and backward, and free its memory."""
        model = self._trainer.model
        try:
            with torch.random.fork_rng():  # LoRA dropout
                self._run(batch)
            return True
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(
                words in str(error) for words in OUT_OF_MEMORY
            ):
                raise
            log.info("memory probe: out of memory with %d sequences of %d completion tokens", *batch)
            return False
        finally:
            model.zero_grad(set_to_none=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _run(self, batch: Batch) -> None:
        trainer = self._trainer
        groups = -(-batch.sequences // trainer.num_generations)
        lengths = [self._lengths[min(group, len(self._lengths) - 1)] for group in range(groups)]
        draw, vocabulary = torch.Generator().manual_seed(0), trainer.model.config.get_text_config().vocab_size
        # All random: the shared-prefix loss computes equal prompts and equal completions only once.
        prompts = torch.randint(vocabulary, (groups, lengths[0]), generator=draw)
        masks = torch.arange(lengths[0])[None] >= lengths[0] - torch.tensor(lengths)[:, None]  # padded on the left
        group = torch.arange(batch.sequences) // trainer.num_generations
        completions = torch.randint(vocabulary, (batch.sequences, batch.completion), generator=draw)
        ids = torch.cat([prompts[group], completions], dim=1).to(trainer.args.device)
        mask = torch.cat([masks[group], torch.ones_like(completions)], dim=1).to(trainer.args.device)
        trainer.model.train()
        with trainer.compute_loss_context_manager():
            log_probs = trainer.completion_log_probs(ids, mask, batch.completion)
        log_probs.mean().backward()

    def _advice(self, worst: Batch, fitting: Batch | None) -> str:
        args = self._trainer.args
        problem = (
            f"Not enough memory{_of_gpu()} for the longest batch: {worst.sequences} sequences of up to {self._lengths[0]} + "
            f"{worst.completion} tokens, forward and backward. "
        )
        if fitting is None:
            return problem + (
                "Even one short sequence does not fit: use a smaller model, lora.load_in_4bit, or a larger instance."
            )
        if fitting.completion == worst.completion:
            steps = args.gradient_accumulation_steps
            return problem + (
                f"{fitting.sequences} sequences fit: lower grpo.per_device_train_batch_size from {worst.sequences} to "
                f"{fitting.sequences} and raise grpo.gradient_accumulation_steps from {steps} to "
                f"{steps * worst.sequences // fitting.sequences}. The training stays the same."
            )
        return problem + (
            f"One sequence fits with {fitting.completion} completion tokens: lower grpo.max_completion_length from "
            f"{worst.completion} to {fitting.completion} and grpo.per_device_train_batch_size from {worst.sequences} to 1, "
            "or use lora.load_in_4bit or a larger instance."
        )


def smaller(batch: Batch) -> Iterator[Batch]:
    """Yield smaller batches: each smaller divisor of the sequences, then one sequence with ever fewer tokens."""
    sequences, completion = batch
    yield from (Batch(size, completion) for size in range(sequences // 2, 0, -1) if sequences % size == 0)
    while completion > 1:
        completion //= 2
        yield Batch(1, completion)


def _of_gpu() -> str:
    """Return the GPU's memory as ` (of 22.0 GB)`, an empty text without a GPU."""
    return f" (of {torch.cuda.mem_get_info()[1] / 1e9:.1f} GB)" if torch.cuda.is_available() else ""
