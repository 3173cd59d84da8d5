"""Reads the records of a file in batches of decoded values: JSON in three shapes, CSV and Parquet.

Files are read in pieces: memory does not grow with the file. Text formats may be gzipped.
"""

import csv
import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from tunedrop.dataset.parquet import ParquetError, read_parquet
from tunedrop.problems import Problem

TEXT_SUFFIXES = (".jsonl", ".json", ".csv")
DATA_SUFFIXES = (*TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES), ".parquet")
BLOCK_BYTES = 64 * 1024  # fits a core's cache, because several passes read a block
BATCH_ROWS = 1024
MAX_ROW_BYTES = 16 * 1024**2
# A broken record can have a few bytes: a large file could hold more of them than the function can process in time.
MAX_BROKEN = 500_000
# The search for duplicates keeps about 24 bytes of each row.
MAX_ROWS = 10_000_000
# The limit for one line of CSV. Each comma takes at least eight bytes of memory.
MAX_COMMAS = 1_000_000
SAMPLE_HINT = "GRPO needs thousands of rows, not millions: upload a sample of them"
_GIB = 1024**3
# validate_dataset reads these sizes in half of its time, on a third of a core, at the rates of docs/benchmarks.md. A gzipped
# file's size is its unpacked size. The function's /tmp holds twice as much.
MAX_BYTES = {".jsonl": 4 * _GIB, ".json": 4 * _GIB, ".csv": 2 * _GIB, ".parquet": 1 * _GIB}


class Broken(NamedTuple):
    """A record that cannot be decoded: the problem, and the record's bytes."""

    problem: Problem
    text: bytes = b""


# How to convert files of other formats, by the suffixes of their names.
CONVERSIONS = {
    "xlsx xls ods numbers": "save the sheet as CSV",
    "tsv tab": "write it as CSV, with commas",
    "txt md": "write one JSON object per line, with prompt and answer, and call it .jsonl",
    "ndjson jsonlines jl": "it is JSON Lines: call it .jsonl",
    "yml": "a run config ends with .yaml; a dataset is JSON Lines, JSON, CSV or Parquet",
    "zip tar tgz bz2 xz zst 7z": "unpack it, or pack it with gzip alone: .jsonl.gz",
    "gz": "JSON Lines, JSON and CSV can be gzipped: name the format before .gz, such as .jsonl.gz",
    "arrow feather orc avro": "write it as Parquet",
    "pkl pickle npz npy pt": "write it as JSON Lines or Parquet: a pickle can run code, and is never opened",
    "db sqlite sqlite3": "export the table as CSV",
}


class Batch(NamedTuple):
    """Consecutive records: decoded values or Broken records, the row number of the first one (from 1), and their lines.

    `lines` is None if the format has no lines. Row 0 marks the end of a broken file: one Broken value about no record.
    """

    values: list[Any]
    row: int
    lines: Sequence[int] | None


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
            yield _failure(Problem("TOO_LARGE", message, SAMPLE_HINT))
            return


def _read_text(file: io.BufferedReader, suffix: str) -> Iterator[Batch]:
    if suffix.endswith(".gz"):
        unpacked = _Limited(gzip.GzipFile(fileobj=file), MAX_BYTES[suffix.removesuffix(".gz")])
        file = io.BufferedReader(unpacked, BLOCK_BYTES)
    reader = _read_csv if suffix.startswith(".csv") else _JsonReader
    try:
        if file.peek(2)[:2] in {b"\xff\xfe", b"\xfe\xff"}:
            yield _failure(Problem("ENCODING", "the file is UTF-16", "save it as UTF-8", line=1))
            return
        broken = 0
        for batch in reader(file):
            yield batch
            broken += sum(type(value) is Broken for value in batch.values)
            if broken > MAX_BROKEN:
                message = f"more than {MAX_BROKEN:,} records cannot be read; the rest was not read"
                yield _failure(Problem("TOO_MANY_BROKEN", message, "check that the file has the format of its name"))
                return
    except _TooLargeError as error:
        yield _failure(refuse(suffix, error.size))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        yield _failure(Problem("BAD_GZIP", f"the gzip data is broken: {error}", "the file may be cut off"))


def _failure(problem: Problem | None) -> Batch:
    """Return the batch that ends a broken file."""
    assert problem is not None
    return Batch([Broken(problem)], 0, None)


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


# --- JSON: one object per line, objects one after another over many lines, or one array ---

