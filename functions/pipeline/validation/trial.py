"""A trial of rewards on candidates: right and wrong answers to some rows of a dataset, which each reward scores."""

import time
from collections.abc import Iterator, Sequence
from statistics import correlation, fmean
from typing import Any, NamedTuple

from pipeline.validation.candidates import Candidate, candidates
from tunedrop.config.model import RunConfig
from tunedrop.dataset.rows import Row
from tunedrop.rewards import Reward
from tunedrop.rewards.sample import make_samples

Scores = list[float | None]


class Trial(NamedTuple):
    """All candidates, each reward's scores of them, and the seconds of each call of a reward (a call scores one row).

    `consistency`: for a reward that ranks, the correlation of the ranks in two calls; see `consistency`.
    """

    candidates: list[Candidate]
    scores: dict[str, Scores]
    seconds: dict[str, list[float]]
    consistency: dict[str, float]


def score_candidates(rewards: Sequence[Reward], rows: Sequence[Row], config: RunConfig) -> Trial:
    """Score all candidates, one row per call. Raises RewardError, as the training job would."""
    names = [reward.__name__ for reward in rewards]
    # A service or a program takes long, and a user's code may look at something else than words.
    paraphrased = not any(reward.per_batch or reward.spec.reward_type.external for reward in rewards)
    trial = Trial(
        list(candidates(rows, config, paraphrased=paraphrased)),
        {name: [] for name in names},
        {name: [] for name in names},
        {},
    )
    for index, row in enumerate(rows):
        texts = [candidate.text for candidate in trial.candidates if candidate.row == index]
        for reward in rewards:  # in the config's order: a reward's gate has just scored the same candidates
            started = time.perf_counter()
            trial.scores[reward.__name__] += call(reward, row["prompt"], texts, columns_of(row))
            trial.seconds[reward.__name__].append(time.perf_counter() - started)
    return trial


def score_again(reward: Reward, rows: Sequence[Row], trial: Trial, step: int) -> Scores:
    """Return the candidates' scores of a second call for each row, forwards (step 1) or backwards (step -1)."""
    by_row: dict[int, Scores] = {}
    for index in range(len(rows))[::step]:
        texts = [candidate.text for candidate in trial.candidates if candidate.row == index]
        by_row[index] = call(reward, rows[index]["prompt"], texts[::step], columns_of(rows[index]))[::step]
    return [score for index in range(len(rows)) for score in by_row[index]]


def consistency(rewards: Sequence[Reward], rows: Sequence[Row], trial: Trial) -> Iterator[tuple[str, float]]:
    """Yield the rewards that rank, each with the mean over the rows of the correlation between the ranks of two calls.

    The scores are ranks, so Pearson's correlation of the scores is Spearman's. Two calls show the answers in different
    orders. Rows whose answers all tie in both calls, or whose judge did not rank them twice, are left out.
    """
    for reward in rewards:
        if not reward.spec.reward_type.ranks:
            continue
        found = []
        second = score_again(reward, rows, trial, step=-1)
        for index in range(len(rows)):
            pairs = [
                (a, b)
                for candidate, a, b in zip(trial.candidates, trial.scores[reward.__name__], second, strict=True)
                if candidate.row == index and a is not None and b is not None
            ]
            spread = [len(set(ranks)) > 1 for ranks in zip(*pairs, strict=True)]
            if any(spread):
                found.append(correlation(*zip(*pairs, strict=True)) if all(spread) else 0.0)
        if found:
            yield reward.__name__, fmean(found)


def call(reward: Reward, prompt: Any, texts: Sequence[str], columns: dict[str, Any]) -> Scores:
    """Return a reward's scores of texts as completions to a prompt. Raises RewardError, as the training job would."""
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    repeated = {name: [value] * len(texts) for name, value in columns.items()}
    return reward.score_samples(make_samples([prompt] * len(texts), completions, repeated))


def columns_of(row: Row) -> dict[str, Any]:
    """Return what rewards read of a row beside its prompt."""
    return {name: value for name, value in row.items() if name != "prompt"}
