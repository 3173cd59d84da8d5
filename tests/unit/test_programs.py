# ruff: noqa: E501, ISC004 - each program of a table is one line
"""Programs and their tests in two confined processes: what tests can use, and what programs try."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunedrop.programs import confinement, values
from tunedrop.programs.peers import Peer, Remote
from tunedrop.rewards import code
from tunedrop.rewards.code import Job, run_tests
from tunedrop.sandboxed_process import PACKAGES

# The kernels that refuse a step: each text runs before the runner.
REFUSE = "import tunedrop.programs.confinement as c\ndef refuse(*_): raise OSError\n"
NO_NAMESPACES = "c._unshare = refuse\n"
NO_LANDLOCK = "c._landlock = refuse\n"
NO_SECCOMP = "c._seccomp = refuse\n"
KERNELS = {
    "all": "",
    "container": REFUSE + NO_NAMESPACES,
    "lambda": REFUSE + NO_NAMESPACES + NO_LANDLOCK,
    "no seccomp": REFUSE + NO_SECCOMP,
    "nothing": REFUSE + NO_NAMESPACES + NO_LANDLOCK + NO_SECCOMP,
}


def probe(step):
    """Return whether this machine's kernel allows a step, in a process of its own."""
    child = os.fork()
    if child == 0:
        try:
            confinement._drop_capabilities() if step == "_landlock" else None
            getattr(confinement, step)(*([0x20000000] if step == "_unshare" else []))
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


HAS_NAMESPACES, HAS_LANDLOCK = probe("_unshare"), probe("_landlock")


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    start = code._START.replace(
        "from tunedrop.programs.runner", f"exec({KERNELS[request.param]!r}); from tunedrop.programs.runner"
    )
    monkeypatch.setattr(code, "_START", start)
    return request.param


def outcome(program, *tests, function=None, timeout=10, memory_mb=256):
    (reasons,) = run_tests([Job(program, tests, function)], timeout=timeout, memory_mb=memory_mb)
    return reasons


