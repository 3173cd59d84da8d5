"""The reward that runs programs: the completion is a program, and unit tests score it in a subprocess with limits.

The limits stop accidents and the shortcuts that models find (exit, endless loops, printing "passed"). The limits do not
stop a program that is written to break out of the interpreter. Where `unshare` works, the program also has no network
and cannot see other processes. Elsewhere it has both, which is why a stack must allow this reward.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import Annotated

from pydantic import Field

from tunedrop.rewards.permissions import RewardPermissions
from tunedrop.rewards.program_tests import Pair, function_of, read_tests
from tunedrop.rewards.registry import Need, reward
from tunedrop.rewards.sample import RewardError, Sample, fenced, final_answer
from tunedrop.sandboxed_process import bare_environment

# The subprocess runs this driver. The driver sets its limits, runs the program and then each test, and writes one line with
# the results. The line begins with a random word that only the parent and the driver's variables hold: a program that
# exits or prints cannot write that word. The driver compiles the tests, and binds the functions that run them, before the
# program can replace a builtin.
_DRIVER = """
import io, json, os, resource, sys
job = json.load(sys.stdin)
for kind, limit in ((resource.RLIMIT_CPU, job["cpu"]), (resource.RLIMIT_AS, job["memory"]),
                    (resource.RLIMIT_FSIZE, 1 << 20), (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(kind, (limit, limit))
out = os.dup(1)
os.dup2(os.open(os.devnull, os.O_RDWR), 1)
os.dup2(1, 0)
sys.stdin = open(os.devnull)
def compiled(text, name):
    try:
        return compile(text, name, "exec")
    except (SyntaxError, ValueError):
        return None
def lines(text):
    return [line.rstrip() for line in text.strip().splitlines()]
def prints(program, given, run=exec, sys=sys, text=io.TextIOWrapper, pipe=io.BytesIO):
    printed = pipe()
    sys.stdin, sys.stdout = text(pipe(given.encode())), text(printed, write_through=True)
    try:
        run(program, {"__name__": "__main__", "exit": sys.exit, "quit": sys.exit})
    except SystemExit as end:
        if end.code:
            raise
    return printed.getvalue().decode()
def main(program, tests, word, out, write=os.write, run=exec, prints=prints, lines=lines):
    space, passed, runs = {"__name__": "__main__"}, [], None
    for kind, *test in tests:
        try:
            if kind == "pair":
                passed.append("1" if lines(prints(program, test[0])) == lines(test[1]) else "0")
                continue
            if runs is None:
                runs = False
                run(program, space)
                runs = True
            if runs:
                run(test[0], space)
            passed.append("1" if runs else "0")
        except BaseException:
            passed.append("0")
    write(out, (word + "".join(passed)).encode())
program, word = compiled(job.pop("program"), "<completion>"), job.pop("word")
tests = [test if test[0] == "pair" else [test[0], compiled(test[1], "<test>")] for test in job.pop("tests")]
main(program, tests, word, out)
os._exit(0)
"""


@cache
def _isolation() -> tuple[str, ...]:
    """Return the command that removes network, other processes and IPC. Empty where the kernel forbids namespaces."""
    command = ("unshare", "--user", "--net", "--pid", "--ipc", "--fork", "--kill-child")
    if not shutil.which("unshare"):
        return ()
    trial = subprocess.run([*command, "true"], capture_output=True, check=False)  # noqa: S603 - a fixed command
    return command if trial.returncode == 0 else ()


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

    The program is the last code block of the final answer, or the whole final answer. `tests` are Python statements,
    usually asserts; each runs after the program. Without `tests`, the row's `column` holds the tests, and without that
    column the row's answer. There, `check(candidate)` with the row's `entry_point`, functions `test_…`, a `TestCase`, and
    inputs with outputs are tests, too. A program can import the standard library only, has `timeout` seconds and `memory_mb`
    MiB.
    """

    def run(sample: Sample) -> float:
        passed = run_tests(
            _program(sample.completion), _tests_of(sample, column, tests), timeout=timeout, memory_mb=memory_mb
        )
        share = sum(passed) / len(passed)
        return share if partial else float(share == 1.0)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(run, samples))


def _program(completion: str) -> str:
    answer = final_answer(completion)
    if answer.startswith('["'):  # APPS and TACO have a row's solutions in a JSON list
        with suppress(ValueError):
            answer = str(json.loads(answer)[0])
    return fenced(answer, "python|py|python3") or answer


def _tests_of(sample: Sample, column: str, tests: list[str] | None) -> list[str | Pair]:
    """Return the tests of a sample's row. Raises RewardError if there are none."""
    value = sample.columns.get(column, sample.answer) if tests is None else tests
    if not value:
        raise RewardError(f"code_tests needs unit tests: set 'tests', or put them into the column '{column}' or the answer")
    return read_tests(value, sample.columns.get("entry_point") or function_of(_program(sample.answer)))


def run_tests(program: str, tests: Sequence[str | Pair], *, timeout: float, memory_mb: int) -> list[bool]:
    """Run a program and then each test in a subprocess with limits. Return for each test whether it passed.

    The program runs once for all statements, and once for each pair of input and output. Every test of a program that does
    not finish within `timeout` seconds fails.
    """
    word = secrets.token_hex(16)
    listed = [["statements", test] if isinstance(test, str) else ["pair", *test] for test in tests]
    job = {"program": program, "tests": listed, "word": word, "cpu": int(timeout) + 1, "memory": memory_mb * 1024**2}
    with tempfile.TemporaryDirectory(prefix="code-tests-") as folder:
        process = subprocess.Popen(  # noqa: S603 - the purpose is to run untrusted programs, within the limits
            [*_isolation(), sys.executable, "-I", "-S", "-c", _DRIVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=bare_environment(),
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(json.dumps(job).encode(), timeout=timeout)
        except subprocess.TimeoutExpired:
            output = b""
        finally:
            with suppress(ProcessLookupError):  # the program's own children are in its process group
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    passed = output.decode(errors="replace").removeprefix(word)
    if len(passed) != len(tests) or not output.startswith(word.encode()):
        return [False] * len(tests)
    return [mark == "1" for mark in passed]
