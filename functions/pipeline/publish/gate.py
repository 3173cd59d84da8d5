"""The gate: may the tuned model be used? It decides by the figures of `statistics`, and says why in plain sentences."""

from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from pipeline.publish.comparison import FEW_TESTS, MOST_TRIES, Comparison, percent
from pipeline.publish.statistics import ChampionFigures, Figures, Other, failed_must_pass, is_cut, judging, measure
from tunedrop.config.model import RunConfig
from tunedrop.inference_tests import Outcome

NO_JUDGE = "they repeat rows of the dataset, or their `judges` is false"


class Verdict(msgspec.Struct, frozen=True):
    """The gate's decision and its reasons."""

    status: Literal["APPROVED", "PENDING", "REJECTED"]
    reasons: list[str]


class Evaluation(Figures, frozen=True, kw_only=True):
    """What the tests show, and the gate's decision."""

    verdict: Verdict


def evaluate(
    tests: Sequence[Outcome],
    config: RunConfig,
    suite: Sequence[Outcome] = (),
    tries: int = 1,
    probe: Sequence[Outcome] = (),
) -> Evaluation:
    """Compare the models over a run's inference tests and decide. Raises ValueError if no test has a score.

    `suite` are the tests of the line's suite, which count if the line has a champion. `probe` are the general questions,
    which count with `gate.probe_max_loss`. `tries` counts the models that these tests have judged since the last champion,
    this one included. If no scored test judges, the comparison is over all scored tests, and the verdict is not APPROVED.
    """
    figures = measure(tests, config, suite, tries, probe)
    return Evaluation(**msgspec.structs.asdict(figures), verdict=decide(tests, suite, figures, config))


def decide(tests: Sequence[Outcome], suite: Sequence[Outcome], figures: Figures, config: RunConfig) -> Verdict:
    """Decide whether the tuned model may be used.

    `REJECTED`: a must-pass test failed, a protected tag regressed, more general questions are lost than `probe_max_loss`
    allows, the lift over the base or the champion is not above the gate's limit, or the suite shows a loss. `PENDING`:
    there is not enough evidence to decide, or only with the answers that the limit of tokens cut, or these tests have
    judged too many models. `APPROVED`: the lower bounds of the lifts over the base and over the champion are above the
    gate's limits, with these answers and without them, and the suite shows no loss of `max_loss` or more.
    """
    gate, comparison, champion = config.gate, figures.comparison, figures.champion
    lift = _described(comparison, figures)
    against = [
        *_failed_must_pass_tests(tests),
        *_regressed_tags(gate.must_not_regress, figures.by_tag),
        *_against_lift(comparison, gate.min_lift, lift),
        *_probe_is_lost(figures, gate.probe_max_loss),
    ]
    missing = [
        *(
            f"No inference test has the tag '{tag}', which must not regress: add tests with this tag."
            for tag in gate.must_not_regress
            if tag not in figures.by_tag
        ),
        *_unscored_tests(tests, champion),
        *_no_judges(tests),
        *_few_tests(comparison),
        *_too_little_evidence(comparison, gate.min_lift, lift),
        *_made_by_the_limit(comparison, figures.ended, gate.min_lift),
        *_used_up(figures),
        *_probe_is_open(figures, gate.probe_max_loss),
    ]
    better = [f"The tuned model is better: {lift}.", *_probe_is_kept(figures, gate.probe_max_loss)]
    if champion:
        over = _described(champion.comparison, figures)
        against += [
            *_against_lift(champion.comparison, gate.champion.min_lift, over, "champion"),
            *_failed_must_pass_tests(suite),
            *_suite_is_lost(champion, figures, gate.champion.max_loss),
        ]
        missing += [
            *_too_little_evidence(champion.comparison, gate.champion.min_lift, over, "champion"),
            *_made_by_the_limit(champion.comparison, champion.ended, gate.champion.min_lift, "champion"),
            *_unscored_suite(suite),
            *_suite_is_open(champion, figures, suite, config),
        ]
        better += [f"It is better than the champion: {over}.", *_suite_is_kept(champion, figures, gate.champion.max_loss)]
    more = [*_on_cut_answers(tests, figures), *_tries(figures)]
    if against:
        return Verdict("REJECTED", [*against, *more])
    if missing:
        return Verdict("PENDING", [*missing, *more])
    return Verdict("APPROVED", [*better, *more, *_kept(tests, gate.must_not_regress)])


def _described(comparison: Comparison, figures: Figures, what: str = "lift", where: str = "tests") -> str:
    repeats = f" of {comparison.questions} different questions" if comparison.questions < comparison.tests else ""
    return f"a {what} of {comparison.lift:+.3f} over {comparison.tests} {where}{repeats} ({_bounds(comparison, figures)})"