# What tests can do with a program, beyond plain values: program, test.
USES = [
    ("class Stack:\n def __init__(self): self.items = []\n def push(self, x): self.items.append(x)\n"
     " def pop(self): return self.items.pop()\n def __len__(self): return len(self.items)",
     "s = Stack()\ns.push([1, {2}])\nassert len(s) == 1 and s.items == [[1, {2}]] and isinstance(s, Stack)\nassert s.pop() == [1, {2}]"),
    ("def numbers(n):\n yield from range(n)", "assert list(numbers(3)) == [0, 1, 2]\nassert next(numbers(1)) == 0 and sum(numbers(4)) == 6"),
    ("def f(x):\n if x < 0: raise ValueError('negative')\n return x ** 0.5",
     "import unittest\nclass T(unittest.TestCase):\n def test_it(self):\n  with self.assertRaisesRegex(ValueError, 'neg'): f(-1)\n"
     "  self.assertAlmostEqual(f(2), 1.41421356)\nr = unittest.TestResult()\nT('test_it').run(r)\nassert r.wasSuccessful()"),
    ("class Empty(KeyError): pass\ndef f(): raise Empty('nothing')",
     "try:\n f()\n assert False\nexcept Empty as error:\n assert error.args == ('nothing',) and isinstance(error, KeyError)"),
    ("import json\ndef f(t): return json.loads(t)", "import json\ntry:\n f('{')\n raise SystemExit\nexcept json.JSONDecodeError: pass"),
    ("def f(values, key): return sorted(values, key=key)", "assert f([3, -5, 1], lambda x: -x) == [3, 1, -5] and f(['bb', 'a'], len) == ['a', 'bb']"),
    ("def f(values): values.sort()", "a = [3, 1, 2]\nassert f(a) is None and a == [1, 2, 3]"),
    ("def f(d, s, m): d['x'] = 1; s.add(2); m[0].append(9)", "d, s, m = {}, set(), [[]]\nf(d, s, m)\nassert (d, s, m) == ({'x': 1}, {2}, [[9]])"),
    ("from collections import *\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)",
     "p = f()\nassert p.x == 1 and p == (1, 2) and tuple(p) == (1, 2) and (0, 2) < p and 2 in p and isinstance(p, tuple)\nx, y = p"),
    ("from collections import *\ndef f(t): return Counter(t)\ndef g():\n d = defaultdict(list)\n d[1].append(2)\n return d",
     "assert f('aab') == {'a': 2, 'b': 1} and f('aab').most_common(1) == [('a', 2)] and f('')['x'] == 0 and g() == {1: [2]}"),
    ("from dataclasses import dataclass\n@dataclass\nclass V:\n x: int\n y: int = 0\n def __add__(self, o): return V(self.x + o.x, self.y + o.y)",
     "assert V(1) + V(2, y=3) == V(3, 3) and V(1) != V(2) and repr(V(1)) == 'V(x=1, y=0)'\nv = V(1)\nv.x = 5\nassert v.x == 5"),
    ("class C:\n def __enter__(self): return self\n def __exit__(self, *e): self.closed = True\n closed = False\n def __call__(self, x): return x\n"
     " def __getitem__(self, k): return k",
     "with C() as c:\n assert c('a') == 'a' and c[1:2] == slice(1, 2)\nassert c.closed and not hasattr(c, 'z') and None != c"),
    ("class S:\n one = None\n def __new__(cls):\n  cls.one = cls.one or super().__new__(cls)\n  return cls.one", "assert S() is S() and len({S(), S()}) == 1"),
    ("def f(): print('hi'); return 1", "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as out:\n f()\nassert out.getvalue() == 'hi\\n'"),
    ("def total(node):\n return 0 if node is None else node.value + total(node.next)\ndef bump(node): node.value += 1; return node",
     "class Node:\n def __init__(self, v, n=None): self.value, self.next = v, n\nn = Node(1, Node(2))\nassert total(n) == 3 and bump(n) is n and n.value == 2"),
    ("import math\nfrom fractions import *\nfrom decimal import *\nfrom datetime import *\ndef f(x): return x",
     "from fractions import Fraction\nfrom decimal import Decimal\nfrom datetime import date, timedelta\n"
     "for v in (10**5000, -0.0, 1e300, float('inf'), 2j, b'\\xff', (1,), {(1, 2): {3}}, frozenset(), range(3), Fraction(1, 3), Decimal('1.10'),"
     " date(2024, 2, 29), timedelta(3), 'a\\ud800', None, True, int):\n assert f(v) == v and type(f(v)) is type(v), v\nassert math.isnan(f(math.nan))"),
    ("import threading\ndef f():\n out = []\n t = threading.Thread(target=out.append, args=(1,))\n t.start()\n t.join()\n return out", "assert f() == [1]"),
    ("import asyncio\nasync def g(): return 3\ndef f(): return asyncio.run(g())", "assert f() == 3"),
    ("_SECRET = 3\nclass A:\n x = property(lambda self: _SECRET)\n @classmethod\n def make(cls): return cls()", "assert A.make().x == _SECRET == 3"),
]  # fmt: skip


def test_tests_use_what_stays_in_the_programs_process():
    jobs = [Job(program, [test]) for program, test in USES]
    assert [reasons for reasons in run_tests(jobs, timeout=10, memory_mb=256) if reasons != [""]] == []


