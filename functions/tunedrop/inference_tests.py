"""Inference tests: what the base and the tuned model are asked, how their answers compare, and the gate.

A test file is `{"evaluations": [{"id", "prompt", "description"}, …]}`, `description` being the expected answer. Accepted
beside or instead of these: `messages` for `prompt`, `reference_answer` for `description`, and `tags`, `weight`,
`must_pass` and `columns` (what rewards read of a row beside its answer).
"""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from tunedrop.problems import Problem, RejectedError
from tunedrop.records import ROLES, Row
from tunedrop.run_config import Gate, RunConfig

MAX_TESTS_BYTES = 32 * 1024**2
BOOTSTRAP_SAMPLES = 2000
# Below this many tests a bootstrap interval says more about the sample than about the model.
FEW_TESTS = 20


class InferenceTest(msgspec.Struct, frozen=True, kw_only=True):
    """One case: the messages to answer, the answer that rewards compare with, and the columns that some rewards read."""

    id: str
    prompt: list[dict[str, str]]
    reference: str
    tags: list[str] = []
    weight: float = 1.0
    must_pass: bool = False
    columns: dict[str, Any] = {}


class _Case(msgspec.Struct, forbid_unknown_fields=True):
    """A case as written in a test file."""

    id: str | int | None = None
    prompt: str | None = None
    messages: list[dict[str, str]] | None = None
    description: str | None = None
    reference_answer: str | None = None
    tags: list[str] = []
    weight: float = 1.0
    must_pass: bool = False
    columns: dict[str, Any] = {}


class _TestFile(msgspec.Struct):
    evaluations: list[msgspec.Raw]


def read_tests(path: Path, config: RunConfig) -> list[InferenceTest]:
    """Read an inference-test file. Raises RejectedError with a Problem per broken case."""
    return parse_tests(path.read_bytes(), config)


def parse_tests(raw: bytes, config: RunConfig) -> list[InferenceTest]:
    """Parse the bytes of a test file (UTF-8 JSON). Raises RejectedError with a Problem per broken case."""
    if len(raw) > MAX_TESTS_BYTES:
        raise RejectedError([Problem("TESTS_SYNTAX", f"the test file is larger than {MAX_TESTS_BYTES // 1024**2} MiB")])
    try:
        cases = msgspec.json.decode(raw.removeprefix(b"\xef\xbb\xbf"), type=_TestFile).evaluations
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        hint = 'expected {"evaluations": [{"id", "prompt", "description"}]}'
        raise RejectedError([Problem("TESTS_SYNTAX", f"the inference tests cannot be read: {error}", hint)]) from None
    tests: list[InferenceTest] = []
    problems: list[Problem] = []
    ids: set[str] = set()
    for row, case in enumerate(cases, 1):
        try:
            test = _inference_test(msgspec.json.decode(case, type=_Case), row, config)
        except (msgspec.DecodeError, ValueError) as error:
            problems.append(Problem("BAD_TEST", f"inference test {row}: {error}", row=row))
            continue
        if test.id in ids:
            problems.append(Problem("DUPLICATE_TEST", f"inference test {row}: the id '{test.id}' is used twice", row=row))
        ids.add(test.id)
        tests.append(test)
    if not cases:
        problems.append(Problem("NO_TESTS", "the inference-test file has no evaluations"))
    if problems:
        raise RejectedError(problems)
    return tests


def _inference_test(case: _Case, row: int, config: RunConfig) -> InferenceTest:
    messages = case.messages or ([{"role": "user", "content": case.prompt}] if case.prompt else [])
    if not messages or any(message.get("role") not in ROLES or not message.get("content") for message in messages):
        raise ValueError("needs 'prompt' (a text) or 'messages' (a list of {role, content})")
    reference = case.reference_answer if case.reference_answer is not None else case.description
    if reference is None:
        raise ValueError("needs 'description' (the expected answer) or 'reference_answer'")
    if case.weight <= 0:
        raise ValueError(f"'weight' must be above 0, got {case.weight}")
    if config.system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    return InferenceTest(
        id=f"test-{row}" if case.id is None else str(case.id),
        prompt=messages,
        reference=reference,
        tags=case.tags,
        weight=case.weight,
        must_pass=case.must_pass,
        columns=case.columns,
    )