def _bounds(comparison: Comparison, figures: Figures) -> str:
    return f"{percent(figures.confidence)}% interval {comparison.lift_low:+.3f} to {comparison.lift_high:+.3f}"


# --- this run's tests ---


def _failed_must_pass_tests(tests: Sequence[Outcome]) -> Iterator[str]:
    for test in filter(failed_must_pass, tests):
        of_run = f" of run {test.run_id}" if test.run_id else ""
        why = "; ".join(test.tuned.unmet) or f"it scores {test.tuned.score:.2f}, not full marks"
        why += "; the limit of tokens cut its answer" if test.tuned.cut else ""
        yield f"The must-pass test '{test.id}'{of_run} failed: {why}."


def _regressed_tags(tags: Sequence[str], by_tag: dict[str, Comparison]) -> Iterator[str]:
    for tag in tags:
        if tag in by_tag and (change := by_tag[tag].lift) < 0:
            yield f"The tests tagged '{tag}' must not regress, but score {-change:.3f} lower than with the base model."


def _against_lift(comparison: Comparison, min_lift: float, lift: str, other: Other = "base") -> Iterator[str]:
    than, same = (" than the champion", "champion") if other == "champion" else ("", "base model")
    if comparison.questions >= FEW_TESTS and comparison.ties == comparison.tests:
        yield f"The tuned model scores the same as the {same} in each of the {comparison.tests} tests."
    if comparison.lift_high <= min_lift:
        yield f"The tuned model is not better{than}: {lift}; the gate requires more than {min_lift:+.3f}."


def _unscored_tests(tests: Sequence[Outcome], champion: ChampionFigures | None) -> Iterator[str]:
    def failed(test: Outcome) -> bool:
        return bool(test.base.error or test.tuned.error or (champion and (test.champion is None or test.champion.error)))

    yield from _unscored([test.id for test in tests if failed(test)], len(tests), "tests")


def _unscored(failed: Sequence[str], tests: int, noun: str) -> Iterator[str]:
    if failed:
        names = ", ".join(f"'{name}'" for name in failed[:5]) + (" and others" if len(failed) > 5 else "")
        yield f"{len(failed)} of {tests} {noun} could not be scored ({names}): see the report for the reasons."


def _no_judges(tests: Sequence[Outcome]) -> Iterator[str]:
    if not any(test.judges for test in tests):
        yield f"None of the {len(tests)} tests judges the model: {NO_JUDGE}. Add other tests."


def _few_tests(comparison: Comparison) -> Iterator[str]:
    if comparison.questions < FEW_TESTS:
        yield f"{comparison.questions} {_noun(comparison)} are not enough evidence to decide: give at least {FEW_TESTS}."


def _too_little_evidence(comparison: Comparison, min_lift: float, lift: str, other: Other = "base") -> Iterator[str]:
    if comparison.questions >= FEW_TESTS and comparison.lift_low <= min_lift < comparison.lift_high:
        what = "that the tuned model is better than the champion" if other == "champion" else "to decide"
        more = _more(comparison, "a lift of this size")
        yield f"Not enough evidence {what}: {lift}; the true lift may be {min_lift:+.3f} or less; {more}."


def _more(comparison: Comparison, what: str) -> str:
    if comparison.needed is None:
        return "more tests like these would not show it"
    return f"about {comparison.needed} {_noun(comparison)} like these would show {what}"


def _noun(comparison: Comparison) -> str:
    return "tests" if comparison.questions == comparison.tests else "different questions"


def _on_cut_answers(tests: Sequence[Outcome], figures: Figures) -> Iterator[str]:
    """Say how much of the lift stands on the tests where the limit of tokens cut an answer."""
    judged, ended = judging(tests, "base"), figures.ended
    cut = [test for test in judged if is_cut(test, "base")]
    if not cut:
        return
    part = sum(_change(test) * test.weight for test in cut) / sum(test.weight for test in judged)
    base, tuned = sum(test.base.cut for test in cut), sum(test.tuned.cut for test in cut)
    rest = "No test has two answers that ended by themselves."
    if ended:
        rest = f"Over the other {ended.tests} tests, the lift is {ended.lift:+.3f} ({_bounds(ended, figures)})."
    yield (
        f"{part:+.3f} of the lift of {figures.comparison.lift:+.3f} stands on {len(cut)} of {len(judged)} tests where the "
        f"limit of tokens cut an answer ({base} of the base model, {tuned} of the tuned model). {rest}"
    )


def _change(test: Outcome) -> float:
    assert test.base.score is not None
    assert test.tuned.score is not None
    return test.tuned.score - test.base.score


def _made_by_the_limit(
    comparison: Comparison, ended: Comparison | None, min_lift: float, other: Other = "base"
) -> Iterator[str]:
    if comparison.lift_low > min_lift and (ended is None or ended.lift_low <= min_lift):
        left = "No lift" if ended is None or ended.lift <= min_lift else "Too little evidence of a lift"
        over = " over the champion" if other == "champion" else ""
        yield (
            f"{left}{over} is left without the tests where the limit of tokens cut an answer: raise "
            "tests.max_completion_length, so that both models can finish."
        )


