"""The reward that runs programs: the completion is a program, and unit tests score it.

The program and its tests run in two processes (tunedrop.programs.runner): the program never sees a test. docs/rewards.md
says what else holds where.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Annotated, NamedTuple

from pydantic import Field

from tunedrop.rewards.permissions import RewardPermissions
from tunedrop.rewards.program_tests import Pair, function_of, read_tests
from tunedrop.rewards.registry import Need, reward
from tunedrop.rewards.sample import RewardError, Sample, fenced, final_answer
from tunedrop.sandboxed_process import PACKAGES, bare_environment

# Tunedrop's own files are no files that a program may read or import.
_START = f"import sys; sys.path.append({PACKAGES!r}); from tunedrop.programs.runner import main; sys.path.pop(); main()"


class Job(NamedTuple):
    """A program and its tests. `function` is the name of the function that the tests call, where it is known."""

    program: str
    tests: Sequence[str | Pair]
    function: str | None = None


@reward(
    reads=lambda parameters: [parameters["column"], "entry_point"],
    # Without tests elsewhere, the row's answer holds the tests. Such an answer is not a program that should score well.
    measures=lambda parameters, columns: (
        "content" if parameters["tests"] is None and parameters["column"] not in columns else "answer"
    ),
    needs=Need(
        lambda permissions, _: permissions.allow_code,
        "AllowCodeRewards",
        "runs programs that a model wrote, which is not allowed here",
    ),
)
def code_tests(
    samples: Sequence[Sample],
    permissions: RewardPermissions,  # noqa: ARG001 - `needs` has checked allow_code
    *,
    tests: list[str] | None = None,
    column: str = "tests",
    timeout: Annotated[float, Field(gt=0, le=300)] = 10.0,
    memory_mb: Annotated[int, Field(ge=64)] = 512,
    partial: bool = True,
) -> list[float]:
    """Share of the unit tests that the completion's Python program passes. Without `partial`, 1.0 only if all tests pass.

    The program is the last code block of the final answer, or the whole final answer. An answer that begins with an indented
    line continues the program in the question (HumanEval). `tests` are Python statements, usually asserts; each runs after
    the program. Without `tests`, the row's `column` holds the tests, and without that
    column the row's answer. There, `check(candidate)` with the row's `entry_point`, functions `test_…`, a `TestCase`, and
    inputs with outputs are tests, too. A program can import the standard library only, has `timeout` seconds and `memory_mb`
    MiB.
    """

    jobs = [read_job(sample, column, tests) for sample in samples]
    failures = run_tests(jobs, timeout=timeout, memory_mb=memory_mb)
    shares = [reasons.count("") / len(reasons) for reasons in failures]
    return shares if partial else [float(share == 1.0) for share in shares]


def _program(text: str, question: str) -> str:
    if text[:1].isspace() and function_of(question + text):
        return question + text
    answer = final_answer(text)
    if answer.startswith('["'):  # APPS and TACO have a row's solutions in a JSON list
        with suppress(ValueError):
            answer = str(json.loads(answer)[0])
    return fenced(answer, "python|py|python3") or answer


def read_job(sample: Sample, column: str, tests: list[str] | None = None) -> Job:
    """Return a sample's program and its row's tests. Raises RewardError if the row has none."""
    value = sample.columns.get(column, sample.answer) if tests is None else tests
    if not value:
        raise RewardError(f"code_tests needs unit tests: set 'tests', or put them into the column '{column}' or the answer")
    function = sample.columns.get("entry_point") or function_of(_program(sample.answer, sample.question))
    return Job(_program(sample.completion, sample.question), read_tests(value, function), function)


def run_tests(jobs: Sequence[Job], *, timeout: float, memory_mb: int) -> list[list[str]]:
    """Run programs and their tests, at most as many at a time as the machine has CPUs.

    Returns for each test of each job the reason why it failed, empty where it passed. A program runs once for all
    statements, and once for each pair of input and output. Every test of a program that does not finish within `timeout`
    seconds fails.
    """
    with TemporaryDirectory(prefix="code-tests-") as folder, TemporaryFile("a+b") as results:
        with TemporaryFile() as file:
            places = [{"program": _put(file, job.program), "tests": _put(file, _as_json(job))} for job in jobs]
            file.flush()
            runner = subprocess.Popen(  # noqa: S603 - the purpose is to run untrusted programs, confined
                [sys.executable, "-I", "-S", "-c", _START],
                stdin=subprocess.PIPE,
                stdout=results,
                stderr=subprocess.DEVNULL,
                env=bare_environment(),
                pass_fds=[file.fileno()],
            )
            batch = {"file": file.fileno(), "jobs": places, "folder": folder}
        runner.communicate(json.dumps(batch | {"timeout": timeout, "memory": memory_mb * 1024**2}).encode())
        results.seek(0)
        by_index = dict(map(json.loads, results))
    if runner.returncode or len(by_index) != len(jobs):
        raise RewardError(f"the process that runs programs has ended with exit code {runner.returncode}")
    return [by_index[index] or ["the tests did not end"] * len(job.tests) for index, job in enumerate(jobs)]


def _put(file: IO[bytes], text: str) -> tuple[int, int]:
    """Append a text; return where it begins, and its bytes."""
    return file.tell(), file.write(text.encode(errors="surrogatepass"))


def _as_json(job: Job) -> str:
    tests = [["statements", test] if isinstance(test, str) else ["pair", *test] for test in job.tests]
    return json.dumps([tests, job.function])
