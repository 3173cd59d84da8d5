"""Asks the model before the first step, and ends a run in which it has nothing to learn.

    asked = ask_model(trainer, config, rewards, rows, …)  →  the model's answers to some rows
    check_learnability(trainer, config, rows, asked)      →  the record's `learnability` and `dropped`; raises JobError
    drop_rows(trainer, rows)                              →  a training without the dropped rows

`trainer.learnability` has the statistics.
"""

import functools
import json
import logging
import time
from collections.abc import Callable, Sequence
from itertools import chain
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from accelerate.utils import gather_object

from trainer import learnability
from trainer.dataset import check_step
from trainer.job import REASON_CHARACTERS, JobError
from trainer.learnability import Learnability
from trainer.sampling import ScoredCompletion, sample_completions
from tunedrop.config.model import RunConfig
from tunedrop.config.schedule import generated_answers, most_gate_prompts
from tunedrop.dataset.rows import Row
from tunedrop.rewards import Reward

if TYPE_CHECKING:
    from trainer.run_trainer import RunTrainer

log = logging.getLogger("trainer")

SHOWN_ANSWERS = 3
# SageMaker adds "AlgorithmError: " and ", exit code: 1" to a failure's reason.
REASON_ROOM = REASON_CHARACTERS - 40
TO_GO_ON = "To train all the same, set learnability.policy to go_on."


Answers = dict[int, list[ScoredCompletion]]  # what the model answered to each of some rows, by the row's index


class Asked(NamedTuple):
    """The model's answers, and the estimate from them."""

    answers: Answers
    estimate: Learnability
    seconds: float

    def summary(self) -> dict[str, Any]:
        """Return the numbers for training.json."""
        return self.estimate.summary() | {"seconds": self.seconds}


def ask_first(trainer: "RunTrainer", config: RunConfig, rewards: list[Reward], rows: list[Row]) -> Asked | None:
    """Ask the model the gate's first block of prompts."""
    return ask_model(trainer, config, rewards, rows, 0.0)


def ask_model(
    trainer: "RunTrainer",
    config: RunConfig,
    rewards: list[Reward],
    rows: list[Row],
    seconds: float,
    enough: Callable[[Learnability], bool] = lambda _estimate: False,
) -> Asked | None:
    """Ask the model, until the answer is clear, or `enough` for the caller. None if the config's gate asks for no samples.

    The gate asks at most as many prompts as `most_gate_prompts` says, and ends before a block that would not fit into
    `seconds`. It asks its first block in any case, and no other one if the training goes on whatever the answer is.
    """
    policy, began = config.learnability, time.monotonic()
    if policy.samples == 0:
        return None
    total = generated_answers(config, len(rows), trainer.accelerator.num_processes)
    # `drop` judges each row that it asks, and therefore asks as many as it may.
    threshold = {"stop": policy.min_nonzero_groups, "drop": None}.get(policy.policy, 0.0)

    def ends(found: Learnability, prompts: int) -> bool:
        spent: float = gather_object([time.monotonic() - began])[0]  # all ranks ask the same prompts
        no_time = spent * (1 + learnability.BLOCK / prompts) >= seconds
        return no_time or policy.policy == "go_on" or enough(found)

    def sample(chosen: list[int], seed: int) -> list[list[ScoredCompletion]]:
        return sample_completions(trainer, rewards, [rows[index] for index in chosen], policy.samples, seed=seed)

    comparing = [reward.__name__ for reward in rewards if reward.weight > 0 and reward.spec.measures(rows[0]) == "answer"]
    judge = functools.partial(estimate_of, group=trainer.num_generations, comparing=comparing)
    most = most_gate_prompts(total, policy.samples)
    answers, estimate = ask(sample, trainer.row_order(), most, judge, threshold, ends)
    return Asked(answers, estimate, round(time.monotonic() - began, 1))


def check_learnability(trainer: "RunTrainer", config: RunConfig, rows: list[Row], asked: Asked | None) -> None:
    """Act on the model's answers before the first step as `learnability.policy` says; None: on no answers.

    Writes the estimate and the rows to drop into the trainer's record. Raises JobError where nothing can be learned, except
    with `go_on` or if a warm start solved every prompt, and with `stop` where too little can be learned.
    """
    if asked is None:
        return
    policy, (answers, estimate, _) = config.learnability, asked
    if trainer.curriculum:
        for index, group in zip(answers, scores_of(answers), strict=True):
            trainer.curriculum.observe(index, group)
    numbers = trainer.record.learnability = asked.summary()
    log.info("learnability %s", " ".join(f"{name}={value}" for name, value in numbers.items()))
    log.info(
        "note=of %d prompts, the model solves %.0f%%, can learn from %.0f%%, and is lost at %.0f%%",
        estimate.prompts,
        100 * estimate.solved,
        100 * estimate.learnable,
        100 * estimate.dead,
    )
    limit = trainer.args.max_completion_length
    solved_by_warm_start = trainer.record.warm_start is not None and estimate.dead == 0
    if policy.policy != "go_on" and not estimate.has_gradient and not solved_by_warm_start:
        warm = trainer.record.warm_start
        after = f"After a warm start of {warm['steps']} steps: " if warm else ""
        raise JobError(explain(after + nothing_to_learn(estimate), estimate, list(answers.values()), limit))
    if policy.policy == "stop" and estimate.expected_nonzero_groups < policy.min_nonzero_groups:
        too_few = (
            f"The model would learn from only {estimate.expected_nonzero_groups:.0%} of the groups, fewer than "
            f"learnability.min_nonzero_groups ({policy.min_nonzero_groups:.0%})."
        )
        raise JobError(explain(too_few, estimate, list(answers.values()), limit))
    if policy.policy == "drop":
        indices = list(answers)
        trainer.record.dropped = [str(rows[indices[index]]["id"]) for index in estimate.flat]


