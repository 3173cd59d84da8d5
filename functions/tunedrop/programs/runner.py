"""Runs programs against their tests: each program in a process, its tests in another one, both confined.

code.py starts this file's `main` once for a batch. For each program, `main` forks a supervisor. The supervisor forks two
processes that are connected with each other only (peers.py):

- the process of the tests reads the tests, and runs them. Where a test uses a name of the program, it uses a Remote.
- the process of the program reads the program, and does what the other process asks: no test and no expected value is ever
  in its memory, in its files or on its connection. It cannot say that a test has passed.

The supervisor ends both when the tests are over or the time is. All these processes are forks of one interpreter, which has
read none of the programs and tests: that is faster than an interpreter for each program.
"""

import builtins
import io
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import CodeType, FunctionType, ModuleType
from typing import Any

from tunedrop.programs import confinement
from tunedrop.programs.peers import Peer

REASON_CHARACTERS = 200


class _ProgramError(Exception):
    """The program does not run."""


def main() -> None:
    """Run a batch of programs. Results are lines of JSON on the standard output, in any order: index and reasons.

    Standard input has JSON: `file`, an open file with all texts; `jobs`, where each job's program and tests lie in the file;
    `timeout` in seconds, `memory` in bytes, `folder`, an empty one.
    """
    confinement.die_with_parent()
    confinement.hide_memory()
    confinement.readable()  # once for all
    sys.set_int_max_str_digits(0)  # long numbers are results, too
    batch = json.load(sys.stdin)
    running = 0
    for index, job in enumerate(batch["jobs"]):
        if running == (os.cpu_count() or 1):
            os.wait()
            running -= 1
        running += 1
        if os.fork() == 0:
            try:
                reasons = _supervise(batch, job)
                os.write(1, json.dumps([index, reasons]).encode() + b"\n")  # at the file's end: one write is one line
            finally:
                os._exit(0)
    with suppress(ChildProcessError):
        while True:
            os.wait()


def _supervise(batch: dict[str, Any], job: dict[str, list[int]]) -> list[str] | None:
    """Run a program against its tests. Return the reason why each test failed, empty if it passed; None without a result."""
    confinement.die_with_parent()
    ends = time.monotonic() + batch["timeout"]
    for_tests, for_program = socket.socketpair()
    reading, writing = os.pipe()
    tests = _start(batch, {for_tests.fileno(), writing, batch["file"]}, lambda: _test(batch, job, for_tests, writing))
    os.close(writing)
    for_tests.close()
    confinement.new_processes_see_no_others()
    program = _start(batch, {for_program.fileno(), batch["file"]}, lambda: _serve(batch, job, for_program))
    for_program.close()
    result = b""
    while (left := ends - time.monotonic()) > 0 and select.select([reading], [], [], left)[0]:
        part = os.read(reading, 1 << 16)
        if not part:
            break
        result += part
    for process in (tests, program):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    with suppress(ValueError):
        reasons: list[str] = json.loads(result)
        return reasons
    return None


def _start(batch: dict[str, Any], keep: set[int], run: Callable[[], None]) -> int:
    """Start a confined process and return its id."""
    process = os.fork()
    if process == 0:
        try:
            confinement.confine(batch["folder"], keep, batch["memory"], int(batch["timeout"]) + 1)
            sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115 - open for as long as the process
            run()
        finally:
            os._exit(0)
    return process


def _read(batch: dict[str, Any], place: list[int]) -> str:
    """Return a text of the batch."""
    offset, length = place
    return os.pread(batch["file"], length, offset).decode()


def _compiled(text: str, name: str) -> CodeType:
    """Compile a text. Raises _ProgramError if it is no Python."""
    try:
        return compile(text, name, "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _ProgramError(f"{name} is no Python: {error}") from None


def _serve(batch: dict[str, Any], job: dict[str, list[int]], connection: socket.socket) -> None:
    """The process of the program: do what the tests ask."""
    text = _read(batch, job["program"])
    os.close(batch["file"])
    space: dict[str, Any] = {"__name__": "completion"}  # a script's block for __main__ reads input that no test gives

    def run() -> dict[str, Any]:
        """Run the program; return its names."""
        exec(_compiled(text, "<completion>"), space)  # noqa: S102 - the purpose of this process
        return {name: value for name, value in space.items() if not name.startswith("__")}

    def read_and_print(given: str) -> str:
        """Run the program as a script; return what it prints for an input."""
        printed = io.BytesIO()
        sys.stdin = io.TextIOWrapper(io.BytesIO(given.encode()))
        sys.stdout = io.TextIOWrapper(printed, write_through=True)
        try:
            exec(_compiled(text, "<completion>"), {"__name__": "__main__", "exit": sys.exit, "quit": sys.exit})  # noqa: S102
        except SystemExit as end:
            if end.code:
                raise
        return printed.getvalue().decode()

    Peer(connection, lambda *_: True, {"run": run, "read_and_print": read_and_print}).serve()


def _test(batch: dict[str, Any], job: dict[str, list[int]], connection: socket.socket, writing: int) -> None:
    """The process of the tests: run them, and write the reasons of those that fail."""
    tests, function = json.loads(_read(batch, job["tests"]))
    os.close(batch["file"])
    program = Peer(connection, _may_use, {})
    space: dict[str, Any] | None = None  # the names that the tests see; empty where the program does not run
    reasons = []
    for kind, *test in tests:
        try:
            if kind == "pair":
                printed = program.ask("read_and_print", test[0])
                if type(printed) is not str or _lines(printed) != _lines(test[1]):
                    raise AssertionError
            else:
                if space is None:
                    space = {}
                    space = _space(program, function)
                if not space:
                    raise _ProgramError("the program does not run")
                exec(_compiled(test[0], "<test>"), space)  # noqa: S102 - the tests of a row
            reasons.append("")
        except BaseException as error:  # noqa: BLE001 - a test fails by any
            reasons.append(f"{type(error).__name__}: {error}"[:REASON_CHARACTERS])
    content = json.dumps(reasons).encode()
    while content:
        content = content[os.write(writing, content) :]


def _space(program: Peer, function: str | None) -> dict[str, Any]:
    """Run the program, and return the names that tests see. `_program` has all of the program's names.

    Python's own names stay Python's own: a program that defines `abs` would decide what tests compare. Only the function
    that the row tests may have such a name.
    """
    names = program.ask("run")
    own = {
        name: value
        for name, value in names.items()
        if type(name) is str and name.isidentifier() and not name.startswith("__")
        if not hasattr(builtins, name) or name == function
    }
    # The tests' own builtins, given here: exec would take those that the program's process sends under this name.
    return own | {"__name__": "__main__", "__builtins__": builtins, "_program": names}


def _may_use(operation: str, arguments: list[Any]) -> bool:
    """Return whether a program may do something with an object of its tests: with what a test gave it, and nothing beyond.

    A program may call such a function, and may read and write the public attributes of instances of the tests' own classes.
    An attribute of any other object, such as a generator's frame, could lead to the expected values.
    """
    if operation not in {"getattr", "setattr", "delattr"}:
        return True
    value, name, *_ = arguments
    is_own = type(value).__module__ == "__main__" and not isinstance(value, type | FunctionType | ModuleType)
    return is_own and not name.startswith("_")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