def _kept(tests: Sequence[Outcome], tags: Sequence[str]) -> list[str]:
    """Return the gate's other requirements that the tuned model meets, and how many tests do not judge."""
    musts, others = sum(test.must_pass for test in tests), sum(not test.judges for test in tests)
    reasons = [f"All {musts} must-pass tests passed."] if musts else []
    if others:
        reasons.append(f"{others} of {len(tests)} tests do not judge the model: {NO_JUDGE}.")
    return [*reasons, *(f"The tests tagged '{tag}' did not regress." for tag in tags)]


# --- the general questions ---


def _probe_is_lost(figures: Figures, max_loss: float | None) -> Iterator[str]:
    probe = figures.probe
    if probe and max_loss is not None and probe.lift_high <= -max_loss:
        yield (
            f"The tuned model has lost general questions: {_on_probe(probe, figures)}; the gate allows a loss of less than "
            f"{max_loss:.3f} (gate.probe_max_loss)."
        )


def _probe_is_open(figures: Figures, max_loss: float | None) -> Iterator[str]:
    probe = figures.probe
    if max_loss is not None and probe is None:
        yield "No general question could be answered by both models, and gate.probe_max_loss needs them: see the job's log."
    if probe and max_loss is not None and probe.lift_low <= -max_loss < probe.lift_high:
        yield (
            f"Not enough evidence that the general questions are kept: {_on_probe(probe, figures)}; the true loss may be "
            f"{max_loss:.3f} or more (gate.probe_max_loss)."
        )


def _probe_is_kept(figures: Figures, max_loss: float | None) -> Iterator[str]:
    probe = figures.probe
    if probe and max_loss is not None:
        yield f"It keeps the general questions: {_on_probe(probe, figures)}."


def _on_probe(probe: Comparison, figures: Figures) -> str:
    return _described(probe, figures, "difference", "general questions")


# --- how often these tests were asked ---


def _tries(figures: Figures) -> Iterator[str]:
    if figures.tries > 1:
        since = "since the last champion" if figures.champion else "of the line, which has no champion"
        yield (
            f"These tests have judged {figures.tries} models {since}, this one included: it is judged at a confidence of "
            f"{percent(figures.confidence)} %."
        )


def _used_up(figures: Figures) -> Iterator[str]:
    if figures.tries > MOST_TRIES:
        yield (
            f"These tests are used up: they judge at most {MOST_TRIES} models, since each further one may be approved by "
            "chance. Fresh tests are needed."
        )


# --- the line's suite ---


def _suite_is_lost(champion: ChampionFigures, figures: Figures, max_loss: float) -> Iterator[str]:
    suite = champion.suite
    if suite and suite.lift_high <= -max_loss:
        run_id, part = min(champion.suite_by_run.items(), key=lambda item: item[1].lift * item[1].tests)
        yield (
            f"The tuned model is worse than the champion on the line's suite: {_difference(suite, figures)}; the gate "
            f"allows a loss of less than {max_loss:.3f}. The {part.tests} tests of run {run_id} lose the most: "
            f"{part.lift:+.3f}."
        )


def _unscored_suite(suite: Sequence[Outcome]) -> Iterator[str]:
    failed = [test.id for test in suite if test.tuned.error or test.champion is None or test.champion.error]
    yield from _unscored(failed, len(suite), "suite tests")


def _suite_is_open(
    champion: ChampionFigures, figures: Figures, tests: Sequence[Outcome], config: RunConfig
) -> Iterator[str]:
    suite, max_loss = champion.suite, config.gate.champion.max_loss
    if tests and not any(test.judges for test in tests):
        yield (
            f"None of the {len(tests)} suite tests judges the model, because this run's training data ask their questions: "
            "take these rows out of the dataset."
        )
    if suite and suite.lift_low <= -max_loss < suite.lift_high:
        more = _more(suite, "that it is kept")
        if suite.needed is not None and suite.needed > config.suite.max:
            more += f" (suite.max is {config.suite.max})"
        yield (
            f"Not enough evidence that the line's suite is kept: {_difference(suite, figures)}; the true loss may be "
            f"{max_loss:.3f} or more; {more}."
        )


def _suite_is_kept(champion: ChampionFigures, figures: Figures, max_loss: float) -> Iterator[str]:
    if champion.suite:
        difference = _difference(champion.suite, figures)
        yield f"It keeps the line's suite: {difference}; the gate allows a loss of less than {max_loss:.3f}."


def _difference(suite: Comparison, figures: Figures) -> str:
    return _described(suite, figures, "difference", "suite tests")
