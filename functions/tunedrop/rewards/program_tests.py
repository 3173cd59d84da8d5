"""A row's unit tests for programs, in the forms that datasets have, as `code_tests` runs them.

- Python statements: asserts (MBPP), a `check(candidate)` (HumanEval), functions `test_…`, a `unittest.TestCase`.
- Calls of a function: `{"fn_name", "inputs", "outputs"}` (APPS, TACO).
- Standard input and output: `{"inputs", "outputs"}` (APPS, TACO, verl), or a list of `{"input", "output"}` (LiveCodeBench).
"""

import ast
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from tunedrop.rewards.sample import RewardError

# Python's parser needs a second and 600 MB for some texts of a megabyte, and a minute for an f-string of that length.
MOST_CHARACTERS = 200_000
MOST_CHARACTERS_OF_PROGRAM = 20_000
_CHECKING = re.compile(r"_*(assert|check|test|verify|expect)", re.IGNORECASE)

_RUN_TEST_CASE = """import unittest as _unittest
_case = _unittest.defaultTestLoader.loadTestsFromTestCase({})
assert _case.countTestCases() and _case.run(_unittest.TestResult()).wasSuccessful()"""


class Pair(NamedTuple):
    """A test: the program reads `input` and must print `output`, up to spaces at the ends of lines."""

    input: str
    output: str


def read_tests(value: Any, candidate: str | None) -> list[str | Pair]:
    """Return the tests in a value: statements that run after the program, and pairs.

    `candidate` is the expression that a `check(candidate)` gets: the name of the function to test. Statements of a list
    that test nothing, such as imports, stand before the next test. Raises RewardError where a text is no Python or no text
    tests anything.
    """
    value = _parsed(value)
    tests: list[str | Pair] = []
    setup = ""
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, dict):
            tests += _of_mapping(each)
        elif isinstance(each, str) and each.strip():
            statements, can_fail = _statements(each, candidate)
            setup += f"{statements}\n"
            if can_fail:
                tests.append(setup)
                setup = ""
        else:
            raise RewardError(f"a test must be Python statements or an object with inputs and outputs, not {_short(each)}")
    if not tests:
        raise RewardError(f"{_short(value)} tests nothing: nothing in it can fail, such as an assert")
    return tests


def _parsed(value: Any) -> Any:
    """Return the list or object in a text: JSON, or Python's own notation, as CSV files have it."""
    if not isinstance(value, str):
        return value
    for read in (json.loads, ast.literal_eval) if len(value) <= MOST_CHARACTERS else (json.loads,):
        try:
            parsed = read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        if isinstance(parsed, list | dict):
            return parsed
    return value


def _of_mapping(value: dict[str, Any]) -> Iterator[str | Pair]:
    """Yield the tests of an object with inputs and outputs."""
    inputs, outputs = (value.get(f"{name}s", value.get(name)) for name in ("input", "output"))
    function = value.get("fn_name")
    if inputs is None or outputs is None:
        raise RewardError(f"a test must have inputs and outputs, but {_short(value)} has {', '.join(value) or 'no keys'}")
    if not isinstance(inputs, list):
        inputs, outputs = [inputs], [outputs]
    if not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise RewardError(f"{_short(value)} must have as many outputs as inputs")
    for given, expected in zip(inputs, outputs, strict=True):
        yield _call(function, given, expected) if function else Pair(_lines(given), _lines(expected))


def _call(function: str, given: Any, expected: Any) -> str:
    """Return a call as an assert. APPS has the arguments in a list, some results in a list of one, and tuples as lists."""
    arguments = given if isinstance(given, list) else [given]
    target = f"(_program[{function!r}] if {function!r} in _program else getattr(Solution(), {function!r}))"
    plain = "list(result) if isinstance(result, tuple) else result"
    compare = f"(lambda result: result == {expected!r} or [result] == {expected!r})"
    return f"assert {compare}((lambda result: {plain})({target}(*{arguments!r})))"


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


@lru_cache(64)  # a row's completions share its tests
def _statements(text: str, candidate: str | None) -> tuple[str, bool]:
    """Return statements with the calls that run the tests which they define, and whether anything in them can fail."""
    if len(text) > MOST_CHARACTERS:
        raise RewardError(f"a test of statements may have {MOST_CHARACTERS} characters, but {_short(text)} has {len(text)}")
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise RewardError(f"a test must be Python statements, but {_short(text)} is not: {reason}") from None
    for node in tree.body:  # the program is no module that tests could import (KodCode), and its names are there already
        if isinstance(node, ast.ImportFrom) and node.module == "solution":
            text = text.replace(ast.get_source_segment(text, node) or "", "pass", 1)
    definitions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    loose = [node for node in tree.body if node not in definitions]
    called = {_name(node) for each in loose for node in ast.walk(each) if isinstance(node, ast.Call)}
    calls = [call for node in definitions if node.name not in called if (call := _run(node, candidate))]
    checking = {node.name for node in definitions if any(map(_checks, ast.walk(node)))}
    can_fail = any(_checks(node) or _name(node) in checking for each in loose for node in ast.walk(each))
    return "\n".join([text, *calls]), can_fail or bool(calls)


def _run(definition: ast.FunctionDef | ast.ClassDef, candidate: str | None) -> str | None:
    """Return the statement that runs the tests of a definition; None for a definition without tests."""
    name = definition.name
    if not any(map(_checks, ast.walk(definition))):
        return None
    if isinstance(definition, ast.ClassDef):
        if not any(ast.unparse(base).endswith("TestCase") for base in definition.bases):
            return None
        return _RUN_TEST_CASE.format(name)
    parameters = definition.args.posonlyargs + definition.args.args
    if name == "check" and len(parameters) == 1:
        if candidate is None:
            raise RewardError("check(candidate) needs the name of the function to test: add a column 'entry_point'")
        return f"check({candidate})"
    return f"{name}()" if name.startswith("test") and not parameters else None


def _checks(node: ast.AST) -> bool:
    """Whether a node can fail a test: an assert of more than a constant, a raise, or a call of what sounds like a check."""
    if isinstance(node, ast.Assert):
        return not isinstance(node.test, ast.Constant)
    return isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and bool(_CHECKING.match(_name(node))))


def _name(node: ast.AST) -> str:
    """Return the last name of what a node calls, empty for other nodes."""
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def function_of(program: str) -> str | None:
    """Return the name of the last function that a program defines at its top; None without one, or for a long program."""
    if len(program) > MOST_CHARACTERS_OF_PROGRAM:
        return None
    try:
        body = ast.parse(program).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return next((node.name for node in reversed(body) if isinstance(node, ast.FunctionDef)), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
