"""Sample completions from the model in training, between its steps: for the learnability gate and the evaluations."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate.utils import gather_object

from trainer.row_rewards import columns
from trainer.shared_prefix_sampling import tokens_that_fit
from tunedrop.dataset.rows import Row
from tunedrop.rewards import Reward, score

if TYPE_CHECKING:
    from trainer.run_trainer import RunTrainer


# The most completions that the gate or an evaluation samples at a time.
MOST_AT_ONCE = 512


class ScoredCompletion(NamedTuple):
    """A completion's text, the weighted sum of its rewards, and each reward (None: no score).

    `cut`: the limit cut it. `tokens`: its length.
    """

    text: str
    score: float
    rewards: dict[str, float | None]
    cut: bool
    tokens: int = 0


def sample_completions(
    trainer: "RunTrainer",
    rewards: Sequence[Reward],
    rows: Sequence[Row],
    samples: int,
    *,
    greedy: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> list[list[ScoredCompletion]]:
    """Return `samples` completions for each row, sampled as in training, or greedily, or with another `limit` of tokens.

    Calls with another `seed` sample other completions. The ranks share the rows, and every rank gets all completions. The
    trainer's random numbers and metrics stay as they were.
    """
    ranks, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    repeated = [row for row in rows[rank::ranks] for _ in range(samples)]
    size = completions_at_once(trainer)
    completions: list[ScoredCompletion] = []
    with own_random_numbers(), torch.no_grad(), without_dropout(trainer.model), _decoding(trainer, greedy, limit):
        torch.manual_seed(trainer.args.seed + rank + ranks * seed)
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
    return [
        ScoredCompletion(text, each["score"], each["rewards"], trainer.was_cut(tokens), len(tokens))
        for text, each, tokens in zip(texts, scored, ids, strict=True)
    ]


def completions_at_once(trainer: "RunTrainer") -> int:
    """Return how many completions to sample at a time: as many as in a rollout, on a GPU as many as fit."""
    arguments, group = trainer.args, trainer.num_generations
    rollout: int = arguments.per_device_train_batch_size * arguments.steps_per_generation
    if (tokens := tokens_that_fit(trainer.model.config)) is None:
        return rollout
    fitting = min(tokens // (trainer.prompt_limit + arguments.max_completion_length), MOST_AT_ONCE)
    size: int = max(rollout, fitting // group * group)
    return size


def own_random_numbers() -> AbstractContextManager[None]:
    """Return a context whose random numbers, on the CPU and this process's GPU, are not those of the training."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    forked: AbstractContextManager[None] = torch.random.fork_rng(devices)
    return forked


@contextmanager
def without_dropout(model: torch.nn.Module) -> Iterator[None]:
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
def _decoding(trainer: "RunTrainer", greedy: bool, limit: int | None) -> Iterator[None]:
    """Switch the trainer's generation to greedy decoding, if `greedy`, and to another limit of tokens, if given."""
    kept = trainer.generation_config
    trainer.generation_config = copy.deepcopy(kept)
    if greedy:
        trainer.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    if limit is not None:
        trainer.generation_config.update(max_new_tokens=limit)
    try:
        yield
    finally:
        trainer.generation_config = kept
