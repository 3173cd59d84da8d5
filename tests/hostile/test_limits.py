"""However large or dense a file is, checking it takes bounded memory and time.

Each is checked in a process of its own, which says how much its peak memory grew over what it had before.
"""

import gzip
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile import CSV, GOOD, parquet_bomb

MB = 1_000_000
MAX_GROWTH_MB = 300
CHECK = """
import json, resource, sys, tempfile
from pathlib import Path
import arro3.io, yaml
from pipeline.validation.terms import Terms
from pipeline.validation.validate import Submission, read_config, validate

def peak():  # unlike ru_maxrss, which begins with that of the process that started this one
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6

before = peak()
path = Path(sys.argv[1])
config, about_config = read_config(b"", "base")
with tempfile.TemporaryDirectory(dir=path.parent) as folder, path.open("rb") as data:
    folder = Path(folder)
    files = {"tests": None, "model": None, "rewards": folder, "beside": "", "folder": folder}
    submission = Submission(path.name, path.stat().st_size, lambda: data, config, about_config, **files)
    receipt = validate(submission, Terms(["ml.g5.4xlarge"]))
grown = peak() - before + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000  # and of Parquet
print(json.dumps({"codes": sorted(receipt.error_counts), "rows": receipt.rows, "grown": grown}))
"""


def repeated(before: bytes, filling: bytes, size: int, after: bytes) -> Iterator[bytes]:
    yield before
    block = filling * (MB // len(filling))
    for _ in range(size // len(block)):
        yield block
    yield after


def gzipped(parts: Iterator[bytes]) -> Iterator[bytes]:
    yield from (gzip.compress(part, 1) for part in parts)  # members one after another are one file


def large_value() -> bytes:
    """A small Parquet file with one value of 300 MB, more than the reader's memory."""
    import io

    import pyarrow
    from pyarrow import parquet

    out = io.BytesIO()
    table = pyarrow.table({"question": ["x" * (300 * MB)], "answer": ["a"]})
    parquet.write_table(table, out, compression="zstd", use_dictionary=False, write_statistics=False)
    return out.getvalue()


def many_columns() -> bytes:
    row = {f"column {n}": n for n in range(200_000)} | {"question": "a", "answer": "b"}
    return GOOD + json.dumps(row).encode() + b"\n"


CASES: dict[str, tuple[str, Callable[[], Iterator[bytes]], set[str]]] = {
    "one line of 100 MB": (
        ".jsonl",
        lambda: repeated(GOOD + b'{"question": "', b"x", 100 * MB, b'", "answer": "a"}\n'),
        {"ROW_TOO_LARGE"},
    ),
    "100 MB that are no JSON": (".jsonl", lambda: repeated(b"", b"x", 100 * MB, b""), {"ROW_TOO_LARGE"}),
    "100 MB of brackets": (".json", lambda: repeated(b"[", b"[]", 100 * MB, b"]"), {"TOO_MANY_BROKEN", "NOT_AN_OBJECT"}),
    "100 MB of white space": (".json", lambda: repeated(b"", b" ", 100 * MB, b""), {"NO_ROWS", "ROW_TOO_LARGE"}),
    "an array of one text of 100 MB": (".json", lambda: repeated(b'["', b"x", 100 * MB, b'"]'), {"ROW_TOO_LARGE"}),
    "a CSV field of 100 MB": (".csv", lambda: repeated(CSV + b'"', b"x", 100 * MB, b'",1\n'), {"BAD_CSV"}),
    "a CSV line of 100 MB": (".csv", lambda: repeated(CSV, b"x", 100 * MB, b",1\n"), {"BAD_CSV"}),
    "a CSV header of 100 MB": (".csv", lambda: repeated(b"", b"x,", 100 * MB, b"\n"), {"BAD_CSV"}),
    "100 MB of commas": (".csv", lambda: repeated(CSV, b",", 100 * MB, b"\n"), {"BAD_CSV"}),
    "a few hundred kilobytes of gzip with one line of 500 MB": (
        ".jsonl.gz",
        lambda: gzipped(repeated(b'{"question": "', b"x", 500 * MB, b'", "answer": "a"}\n')),
        {"ROW_TOO_LARGE"},
    ),
    "a Parquet bomb of many values": (".parquet", lambda: iter([parquet_bomb(300_000)]), {"REWARD_PAYS_WRONG"}),
    "a Parquet bomb of one value": (".parquet", lambda: iter([large_value()]), {"BAD_PARQUET"}),
    "a Parquet bomb of large values": (
        ".parquet",
        lambda: iter([parquet_bomb(1000, 50 * MB)]),
        {"BAD_PARQUET"},
    ),
    "200,000 columns": (".jsonl", lambda: iter([many_columns()]), set()),
}
SLOW: dict[str, tuple[str, Callable[[], Iterator[bytes]], set[str]]] = {
    "rows of 50,000 shapes": (
        ".jsonl",
        lambda: (b'{"question": "a%d", "answer": "b", "c%d": 1}\n' % (n, n) for n in range(50_000)),
        set(),
    ),
    "500,000 broken rows": (".jsonl", lambda: repeated(b"", b'{"question": }\n', 7 * MB, b""), {"BAD_JSON"}),
    "100 MB of opening braces": (".jsonl", lambda: repeated(b"", b"{", 100 * MB, b""), {"ROW_TOO_LARGE", "BAD_JSON"}),
    "10 million rows": (
        ".jsonl",
        lambda: (b'{"question":"%d","answer":"%d"}\n' % (n, n + 1) for n in range(10_000_000)),
        set(),
    ),
    "10 million rows in CSV": (
        ".csv",
        lambda: iter([b"question,answer\n", *(b"%d,%d\n" % (n, n + 1) for n in range(10_000_000))]),
        set(),
    ),
    "gzip of more than a dataset may have": (
        ".jsonl.gz",
        lambda: gzipped(b'{"question":"a","answer":"b"}\n' * 33_000 for _ in range(4400)),
        {"TOO_LARGE"},
    ),
    "a Parquet bomb of 4 GB": (".parquet", lambda: iter([parquet_bomb()]), {"REWARD_PAYS_WRONG"}),
}


def check(folder: Path, suffix: str, parts: Iterator[bytes], seconds: float) -> dict[str, Any]:
    path = folder / f"data{suffix}"

    def write() -> None:
        with path.open("wb") as file:
            file.writelines(parts)

    # In a process of its own: making a bomb takes more memory than reading it.
    process = multiprocessing.get_context("fork").Process(target=write)
    process.start()
    process.join()
    assert process.exitcode == 0
    try:
        command = [sys.executable, "-c", CHECK, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    finally:
        path.unlink()
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_large_and_dense_files(tmp_path: Path, name: str) -> None:
    suffix, parts, codes = CASES[name]
    found = check(tmp_path, suffix, parts(), seconds=120)
    assert found["grown"] < MAX_GROWTH_MB
    assert bool(found["codes"]) == bool(codes)
    assert set(found["codes"]) <= codes


@pytest.mark.soak
@pytest.mark.parametrize("name", SLOW)
def test_very_large_files(tmp_path: Path, name: str) -> None:
    suffix, parts, codes = SLOW[name]
    found = check(tmp_path, suffix, parts(), seconds=900)
    assert found["grown"] < MAX_GROWTH_MB
    assert bool(found["codes"]) == bool(codes)
    assert set(found["codes"]) <= codes