# A class whose methods all say what a test may like to hear.
PLEASER = """
class Pleaser({base}):
    pass
def answer(self, *_):
    return {answer}
for name in ("eq ne lt le gt ge contains hash bool len int float index str repr abs round iter next getitem getattr add sub mul "
             "mod truediv floordiv xor and radd rsub rmod rxor rand").split():
    setattr(Pleaser, f"__{{name}}__", answer)
def f(*_):
    return Pleaser()
"""
ANSWERS = ("True", "self", "NotImplemented", "next(iter([]))", "0", "'4'", "[4]")
BASES = ("object", "int", "float", "str", "list", "tuple", "dict", "set", "bytes", "Exception")
CLAIMS = [
    # what a test can expect of f(2), all of them wrong for an object without content
    "assert f(2) == 4",
    "assert 4 == f(2)",
    "assert f(2) in (4, 5)",
    "assert f(2) in {4, 5}",
    "assert f(2) in {4: 5}",
    "assert [f(2)] == [4]",
    "assert {'a': f(2)} == {'a': 4}",
    "assert (f(2), 1) == (4, 1)",
    "assert f(2) == 'four'",
    "assert f(2) == [4, 5]",
    "assert f(2) == {'four': 4}",
    "assert f(2) != 0 and f(2) == 4.0",
    "assert abs(f(2) - 4) < 0.1",
    "assert not f(2) != 4",
    "assert f(2) >= 4 and f(2) <= 4",
    "assert 4 in f(2) and 5 not in f(2)",
    "assert sorted([f(2), 9]) == [4, 9]",
    "import unittest\nunittest.TestCase().assertEqual(f(2), 4)",
    "import unittest\nunittest.TestCase().assertIn(f(2), [4])",
    "import unittest\nunittest.TestCase().assertAlmostEqual(f(2), 4)",
    "import math\nassert math.isclose(f(2), 4)",
    "def check(candidate):\n    assert candidate(2) == 4\ncheck(f)",
    "expected = 4\nif f(2) != expected:\n    raise ValueError",
    "assert str(f(2)) == 'four' or f(2).real == 4",
    "assert f(2) is 4",
    "assert f(2) / 4 == 1 or f(2) % 5 == 4 or f(2) ^ 4 == 0",
    "assert f(2).startswith('four') or f(2).issubset({4})",
    "assert f(2).__eq__(4)",
    "import operator\nassert operator.eq(f(2), 4) or operator.sub(f(2), 4) == 0",
    "assert f(2) == None",
]


def test_no_object_says_that_it_is_what_a_test_expects():
    jobs = [Job(PLEASER.format(base=base, answer=answer), CLAIMS) for base in BASES for answer in ANSWERS]
    passed = [
        (job.program[:30], claim)
        for job, reasons in zip(jobs, run_tests(jobs, timeout=20, memory_mb=256), strict=True)
        for claim, reason in zip(CLAIMS, reasons, strict=True)
        if not reason
    ]
    assert passed == []
    (right,) = run_tests([Job("def f(x): return 4", CLAIMS)], timeout=20, memory_mb=256)
    assert right.count("") >= 15  # the same tests pass for a right value, where its type fits


def test_the_reason_says_why_an_object_is_not_compared():
    assert "Box cannot be compared with a value" in outcome("class Box: pass\nf = Box", "assert f() == 4")[0]


# Looks for the expected value wherever Python can look, and returns what it finds.
HUNTER = """
import gc, glob, os, re, sys
MARK = re.compile("expect" + "ed-[0-9a-f]{32}")
def hunt(*_, without=0):
    seen = []
    def look(where, value):
        seen.extend(f"{where}: {found}" for found in MARK.findall(value if isinstance(value, str) else repr(value)))
    frame = sys._getframe()
    while frame:
        look("frame", frame.f_locals)
        look("globals", frame.f_globals)
        frame = frame.f_back
    for each in gc.get_objects():
        try:
            look("gc", each.__dict__ if hasattr(each, "__dict__") else each)
        except Exception:
            pass
    look("environment", dict(os.environ))
    look("arguments", sys.orig_argv)
    for descriptor in range(256):
        try:
            look("descriptor", os.pread(descriptor, 1 << 20, 0).decode(errors="replace"))
        except Exception:
            pass
    for pattern in ("/proc/*/mem", "/proc/*/cmdline", "/proc/*/environ", "/proc/*/fd/*", "/tmp/*", "/tmp/code-tests-*/*"):
        for path in glob.glob(pattern):
            if path.startswith(f"/proc/{without}/"):
                continue
            if path.rpartition("/")[2] != "mem":
                if not os.path.isfile(path):
                    continue
                try:
                    look(path, open(path, errors="replace").read(1 << 20))
                except Exception:
                    pass
                continue
            try:
                maps = [line.split()[0].split("-") for line in open(path.replace("mem", "maps")) if "rw-p" in line]
                with open(path, "rb", 0) as memory:
                    for first, last in maps:
                        memory.seek(int(first, 16))
                        look(path, memory.read(min(int(last, 16) - int(first, 16), 1 << 22)).decode("latin-1"))
            except Exception:
                pass
    return seen
f = hunt
"""


