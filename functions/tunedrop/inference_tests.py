"""Inference tests: prompts for the base model and the tuned model, checks of their completions, and the results.

A test file is `{"evaluations": [{"id", "prompt", "description"}, …]}`; `description` is the expected answer. A bare list,
JSON Lines, YAML and CSV are accepted too; `parse_tests` detects the format from the content. Prompt and expected answer are
read as those of a dataset's row, with the same names of columns. Beside them, a test may have

- `checks`: rewards, each with `at_least` (1.0), and `{type: latency, maximum: seconds}`. The test passes when all checks
  pass. A test without checks passes when every reward of the run with a positive weight gives 1.0;
- `must_pass`: the gate rejects a tuned model that fails the test;
- `samples`: the number of completions per model (pass@k);
- `judges`: false for a test whose score does not count in the lift. Validation sets it for tests that repeat a row;
- `tags`, `weight`, and `columns` (the columns that rewards read beside the answer).
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunedrop.config.model import Columns, RunConfig
from tunedrop.dataset.bad_row import BadRowError
from tunedrop.dataset.columns import OWN, PROMPT_NAMES, REASONING_NAMES, normal, template_fields
from tunedrop.dataset.rows import Records, Row
from tunedrop.problems import Problem, RejectedError
from tunedrop.rewards import NO_PERMISSIONS, RewardError, RewardPermissions, RewardSpec, build_rewards
from tunedrop.yaml_file import read_yaml

MAX_TESTS_BYTES = 32 * 1024**2
MAX_SAMPLES = 64


class Latency(BaseModel):
    """A check of the seconds that a completion takes. Its test runs alone, because a batch would change the time."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["latency"]
    maximum: Annotated[float, Field(gt=0, description="Seconds.")]
    label: Literal["latency"] = "latency"


class Check(RewardSpec):
    """A check by a reward: the reward's score of the completion, without its weight, must be at least `at_least`."""

    at_least: Annotated[float, Field(allow_inf_nan=False)] = 1.0


class InferenceTest(msgspec.Struct, frozen=True, kw_only=True):
    """One test: the prompt's messages, the reference answer for the rewards, and the columns that some rewards read."""

    id: str
    prompt: list[dict[str, str]]
    reference: str
    tags: list[str] = []
    weight: float = 1.0
    must_pass: bool = False
    judges: bool = True
    samples: int = 1
    checks: list[dict[str, Any]] = []
    columns: dict[str, Any] = {}

    @property
    def timed(self) -> bool:
        """Whether the test has a latency check."""
        return any(check["type"] == "latency" for check in self.checks)


MOST_LIKELY = 20  # the most that OpenAI's and vLLM's `top_logprobs` returns


class ModelResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model's result in one test, as in `inference.json`.

    With several samples, `text` is the first sample's text, `score` and `rewards` are means, `passed` is true when all
    samples passed, and `samples` has the result of each. `unmet` lists the checks that failed. `cut`: the limit of tokens
    ended a completion, not the model. `first_token` has the log-probabilities of the first token of a greedy completion, in
    nats, by the token's text: the MOST_LIKELY most likely ones. `error` is the reason for a missing score.
    """

    text: str = ""
    score: float | None = None
    rewards: dict[str, float | None] = {}
    passed: bool | None = None
    unmet: list[str] = []
    tokens: int | None = None
    cut: bool = False
    seconds: float | None = None
    first_token: dict[str, float] = {}
    error: str | None = None
    samples: list["ModelResult"] = []


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """An inference test with the results of the models: one entry of `inference.json`.

    `champion` is the result of the line's model in use, if there is one. A test of the line's suite has the id of the run
    that brought it.
    """

    id: str
    prompt: list[dict[str, str]]
    reference: str
    base: ModelResult
    tuned: ModelResult
    champion: ModelResult | None = None
    tags: list[str] = []
    weight: float = 1.0
    must_pass: bool = False
    judges: bool = True
    run_id: str | None = None

    @property
    def cut(self) -> bool:
        """Whether the limit of tokens cut an answer of one of the models."""
        return self.base.cut or self.tuned.cut

    @property
    def outcome(self) -> Literal["won", "tied", "lost", "failed"]:
        """The tuned model's outcome against the base model; `failed` where a score is missing."""
        if self.base.score is None or self.tuned.score is None:
            return "failed"
        lift = self.tuned.score - self.base.score
        return "won" if lift > 0 else "lost" if lift < 0 else "tied"


