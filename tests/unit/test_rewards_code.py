"""The reward that runs programs: good programs pass; programs that cheat, hang or break out score 0."""

import time
from contextlib import suppress

import pytest

from tunedrop.rewards import RewardError, RewardPermissions, RewardSpec, build_rewards

ADD = "def add(a, b):\n    return a + b"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


def reward(**parameters):
    return build_rewards([RewardSpec(type="code_tests", **parameters)], RewardPermissions(allow_code=True))[0]


CASES = [
    # completion, tests passed of two
    (ADD, 2),
    (f"Sure:\n```python\n{ADD}\n```\nThat adds.", 2),
    (f"```\nold\n```\n```py\n{ADD}\n```", 2),
    (f"<think>```python\nnot this\n```</think><answer>\n{ADD}\n</answer>", 2),
    ("def add(a, b):\n    return 3", 1),
    ("def add(a, b):\n    raise SystemExit(0)", 0),
    ("this is no program", 0),
    ("", 0),
    ("import os\nos._exit(0)", 0),
    ("import sys\nsys.exit(0)", 0),
    ("print('11')\nimport os\nos.write(1, b'11')\nos._exit(0)", 0),
    ("import builtins\nbuiltins.exec = lambda *_: None\nbuiltins.compile = lambda *_: 'pass'", 0),
    ("def add(a, b):\n    return bytearray(4 * 1024**3) or 3", 0),  # beyond the memory limit
    ("open('big', 'wb').write(bytes(2 * 1024**2))\n" + ADD, 0),  # beyond the file size limit
    ("import numpy\n" + ADD, 0),  # only the standard library
    ("import os\nassert not [name for name in os.environ if name.startswith('AWS')]\n" + ADD, 2),
]


def test_a_program_scores_the_share_of_passed_tests():
    completions = [completion for completion, _ in CASES]
    scores = reward(tests=TESTS)([""] * len(CASES), completions, answer=[""] * len(CASES))
    assert scores == [passed / 2 for _, passed in CASES]
    assert reward(tests=TESTS, partial=False)([""], [CASES[4][0]], answer=[""]) == [0.0]


def test_programs_that_do_not_finish_are_killed():
    started = time.monotonic()
    scores = reward(tests=TESTS, timeout=0.5)(
        [""] * 3,
        ["while True: pass", "import time\ntime.sleep(60)", "import os, time\nos.fork()\ntime.sleep(60)\n" + ADD],
        answer=[""] * 3,
    )
    assert scores == [0.0] * 3
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("tests", [TESTS, '["assert add(1, 2) == 3"]', "assert add(1, 2) == 3\nassert add(0, 0) == 0"])
def test_tests_come_from_the_row(tests):
    assert reward()([""], [ADD], answer=["unused"], tests=[tests]) == [1.0]
    assert reward(column="cases")([""], [ADD], answer=["unused"], cases=[tests]) == [1.0]
    if isinstance(tests, str):
        assert reward()([""], [ADD], answer=[tests]) == [1.0]


