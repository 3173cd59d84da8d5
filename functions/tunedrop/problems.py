"""What is wrong with a user's input, said so that they can act on it."""

from collections.abc import Iterable
from difflib import get_close_matches

import msgspec


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """One finding about a dataset, a config or inference tests; a line of a receipt.

    `line` counts lines of a text file and `row` counts records, both from 1; `key` is a dotted config key or a column.
    """

    code: str
    message: str
    hint: str = ""
    line: int | None = None
    row: int | None = None
    key: str | None = None

    def __str__(self) -> str:
        """Render as one line: place, message, hint."""
        place = f"line {self.line}: " if self.line else f"row {self.row}: " if self.row else ""
        return f"{place}{self.message}" + (f" ({self.hint})" if self.hint else "")


class RejectedError(Exception):
    """A user's input cannot be used; `problems` says why. It becomes a receipt, never a stack trace."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = list(problems)
        super().__init__("; ".join(map(str, self.problems)))


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint that names the valid names most like `name`."""
    valid = sorted(valid)
    close = get_close_matches(name, valid, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return "valid keys: " + ", ".join(valid) if len(valid) <= 30 else f"none of the {len(valid)} valid keys is like it"