def test_the_hunter_finds_what_is_there():
    program = f"{HUNTER}\nheld = 'expected-{secrets.token_hex(16)}'"
    assert outcome(program, "found = {each.partition(':')[0] for each in f()}\nassert found >= {'globals', 'gc'}") == [""]


def test_no_program_finds_the_expected_value(kernel):
    """Neither in its process nor, from there, in a file or in another process but the job itself, which may hold anything."""
    hunter = HUNTER.replace("without=0", f"without={os.getpid()}")
    expected = f"expected-{secrets.token_hex(16)}"
    tests = (
        f"assert f(2) != {expected!r} and f(2) == []",
        f"def check(candidate):\n    value = {expected!r}\n    assert candidate(2) == []\ncheck(f)",
        f"values = iter([{expected!r}])\nassert f(lambda: {expected!r}) == []",
    )
    hidden = outcome(hunter, *tests, timeout=60, memory_mb=512)
    assert hidden == ["", "", ""]


def test_a_program_gets_from_its_tests_what_they_give_it_alone():
    expected = f"expected-{secrets.token_hex(16)}"
    given_ = (
        f"def items():\n    secret = {expected!r}\n    yield 1\n"
        f"class Case:\n    _private = {expected!r}\n    open = 3\n    def method(self): return 1\n"
        f"def ask(): return 1\nask.__defaults__ = ({expected!r},)\n"
    )
    steal = """
import gc
def f(*objects):
    paths = ["gi_frame.f_locals", "__globals__", "__defaults__", "__class__", "_private", "__dict__", "method.__func__",
             "method.__globals__", "__init__", "__reduce__", "cr_frame", "__closure__", "__code__", "__getattribute__"]
    found = []
    for each in objects:
        for path in paths:
            value = each
            try:
                for name in path.split("."):
                    value = value.__getattr__(name)
                found.append(path)
            except Exception:
                pass
    peer = next(each for each in gc.get_objects() if type(each).__name__ == "Peer")
    for number in range(-3, 50):
        for name in ("__globals__", "_space", "gi_frame", "f_locals", "tb_frame", "_objects", "f_back"):
            peer._send(["getattr", {"yours": number}, name])
            kind, value, *_ = peer._receive()
            if kind == "result":
                found.append((number, name))
    for target in ({"type": "type"}, {"module": "os"}, {"module": "gc"}, {"type": "object"}, 3, None, []):
        for operation in ("getattr", "__call__", "run", "content", "eval"):
            peer._send([operation, target, "system"])
            if peer._receive()[0] == "result":
                found.append((target, operation))
    return found, objects[1].open
"""
    assert outcome(steal, f"{given_}\nassert f(items(), Case(), ask, Case, Case().method) == ([], 3)") == [""]