ECHO = "print(int(input()) + 1)"
LOOP = "import sys\nfor line in sys.stdin:\n    print(line.strip()[::-1])"
SOLUTION = "class Solution:\n    def add(self, a, b):\n        return a + b"
CHECK = "METADATA = {}\ndef check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(0, 0) == 0"
UNITTEST = (
    "import unittest\nclass TestAdd(unittest.TestCase):\n    def test_it(self):\n        self.assertEqual(add(1, 2), 3)"
)
FORMS = [
    # tests as a row has them, other columns, a right program, a wrong program
    (["assert add(1, 2) == 3"], {}, ADD, "def add(a, b):\n    return 0"),
    ("['assert add(1, 2) == 3', 'assert add(2, 2) == 4']", {}, ADD, "def add(a, b):\n    return 0"),
    (["import math", "x = 1", "assert add(x, math.ceil(1.5)) == 3"], {}, ADD, "def add(a, b):\n    return 0"),
    ("def test_one():\n    assert add(1, 2) == 3\n\ndef test_two():\n    assert add(0, 0) == 0", {}, ADD, "add = max"),
    ("from solution import add\n\ndef test_one():\n    assert add(1, 2) == 3", {}, ADD, "def add(a, b):\n    return 0"),
    ("def verify(value):\n    if value != 3:\n        raise ValueError\nverify(add(1, 2))", {}, ADD, "def add(a, b): pass"),
    (CHECK, {"entry_point": "add"}, ADD, "def add(a, b):\n    return 0"),
    (f"{CHECK}\ncheck(add)", {}, ADD, "def add(a, b):\n    return 0"),
    (CHECK, {"entry_point": "Solution().add"}, SOLUTION, SOLUTION.replace("a + b", "a - b")),
    (CHECK, {"answer": ADD}, ADD, "def add(a, b):\n    return 0"),  # the row's own program names the function
    (UNITTEST, {}, ADD, "def add(a, b):\n    return 0"),
    ({"inputs": ["1\n", "5\n"], "outputs": ["2\n", "6"]}, {}, ECHO, "print(2)"),
    ('{"inputs": ["1\\n"], "outputs": ["2\\n"]}', {}, ECHO, "print(1)"),
    ("{'inputs': ['1'], 'outputs': ['2']}", {}, ECHO, "input()"),
    ({"inputs": [["ab", "cd"]], "outputs": [["ba", "dc"]]}, {}, LOOP, ECHO),
    ([{"input": "3", "output": "4", "testtype": "stdin"}], {}, f"{ECHO}\nexit()", "raise SystemExit(4)"),
    ({"input": "1", "output": "2"}, {}, "import sys\nsys.stdout.buffer.write(b'2  \\n\\n')", "print('2.0')"),
    ({"fn_name": "add", "inputs": [[1, 2], [2, 2]], "outputs": [3, [4]]}, {}, ADD, "def add(a, b):\n    return 0"),
    ({"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}, {}, SOLUTION, "class Solution: pass"),
]  # fmt: skip


@pytest.mark.parametrize(("tests", "columns", "right", "wrong"), FORMS, ids=[str(tests)[:40] for tests, *_ in FORMS])
def test_every_form_of_tests_tells_a_right_program_from_a_wrong_one(tests, columns, right, wrong):
    row = {"answer": ""} | columns | {"tests": tests}
    programs = [right, f"Here:\n```python\n{right}\n```", wrong, ""]
    scores = reward(partial=False)([""] * 4, programs, **{name: [value] * 4 for name, value in row.items()})
    assert scores == [1.0, 1.0, 0.0, 0.0]


def test_an_answer_that_begins_with_an_indented_line_continues_the_questions_program():
    question = 'def add(a, b):\n    """Add."""\n'
    prompts = [[{"role": "user", "content": question}]] * 3
    completions = ["    c = a + b\n    return c\n", ADD, "    return a\n"]
    row = {"answer": [completions[0]] * 3, "tests": [CHECK] * 3, "entry_point": ["add"] * 3}
    assert reward()(prompts, completions, **row) == [1.0, 1.0, 0.0]


def test_a_rows_list_of_solutions_is_its_first_program():
    assert reward()([""], ['["print(2)", "print(3)"]'], answer=[""], tests=[[{"input": "", "output": "2"}]]) == [1.0]


NO_TESTS = [
    # what a row has in the place of tests, words of the error
    ("", "needs unit tests"),
    ([], "needs unit tests"),
    ("91", "'91' tests nothing"),
    ("print(add(1, 2))", "tests nothing"),
    (["import math", "x = 3"], "tests nothing"),
    ("assert True", "tests nothing"),
    ("(1, 2)", "tests nothing"),
    ("def helper(value):\n    assert value", "tests nothing"),
    ("class Check:\n    pass", "tests nothing"),
    ("The answer is 4.", "must be Python statements, but 'The answer is 4.' is not"),
    ({"public": 1}, r"must have inputs and outputs, but \{'public': 1\} has public"),
    ({"inputs": ["1"], "outputs": []}, "as many outputs as inputs"),
    ([3], "must be Python statements or an object with inputs and outputs, not 3"),
    (CHECK, "add a column 'entry_point'"),
]


@pytest.mark.parametrize(("tests", "words"), NO_TESTS, ids=[str(tests)[:40] for tests, _ in NO_TESTS])
def test_what_is_no_test_fails_the_reward_and_never_passes(tests, words):
    with pytest.raises(RewardError, match=words):
        reward()([""], [ADD], answer=["unused"], tests=[tests])


PATHOLOGICAL = [
    # texts that take a parser, a compiler or a program long, or too much memory
    "(" * 10**6,
    "-" * 10**6 + "1",
    "1" + "+1" * 500_000,
    "a" + ".b" * 500_000,
    "f'" + "{1}" * 300_000 + "'",
    "x = 1\n" * 170_000,
    "[" + "1," * 500_000 + "]",
    "x = 9**9**9**9",
    "x = 'a' * 10**12",
    "[" * 10**6,
    "{" * 10**6,
    "```python\n" * 100_000,
    "<answer>" * 125_000,
    r"\boxed{" * 140_000,
    "if 1:\n" + "".join(" " * depth + "if 1:\n" for depth in range(1, 1_300)),
    "lambda: " * 120_000 + "1",
    "9" * 10**6,
    "\0" * 10**6,
    "\ud800" * 10**5,
    "#" * 10**6,
    "import re\nre.match('(a+)+$', 'a' * 99 + 'b')",
    "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    '["' + "print(1)" * 120_000 + '"]',
]


def test_pathological_programs_and_answers_end_soon_and_never_pass():
    """All of a megabyte. Time is that of this process: the programs' own is limited by `timeout`."""
    began = time.process_time()
    scores = reward(tests=TESTS, timeout=1)([""] * len(PATHOLOGICAL), PATHOLOGICAL, answer=PATHOLOGICAL)
    assert scores == [0.0] * len(PATHOLOGICAL)
    assert time.process_time() - began < 0.1 * len(PATHOLOGICAL)


@pytest.mark.parametrize("answer", PATHOLOGICAL, ids=lambda answer: answer[:20].encode("unicode_escape").decode())
def test_pathological_answers_test_nothing_or_fail_soon(answer):
    began = time.process_time()
    with suppress(RewardError):
        assert reward(timeout=1)([""], [ADD], answer=[answer]) == [0.0]
    assert time.process_time() - began < 2
