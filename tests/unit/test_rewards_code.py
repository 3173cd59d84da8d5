"""The reward that runs programs: good programs pass; programs that cheat, hang or break out score 0."""

import os
import time

import pytest

from tunedrop.rewards import RewardError, RewardPermissions, RewardSpec, build_rewards
from tunedrop.rewards.code import _isolation, run_tests

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


def test_child_processes_of_a_program_are_killed(tmp_path):
    mark = tmp_path / "alive"
    spawn = f"import os, time\nif os.fork() == 0:\n    time.sleep(1)\n    open({str(mark)!r}, 'w')\n    os._exit(0)\n"
    assert run_tests(spawn + ADD, TESTS, timeout=5, memory_mb=256) == [True, True]
    time.sleep(1.2)
    assert not mark.exists()


@pytest.mark.parametrize("tests", [TESTS, '["assert add(1, 2) == 3"]', "assert add(1, 2) == 3\nassert add(0, 0) == 0"])
def test_tests_come_from_the_row(tests):
    assert reward()([""], [ADD], answer=["unused"], tests=[tests]) == [1.0]
    assert reward(column="cases")([""], [ADD], answer=["unused"], cases=[tests]) == [1.0]
    if isinstance(tests, str):
        assert reward()([""], [ADD], answer=[tests]) == [1.0]


def test_a_row_without_tests_fails_the_reward():
    with pytest.raises(RewardError, match="needs unit tests"):
        reward()([""], [ADD], answer=[""])


def test_a_program_has_no_network_and_sees_no_other_process():
    if not _isolation():  # what the kernel here refuses, a deployment must do without too
        return
    assert (
        run_tests(
            "import os, socket",
            [
                "assert [name for _, name in socket.if_nameindex()] == ['lo']",
                "assert os.getpid() <= 2",
                f"try:\n    os.kill({os.getpid()}, 0)\n    raise SystemExit\nexcept ProcessLookupError:\n    pass",
            ],
            timeout=10,
            memory_mb=256,
        )
        == [True] * 3
    )
