"""What a run's inference tests show: the tuned model beside its base and beside the line's champion.

All models get the same tests. A comparison with the champion has the form of one with the base: its `base_score` is the
champion's score.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import msgspec

from pipeline.publish.comparison import BOOTSTRAP_SAMPLES, MOST_TRIES, Comparison, Pair, at_try, compare, extra_tests
from tunedrop.config.model import RunConfig
from tunedrop.inference_tests import ModelResult, Outcome
from tunedrop.questions import prompt_text, question

# A model that the tuned model is compared with.
Other = Literal["base", "champion"]
# Gives the two scores of a test: the other model's and the tuned model's.
Scores = Callable[[Outcome], tuple[float | None, float | None]]


class ChampionFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The comparisons of the tuned model with the champion; in each, `base_score` is the champion's score.

    `comparison`, `ended` and `by_tag` are over the run's own tests, as in `Figures`. `suite` is over the tests of the line's
    suite that judge, None if there is none, and `suite_by_run` over those that each run brought. `suite_failed` has the ids
    of the suite's must-pass tests that the tuned model failed, by run.
    """

    comparison: Comparison
    ended: Comparison | None
    by_tag: dict[str, Comparison]
    suite: Comparison | None
    suite_by_run: dict[str, Comparison]
    suite_failed: dict[str, list[str]]


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """The comparison over the inference tests that judge, by tag and by reward; `failed` counts tests without a score.

    `cut` counts the tests with an answer that the limit of tokens cut, by model. `ended` is the comparison over the tests
    where both models' answers ended by themselves, None if there is no such test. `probe` is the comparison over the general
    questions, right (1) or wrong (0), None without any. `champion` is None if the line has no champion. `tries` counts the
    models that these tests have judged since the last champion, this one included, and `confidence` is that of all intervals
    at this try.
    """

    comparison: Comparison
    ended: Comparison | None
    by_tag: dict[str, Comparison]
    by_reward: dict[str, Comparison]
    passed: dict[str, int]
    cut: dict[str, int]
    failed: int
    probe: Comparison | None
    champion: ChampionFigures | None
    tries: int
    confidence: float


def measure(
    tests: Sequence[Outcome],
    config: RunConfig,
    suite: Sequence[Outcome] = (),
    tries: int = 1,
    probe: Sequence[Outcome] = (),
) -> Figures:
    """Compare the models over a run's inference tests, the line's suite and the general questions of the probe.

    Raises ValueError if no test has a score.

    If no scored test judges, the comparison is over all scored tests. `tries` is as in `Figures`. The bounds of later tries
    lie further out in the bootstrap's tails: the intervals that decide get more samples, for enough of them in a tail.
    """
    judged = judging(tests, "base")
    if not judged:
        raise ValueError(f"none of the {len(tests)} inference tests could be scored")
    # A reward is 0 to 1, a penalty -1 to 0. `compare` widens the span to the measured scores.
    weights = {reward.label: abs(reward.weight) for reward in config.rewards}
    counted = min(tries, MOST_TRIES)
    confidence = at_try(config.gate.confidence, counted)
    samples, extra = BOOTSTRAP_SAMPLES * counted, extra_tests(counted)
    how = _How(confidence, sum(weights.values()), config.gate.min_lift, samples, extra)

    def reward(name: str) -> Scores:
        return lambda test: (test.base.rewards.get(name), test.tuned.rewards.get(name))

    comparison = how.compare(judged, totals("base"))
    names = [name for name in weights if any(None not in reward(name)(test) for test in judged)]
    champion = _champion_figures(tests, suite, config, how)
    answered = [test for test in probe if None not in right(test)]
    kept = how._replace(span=1.0, min_lift=-(config.gate.probe_max_loss or 0.0))
    results: dict[str, list[ModelResult | None]] = {
        "base": [test.base for test in tests],
        "tuned": [test.tuned for test in tests],
        **({"champion": [test.champion for test in tests]} if champion else {}),
    }
    return Figures(
        comparison=comparison,
        ended=_ended(judged, "base", comparison, how),
        by_tag=_by_tag(judged, "base", how),
        by_reward={name: how.rough._replace(span=1.0).compare(judged, reward(name)) for name in names},
        passed={model: sum(each is not None and each.passed is True for each in results[model]) for model in results},
        cut={model: sum(each is not None and each.cut for each in results[model]) for model in results},
        failed=sum(any(each is None or each.score is None for each in test) for test in zip(*results.values(), strict=True)),
        probe=kept.compare(answered, right) if answered else None,
        champion=champion,
        tries=tries,
        confidence=confidence,
    )


