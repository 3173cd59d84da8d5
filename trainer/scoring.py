"""Scores the completions of tests, and writes what a test job says of them."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import msgspec

from trainer.engines import Completion, Decoding
from tunedrop.inference_tests import Check, InferenceTest, Latency, ModelResult, Outcome, build_checks
from tunedrop.rewards import Reward, RewardError, RewardPermissions, build_rewards, score
from tunedrop.rewards.wire import write_result


class Part(NamedTuple):
    """Tests that all models complete with the same settings, and that the same rewards score.

    `name` follows the models' names in the log; it is empty for the run's own tests. `template`: arguments of the chat
    template. `least`: how many tokens a model's context must leave for a completion. `allowed`: permissions of rewards in
    the tests' checks. `run_id`: the run that brought the tests to the line's suite.
    """

    name: str
    tests: Sequence[InferenceTest]
    decoding: Decoding
    rewards: Sequence[Reward]
    allowed: RewardPermissions
    template: dict[str, Any]
    least: int = 1
    run_id: str | None = None


def scored(test: InferenceTest, completions: list[Completion] | str, part: Part) -> ModelResult:
    """Score the completions of a test. If a reward fails, the result has its error and no score, never a score of 0."""
    if isinstance(completions, str):
        return ModelResult(error=completions)
    checks = build_checks(test.checks, part.allowed)
    checkers = build_rewards([check for check in checks if isinstance(check, Check)], part.allowed)
    try:
        results, checked = _scores(test, completions, part.rewards, checkers)
    except RewardError as error:
        return ModelResult(text=completions[0].text, error=str(error))
    samples = []
    for number, (completion, result) in enumerate(zip(completions, results, strict=True)):
        measured = checked[number]
        unmet = [reason for check in checks if (reason := _unmet(check, completion, measured))]
        paid = [result["rewards"][reward.__name__] for reward in part.rewards if reward.weight > 0]
        samples.append(
            ModelResult(
                text=completion.text,
                score=result["score"],
                rewards=result["rewards"],
                passed=not unmet if checks else all(value is None or value >= 1.0 for value in paid),
                unmet=unmet,
                tokens=completion.tokens,
                cut=completion.cut,
                seconds=round(completion.seconds, 3) if test.timed else None,
                first_token=completion.first_token,
            )
        )
    return samples[0] if len(samples) == 1 else _mean(samples)


def _scores(
    test: InferenceTest, completions: list[Completion], rewards: Sequence[Reward], checkers: Sequence[Reward]
) -> tuple[list[dict[str, Any]], list[dict[str, float | None]]]:
    """Return for each completion its entry of `tunedrop.rewards.score`, and the scores of the checks by name.

    Ranked against each other, the samples of every model would have the same mean. Thus a reward that ranks scores each
    alone, against the expected answer. Raises RewardError if it gives no rank: 0 would be a lost comparison.
    """
    ranking = [reward.__name__ for reward in [*rewards, *checkers] if reward.spec.reward_type.ranks]
    results: list[dict[str, Any]] = []
    checked: list[dict[str, float | None]] = []
    for batch in [[each] for each in completions] if ranking else [completions]:
        count = len(batch)
        prompts = [test.prompt] * count
        messages = [[{"role": "assistant", "content": completion.text}] for completion in batch]
        columns = {name: [value] * count for name, value in test.columns.items()}
        columns |= {"answer": [test.reference] * count, "id": [test.id] * count}
        results += score(rewards, prompts, messages, columns)
        by_check = {checker.__name__: checker(prompts, messages, **columns) for checker in checkers}
        checked += [{name: values[place] for name, values in by_check.items()} for place in range(count)]
        for name in ranking:
            if (results[-1]["rewards"] | checked[-1])[name] is None:
                raise RewardError(f"reward '{name}' gave no rank: its judge did not reply with a ranking")
    return results, checked


def _unmet(check: Check | Latency, completion: Completion, measured: dict[str, float | None]) -> str | None:
    """Return the reason why a check fails, None if it passes. A check that abstains passes."""
    if isinstance(check, Latency):
        if completion.seconds > check.maximum:
            return f"took {completion.seconds:.2f} s, more than the maximum of {check.maximum:g} s"
        return None
    value = measured[check.label]
    if value is not None and value < check.at_least:
        return f"{check.label} is {value:.2f}, less than the minimum of {check.at_least:g}"
    return None


def _mean(samples: list[ModelResult]) -> ModelResult:
    """Return the samples of a test as one result: mean scores, and passed if all samples passed."""
    rewards: dict[str, float | None] = {}
    for name in samples[0].rewards:
        values = [value for sample in samples if (value := sample.rewards[name]) is not None]
        rewards[name] = fmean(values) if values else None
    return ModelResult(
        text=samples[0].text,
        score=fmean([sample.score or 0.0 for sample in samples]),
        rewards=rewards,
        passed=all(sample.passed for sample in samples),
        unmet=next((sample.unmet for sample in samples if sample.unmet), []),
        tokens=sum(sample.tokens or 0 for sample in samples),
        cut=any(sample.cut for sample in samples),
        samples=samples,
    )


def outcomes(part: Part, results: Mapping[str, Sequence[ModelResult]]) -> list[Outcome]:
    """Join the models' results of a part, by the model's name, to one outcome for each test."""
    return [
        Outcome(
            id=test.id,
            prompt=test.prompt,
            reference=test.reference,
            tags=test.tags,
            weight=test.weight,
            must_pass=test.must_pass,
            judges=test.judges,
            run_id=part.run_id,
            **{name: each[number] for name, each in results.items()},
        )
        for number, test in enumerate(part.tests)
    ]


def evaluation_lines(tests: Sequence[InferenceTest], results: Sequence[ModelResult]) -> bytes:
    """Return one line per scored completion, `{"id", "aggregate_reward_score", "metrics_list", "cut"}`."""
    lines = [
        write_result(
            f"{test.id}:{number}" if result.samples else test.id, {"score": sample.score, "rewards": sample.rewards}
        )
        | {"cut": sample.cut}
        for test, result in zip(tests, results, strict=True)
        if result.error is None
        for number, sample in enumerate(result.samples or [result])
    ]
    return b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