def tests_from_rows(rows: Iterable[Row]) -> list[InferenceTest]:
    """Make inference tests of held-out rows, for a dataset that came without a test file."""
    own = {"id", "prompt", "answer"}
    return [
        InferenceTest(
            id=row["id"],
            prompt=row["prompt"],
            reference=row["answer"],
            columns={name: value for name, value in row.items() if name not in own},
        )
        for row in rows
    ]


def dump_tests(tests: Iterable[InferenceTest]) -> bytes:
    """Write tests in the file format, so that `parse_tests` gives them back."""
    cases = [
        {
            "id": test.id,
            "messages": test.prompt,
            "reference_answer": test.reference,
            "tags": test.tags,
            "weight": test.weight,
            "must_pass": test.must_pass,
            "columns": test.columns,
        }
        for test in tests
    ]
    return msgspec.json.encode({"evaluations": cases})


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Base against tuned over all tests; scores are weighted means, `lift` the mean paired difference and its interval."""

    tests: int
    base_score: float
    tuned_score: float
    lift: float
    lift_low: float
    lift_high: float
    wins: int
    ties: int
    losses: int


class Verdict(msgspec.Struct, frozen=True):
    """What the gate decides, with its reasons in plain words."""

    status: Literal["APPROVED", "PENDING", "REJECTED"]
    reasons: list[str]


def compare(tested: list[dict[str, Any]], confidence: float) -> Comparison:
    """Compare the two models' scores, paired by test, with a percentile bootstrap interval of the mean lift.

    `tested` is the `tests` list of `inference.json`. The interval is Efron's percentile interval at `confidence` over
    2,000 resamples of the tests, seeded, so that a result can be reproduced.
    """
    weights = [test["weight"] for test in tested]
    base, tuned = ([test[model]["score"] for test in tested] for model in ("base", "tuned"))
    lifts = [after - before for before, after in zip(base, tuned, strict=True)]

    def mean(values: list[Any], indices: Iterable[int] = range(len(tested))) -> float:
        chosen = list(indices)
        return float(sum(weights[i] * values[i] for i in chosen) / sum(weights[i] for i in chosen))

    generator = random.Random(0)
    everything = range(len(tested))
    resampled = sorted(mean(lifts, generator.choices(everything, k=len(tested))) for _ in range(BOOTSTRAP_SAMPLES))
    tail = round((1 - confidence) / 2 * BOOTSTRAP_SAMPLES)
    return Comparison(
        tests=len(tested),
        base_score=mean(base),
        tuned_score=mean(tuned),
        lift=mean(lifts),
        lift_low=resampled[tail],
        lift_high=resampled[-tail - 1],
        wins=sum(lift > 0 for lift in lifts),
        ties=sum(lift == 0 for lift in lifts),
        losses=sum(lift < 0 for lift in lifts),
    )


def judge(tested: list[dict[str, Any]], comparison: Comparison, gate: Gate) -> Verdict:
    """Decide whether the tuned model may be used: better than the base by the gate's bound, and no must-pass test lost.

    A test passes when the tuned model scores at least what the base did.
    """
    against = [
        f"the test '{test['id']}' must pass, but scored {test['tuned']['score']:.2f} (base {test['base']['score']:.2f})"
        for test in tested
        if test["must_pass"] and test["tuned"]["score"] < test["base"]["score"]
    ]
    for tag in gate.must_not_regress:
        tagged = [test for test in tested if tag in test["tags"]]
        lift = sum(test["weight"] * (test["tuned"]["score"] - test["base"]["score"]) for test in tagged)
        if lift < 0:
            against.append(f"the tests tagged '{tag}' score lower than with the base model")
    bounds = f"{gate.confidence:.0%} interval {comparison.lift_low:+.3f} to {comparison.lift_high:+.3f}"
    interval = f"lift {comparison.lift:+.3f} ({bounds})"
    if comparison.lift_high <= gate.min_lift:
        against.append(f"{interval}: not above {gate.min_lift:+.3f}")
    if against:
        return Verdict("REJECTED", against)
    if comparison.tests < FEW_TESTS:
        return Verdict("PENDING", [f"{comparison.tests} tests are too few to tell: give at least {FEW_TESTS}", interval])
    if comparison.lift_low <= gate.min_lift:
        return Verdict("PENDING", [f"{interval}: it could still be {gate.min_lift:+.3f} or less; more tests would tell"])
    return Verdict("APPROVED", [f"{interval} over {comparison.tests} tests"])
