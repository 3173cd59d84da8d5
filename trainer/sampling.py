"""Sample completions from the model in training, between its steps: for the learnability gate and the evaluations."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate.utils import gather_object

from trainer.row_rewards import columns
from tunedrop.dataset.rows import Row
from tunedrop.rewards import Reward, score

if TYPE_CHECKING:
    from trainer.run_trainer import RunTrainer


class ScoredCompletion(NamedTuple):
    """A completion's text, and the weighted sum of its rewards."""

    text: str
    score: float


def sample_completions(
    trainer: "RunTrainer", rewards: Sequence[Reward], rows: Sequence[Row], samples: int, *, greedy: bool = False
) -> list[list[ScoredCompletion]]:
    """Return `samples` completions for each row, sampled as in training, or greedily.

    The ranks share the rows, and every rank gets all completions. The trainer's random numbers and metrics stay as they
    were.
    """
    ranks, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    repeated = [row for row in rows[rank::ranks] for _ in range(samples)]
    size = trainer.completions_at_once()
    completions: list[ScoredCompletion] = []
    with own_random_numbers(), torch.no_grad(), _without_dropout(trainer.model), _decoding(trainer, greedy):
        torch.manual_seed(trainer.args.seed + rank)
        for start in range(0, len(repeated), size):
            completions += _batch(trainer, rewards, repeated[start : start + size], samples)
    by_row = [completions[start : start + samples] for start in range(0, len(completions), samples)]
    numbered: list[tuple[int, list[ScoredCompletion]]] = gather_object(
        list(zip(range(rank, len(rows), ranks), by_row, strict=True))
    )
    return [row_completions for _, row_completions in sorted(numbered, key=lambda pair: pair[0])]


def _batch(trainer: "RunTrainer", rewards: Sequence[Reward], rows: Sequence[Row], samples: int) -> list[ScoredCompletion]:
    prompts = [row["prompt"] for row in rows]
    ids = trainer.complete(prompts, samples)
    texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    scored = score(rewards, prompts, completions, columns(rows))
    return [ScoredCompletion(text, each["score"]) for text, each in zip(texts, scored, strict=True)]


def own_random_numbers() -> AbstractContextManager[None]:
    """Return a context whose random numbers, on the CPU and this process's GPU, are not those of the training."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    forked: AbstractContextManager[None] = torch.random.fork_rng(devices)
    return forked


@contextmanager
def _without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout off. The other modules stay in training mode: in evaluation mode, 4-bit layers repack their weights."""
    training = model.training
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _decoding(trainer: "RunTrainer", greedy: bool) -> Iterator[None]:
    """Switch the trainer's generation to greedy decoding, if `greedy`."""
    kept = trainer.generation_config
    if greedy:
        trainer.generation_config = copy.deepcopy(kept)
        trainer.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    try:
        yield
    finally:
        trainer.generation_config = kept
