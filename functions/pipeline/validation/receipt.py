"""The receipt of a validation: its schema, and its assembly from the steps' sections. docs/receipt.md explains the keys."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from pipeline.validation.section import Section
from tunedrop.problems import Problem

VERSION = 1
LISTED_ERRORS = 100
SHOWN_PLACES = 3


class RejectedRows(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The broken rows that an accepted dataset lacks: how many, the first hundred different problems, counts by code."""

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
    reward_columns: list[str] = []
    unused_columns: list[str] = []
    stats: dict[str, Any] = {}
    tokens: dict[str, Any] = {}
    examples: list[dict[str, str]] = []
    rewards: dict[str, Any] = {}
    warm_start: dict[str, Any] = {}
    cost: dict[str, Any] = {}
    left_out: int = 0
    heldout: int = 0
    choosing: int = 0
    inference_tests: int = 0


class Tally:
    """Problems of millions of rows: the first hundred different ones, and counts of all by code."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[tuple[str, str, str], Problem] = {}
        self._times: Counter[tuple[str, str, str]] = Counter()
        self._places: dict[tuple[str, str, str], list[int]] = {}

    def add(self, *problems: Problem) -> None:
        """Add problems."""
        for problem in problems:
            self.counts[problem.code] += 1
            known = (problem.code, problem.message, problem.hint)
            if known not in self._first:
                if len(self._first) == LISTED_ERRORS:
                    continue
                self._first[known], self._places[known] = problem, []
            self._times[known] += 1
            if len(self._places[known]) < SHOWN_PLACES and (place := problem.line or problem.row):
                self._places[known].append(place)

    @property
    def listed(self) -> list[Problem]:
        """The first hundred different problems. Rows with the same mistake are one problem with their count."""
        return [
            problem
            if self._times[known] == 1
            else msgspec.structs.replace(problem, count=self._times[known], places=self._places[known])
            for known, problem in self._first.items()
        ]


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