class _How(NamedTuple):
    """How tests are compared: the arguments of `compare`."""

    confidence: float
    span: float
    min_lift: float
    samples: int
    extra: int

    @property
    def rough(self) -> "_How":
        """For an interval that decides nothing."""
        return self._replace(samples=BOOTSTRAP_SAMPLES)

    def compare(self, tests: Sequence[Outcome], scores: Scores) -> Comparison:
        pairs = [
            Pair(other, tuned, test.weight, question(prompt_text(test.prompt)))
            for test in tests
            for other, tuned in [scores(test)]
            if other is not None and tuned is not None
        ]
        return compare(pairs, **self._asdict())


def _champion_figures(
    tests: Sequence[Outcome], suite: Sequence[Outcome], config: RunConfig, how: _How
) -> ChampionFigures | None:
    if all(test.champion is None for test in tests):
        return None
    judged = judging(tests, "champion")
    if not judged:
        raise ValueError(f"none of the {len(tests)} inference tests has a score of the champion and of the tuned model")
    how = how._replace(min_lift=config.gate.champion.min_lift)
    kept = how._replace(min_lift=-config.gate.champion.max_loss)
    old = [test for test in suite if test.judges and None not in totals("champion")(test)]
    comparison = how.compare(judged, totals("champion"))
    return ChampionFigures(
        comparison=comparison,
        ended=_ended(judged, "champion", comparison, how),
        by_tag=_by_tag(judged, "champion", how),
        suite=kept.compare(old, totals("champion")) if old else None,
        suite_by_run={run_id: kept.rough.compare(part, totals("champion")) for run_id, part in by_run(old).items()},
        suite_failed={
            run_id: [test.id for test in part] for run_id, part in by_run(filter(failed_must_pass, suite)).items()
        },
    )


def _ended(judged: Sequence[Outcome], other: Other, comparison: Comparison, how: _How) -> Comparison | None:
    ended = [test for test in judged if not is_cut(test, other)]
    if len(ended) == len(judged):
        return comparison
    return how.compare(ended, totals(other)) if ended else None


def _by_tag(judged: Sequence[Outcome], other: Other, how: _How) -> dict[str, Comparison]:
    tags = sorted({tag for test in judged for tag in test.tags})
    return {tag: how.rough.compare([test for test in judged if tag in test.tags], totals(other)) for tag in tags}


# --- tests ---


def totals(other: Other) -> Scores:
    """Return what gives a test's two scores, None where one is missing."""

    def scores(test: Outcome) -> tuple[float | None, float | None]:
        result: ModelResult | None = getattr(test, other)
        return result.score if result else None, test.tuned.score

    return scores


def right(test: Outcome) -> tuple[float | None, float | None]:
    """Return whether base and tuned model answer a general question right, as 1 or 0; None where there is no answer."""
    base, tuned = (None if each.passed is None else float(each.passed) for each in (test.base, test.tuned))
    return base, tuned


def judging(tests: Sequence[Outcome], other: Other) -> list[Outcome]:
    """Return the tests with two scores that judge, or all tests with two scores if none of them judges."""
    scored = [test for test in tests if None not in totals(other)(test)]
    return [test for test in scored if test.judges] or scored


def outcome(test: Outcome, other: Other) -> Literal["won", "tied", "lost", "failed"]:
    """Return the tuned model's outcome against the other; `failed` where a score is missing."""
    theirs, ours = totals(other)(test)
    if theirs is None or ours is None:
        return "failed"
    return "won" if ours > theirs else "lost" if ours < theirs else "tied"


def is_cut(test: Outcome, other: Other) -> bool:
    """Return whether the limit of tokens cut the answer of the other or of the tuned model."""
    result: ModelResult | None = getattr(test, other)
    return test.tuned.cut or (result is not None and result.cut)


def failed_must_pass(test: Outcome) -> bool:
    """Return whether the tuned model failed a must-pass test; a test that could not be scored did not fail."""
    return test.must_pass and test.tuned.error is None and not test.tuned.passed


def by_run(suite: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """Return the tests of a suite by the run that brought them, in the suite's order."""
    runs: dict[str, list[Outcome]] = {}
    for test in suite:
        assert test.run_id is not None, f"the suite's test {test.id!r} has no run_id"
        runs.setdefault(test.run_id, []).append(test)
    return runs
