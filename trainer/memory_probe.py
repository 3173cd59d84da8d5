"""Runs the worst batch that a training can meet before its first step, so that running out of memory comes first, too.

The longest prompts, each with the completions of its group at their full length, go forward and backward once, as in the
loss. If that does not fit, smaller batches are tried until one does, and the job ends with what to write into the config.
Nothing of it is left: gradients are dropped, metrics are not touched, and the trainer's random numbers are not used.

Not measured: weights that FSDP or DeepSpeed shard, and the key-value cache of a rollout (docs/sizing.md reckons it).
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
    from trl import GRPOTrainer

log = logging.getLogger("trainer")

# How torch says on a CPU that there is no memory left; on a GPU it has an exception of its own. oneDNN's text has no reason
# in it: https://github.com/uxlfoundation/oneDNN/blob/main/include/oneapi/dnnl/dnnl.hpp
OUT_OF_MEMORY = (
    "can't allocate memory",
    "bad_alloc",
    "Cannot allocate memory",
    "could not create a primitive",
    "could not execute a primitive",
)


class Batch(NamedTuple):
    """A micro-batch of the loss: so many sequences, with so many tokens at most in prompt and completion."""

    sequences: int
    completion: int


class MemoryProbe(TrainerCallback):  # type: ignore[misc] # transformers is untyped here
    """Probes when the training begins. `lengths` are the prompts' in tokens.

    Raises JobError with the limits to lower if the memory does not suffice.
    """

    def __init__(self, trainer: "GRPOTrainer", lengths: Sequence[int]):
        self._trainer, self._lengths = trainer, sorted(lengths, reverse=True)

    def on_train_begin(self, args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Probe, on every rank for itself: nothing here waits for another."""
        if args.deepspeed or args.fsdp:
            return
        began = time.monotonic()
        worst = Batch(args.per_device_train_batch_size, args.max_completion_length)
        if not self._fits(worst):
            raise JobError(self._advice(worst, next(filter(self._fits, smaller(worst)), None)))
        took = time.monotonic() - began
        log.info(
            "memory probe: %d sequences of %d + %d tokens fit, with %.2f GB at most, in %.1f s",
            *(worst.sequences, self._lengths[0], worst.completion, memory_gb(), took),
        )
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def _fits(self, batch: Batch) -> bool:
        """Whether a batch goes forward and backward; what it took is free again."""
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
            log.info("memory probe: out of memory with %d sequences of %d new tokens", *batch)
            return False
        finally:
            model.zero_grad(set_to_none=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _run(self, batch: Batch) -> None:
        trainer = self._trainer
        groups = -(-batch.sequences // trainer.num_generations)
        lengths = [self._lengths[min(group, len(self._lengths) - 1)] for group in range(groups)]
        draw, words = torch.Generator().manual_seed(0), trainer.model.config.get_text_config().vocab_size
        # Different tokens everywhere: equal prompts and completions might be computed once.
        prompts = torch.randint(words, (groups, lengths[0]), generator=draw)
        masks = torch.arange(lengths[0])[None] >= lengths[0] - torch.tensor(lengths)[:, None]  # padded on the left
        of = torch.arange(batch.sequences) // trainer.num_generations
        completions = torch.randint(words, (batch.sequences, batch.completion), generator=draw)
        ids = torch.cat([prompts[of], completions], dim=1).to(trainer.args.device)
        mask = torch.cat([masks[of], torch.ones_like(completions)], dim=1).to(trainer.args.device)
        trainer.model.train()
        with trainer.compute_loss_context_manager():
            log_probs, *_ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, batch.completion, compute_entropy=True
            )
        log_probs.mean().backward()

    def _advice(self, worst: Batch, fitting: Batch | None) -> str:
        args = self._trainer.args
        what = (
            f"Not enough memory{_of_gpu()} for the longest batch: {worst.sequences} sequences of up to {self._lengths[0]} + "
            f"{worst.completion} tokens, forward and backward. "
        )
        if fitting is None:
            return what + "Not even one short one fits: take a smaller model, lora.load_in_4bit, or a larger instance."
        if fitting.completion == worst.completion:
            steps = args.gradient_accumulation_steps
            return what + (
                f"{fitting.sequences} at a time fit: lower grpo.per_device_train_batch_size from {worst.sequences} to "
                f"{fitting.sequences} and raise grpo.gradient_accumulation_steps from {steps} to "
                f"{steps * worst.sequences // fitting.sequences}, which trains the same."
            )
        return what + (
            f"One alone fits with {fitting.completion} new tokens: lower grpo.max_completion_length from "
            f"{worst.completion} to {fitting.completion} and grpo.per_device_train_batch_size from {worst.sequences} to 1, "
            "or take lora.load_in_4bit or a larger instance."
        )


def smaller(batch: Batch) -> Iterator[Batch]:
    """Yield ever smaller batches: of fewer sequences, so many as divide them, and then one of half the tokens again."""
    sequences, completion = batch
    yield from (Batch(size, completion) for size in range(sequences // 2, 0, -1) if sequences % size == 0)
    while completion > 1:
        completion //= 2
        yield Batch(1, completion)


def _of_gpu() -> str:
    """Return ` (of 22.0 GB)`, the size of the GPU's memory, where there is a GPU."""
    return f" (of {torch.cuda.mem_get_info()[1] / 1e9:.1f} GB)" if torch.cuda.is_available() else ""
