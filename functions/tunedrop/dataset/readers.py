"""Reads the records of a file in batches of decoded values: JSON, delimited tables and Parquet.

Files are read in pieces: memory does not grow with the file. Text formats may be gzipped.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from typing import Any

from tunedrop.dataset.batches import BLOCK_BYTES, Batch, Broken, failure
from tunedrop.dataset.json_records import JsonReader
from tunedrop.dataset.parquet import ParquetError, read_parquet
from tunedrop.dataset.tables import read_table
from tunedrop.problems import Problem

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
DATA_SUFFIXES = (*TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES), ".parquet")
# A broken record can have a few bytes: a large file could hold more of them than the function can process in time.
MAX_BROKEN = 500_000
# The search for duplicates keeps about 24 bytes of each row.
MAX_ROWS = 10_000_000
SAMPLE_HINT = "GRPO needs thousands of rows, not millions: upload a sample of them"
_GIB = 1024**3
# validate_dataset reads these sizes in half of its time, on a third of a core, at the rates of docs/benchmarks.md. A gzipped
# file's size is its unpacked size. The function's /tmp holds twice as much.
MAX_BYTES = {".jsonl": 4 * _GIB, ".json": 4 * _GIB, ".csv": 2 * _GIB, ".tsv": 2 * _GIB, ".parquet": 1 * _GIB}


# How to convert files of other formats, by the suffixes of their names.
CONVERSIONS = {
    "xlsx xls ods numbers": "save the sheet as CSV",
    "tab": "call it .tsv",
    "txt md": "write one JSON object per line, with prompt and answer, and call it .jsonl",
    "ndjson jsonlines jl": "it is JSON Lines: call it .jsonl",
    "yml": "a run config ends with .yaml; a dataset is JSON Lines, JSON, CSV, TSV or Parquet",
    "zip tar tgz bz2 xz zst 7z": "unpack it, or pack it with gzip alone: .jsonl.gz",
    "gz": "JSON Lines, JSON, CSV and TSV can be gzipped: name the format before .gz, such as .jsonl.gz",
    "arrow feather orc avro": "write it as Parquet",
    "pkl pickle npz npy pt": "write it as JSON Lines or Parquet: a pickle can run code, and is never opened",
    "db sqlite sqlite3": "export the table as CSV",
}


def suffix_of(name: str) -> str:
    """Return the suffix of a file name's format in lower case (`.jsonl`, `.csv.gz`, …), empty for other formats."""
    return next((suffix for suffix in DATA_SUFFIXES if name.lower().endswith(suffix)), "")


def refuse(name: str, size: int) -> Problem | None:
    """Return a problem if the file's format is unknown by its name, or if its bytes are too many to check in time."""
    suffix = suffix_of(name)
    if not suffix:
        last = name.lower().rpartition(".")[2]
        hint = next(
            (hint for endings, hint in CONVERSIONS.items() if last in endings.split()),
            "give the file the suffix of its format",
        )
        return Problem("UNKNOWN_FORMAT", f"the file's format is not one of {', '.join(DATA_SUFFIXES)}", hint)
    plain = suffix.removesuffix(".gz")
    limit = MAX_BYTES[plain]
    if size <= limit:
        return None
    message = f"the dataset has {size:,} bytes; the limit for {plain} is {limit:,} bytes"
    return Problem("TOO_LARGE", message, SAMPLE_HINT)


def read_batches(file: io.BufferedReader, suffix: str) -> Iterator[Batch]:
    """Read the records of an open binary file of a format (`suffix`). A Parquet file must be seekable."""
    for batch in _read_parquet(file) if suffix == ".parquet" else _read_text(file, suffix):
        yield batch
        if batch.row + len(batch.values) - 1 > MAX_ROWS:
            message = f"the file has more than {MAX_ROWS:,} rows; the rest was not read"
            yield failure(Problem("TOO_LARGE", message, SAMPLE_HINT))
            return


def _read_text(file: io.BufferedReader, suffix: str) -> Iterator[Batch]:
    if suffix.endswith(".gz"):
        unpacked = _Limited(gzip.GzipFile(fileobj=file), MAX_BYTES[suffix.removesuffix(".gz")])
        file = io.BufferedReader(unpacked, BLOCK_BYTES)
    reader = read_table if suffix.startswith((".csv", ".tsv")) else JsonReader
    try:
        if file.peek(2)[:2] in {b"\xff\xfe", b"\xfe\xff"}:
            yield failure(Problem("ENCODING", "the file is UTF-16", "save it as UTF-8", line=1))
            return
        broken = 0
        for batch in reader(file):
            yield batch
            broken += sum(type(value) is Broken for value in batch.values)
            if broken > MAX_BROKEN:
                message = f"more than {MAX_BROKEN:,} records cannot be read; the rest was not read"
                yield failure(Problem("TOO_MANY_BROKEN", message, "check that the file has the format of its name"))
                return
    except _TooLargeError as error:
        if problem := refuse(suffix, error.size):
            yield failure(problem)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        yield failure(Problem("BAD_GZIP", f"the gzip data is broken: {error}", "the file may be cut off"))


class _TooLargeError(Exception):
    def __init__(self, size: int):
        self.size = size


class _Limited(io.RawIOBase):
    """A gzipped file's unpacked bytes, up to a limit: a few gzipped megabytes can hold terabytes."""

    def __init__(self, file: gzip.GzipFile, limit: int):
        self._file = file
        self._limit = limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._file.readinto(buffer)
        if self._file.tell() > self._limit:
            raise _TooLargeError(self._file.tell())
        return count


def _read_parquet(file: io.BufferedReader) -> Iterator[Batch]:
    values: list[Any] = []
    size, row = 0, 1
    problem: Problem | None = None
    try:
        for rows, length in read_parquet(file):
            values += rows
            size += length
            if size >= BLOCK_BYTES:
                yield Batch(values, row, None)
                row, size, values = row + len(values), 0, []
    except ParquetError as error:
        message, hint = (
            f"not a readable Parquet file: {error}",
            "write it again; if it has large pages or values, write smaller ones",
        )
        problem = Problem("BAD_PARQUET", message, hint, row=row + len(values))
    if values:
        yield Batch(values, row, None)
    if problem:
        yield failure(problem)
