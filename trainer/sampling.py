"""Let the model that is being trained answer rows, outside its training steps: for the learnability gate and evaluations."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate.utils import gather_object

from trainer.row_rewards import columns
from tunedrop.dataset.rows import Row
from tunedrop.rewards import Reward, score

if TYPE_CHECKING:
    from trainer.run_trainer import RunTrainer


class Answer(NamedTuple):
    """What the model said to a row, and the weighted sum of its rewards."""

    text: str
    score: float


def answers(
    trainer: "RunTrainer", rewards: Sequence[Reward], rows: Sequence[Row], samples: int, *, greedy: bool = False
) -> list[list[Answer]]:
    """Return so many answers to each row, sampled as training samples them, or greedily.

    The ranks share the rows, and all get all answers. Neither the trainer's random numbers nor its metrics notice.
    """
    ranks, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    asked = [row for row in rows[rank::ranks] for _ in range(samples)]
    size = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
    found: list[Answer] = []
    with torch.random.fork_rng(), torch.no_grad(), _without_dropout(trainer.model), _decoding(trainer, greedy):
        torch.manual_seed(trainer.args.seed + rank)
        for start in range(0, len(asked), size):
            found += _batch(trainer, rewards, asked[start : start + size], samples)
    mine = [found[start : start + samples] for start in range(0, len(found), samples)]
    everyone: list[tuple[int, list[Answer]]] = gather_object(list(zip(range(rank, len(rows), ranks), mine, strict=True)))
    return [given for _, given in sorted(everyone, key=lambda each: each[0])]


def _batch(trainer: "RunTrainer", rewards: Sequence[Reward], rows: Sequence[Row], samples: int) -> list[Answer]:
    prompts = [row["prompt"] for row in rows]
    ids = trainer.complete(prompts, samples)
    texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    scored = score(rewards, prompts, completions, columns(rows))
    return [Answer(text, each["score"]) for text, each in zip(texts, scored, strict=True)]


@contextmanager
def _without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout off for a while, with the rest in training mode: else 4-bit layers would repack their weights."""
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
    """Let the trainer's generation take the likeliest token for a while."""
    holder, name = (trainer.vllm_generation, "temperature") if trainer.use_vllm else (trainer, "generation_config")
    kept = getattr(holder, name)
    if greedy:
        likeliest = copy.deepcopy(kept)
        if not trainer.use_vllm:
            likeliest.update(do_sample=False, temperature=None, top_p=None, top_k=None)
        setattr(holder, name, 0.0 if trainer.use_vllm else likeliest)
    try:
        yield
    finally:
        setattr(holder, name, kept)