class _Case(msgspec.Struct):
    """The keys of a test that are not columns of a dataset's row."""

    id: str | int | None = None
    tags: list[str] = []
    weight: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    must_pass: bool = False
    judges: bool = True
    samples: Annotated[int, msgspec.Meta(ge=1, le=MAX_SAMPLES)] = 1
    checks: list[dict[str, Any]] = []
    columns: dict[str, Any] = {}


KEYS = _Case.__struct_fields__


class _CaseError(ValueError):
    """A mistake in one key of a case."""

    def __init__(self, key: str, message: str):
        self.key = key
        super().__init__(message)


def parse_tests(raw: bytes, config: RunConfig, permissions: RewardPermissions = NO_PERMISSIONS) -> list[InferenceTest]:
    """Parse a test file. Raises RejectedError with one Problem per broken test, which names the test and the key.

    `permissions` limits the rewards in checks, as for the rewards of a run.
    """
    if len(raw) > MAX_TESTS_BYTES:
        raise RejectedError([Problem("TESTS_SYNTAX", f"the test file is larger than {MAX_TESTS_BYTES // 1024**2} MiB")])
    try:
        cases, from_text = _cases(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError, csv.Error) as error:
        hint = 'expected {"evaluations": [{"id", "prompt", "description"}]} as JSON or YAML, JSON Lines, or CSV'
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise RejectedError([Problem("TESTS_SYNTAX", f"the inference tests cannot be read: {reason}", hint)]) from None
    rows = Records(config.model_copy(update={"columns": _columns(cases, config)}))
    tests: list[InferenceTest] = []
    problems: list[Problem] = []
    ids: set[str] = set()
    for row, case in enumerate(cases, 1):
        name = f"inference test {row}" + (f" ('{case['id']}')" if isinstance(case, dict) and case.get("id") else "")
        try:
            test = _inference_test(case, row, rows, permissions, from_text)
        except _CaseError as error:
            problems.append(Problem("BAD_TEST", f"{name}: '{error.key}': {error}", row=row, key=error.key or None))
            continue
        except BadRowError as error:
            problems.append(Problem("BAD_TEST", f"{name}: {error}", error.problem.hint, row=row))
            continue
        if test.id in ids:
            problems.append(
                Problem("DUPLICATE_TEST", f"{name}: 'id': an earlier test has the id '{test.id}'", row=row, key="id")
            )
        ids.add(test.id)
        tests.append(test)
    if not cases:
        problems.append(Problem("NO_TESTS", "the file of inference tests has no evaluations"))
    if problems:
        raise RejectedError(problems)
    return tests


def _cases(text: str) -> tuple[list[Any], bool]:
    """Return a file's cases, and whether all their values are text (CSV). Passes on the exceptions of the parsers."""
    start = text.lstrip()[:1]
    if start not in {"{", "["}:
        header = text.strip().split("\n", 1)[0]
        delimiter = max(",;\t", key=header.count)
        if {normal(name.strip(' "\r')) for name in header.split(delimiter)} & set(PROMPT_NAMES):
            return [
                _csv_case(row) for row in csv.DictReader(io.StringIO(text.strip()), delimiter=delimiter, strict=True)
            ], True
        return _evaluations(read_yaml(text)), False
    try:
        decoded = msgspec.json.decode(text)
    except msgspec.DecodeError:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) == 1 or not lines[0].rstrip().endswith("}"):
            raise
        return [msgspec.json.decode(line) for line in lines], False
    return _evaluations(decoded), False


def _evaluations(decoded: Any) -> list[Any]:
    if isinstance(decoded, dict) and "evaluations" not in decoded and {normal(name) for name in decoded} & set(PROMPT_NAMES):
        return [decoded]  # JSON Lines with a single line
    cases = decoded.get("evaluations") if isinstance(decoded, dict) else decoded
    if not isinstance(cases, list):
        raise ValueError("the file has no list 'evaluations'")
    return cases