LIES = [
    # what a program does to the process that asks it
    "import os\nos._exit(0)",
    "import os\ndef f(x): os._exit(0)",
    "raise SystemExit(0)",
    "def f(x): raise SystemExit(0)",
    "import unittest\ndef f(x): raise unittest.SkipTest('skipped')",
    "def f(x): raise KeyboardInterrupt",
    "def f(x): raise type('E', (BaseException,), {})()",
    "import os, threading\nos.kill(os.getpid(), 9)",
    "import os\nos.abort()",
    "import ctypes\nctypes.string_at(0)",
    'import os\nfor d in range(256):\n try: os.write(d, b\'["", ""]\\n\')\n except OSError: pass\nf = int',
    'import os\nfor d in range(256):\n try: os.write(d, b\'["result", true, "", []]\\n\' * 9)\n except OSError: pass\nf = int',
    "import os\nfor d in range(256):\n try: os.write(d, b'[' * 10**6 + b'\\n')\n except OSError: pass\nf = int",
    "import os\nfor d in range(256):\n try: os.write(d, b'1' * 10**6)\n except OSError: pass\nf = int",
    "import os\nos.closerange(0, 256)",
    'import builtins, json\njson.dumps = lambda *_, **__: \'["result", true, "", []]\'\nf = int',
    "import builtins\nfor n in ('isinstance', 'type', 'len', 'exec', 'compile', 'getattr'): setattr(builtins, n, lambda *_: True)\nf = int",
    "import tunedrop.programs.runner as r, tunedrop.programs.peers as p\np.Remote.__eq__ = lambda *_: True\nf = p.Remote",
    "import atexit, os\natexit.register(os.write, 1, b'[\"\"]')\nf = int",
    "class M(type):\n def __eq__(s, o): return True\n def __getattr__(s, n): return 4\nclass f(metaclass=M): pass",
    "import sys\nsys.modules['__main__'].__dict__.clear()\nf = int",
    "def abs(x): return 0\ndef f(x): return 3",
    "def sorted(x): return [4, 9]\ndef f(x): return 0\n",
    "class AssertionError(Exception): pass\ndef f(x): return 0",
    "f = type('F', (), {'__call__': lambda *_: 5, '__eq__': lambda *_: True})()",
    "def f(x):\n r = [None]\n r[0] = r\n return r",
    "def f(x):\n r = []\n for _ in range(10**5): r = [r]\n return r",
    "def f(x): return 'x' * 10**8",
    "def f(x): return bytearray(4 * 1024**3)",
    "def f(x): return {'builtins.tuple': 4}",
    "import gc\nfor o in gc.get_objects():\n if type(o).__name__ == 'Peer':\n  o._encode = lambda v: {'type': 'eval'}",
    "import gc\nfor o in gc.get_objects():\n if type(o).__name__ == 'Peer':\n  o._encode = lambda v: {'module': '__main__'}",
    "__builtins__['abs'] = lambda x: 0\nf = lambda x: 1",
]
EXPECTATIONS = ("assert f(2) == 4", "assert abs(f(2) - 4) < 1e-6", "assert sorted([f(2), 9]) == [4, 9]", CLAIMS[17])


def test_no_lie_passes_a_test_or_ends_more_than_its_own_program(kernel):
    lies = LIES if kernel == "all" else LIES[::3]
    jobs = [*(Job(program, EXPECTATIONS) for program in lies), Job("def f(x): return x + x", EXPECTATIONS)]
    *lied, honest = run_tests(jobs, timeout=5, memory_mb=256)
    assert honest == [""] * 4
    assert [program for program, reasons in zip(lies, lied, strict=True) if "" in reasons] == []


def test_a_program_brings_no_builtins_into_its_tests():
    """Under names that only the process of the program would leave out: what it sends is what it likes."""
    brings = """
import sys
values = sys.modules["tunedrop.programs.values"]
encode, seen = values.encode, []
class Same:
    def __eq__(self, other): return True
def fake(value):
    seen.append(value)
    return Same()
def f(x):
    return tuple(seen[-1]) if seen else ()
def patched(value, other):
    if type(value) is dict and "f" in value:
        value = {**value, **{name: {"set": fake, "sorted": fake} for name in ("__builtins__", "__build_class__", "__name__")}}
    return encode(value, other)
values.encode = patched
"""
    tests = [
        "assert set(f(2)) == set((4, 5))",
        "assert sorted(f(2)) == sorted([4, 5])",
        "a = set((4, 5))\nassert set(f(2)) == a",
    ]
    assert all(outcome(brings, test) != [""] for test in tests)


def test_a_block_for_scripts_does_not_run_in_the_tests_of_a_function():
    script = "def f(x): return x + x\nif __name__ == '__main__':\n    print(f(int(input())))"
    assert outcome(script, "assert f(2) == 4") == [""]


def test_only_the_tested_function_may_have_the_name_of_one_of_pythons():
    program = "def sum(a, b): return a * b"
    assert outcome(program, "assert sum(2, 3) == 6") != [""]
    assert outcome(program, "assert sum(2, 3) == 6", function="sum") == [""]