def ask(
    sample: Callable[[list[int], int], list[list[ScoredCompletion]]],
    order: Sequence[int],
    most: int,
    judge: Callable[[Answers], Learnability],
    threshold: float | None,
    ends: Callable[[Learnability, int], bool] = lambda _estimate, _prompts: False,
) -> tuple[Answers, Learnability]:
    """Return the model's answers by row, and the estimate: block by block of prompts, until it is clear or `ends` says so.

    `sample` returns the answers to rows, for a seed. `order` is the training's order of the rows: the first steps will
    measure the same rows. At most `most` prompts are asked; few rows are asked again. `judge` estimates from the answers.
    Without a `threshold` (of `Learnability.is_clear`), no estimate is clear. `ends` gets the number of asked prompts, too.
    """
    answers: Answers = {}
    for start, end in learnability.blocks(most):
        chosen = [order[place % len(order)] for place in range(start, end)]
        for index, completions in zip(chosen, sample(chosen, start), strict=True):
            answers.setdefault(index, []).extend(completions)
        found = judge(answers)
        if ends(found, end) or (threshold is not None and found.is_clear(threshold)):
            break
    return answers, found


def estimate_of(answers: Answers, group: int, comparing: Sequence[str] = ()) -> Learnability:
    """Return the estimate for groups of `group` completions. `comparing` names the rewards that compare with the answer."""
    answered = [
        not comparing or any((each.rewards[name] or 0.0) > 0 for each in found for name in comparing)
        for found in answers.values()
    ]
    return learnability.estimate(scores_of(answers), group, answered)


def scores_of(answers: Answers) -> list[list[float]]:
    """Return the scores of answers by row."""
    return [[each.score for each in found] for found in answers.values()]


def drop_rows(trainer: "RunTrainer", rows: list[Row]) -> None:
    """Take the rows that the learnability gate dropped out of the training. Raises JobError if too few rows are left."""
    dropped = set(trainer.record.dropped)
    if dropped:
        kept = [index for index, row in enumerate(rows) if str(row["id"]) not in dropped]
        check_step(len(kept), trainer.args, "set learnability.policy to go_on")
        trainer.keep_rows(kept)


def nothing_to_learn(estimate: Learnability) -> str:
    """Return what it means that no prompt had answers with different rewards, in sentences."""
    if estimate.dead == 0:
        return "Nothing to learn: every answer already gets the best reward."
    return "Nothing to learn: all answers to each prompt got the same reward, so that no group has a gradient."


def explain(finding: str, estimate: Learnability, answers: Sequence[Sequence[ScoredCompletion]], limit: int) -> str:
    """Return the finding with what each reward gave, three answers with their scores, and the ways out.

    `answers` are by prompt; `limit` is the limit of an answer in tokens. The text has at most REASON_ROOM characters, if the
    rewards have few names: the answers are cut to what fits.
    """
    every = list(chain.from_iterable(answers))
    before = (
        f"{finding} Of {estimate.prompts} prompts the model never solved {estimate.dead:.0%} and always solved "
        f"{estimate.solved:.0%}, in {len(every)} answers.\nRewards: {'; '.join(given(every))}.\nAnswers and their scores:"
    )
    after = f"Ways out: {ways_out(estimate, every, limit)}. {TO_GO_ON}"
    shown = examples(answers)
    room = (REASON_ROOM - len(before) - len(after) - 1) // len(shown)
    lines = [f"{score:.4g}: " for score in (each.score for each in shown)]
    lines = [line + _quoted(each.text, room - len(line) - 1) for line, each in zip(lines, shown, strict=True)]
    return "\n".join([before, *lines, after])


def given(answers: Sequence[ScoredCompletion]) -> list[str]:
    """Return for each reward what it gave to the answers, in words."""

    def in_words(scores: Sequence[float]) -> str:
        if not scores:
            return "no score"
        low, high = min(scores), max(scores)
        return f"always {low:.4g}" if low == high else f"{low:.4g} to {high:.4g}, {fmean(scores):.4g} on average"

    names = list(answers[0].rewards)
    return [f"{name} {in_words([s for each in answers if (s := each.rewards[name]) is not None])}" for name in names]


def examples(answers: Sequence[Sequence[ScoredCompletion]]) -> list[ScoredCompletion]:
    """Return three different answers to different prompts: those with the lowest, the middle and the highest score."""
    different = {first.text: first for first, *_ in answers}
    ordered = sorted(different.values(), key=lambda each: each.score)
    places = {round(part * (len(ordered) - 1) / (SHOWN_ANSWERS - 1)) for part in range(SHOWN_ANSWERS)}
    return [ordered[place] for place in sorted(places)]


def ways_out(estimate: Learnability, answers: Sequence[ScoredCompletion], limit: int) -> str:
    """Return what a user can change, in words."""
    if estimate.dead == 0:
        return "harder rows; a stricter reward, which tells good answers from better ones"
    ways = [
        "another reward, if such answers are right",
        "partial credit (for example the reward similarity)",
        "a warm start (a column `reasoning` with worked solutions, or as `model` one that already answers some rows)",
        "easier rows",
    ]
    if cut := sum(each.cut for each in answers):
        ways.append(f"a higher grpo.max_completion_length: {limit} tokens cut {cut} of {len(answers)} answers")
    return "; ".join(ways)


def _quoted(text: str, room: int) -> str:
    """Return a text in quotes, on one line, cut to so many characters."""
    quoted = json.dumps(" ".join(text.split()), ensure_ascii=False)
    return quoted if len(quoted) <= room else quoted[: max(room - 2, 1)].rstrip("\\") + '…"'
