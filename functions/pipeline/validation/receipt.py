"""The receipt of a validation: its schema, and its assembly from the steps' sections. docs/receipt.md explains the keys."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pipeline.validation.section import Section
from tunedrop.problems import Problem

VERSION = 1
LISTED_ERRORS = 100


class RejectedRows(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The broken rows that an accepted dataset goes without: how many, the first hundred problems, and counts by code."""

    rows: int = 0
    problems: list[Problem] = []
    counts: dict[str, int] = {}


class Receipt(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The findings about a dataset. `version` changes if a key gets another meaning; a new key does not change it."""

    version: int = VERSION
    ok: bool
    rows: int = 0
    errors: list[Problem]
    error_counts: dict[str, int]
    warnings: list[str]
    fixes: list[str] = []
    rejected: RejectedRows = RejectedRows()
    columns: dict[str, str] = {}
    stats: dict[str, Any] = {}
    tokens: dict[str, Any] = {}
    examples: list[dict[str, str]] = []
    rewards: dict[str, Any] = {}
    cost: dict[str, Any] = {}
    heldout: int = 0
    choosing: int = 0
    inference_tests: int = 0


@dataclass
class Tally:
    """Problems of millions of rows: the first hundred in full, and counts of all by code."""

    listed: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, *problems: Problem) -> None:
        """Add problems."""
        self.counts.update(problem.code for problem in problems)
        self.listed += problems[: LISTED_ERRORS - len(self.listed)]

    def __add__(self, other: "Tally") -> "Tally":
        """Return both tallies as one, this one's problems first."""
        return Tally((self.listed + other.listed)[:LISTED_ERRORS], self.counts + other.counts)


def accepts(sections: Sequence[Section]) -> bool:
    """Return whether no section has a problem."""
    return not any(section.problems for section in sections)


def assemble(sections: Sequence[Section]) -> Receipt:
    """Put the sections together to a receipt.

    The key `error_counts` of a section counts its problems by code if the section lists only the first of them.
    """
    content: dict[str, Any] = {}
    errors: list[Problem] = []
    counts: Counter[str] = Counter()
    warnings: list[str] = []
    for section in sections:
        content |= section.receipt
        errors += section.problems
        counts += section.receipt.get("error_counts") or Counter(problem.code for problem in section.problems)
        warnings += section.warnings
    return Receipt(
        **content
        | {
            "ok": not errors,
            "errors": errors[:LISTED_ERRORS],
            "error_counts": dict(sorted(counts.items())),
            "warnings": warnings,
        }
    )