def _csv_case(row: dict[str | Any, Any]) -> dict[str, Any]:
    """Return a CSV row as a case. Empty cells are left out, lists and objects are JSON."""
    if None in row:
        raise ValueError(f"the row of '{row.get('id') or next(iter(row.values()))}' has more fields than the header")
    filled = {str(name).strip(): value for name, value in row.items() if value not in {None, ""}}
    case: dict[str, Any] = dict(filled)
    if "tags" in case:
        case["tags"] = [tag.strip() for tag in case["tags"].replace(";", ",").split(",") if tag.strip()]
    for name in {"checks", "columns"} & set(case):
        case[name] = msgspec.json.decode(case[name])
    return case


def _columns(cases: Sequence[Any], config: RunConfig) -> Columns:
    """Return the config's columns if the tests have them. Tests may have other names than the dataset."""
    names = {name for case in cases if isinstance(case, dict) for name in case}
    named = [config.columns.prompt, config.columns.answer]
    used = {field.split(".")[0] for name in named if name for field in (template_fields(name) or [name])}
    return config.columns if used and used <= names else Columns()


def _inference_test(case: Any, number: int, rows: Records, permissions: RewardPermissions, from_text: bool) -> InferenceTest:
    if not isinstance(case, dict):
        raise _CaseError("", f"a test is an object, not a {type(case).__name__}")
    record = {str(name): value for name, value in case.items() if name == "id" or name not in KEYS}
    for name in record.keys() - set(KEYS):
        if close := get_close_matches(name, KEYS, n=1, cutoff=0.8):
            raise _CaseError(name, f"is not a key of a test: did you mean '{close[0]}'?")
    try:
        fields = msgspec.convert({name: case[name] for name in KEYS if name in case}, _Case, strict=not from_text)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$")
        raise _CaseError(path.strip("`.").split("[")[0].split(".")[0], reason) from None
    if not math.isfinite(fields.weight):
        raise _CaseError("weight", "must be a finite number")
    row, _ = rows.row(record, number, [record])
    build_checks(fields.checks, permissions)
    return InferenceTest(
        id=f"test-{number}" if fields.id is None else str(fields.id),
        prompt=row["prompt"],
        reference=row["answer"],
        tags=fields.tags,
        weight=fields.weight,
        must_pass=fields.must_pass,
        judges=fields.judges,
        samples=fields.samples,
        checks=fields.checks,
        columns={name: value for name, value in row.items() if name not in OWN} | fields.columns,
    )


def build_checks(checks: Sequence[dict[str, Any]], permissions: RewardPermissions) -> list[Check | Latency]:
    """Build a test's checks. Raises ValueError for a check that is not a reward, or that the permissions do not allow."""
    try:
        built: list[Check | Latency] = [
            (Latency if check.get("type") == "latency" else Check).model_validate(check) for check in checks
        ]
        build_rewards([check for check in built if isinstance(check, Check)], permissions)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise _CaseError("checks", f"{key}: {first['msg']}" if key else first["msg"].removeprefix("Value error, ")) from None
    except (RewardError, ValueError) as error:
        raise _CaseError("checks", str(error)) from None
    return built


def tests_from_rows(rows: Iterable[Row]) -> list[InferenceTest]:
    """Make inference tests from held-out rows, for a dataset without a test file."""
    return [
        InferenceTest(
            id=row["id"],
            prompt=row["prompt"],
            reference=row["answer"],
            columns={name: value for name, value in row.items() if name not in OWN},
        )
        for row in rows
    ]


def with_reasoning(answer: str, columns: Mapping[str, Any]) -> str:
    """Return an expected answer as a model that reasons gives it: after the row's reasoning, if a column has it."""
    reasoning = [value for name, value in columns.items() if normal(name) in REASONING_NAMES]
    return "\n".join([*(value for value in reasoning if isinstance(value, str)), answer])


def dump_tests(tests: Iterable[InferenceTest]) -> bytes:
    """Write tests in the file format that `parse_tests` reads."""
    cases = []
    for test in tests:
        case = msgspec.to_builtins(test)
        cases.append(case | {"messages": case.pop("prompt"), "reference_answer": case.pop("reference")})
    return msgspec.json.encode({"evaluations": cases})
