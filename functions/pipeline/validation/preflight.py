"""The preflight scores answers before a job starts: the dataset's answers must win against wrong ones.

For a few rows, the rewards score the row's answer (*gold*), paraphrases of it, an empty answer, another row's answer, a
copy of the prompt, a long meaningless text, and the bare form that the run asks for. Rewards that prefer a wrong answer
would train the model to give that answer. Rewards that score all answers alike would train nothing. Rewards that only the
words of the dataset earn teach little.
"""

from collections.abc import Iterator, Sequence
from math import ceil, inf, isclose
from statistics import fmean, median
from typing import Any, TypeVar

from pipeline.validation.candidates import GOLD, PARAPHRASES, WRONG, Candidate, filled
from pipeline.validation.section import Section
from pipeline.validation.trial import Trial, call, consistency, score_again, score_candidates
from tunedrop.config.model import RunConfig
from tunedrop.config.schedule import generated_answers, generation_batch
from tunedrop.dataset.rows import Row
from tunedrop.forms import asked_form
from tunedrop.inference_tests import InferenceTest
from tunedrop.problems import Problem
from tunedrop.rewards import Reward, RewardError
from tunedrop.rewards.deadline import SECONDS

T = TypeVar("T")
Totals = list[tuple[Candidate, float]]

# Rows where a reward calls a service or starts processes. A row has up to six candidates then: this bounds the cost.
FEW_ROWS = 4
# A wrong answer that ties with gold in more than this share of the rows deserves a warning. A few ties happen by chance.
TIES = 1 / 2
SLOW_SECONDS = 600
# The candidates differ much more than a model's answers do: a judge that ranks these by chance ranks everything by chance.
LOWEST_CONSISTENCY = 0.7


def check_rewards(
    rewards: Sequence[Reward], rows: Sequence[Row], config: RunConfig, tests: Sequence[InferenceTest], *, trained_rows: int
) -> Section:
    """Score candidates for rows of the dataset, and the expected answers of the inference tests.

    `rows` are a sample of the dataset, the same sample for the same dataset. The preflight takes `config.preflight.rows`
    of them, or FEW_ROWS where a reward works on batches. Each reward scores the candidates twice; a reward that is not
    repeatable scores them once. With `on_failure: warn` in the config, problems become warnings.
    """
    limit = config.preflight.rows
    if any(reward.per_batch for reward in rewards):
        limit = min(limit, FEW_ROWS)
    rows, tests = _spread(rows, limit), _spread(tests, limit)
    if not rows:
        return Section({}, [], [])
    section = _check(rewards, rows, config, tests, trained_rows)
    if config.preflight.on_failure == "reject":
        return section
    return Section(section.receipt, [], [*map(str, section.problems), *section.warnings])


