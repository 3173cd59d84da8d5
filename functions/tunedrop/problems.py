"""Problems: a user's mistakes, each with a message and a hint that says what to do."""

from collections.abc import Iterable
from difflib import get_close_matches

import msgspec


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """One mistake in a dataset, a config or inference tests: a line of a receipt.

    `line` is the line of a text file and `row` the record, both counted from 1. `key` is a dotted config key or a column.
    Of `count` rows with the same mistake, `line` and `row` are those of the first one. `places` are the lines of the first
    few, or their rows in a format without lines.
    """

    code: str
    message: str
    hint: str = ""
    line: int | None = None
    row: int | None = None
    key: str | None = None
    count: int = 1
    places: list[int] = []

    @property
    def extent(self) -> str:
        """How many rows have the mistake, and the first of them; empty for one row."""
        if self.count == 1:
            return ""
        shown = ", ".join(map(str, self.places)) + (", …" if self.count > len(self.places) else "")
        return f"{self.count} rows: {'lines' if self.line else 'rows'} {shown}"

    def __str__(self) -> str:
        """Return one line: position, message, hint."""
        position = f"line {self.line}: " if self.line else f"row {self.row}: " if self.row else ""
        extent = f" [{self.extent}]" if self.extent else ""
        return f"{position}{self.message}" + (f" ({self.hint})" if self.hint else "") + extent


class RejectedError(Exception):
    """Tunedrop cannot use a user's input. `problems` go into the receipt; the user sees no stack trace."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = list(problems)
        super().__init__("; ".join(map(str, self.problems)))


def is_misspelt(name: str, valid: Iterable[str]) -> bool:
    """Whether a name differs from a valid one by about a letter."""
    return bool(get_close_matches(name, valid, n=1, cutoff=0.9))


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint: the valid name most like `name`, or the list of valid names."""
    valid = sorted(valid)
    close = get_close_matches(name, valid, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return "valid keys: " + ", ".join(valid) if len(valid) <= 30 else f"none of the {len(valid)} valid keys is similar"
