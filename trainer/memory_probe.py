"""Runs the largest possible batches before the first step, to find out early whether the memory suffices.

The longest prompts, each with a group of completions of full length, are sampled for two tokens with all memory of a
rollout, and go forward and backward once, as in the loss. If they do not fit, the probe tries smaller batches until one
fits, and the job fails with the values to write into the config. The probe leaves no trace: it drops its gradients, adds no
metrics, and does not use the trainer's random numbers.

On a GPU the loss keeps all activations if they fit, unless the config says `activation_checkpointing`: computing them again
takes a third of the loss's time.

The probe does not measure weights that FSDP or DeepSpeed shard, nor the rollout of stock TRL.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.job import JobError
from trainer.progress import memory_gb
from trainer.sampling import own_random_numbers

if TYPE_CHECKING:
    from trainer.run_trainer import RunTrainer
    from trainer.sft_trainer import RunSftTrainer

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


# The share of a GPU's memory that a loss may take without checkpointing: later steps need a little more for fragments.
MOST_MEMORY = 0.9


class Batch(NamedTuple):
    """A micro-batch of the loss: its number of sequences, and the tokens of each completion."""

    sequences: int
    completion: int


class MemoryProbe(TrainerCallback):  # type: ignore[misc] # transformers is untyped here
    """Probes when the training begins. `lengths` are the lengths of the prompts in tokens.

    `chooses_checkpointing`: switch activation checkpointing off where memory allows it. Raises JobError if the memory does
    not suffice; the message says which limits to lower.
    """

    _trainer: Any

    def __init__(self, trainer: "RunTrainer", lengths: Sequence[int], *, chooses_checkpointing: bool):
        self._trainer, self._lengths = trainer, sorted(lengths, reverse=True)
        self._chooses_checkpointing = chooses_checkpointing

    def on_train_begin(self, args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Probe. Each rank probes by itself and waits for no other rank."""
        if args.deepspeed or args.fsdp:
            return
        began = time.monotonic()
        rows = args.per_device_train_batch_size * args.steps_per_generation
        if not self._samples(rows):
            raise JobError(self._advice_on_rollout(rows))
        worst = Batch(args.per_device_train_batch_size, args.max_completion_length)
        if not self._fits_without_checkpointing(worst) and not self._fits(worst):
            raise JobError(self._advice(worst, next(filter(self._fits, smaller(worst)), None)))
        seconds = time.monotonic() - began
        log.info(
            "memory probe: %d sequences of %d + %d tokens fit, peak %.2f GB, in %.1f s",
            *(worst.sequences, self._lengths[0], worst.completion, memory_gb(), seconds),
        )
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def _fits_without_checkpointing(self, batch: Batch) -> bool:
        """Return whether a batch fits a GPU with all activations. If so, checkpointing stays off."""
        if not (self._chooses_checkpointing and torch.cuda.is_available()):
            return False
        model = self._trainer.model
        model.activation_checkpointing_disable()
        torch.cuda.reset_peak_memory_stats()
        if self._fits(batch) and torch.cuda.max_memory_reserved() < MOST_MEMORY * torch.cuda.mem_get_info()[1]:
            log.info("memory probe: no activation checkpointing, all activations fit")
            return True
        model.activation_checkpointing_enable(self._trainer.args.activation_checkpointing_kwargs)
        return False

    def _samples(self, rows: int) -> bool:
        """Return whether a rollout of this many completions fits."""
        return self._succeeds(lambda: self._trainer.probe_rollout(self._prompts(rows)[0]), f"{rows} completions sampled")

    def _fits(self, batch: Batch) -> bool:
        """Return whether a batch fits, forward and backward."""
        return self._succeeds(
            lambda: self._run(batch), f"{batch.sequences} sequences of {batch.completion} completion tokens"
        )

    def _succeeds(self, run: Callable[[], None], what: str) -> bool:
        """Return whether there is memory for `run`, and free its memory."""
        model = self._trainer.model
        try:
            with own_random_numbers():  # LoRA dropout
                run()
            return True
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(
                words in str(error) for words in OUT_OF_MEMORY
            ):
                raise
            log.info("memory probe: out of memory with %s", what)
            return False
        finally:
            model.zero_grad(set_to_none=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _prompts(self, sequences: int) -> tuple[Tensor, Tensor]:
        """Return the longest prompts of this many sequences, as random tokens (B, P) padded on the left, and their mask."""
        trainer = self._trainer
        groups = -(-sequences // trainer.num_generations)
        lengths = [self._lengths[min(group, len(self._lengths) - 1)] for group in range(groups)]
        vocabulary = trainer.model.config.get_text_config().vocab_size
        # All random: equal prompts and equal completions are computed only once.
        prompts = torch.randint(vocabulary, (groups, lengths[0]), generator=torch.Generator().manual_seed(0))
        masks = torch.arange(lengths[0])[None] >= lengths[0] - torch.tensor(lengths)[:, None]
        group = torch.arange(sequences) // trainer.num_generations
        return prompts[group].to(trainer.args.device), masks[group].to(trainer.args.device)

    def _run(self, batch: Batch) -> None:
        trainer = self._trainer
        prompts, masks = self._prompts(batch.sequences)
        vocabulary = trainer.model.config.get_text_config().vocab_size
        completions = torch.randint(
            vocabulary, (batch.sequences, batch.completion), generator=torch.Generator().manual_seed(1)
        ).to(prompts.device)
        ids = torch.cat([prompts, completions], dim=1)
        mask = torch.cat([masks, torch.ones_like(completions)], dim=1)
        trainer.model.train()
        with trainer.compute_loss_context_manager():
            log_probs = trainer.completion_log_probs(ids, mask, batch.completion)
        log_probs.mean().backward()

    def _advice_on_rollout(self, rows: int) -> str:
        args, once = self._trainer.args, self._trainer.args.per_device_train_batch_size
        problem = (
            f"Not enough memory{_of_gpu()} for a rollout: {rows} completions of up to {self._lengths[0]} + "
            f"{args.max_completion_length} tokens at a time. "
        )
        steps = next((n for n in range(args.steps_per_generation - 1, 0, -1) if self._samples(n * once)), None)
        if steps is None:
            return (
                problem + "Lower grpo.max_completion_length or grpo.per_device_train_batch_size, or use a larger instance."
            )
        return problem + f"{steps * once} fit: set grpo.steps_per_generation to {steps} (it is {args.steps_per_generation})."

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


class SequenceProbe(MemoryProbe):
    """Probes supervised fine-tuning, which takes one sequence of at most `longest` tokens at a time."""

    def __init__(self, trainer: "RunSftTrainer", longest: int):
        self._trainer, self._longest = trainer, longest

    def on_train_begin(self, args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """Run the longest sequence. Each rank runs it by itself. Raises JobError if the memory does not suffice."""
        tokens = self._longest
        if not self._succeeds(lambda: self._trainer.probe(tokens), f"one sequence of {tokens} tokens"):
            raise JobError(
                f"Not enough memory{_of_gpu()} for supervised fine-tuning: one sequence of {tokens} tokens, forward and "
                "backward. Lower max_prompt_length or grpo.max_completion_length, or use a smaller model, "
                "lora.load_in_4bit, or a larger instance."
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