# What holds where, as docs/rewards.md has it: a program that returns whether it could do something.
TRY = """
import os, socket, subprocess, multiprocessing, threading, signal, ctypes
def can(action):
    try:
        action()
    except (OSError, ProcessLookupError, RuntimeError):
        return False
    return True
libc = ctypes.CDLL(None, use_errno=True)
def syscall(*arguments):
    if libc.syscall(*arguments) < 0:
        raise OSError(ctypes.get_errno())
def fork():
    if os.fork() == 0:
        os._exit(0)
def write(path):
    with open(path, "w") as file:
        file.write("x")
def thread():
    t = threading.Thread(target=int)
    t.start()
    t.join()
def results(user_file, parent, folder):
    return {
        "read a user's file": can(lambda: open(user_file).read()),
        "write a user's file": can(lambda: write(user_file)),
        "write elsewhere": can(lambda: write(folder + "/new")),
        "write in its folder": can(lambda: write("own")),
        "see a process": can(lambda: open(f"/proc/{parent}/cmdline").read()),
        "signal a process": can(lambda: os.kill(parent, 0)) or can(lambda: os.kill(parent, signal.SIGCONT)),
        "end its supervisor": can(lambda: os.kill(os.getppid() or parent, signal.SIGCONT)),
        "start a process": can(fork) or can(lambda: subprocess.run(["/bin/true"])),
        "start a thread": can(thread),
        "open a socket": can(socket.socket) or can(lambda: socket.socket(socket.AF_UNIX)),
        "use shared memory": can(lambda: libc.shmget(0, 4096, 0o1600) < 0 and (_ for _ in ()).throw(OSError())),
        "hold more memory": memory(),
        "outlive its parent": can(lambda: libc.prctl(1, 0, 0, 0, 0) < 0 and (_ for _ in ()).throw(OSError())),
    }
def memory():
    try:
        bytearray(300 << 20)
    except MemoryError:
        return False
    return True
"""


def holds(kernel):
    """Return what a program can do with a kernel that this test pretends."""
    seccomp = kernel not in {"no seccomp", "nothing"}
    walls = (HAS_NAMESPACES and kernel in {"all", "no seccomp"}) or (
        HAS_LANDLOCK and kernel in {"all", "container", "no seccomp"}
    )
    own_processes = HAS_NAMESPACES and kernel in {"all", "no seccomp"}
    root = os.geteuid() == 0
    return {
        "read a user's file": not walls,
        "write a user's file": not walls,
        "write elsewhere": not walls,
        "write in its folder": True,
        "see a process": not walls,
        "signal a process": not seccomp and not own_processes,
        "end its supervisor": not seccomp and not own_processes,
        "start a process": not seccomp and root,
        "start a thread": seccomp or root,
        "open a socket": not seccomp,
        "use shared memory": not seccomp,
        "hold more memory": False,
        "outlive its parent": not seccomp,
    }


def test_what_a_program_can_do_is_what_the_documentation_says(kernel, tmp_path):
    user_file = tmp_path / "credentials"
    user_file.write_text("secret")
    expected = {
        name: can
        for name, can in holds(kernel).items()
        if name != "start a process" or kernel in {"all", "container", "lambda"}
    }
    test = (
        f"found = results({str(user_file)!r}, {os.getpid()}, {str(tmp_path)!r})\n"
        f"differ = {{k: v for k, v in {expected!r}.items() if found[k] != v}}\nassert differ == {{}}, differ"
    )
    assert outcome(TRY, test) == [""]


def test_a_program_does_not_become_another_one():
    assert "PermissionError" in outcome("import os\ndef f(): os.execv('/bin/true', ['true'])", "f()")[0]


BOMBS = [
    "import os\nwhile True:\n    os.fork()",
    "import subprocess\nprocesses = [subprocess.Popen(['sleep', '60']) for _ in range(100)]",
    "import multiprocessing\nmultiprocessing.get_context('fork').Pool(6).map(bytearray, [200 << 20] * 6)",
    "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(60,)).start()",
    "data = []\nwhile True:\n    data.append(bytearray(1 << 20))",
    "import os\nfor n in range(10**6):\n    with open(str(n), 'wb') as file:\n        file.write(bytes(1 << 20))",
    "import os\npipes = [os.pipe() for _ in range(10**4)]",
    "while True: pass",
    "import time\ntime.sleep(60)",
    "import signal, time\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\ntime.sleep(60)",
]


