"""Reads JSON in three shapes: one object per line, objects one after another over many lines, or one array.

A file that is one object with all rows in it (a wrapper, a table by columns) is taken apart (unwrap.py).
"""

import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from tunedrop.dataset import batches
from tunedrop.dataset.batches import Batch, Broken, failure, not_utf8
from tunedrop.dataset.unwrap import Unwrapped, unwrap
from tunedrop.problems import Problem

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


class JsonReader:
    """Reads JSON Lines a block at a time, and other shapes object by object, by the balance of their braces."""

    def __init__(self, file: io.BufferedReader):
        self._file = file
        self._array = False
        self._closed = False
        self._row = 1
        self._line = 1

    def __iter__(self) -> Iterator[Batch]:
        rest = self._file.read(batches.BLOCK_BYTES).removeprefix(b"\xef\xbb\xbf")
        begin = _GAP.match(rest).end()  # type: ignore[union-attr]
        if rest[begin : begin + 1] == b"[":
            self._array = True
            self._line += rest.count(b"\n", 0, begin)
            rest = rest[begin + 1 :]
        final = False
        while not final:
            # A row longer than the block is searched again from its start, each time with twice as many bytes.
            block = self._file.read(max(batches.BLOCK_BYTES, min(len(rest), batches.MAX_ROW_BYTES + 1 - len(rest))))
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
            if self._row == len(values) == 1 and not self._array and (unwrapped := self._unwrap(values[0], rest)):
                yield from self._pieces(unwrapped)
                return
            if values:
                yield Batch(values, self._row, lines)
                self._row += len(values)
            if len(rest) > batches.MAX_ROW_BYTES:
                message = (
                    f"the row has more than {batches.MAX_ROW_BYTES // 1024**2} MiB; this row and the rest were not read"
                )
                yield failure(Problem("ROW_TOO_LARGE", message, "remove the row", line=self._line, row=self._row))
                return
        if self._array and not self._closed:
            problem = Problem("BAD_JSON", "the array is never closed", "the file may be cut off", line=self._line)
            yield failure(problem)

    def _unwrap(self, value: Any, rest: bytes) -> Unwrapped | None:
        """Take the file's only object apart."""
        whole = not rest.strip() and not self._file.peek(1).strip()
        return unwrap(value) if whole and type(value) is dict else None

    def _pieces(self, unwrapped: Unwrapped) -> Iterator[Batch]:
        for start in range(0, len(unwrapped.rows), batches.BATCH_ROWS):
            piece = unwrapped.rows[start : start + batches.BATCH_ROWS]
            yield Batch(piece, start + 1, None, () if start else (unwrapped.note,))

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
        return Broken(not_utf8(error), raw)
    except (msgspec.DecodeError, RecursionError) as error:
        straight = _straighten(raw)
        if straight != raw:
            return _decoded(straight)
        return Broken(_not_json(raw, error), raw)


# What people write where JSON allows no such thing: a pattern, the reason and the hint.
_MISTAKES = (
    (rb"\{\s*'", "the quotes are single quotes, as in Python", "write the rows with json.dumps"),
    (rb"[:\[,]\s*-?(?:NaN|nan|Infinity|inf)\b", "NaN and Infinity are not JSON", "write null, or leave the row out"),
    (
        rb"[:\[,]\s*(?:None|True|False)\b",
        "None, True and False are Python's",
        "write null, true and false (json.dumps does)",
    ),
    (rb",\s*[}\]]", "a comma comes before the closing brace or bracket", "remove the comma"),
    (rb"(?m)^\s*#|//|/\*", "JSON has no comments", "remove the comments"),
    (
        rb"[\x00-\x09\x0b-\x1f]",
        "a text has a tab or another control character as it is",
        'write it as an escape, such as "\\t"',
    ),
    (rb"[{,]\s*[A-Za-z_]\w*\s*:", "a key has no quotes", 'write keys in double quotes: {"question": …}'),
)


def _not_json(raw: bytes, error: Exception) -> Problem:
    """Return what is wrong with a record: the mistake if it is a common one, else the parser's reason."""
    if isinstance(error, RecursionError):
        return Problem("BAD_JSON", "not valid JSON: nested too deeply", "check its braces and brackets")
    text = re.sub(rb'"(?:[^"\\\n]++|\\.)*+"', lambda match: b'"' + re.sub(rb"[^\x00-\x1f]", b"", match[0]) + b'"', raw)
    for pattern, reason, hint in _MISTAKES:
        if re.search(pattern, text):
            return Problem("BAD_JSON", f"not valid JSON: {reason}", hint)
    reason = str(error).removeprefix("JSON is malformed: ")
    return Problem("BAD_JSON", f"not valid JSON: {reason}", "check its quotes, commas and braces")


def _straighten(raw: bytes) -> bytes:
    """Replace curly quotes by straight ones where JSON needs quotes. (Text editors curl them.) Quotes in texts stay."""
    text = re.sub(r"([{\[,:]\s*)[“”]", r'\1"', raw.decode(errors="surrogateescape"))
    return re.sub(r"[“”](?=\s*[,:}\]])", '"', text).encode(errors="surrogateescape")