# Everything up to the next brace outside a string. A string ends with its line at the latest. An object at the margin ends
# the match: the object before it was never closed.
_SKIPPED = rb'(?:[^{}"\n]++|"(?:[^"\\\n]++|\\[^\n])*+(?:"|\\?(?=\n)|\\?\Z)|\n(?!\{))*+'
_SKIP = re.compile(_SKIPPED)
_BRACE = re.compile(_SKIPPED + rb"[{}]")
_GAP = re.compile(rb"[\s,]*+")
_JUNK_IN_LINE = re.compile(rb"[^\n]++")
_JUNK_IN_ARRAY = re.compile(rb'(?:"(?:[^"\\\n]++|\\[^\n])*+"?|[^\s,\]{"]++)')
_OPEN, _CLOSE_ARRAY = ord("{"), ord("]")
_decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder()
_DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class _JsonReader:
    """Reads JSON Lines a block at a time, and other shapes object by object, by the balance of their braces."""

    def __init__(self, file: io.BufferedReader):
        self._file = file
        self._array = False
        self._closed = False
        self._row = 1
        self._line = 1

    def __iter__(self) -> Iterator[Batch]:
        rest = self._file.read(BLOCK_BYTES).removeprefix(b"\xef\xbb\xbf")
        begin = _GAP.match(rest).end()  # type: ignore[union-attr]
        if rest[begin : begin + 1] == b"[":
            self._array = True
            self._line += rest.count(b"\n", 0, begin)
            rest = rest[begin + 1 :]
        final = False
        while not final:
            # A row longer than the block is searched again from its start, each time with twice as many bytes.
            block = self._file.read(max(BLOCK_BYTES, min(len(rest), MAX_ROW_BYTES + 1 - len(rest))))
            final = not block
            text, rest = rest + block, b""
            end = len(text) if final else text.rfind(b"\n") + 1
            values = None if self._array else _one_per_line(text[:end])
            if values:
                lines: Sequence[int] = range(self._line, self._line + len(values))
                self._line += len(values)
                rest = text[end:]
            else:
                values, lines, rest = self._objects(text, final)
            if values:
                yield Batch(values, self._row, lines)
                self._row += len(values)
            if len(rest) > MAX_ROW_BYTES:
                message = f"the row has more than {MAX_ROW_BYTES // 1024**2} MiB; this row and the rest were not read"
                yield _failure(Problem("ROW_TOO_LARGE", message, "remove the row", line=self._line, row=self._row))
                return
        if self._array and not self._closed:
            problem = Problem("BAD_JSON", "the array is never closed", "the file may be cut off", line=self._line)
            yield _failure(problem)

    def _objects(self, text: bytes, final: bool) -> tuple[list[Any], list[int], bytes]:
        """Return the records that end in `text`, the lines that they begin in, and the rest of the text."""
        records: list[bytes | Broken] = []
        lines: list[int] = []
        at = 0
        while True:
            start = _GAP.match(text, at).end()  # type: ignore[union-attr]
            self._line += text.count(b"\n", at, start)
            if start == len(text):
                return _decode_all(records), lines, b""
            if self._array and text[start] == _CLOSE_ARRAY:
                self._closed, at = True, start + 1
                continue
            end, why = _end_of_object(text, start) if text[start] == _OPEN else self._end_of_junk(text, start)
            if why and end == len(text) and not final:
                return _decode_all(records), lines, text[start:]
            raw = text[start:end]
            records.append(Broken(why, raw) if why else raw)
            lines.append(self._line)
            self._line += raw.count(b"\n")
            at = end

    def _end_of_junk(self, text: bytes, start: int) -> tuple[int, Problem]:
        match = (_JUNK_IN_ARRAY if self._array else _JUNK_IN_LINE).match(text, start)
        end = match.end() if match else start + 1
        shown = text[start : min(end, start + 40)].decode(errors="replace")
        hint = 'each row is an object such as {"prompt": "…", "answer": "…"}'
        return end, Problem("NOT_AN_OBJECT", f"expected an object in braces, got: {shown}", hint)


def _one_per_line(text: bytes) -> list[Any] | None:
    """Decode lines with one object each; None for other shapes.

    A line with two objects and an empty line pass as two lines: the rows are right, and line numbers are off by one.
    """
    try:
        values = _decoder.decode_lines(text)
    except _DECODE_ERRORS:
        return None
    return values if len(values) == text.count(b"\n") + (not text.endswith(b"\n")) else None