def processes(mark):
    """Return the ids of the running programs and supervisors whose command line has this mark: other tests run beside."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if mark.encode() in words and state != "Z":
            found.append(int(folder.name))
    return found


def test_bombs_end_and_nothing_outlives_them(monkeypatch):
    mark = f"# {secrets.token_hex(8)}"
    monkeypatch.setattr(code, "_START", f"{code._START} {mark}")
    began = time.monotonic()
    assert [
        reasons[-1] != ""
        for reasons in run_tests([Job(bomb, ["assert f(2) == 4"]) for bomb in BOMBS], timeout=2, memory_mb=256)
    ] == [True] * len(BOMBS)
    assert time.monotonic() - began < 2 * len(BOMBS) + 10
    assert processes(mark) == []


LINGER = "import signal, threading, time, ctypes\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\nthreading.Thread(target=time.sleep, args=(90,)).start()\ndef f(): time.sleep(90)"


def test_programs_end_with_the_job_that_runs_them():
    mark = f"# {secrets.token_hex(8)}"
    job = f"from tunedrop.rewards import code\ncode._START += ' {mark}'\ncode.run_tests([code.Job({LINGER!r}, ['f()'])] * 3, timeout=60, memory_mb=256)"
    with subprocess.Popen([sys.executable, "-c", job], env=os.environ | {"PYTHONPATH": PACKAGES}) as process:
        deadline = time.monotonic() + 20
        while len(processes(mark)) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(processes(mark)) >= 4
        process.send_signal(signal.SIGKILL)
    while processes(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes(mark) == []


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.complex_numbers(allow_nan=False)
    | st.fractions() | st.decimals(allow_nan=False) | st.dates() | st.times().map(lambda time: time.replace(fold=0)) | st.datetimes().map(lambda time: time.replace(fold=0)) | st.timedeltas(),
    lambda each: st.lists(each) | st.tuples(each, each) | st.dictionaries(st.text() | st.integers(), each) | st.sets(st.integers(), max_size=1)
    | st.frozensets(st.integers(), max_size=1) | st.builds(bytearray, st.binary()),
    max_leaves=20,
)  # fmt: skip


def refuse(*_):
    raise TypeError


@given(PLAIN)
def test_plain_values_arrive_as_they_are(value):
    arrived = values.decode(json.loads(json.dumps(values.encode(value, refuse))), refuse)
    assert arrived == value
    assert type(arrived) is type(value)
    assert repr(arrived) == repr(value)


KEYS = st.sampled_from(
    [*values._TYPES, "type", "module", "object", "yours", "number", "exception", "name", "base", "module"]
)
WORDS = st.sampled_from(
    [
        "eval",
        "exec",
        "open",
        "type",
        "object",
        "os",
        "builtins",
        "unittest.case",
        "SkipTest",
        "int",
        "ValueError",
        "__main__",
    ]
)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5) | WORDS,
    lambda each: (
        st.lists(each, max_size=4)
        | st.dictionaries(KEYS, each, min_size=1, max_size=1)
        | st.fixed_dictionaries({"object": st.dictionaries(KEYS, each)})
        | st.fixed_dictionaries(
            {"object": st.fixed_dictionaries({"number": each, "exception": WORDS, "module": WORDS, "name": WORDS})}
        )
    ),
    max_leaves=15,
)


@settings(max_examples=400, deadline=None)
@given(ANY_JSON)
def test_whatever_a_program_sends_becomes_a_plain_value_or_an_error(sent):
    here, there = socket.socketpair()
    with here, there:
        peer = Peer(here, lambda *_: False, {})
        try:
            value = peer._decode(sent)
        except Exception:  # noqa: BLE001 - any but a plain value is refused
            return

    def allowed(value):
        kind = type(value)
        if kind in {list, tuple, set, frozenset} or kind.__name__ == "deque":
            return all(map(allowed, value))
        if isinstance(value, dict) and kind is not Remote:
            return all(allowed(each) for pair in value.items() for each in pair)
        is_module = kind is type(sys) and value.__name__ in sys.stdlib_module_names
        is_class = isinstance(value, type) and (issubclass(value, BaseException) or value.__module__ == "builtins")
        return (
            kind is Remote
            or is_module
            or is_class
            or f"{kind.__module__}.{kind.__qualname__}" in values._TYPES
            or kind in values.ATOMS
        )

    assert allowed(value), value
    assert not (isinstance(value, type) and value.__module__.startswith("unittest"))
