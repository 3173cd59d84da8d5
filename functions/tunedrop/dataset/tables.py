"""Reads delimited tables: CSV, and tables with tabs, semicolons or bars between the columns."""

import csv
import io
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import msgspec

from tunedrop.dataset import batches
from tunedrop.dataset.batches import BATCH_ROWS, Batch, Broken, failure, not_utf8
from tunedrop.problems import Problem

# The limit for one record. Each delimiter takes at least eight bytes of memory.
MAX_FIELDS = 1_000_000
# A gzipped file of some megabytes can hold billions of empty lines.
MAX_EMPTY = 1_000_000
_EMPTY = {b"\n", b"\r\n"}
DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
PEEKED_BYTES = 64 * 1024


class _Lines:
    """A file's decoded lines. Raises csv.Error for a record above the limits: a quoted field may go on over many lines."""

    def __init__(self, file: io.BufferedReader, delimiter: str):
        self._file = file
        self._delimiter = delimiter.encode()
        self._first = True
        self._bytes = self._fields = self._empty = 0

    def begin_record(self) -> None:
        """Count bytes and fields from here."""
        self._bytes = self._fields = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        # One byte more than a record may have: a longer line is refused before the csv module sees any of it.
        line = self._file.readline(batches.MAX_ROW_BYTES + 1)
        if not line:
            raise StopIteration
        self._empty += line in _EMPTY
        if self._empty > MAX_EMPTY:
            raise csv.Error(f"more than {MAX_EMPTY:,} lines are empty")
        self._bytes += len(line)
        self._fields += line.count(self._delimiter)
        if self._fields > MAX_FIELDS:
            raise csv.Error(f"a record has more than {MAX_FIELDS:,} {DELIMITERS[self._delimiter.decode()]}")
        if self._bytes > batches.MAX_ROW_BYTES:
            raise csv.Error(f"a record has more than {batches.MAX_ROW_BYTES // 1024**2} MiB, or a quote is never closed")
        first, self._first = self._first, False
        return line.decode("utf-8-sig" if first else "utf-8")


def _delimiter(file: io.BufferedReader) -> tuple[str, bool]:
    """Return a table's delimiter, and whether its first line only names the delimiter (`sep=;`, which Excel reads).

    The delimiter is the first of DELIMITERS that splits the header and the next record into the same number of fields.
    """
    text = file.peek(PEEKED_BYTES)[:PEEKED_BYTES].decode("utf-8", errors="replace").removeprefix("\ufeff")
    first = text.partition("\n")[0].strip()
    if first[:4].casefold() == "sep=" and first[4:] in DELIMITERS:
        return first[4:], True
    for delimiter in DELIMITERS:
        try:
            widths = [
                len(fields) for fields in islice(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), 3) if fields
            ]
        except csv.Error:
            continue
        if widths and widths[0] > 1 and len(set(widths[:2])) == 1:
            return delimiter, False
    return ",", False


def read_table(file: io.BufferedReader) -> Iterator[Batch]:
    """Read a table whose first line has the columns' names. A column without a name is called by its place: column 3."""
    csv.field_size_limit(batches.MAX_ROW_BYTES)
    delimiter, named = _delimiter(file)
    source = _Lines(file, delimiter)
    reader = csv.reader(source, strict=True, delimiter=delimiter)
    notes = () if delimiter == "," else (f"the columns are separated by {DELIMITERS[delimiter]}",)
    header: list[str] = []
    values: list[Any] = []
    lines: list[int] = []
    problem: Problem | None = None
    row, line = 1, 1
    try:
        line += len(next(reader)) if named else 0
        for fields in reader:
            source.begin_record()
            begin, line = line, reader.line_num + 1
            if not fields:
                continue
            if not header:
                header = _names(fields)
                if problem := _repeated_column(header):
                    break
                continue
            values.append(_record(header, fields, delimiter))
            lines.append(begin)
            if len(values) == BATCH_ROWS:
                yield Batch(values, row, lines, notes)
                row, values, lines, notes = row + len(values), [], [], ()
    except csv.Error as error:
        problem = Problem("BAD_CSV", f"not valid CSV: {error}", "check its quotes", line=line, row=row + len(values))
    except UnicodeDecodeError as error:
        problem = msgspec.structs.replace(not_utf8(error), line=reader.line_num + 1, row=row + len(values))
    if values:
        yield Batch(values, row, lines, notes)
    if problem:
        yield failure(problem)


def _names(fields: list[str]) -> list[str]:
    """Return a header's names; a column without a name is called by its place."""
    return [name.strip() or f"column {place}" for place, name in enumerate(fields, 1)]


def _repeated_column(header: list[str]) -> Problem | None:
    name, times = Counter(header).most_common(1)[0]
    return Problem("BAD_CSV", f"two columns are called '{name}'", "rename one of them", line=1) if times > 1 else None


def _record(header: list[str], fields: list[str], delimiter: str) -> Any:
    if len(fields) == len(header):
        return dict(zip(header, fields, strict=True))
    message = f"the row has {len(fields)} fields, and the header has {len(header)}"
    problem = Problem("BAD_CSV", message, f"quote fields that contain {DELIMITERS[delimiter]}")
    return Broken(problem, delimiter.join(fields).encode())
