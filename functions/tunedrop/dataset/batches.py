"""What the readers of all formats share: batches of records, broken records, and limits."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tunedrop.problems import Problem

BLOCK_BYTES = 64 * 1024  # fits a core's cache, because several passes read a block
BATCH_ROWS = 128
MAX_ROW_BYTES = 16 * 1024**2


class Broken(NamedTuple):
    """A record that cannot be decoded: the problem, and the record's bytes."""

    problem: Problem
    text: bytes = b""


class Batch(NamedTuple):
    """Consecutive records: decoded values or Broken records, the row number of the first one (from 1), and their lines.

    `lines` is None if the format has no lines. Row 0 marks the end of a broken file: one Broken value about no record.
    `notes` say how the file was read.
    """

    values: list[Any]
    row: int
    lines: Sequence[int] | None
    notes: Sequence[str] = ()


def failure(problem: Problem) -> Batch:
    """Return the batch that ends a broken file."""
    return Batch([Broken(problem)], 0, None)


def not_utf8(error: UnicodeDecodeError) -> Problem:
    """Return the problem with bytes that are not UTF-8."""
    byte = error.object[error.start : error.start + 1]
    letter = byte.decode("cp1252", errors="ignore")
    hint = f"save the file as UTF-8; in Windows-1252 the byte is {letter}" if letter else "save the file as UTF-8"
    return Problem("ENCODING", f"not UTF-8: byte {byte!r}", hint)
