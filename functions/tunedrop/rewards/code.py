"""The reward that runs what the model wrote: programs that must pass unit tests, in a subprocess with limits.

The limits stop accidents and the shortcuts that models find (exit, endless loops, printing "passed"). They are no wall
against a program written to break out of the interpreter: where `unshare` works, it has no network and no view of
other processes either; elsewhere it has both, so such rewards are off unless a deployment allows them.
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
from typing import Annotated, Any

from pydantic import Field

from tunedrop.rewards.permissions import RewardPermissions
from tunedrop.rewards.registry import Need, reward
from tunedrop.rewards.sample import RewardError, Sample, fenced, final_answer
from tunedrop.sandboxed_process import bare_environment

# Runs in the subprocess. It limits itself, then runs the program and each test, and says what passed in one line that
# begins with a word only the parent and this file's variables know: a program that exits or prints cannot say it. Tests are
# compiled, and what runs them is bound, before the program can replace a builtin.
_DRIVER = """
import json, os, resource, sys
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
def main(program, tests, word, out, write=os.write, run=exec):
    space, passed = {"__name__": "__main__"}, []
    try:
        run(program, space)
    except BaseException:
        tests = [None for _ in tests]
    for test in tests:
        try:
            run(test, space)
            passed.append("1")
        except BaseException:
            passed.append("0")
    write(out, (word + "".join(passed)).encode())
program, tests, word = job.pop("program"), job.pop("tests"), job.pop("word")
main(compiled(program, "<completion>"), [compiled(test, "<test>") for test in tests], word, out)
os._exit(0)
"""


@cache
def _isolation() -> tuple[str, ...]:
    """Return the command that takes network, processes and IPC away, or nothing where the kernel does not let us."""
    command = ("unshare", "--user", "--net", "--pid", "--ipc", "--fork", "--kill-child")
    if not shutil.which("unshare"):
        return ()
    tried = subprocess.run([*command, "true"], capture_output=True, check=False)  # noqa: S603 - a fixed command
    return command if tried.returncode == 0 else ()


@reward(
    # Where the answer holds the unit tests, the answer itself is not a program that passes them.
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
    permissions: RewardPermissions,  # noqa: ARG001 - whether it allows code is checked when rewards are built
    *,
    tests: list[str] | None = None,
    column: str = "tests",
    timeout: Annotated[float, Field(gt=0, le=300)] = 10.0,
    memory_mb: Annotated[int, Field(ge=64)] = 512,
    partial: bool = True,
) -> list[float]:
    """Share of the unit tests that the completion's Python program passes (all or nothing unless `partial`).

    The program is the last code block of the final answer, or all of it. `tests` are Python statements, mostly asserts,
    each run after the program; without `tests` they are the row's `column` (a list, or one text), or else its answer.
    Only the standard library is there; each program has `timeout` seconds and `memory_mb`.
    """

    def run(sample: Sample) -> float:
        wanted = tests if tests is not None else _tests_of(sample, column)
        answer = final_answer(sample.completion)
        passed = run_tests(fenced(answer, "python|py|python3") or answer, wanted, timeout=timeout, memory_mb=memory_mb)
        share = sum(passed) / len(wanted)
        return share if partial else float(share == 1.0)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(run, samples))


def _tests_of(sample: Sample, column: str) -> list[str]:
    given: Any = sample.columns.get(column, sample.answer)
    if isinstance(given, str):
        try:
            parsed = json.loads(given)
        except ValueError:
            parsed = None
        given = parsed if isinstance(parsed, list) else [given]
    if not isinstance(given, list) or not given or not all(isinstance(test, str) and test.strip() for test in given):
        raise RewardError(f"code_tests needs unit tests: 'tests', or a column '{column}' or an answer that holds them")
    return given


def run_tests(program: str, tests: Sequence[str], *, timeout: float, memory_mb: int) -> list[bool]:
    """Run a program and then each test in a limited subprocess; return which tests passed (none if it did not finish)."""
    word = secrets.token_hex(16)
    job = {"program": program, "tests": list(tests), "word": word, "cpu": int(timeout) + 1, "memory": memory_mb * 1024**2}
    with tempfile.TemporaryDirectory(prefix="code-tests-") as folder:
        process = subprocess.Popen(  # noqa: S603 - running what is not trusted is the purpose, within the limits
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
            with suppress(ProcessLookupError):  # what the program started is in its process group
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    passed = output.decode(errors="replace").removeprefix(word)
    if len(passed) != len(tests) or not output.startswith(word.encode()):
        return [False] * len(tests)
    return [mark == "1" for mark in passed]