def _spread(items: Sequence[T], count: int) -> list[T]:
    """Return up to `count` items at equal distances: neighbours are often alike."""
    return [items[index * len(items) // count] for index in range(count)] if count < len(items) else list(items)


def _check(
    rewards: Sequence[Reward], rows: Sequence[Row], config: RunConfig, tests: Sequence[InferenceTest], trained_rows: int
) -> Section:
    try:
        trial = score_candidates(rewards, rows, config)
        unstable = list(_unstable(rewards, rows, trial))
        trial.consistency.update(consistency(rewards, rows, trial))
    except RewardError as error:
        return _failure(error, "the training job would fail on this row")
    try:
        _score_tests(rewards, tests, config)
    except RewardError as error:
        return _failure(error, "the test job would fail on this test")
    totals = _totals(rewards, trial)
    receipt = _receipt(rewards, rows, trial, totals, config, trained_rows)
    warnings = [warning for reward in rewards for warning in _reward_warnings(reward, trial, receipt)]
    # Only rewards that compare with the row's answer must prefer that answer. A run may also pay for form alone.
    if free := _free(totals):
        return Section(receipt, [*unstable, free], warnings)
    comparing = [reward for reward in rewards if reward.weight > 0 and reward.spec.measures(rows[0]) == "answer"]
    if not comparing:
        return Section(receipt, unstable, warnings)
    warnings += [*_tie_warnings(totals), *_literal_warnings(totals)]
    if constant := _constant(totals):
        return Section(receipt, [*unstable, constant], warnings)
    paid_wrong = list(_paid_wrong(totals))
    # An external reward may look at something else than the answer, which is why a win of a wrong answer only warns.
    if all(reward.spec.reward_type.external for reward in comparing):
        return Section(receipt, unstable, [*map(str, paid_wrong), *warnings])
    return Section(receipt, unstable + paid_wrong, warnings)


def _failure(error: RewardError, hint: str) -> Section:
    if isinstance(error.__cause__, ModuleNotFoundError):  # a job has more packages than the function that validates
        return Section({}, [], [f"the rewards were not checked before the job: {error}"])
    return Section({}, [Problem("REWARD_FAILS", str(error), hint, key="rewards")], [])


# ---- scores -----------------------------------------------------------------------------------------------------------


def _score_tests(rewards: Sequence[Reward], tests: Sequence[InferenceTest], config: RunConfig) -> None:
    """Score the tests' expected answers. A reward that lacks a column there would fail in the test job, hours later."""
    for test in tests:
        columns = test.columns | {"id": test.id, "answer": test.reference}
        row = columns | {"prompt": test.prompt}
        text = filled(asked_form(config, row), test.reference, row)
        for reward in rewards:
            try:
                call(reward, test.prompt, [text], columns)
            except RewardError as error:
                raise RewardError(f"inference test '{test.id}': {error}") from error.__cause__


def _repeatable(reward: Reward) -> bool:
    """Whether the preflight may score the candidates a second time. A reward calls its gate, which counts too."""
    return reward.spec.reward_type.repeatable and (reward.gate is None or _repeatable(reward.gate))


def _unstable(rewards: Sequence[Reward], rows: Sequence[Row], trial: Trial) -> Iterator[Problem]:
    """Yield the rewards whose scores depend on the time of the call, or on the other completions in the batch."""
    for reward in rewards:
        if not _repeatable(reward) or not _differs(reward, rows, trial, step=-1):
            continue
        if _differs(reward, rows, trial, step=1):
            message, hint = "scores the same answer differently in each call", "remove randomness and time from its code"
        else:
            message = "scores an answer by the other answers in the batch"
            hint = "score each answer alone: every batch holds other answers"
        yield Problem("REWARD_UNSTABLE", f"reward '{reward.__name__}' {message}", hint, key="rewards")


def _differs(reward: Reward, rows: Sequence[Row], trial: Trial, step: int) -> bool:
    """Score the candidates again, forwards (step 1) or backwards (step -1), and compare with the first scores."""
    return not all(
        a is b if a is None or b is None else isclose(a, b, abs_tol=1e-9)
        for a, b in zip(score_again(reward, rows, trial, step), trial.scores[reward.__name__], strict=True)
    )


# ---- problems and warnings --------------------------------------------------------------------------------------------


def _totals(rewards: Sequence[Reward], trial: Trial) -> Totals:
    """Return each candidate with the weighted sum of its scores, which training maximises."""
    by_reward = [(reward.weight, trial.scores[reward.__name__]) for reward in rewards]
    return [
        (candidate, sum(weight * score for weight, scores in by_reward if (score := scores[index]) is not None))
        for index, candidate in enumerate(trial.candidates)
    ]


def _by_kind(totals: Totals) -> dict[str, list[float]]:
    kinds = dict.fromkeys(candidate.kind for candidate, _ in totals)
    return {kind: [total for candidate, total in totals if candidate.kind == kind] for kind in kinds}


def _gold(totals: Totals) -> dict[int, float]:
    """Return the total of each row's own answer."""
    return {candidate.row: total for candidate, total in totals if candidate.kind == GOLD}


def _winners(totals: Totals) -> dict[str, float]:
    """Return the mean totals of the wrong kinds that score at least as high as gold on average."""
    means = {kind: fmean(kind_totals) for kind, kind_totals in _by_kind(totals).items()}
    return {kind: means[kind] for kind in WRONG if kind in means and means[GOLD] <= means[kind] + 1e-9}


def _constant(totals: Totals) -> Problem | None:
    scores = {round(total, 9) for _, total in totals}
    if len(scores) > 1:
        return None
    message = f"every answer scores {scores.pop():g}, right or wrong: the model has nothing to learn"
    hint = "receipt.rewards shows each reward; at least one must score the dataset's answers above wrong ones"
    return Problem("REWARD_CONSTANT", message, hint, key="rewards")


def _free(totals: Totals) -> Problem | None:
    """Return a problem if an empty answer and another row's answer score what the row's own answer does."""
    means = {kind: fmean(kind_totals) for kind, kind_totals in _by_kind(totals).items()}
    if means[GOLD] <= 0 or not all(isclose(means.get(kind, -inf), means[GOLD]) for kind in ("empty", "other_row")):
        return None
    message = f"an empty answer, another row's answer and the row's own answer all score {means[GOLD]:.3g} on average"
    return Problem("REWARD_CONSTANT", message, "add a reward that compares with the row's answer", key="rewards")


def _paid_wrong(totals: Totals) -> Iterator[Problem]:
    gold = fmean(_by_kind(totals)[GOLD])
    for kind, mean in _winners(totals).items():
        message = f"on average the dataset's answers score {gold:.3g}, and {WRONG[kind]} scores {mean:.3g}"
        yield Problem("REWARD_PAYS_WRONG", message, _FIXES[kind], key="rewards")


_FIXES = {
    "empty": "check that the reward can read these answers: numeric needs numbers, math needs mathematical expressions, "
    "exact_match needs the whole text",
    "other_row": "add a reward that compares with the row's answer, and give it the highest weight",
    "echo": "the prompt contains the answer: use exact_match or multiple_choice, or add overlong_penalty",
    "long": "add overlong_penalty, or compare the whole answer (exact_match) instead of searching for a part of it",
    "form_only": "give the reward for the right answer more weight than the rewards for form, or gate those with only_if",
}


def _reward_warnings(reward: Reward, trial: Trial, receipt: dict[str, Any]) -> Iterator[str]:
    name = reward.__name__
    scores = [score for score in trial.scores[name] if score is not None]
    if reward.expired:
        yield f"reward '{name}' abstained on {reward.expired} answers because each took more than {SECONDS:g} s of CPU time"
    if not scores:
        reason = (
            "its service gave no reply that it can use"
            if reward.spec.reward_type.waits
            else "the rows hold nothing that the reward can compare with"
        )
        yield f"reward '{name}' abstained on every answer: {reason}"
        return
    low, high = min(scores), max(scores)
    if high - low < 1e-9:
        yield (
            f"reward '{name}' gave {low:g} to every answer, right or wrong, and teaches nothing: change its parameters or "
            "remove it"
        )
    if reward.spec.reward_type.external and reward.spec.clip is None and not -1.0 <= low <= high <= 1.0:
        yield f"reward '{name}' gave scores from {low:g} to {high:g}, outside -1 to 1: bound them with clip"
    if (agreement := trial.consistency.get(name, 1.0)) < LOWEST_CONSISTENCY:
        yield (
            f"reward '{name}' ranks the same answers differently each time (rank correlation {agreement:.2f}): use a "
            "better judge, or say in the rubric what makes an answer better"
        )
    if (seconds := receipt["by_reward"][name]["run_seconds"]) > SLOW_SECONDS:
        yield (
            f"reward '{name}' adds about {seconds / 60:.0f} minutes to the run while the GPU waits: make the reward faster, "
            "or raise its concurrency"
        )


def _tie_warnings(totals: Totals) -> Iterator[str]:
    """Warn of wrong kinds that win in many rows, though not on average."""
    gold, winners = _gold(totals), _winners(totals)
    for kind, words in WRONG.items():
        wins = [total >= gold[candidate.row] - 1e-9 for candidate, total in totals if candidate.kind == kind]
        if kind not in winners and sum(wins) > TIES * len(wins):
            yield f"in {sum(wins)} of {len(wins)} rows, {words} scores at least as high as the row's answer: {_FIXES[kind]}"


def _literal_warnings(totals: Totals) -> Iterator[str]:
    """Warn if the dataset's answers earn the rewards only word for word."""
    means = {kind: fmean(kind_totals) for kind, kind_totals in _by_kind(totals).items()}
    texts = {candidate.kind: candidate.text for candidate, _ in reversed(totals)}
    for kind in ("final", "spaced"):
        if kind in means and means[kind] < means[GOLD] / 2:
            yield (
                f"the dataset's answers score {means[GOLD]:.2f}, and the same answers ({PARAPHRASES[kind]}) score "
                f"{means[kind]:.2f} ('{texts[kind].strip()[:60]}'): a model must give the answers word for word"
            )


# ---- receipt ----------------------------------------------------------------------------------------------------------


def _receipt(
    rewards: Sequence[Reward], rows: Sequence[Row], trial: Trial, totals: Totals, config: RunConfig, trained_rows: int
) -> dict[str, Any]:
    gold = _gold(totals)
    wrong = [(candidate, total) for candidate, total in totals if candidate.kind in WRONG]
    best, score = max(wrong, key=lambda pair: pair[1] - gold[pair[0].row])
    return {
        "rows": len(rows),
        "answers": [
            {
                "kind": kind,
                "mean": round(fmean(kind_totals), 4),
                "lowest": round(min(kind_totals), 4),
                "highest": round(max(kind_totals), 4),
            }
            for kind, kind_totals in _by_kind(totals).items()
        ],
        "by_reward": {
            reward.__name__: _reward_scores(reward, trial) | _latency(reward, trial, config, trained_rows)
            for reward in rewards
        },
        "best_wrong": {
            "kind": best.kind,
            "row": rows[best.row]["id"],
            "text": best.text[:200],
            "score": round(score, 4),
            "gold": rows[best.row]["answer"][:200],
            "gold_score": round(gold[best.row], 4),
        },
    }


def _reward_scores(reward: Reward, trial: Trial) -> dict[str, Any]:
    by_kind: dict[str, list[float]] = {candidate.kind: [] for candidate in trial.candidates}
    for candidate, score in zip(trial.candidates, trial.scores[reward.__name__], strict=True):
        if score is not None:
            by_kind[candidate.kind].append(score)
    scores = [score for kind_scores in by_kind.values() for score in kind_scores]
    return {
        "weight": reward.weight,
        "mean": {kind: round(fmean(kind_scores), 4) if kind_scores else None for kind, kind_scores in by_kind.items()},
        "lowest": min(scores, default=None),
        "highest": max(scores, default=None),
        "abstained": round(1 - len(scores) / len(trial.candidates), 4),
    } | ({"consistency": round(trial.consistency[name], 4)} if (name := reward.__name__) in trial.consistency else {})


def _latency(reward: Reward, trial: Trial, config: RunConfig, trained_rows: int) -> dict[str, Any]:
    """Return p50 and p95 in milliseconds, and the seconds that the reward takes in the whole run.

    A reward that waits is measured per request: one call scored a row's candidates at the same time. Any other reward is
    measured per completion.
    """
    calls = sorted(trial.seconds[reward.__name__])
    completions = generated_answers(config, trained_rows)
    kind = reward.spec.reward_type
    if kind.waits:
        per_request = kind.per_request(reward.parameters, config.grpo_value("num_generations"))
        at_once = reward.parameters.get("concurrency", 1) * per_request
        batch = generation_batch(config)
        share, times = 1.0, completions / batch * ceil(batch / at_once)
    else:
        share, times = len(calls) / len(trial.candidates), completions
    p50, p95 = median(calls) * share, calls[ceil(0.95 * len(calls)) - 1] * share
    return {"p50_ms": round(1000 * p50, 3), "p95_ms": round(1000 * p95, 3), "run_seconds": round(times * p50, 1)}