def _end_of_object(text: bytes, start: int) -> tuple[int, Problem | None]:
    """Return the end of the object that begins at `start`. If it is never closed: how far it goes, and the problem."""
    depth, at = 0, start
    while match := _BRACE.match(text, at):
        at = match.end()
        depth += 1 if text[at - 1] == _OPEN else -1
        if depth == 0:
            return at, None
    end: int = _SKIP.match(text, at).end()  # type: ignore[union-attr]
    hint = "the file may be cut off" if end == len(text) else "check its braces and quotes"
    return end, Problem("BAD_JSON", "this object is never closed", hint)


def _decode_all(records: list[bytes | Broken]) -> list[Any]:
    if not any(isinstance(item, Broken) for item in records):
        try:
            values = _decoder.decode_lines(b"\n".join(records))  # type: ignore[arg-type]
        except _DECODE_ERRORS:
            values = []
        if len(values) == len(records):
            return values
    return [item if isinstance(item, Broken) else _decoded(item) for item in records]


def _decoded(raw: bytes) -> Any:
    """Decode one record; Broken if that fails."""
    try:
        return _decoder.decode(raw)
    except UnicodeDecodeError as error:
        return Broken(_not_utf8(error), raw)
    except (msgspec.DecodeError, RecursionError) as error:
        straight = _straighten(raw)
        if straight != raw:
            return _decoded(straight)
        nested = isinstance(error, RecursionError)
        reason = "nested too deeply" if nested else str(error).removeprefix("JSON is malformed: ")
        return Broken(Problem("BAD_JSON", f"not valid JSON: {reason}", "check its quotes, commas and braces"), raw)


def _not_utf8(error: UnicodeDecodeError) -> Problem:
    byte = error.object[error.start : error.start + 1]
    return Problem("ENCODING", f"not UTF-8: byte {byte!r}", "save the file as UTF-8")


def _straighten(raw: bytes) -> bytes:
    """Replace curly quotes by straight ones where JSON needs quotes. (Text editors curl them.) Quotes in texts stay."""
    text = re.sub(r"([{\[,:]\s*)[“”]", r'\1"', raw.decode(errors="surrogateescape"))
    return re.sub(r"[“”](?=\s*[,:}\]])", '"', text).encode(errors="surrogateescape")


# --- tables ---


def _csv_lines(file: io.BufferedReader) -> Iterator[str]:
    """Decode a file's lines. Raises csv.Error for more than MAX_COMMAS commas: the fields would fill the memory."""
    for number, line in enumerate(iter(lambda: file.readline(MAX_ROW_BYTES), b"")):
        if line.count(b",") > MAX_COMMAS:
            raise csv.Error(f"a line has more than {MAX_COMMAS:,} commas")
        yield line.decode("utf-8-sig" if number == 0 else "utf-8")


def _read_csv(file: io.BufferedReader) -> Iterator[Batch]:
    csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader(_csv_lines(file), strict=True)
    header: list[str] = []
    values: list[Any] = []
    lines: list[int] = []
    problem: Problem | None = None
    row, line = 1, 1
    try:
        for fields in reader:
            begin, line = line, reader.line_num + 1
            if not fields:
                continue
            if not header:
                header = fields
                if problem := _repeated_column(header):
                    break
                continue
            values.append(_csv_record(header, fields))
            lines.append(begin)
            if len(values) == BATCH_ROWS:
                yield Batch(values, row, lines)
                row, values, lines = row + len(values), [], []
    except csv.Error as error:
        problem = Problem("BAD_CSV", f"not valid CSV: {error}", "check its quotes", line=line, row=row + len(values))
    except UnicodeDecodeError as error:
        problem = msgspec.structs.replace(_not_utf8(error), line=reader.line_num + 1, row=row + len(values))
    if values:
        yield Batch(values, row, lines)
    if problem:
        yield _failure(problem)


def _repeated_column(header: list[str]) -> Problem | None:
    name, times = Counter(header).most_common(1)[0]
    return Problem("BAD_CSV", f"two columns are called '{name}'", "rename one of them", line=1) if times > 1 else None


def _csv_record(header: list[str], fields: list[str]) -> Any:
    if len(fields) == len(header):
        return dict(zip(header, fields, strict=True))
    message = f"the row has {len(fields)} fields, and the header has {len(header)}"
    return Broken(Problem("BAD_CSV", message, "quote fields that contain commas"), ",".join(fields).encode())


def _read_parquet(file: io.BufferedReader) -> Iterator[Batch]:
    values: list[Any] = []
    size, row = 0, 1
    problem: Problem | None = None
    try:
        for rows, length in read_parquet(file):
            values += rows
            size += length
            if len(values) >= BATCH_ROWS or size >= MAX_ROW_BYTES:
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
        yield _failure(problem)
