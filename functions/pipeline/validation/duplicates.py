"""Rows that say the same: exact repetitions, and one prompt with several answers, found in about 24 bytes a row."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from xxhash import xxh3_64_intdigest

SHOWN = 10
_BUCKETS = 256


class Duplicates:
    """Keeps a hash of each row's prompt and one of its prompt and answer; `found` compares them when all rows are in.

    Among ten million rows the chance that two different prompts share a hash of 64 bits is one in 370,000.
    """

    def __init__(self) -> None:
        self._numbers = array("I")
        self._prompts = array("Q")
        self._rows = array("Q")

    def add(self, numbers: Sequence[int], prompts: Sequence[int], answers: Iterable[str]) -> None:
        """Add rows by their numbers in the file, the hashes of their prompts, and their answers."""
        self._numbers.extend(numbers)
        self._prompts.extend(prompts)
        self._rows.extend(map(xxh3_64_intdigest, map(str.encode, answers), prompts))  # seeded with the prompt's

    def found(self) -> dict[str, Any]:
        """Return how many rows repeat one above them, how many only its prompt, and the first of both.

        `{"exact": 2, "same_prompt": 1, "exact_rows": [[row, the row it repeats], …], "same_prompt_rows": [[…], …]}`
        """
        # One set of all would take ten times the memory of these arrays, so rows are compared bucket by bucket.
        buckets = [array("I") for _ in range(_BUCKETS)]
        for index, prompt in enumerate(self._prompts):
            buckets[prompt % _BUCKETS].append(index)
        counts, rows = {"exact": 0, "same_prompt": 0}, {"exact": list[list[int]](), "same_prompt": list[list[int]]()}
        for bucket in buckets:
            if len({self._prompts[index] for index in bucket}) < len(bucket):
                found = {kind: list[list[int]]() for kind in rows}  # the first of this bucket, which may have all rows
                for kind, number, first in self._repeated(bucket):
                    counts[kind] += 1
                    if len(found[kind]) < SHOWN:
                        found[kind].append([number, first])
                rows = {kind: sorted(pairs + found[kind])[:SHOWN] for kind, pairs in rows.items()}
        return counts | {f"{kind}_rows": pairs for kind, pairs in rows.items()}

    def _repeated(self, bucket: "array[int]") -> Iterator[tuple[str, int, int]]:
        """Yield which rows of a bucket repeat one above them, in what, and which one."""
        first: dict[int, int] = {}
        for index in bucket:
            prompt, row, number = self._prompts[index], self._rows[index], self._numbers[index]
            if row in first:
                yield "exact", number, first[row]
            elif prompt in first:
                yield "same_prompt", number, first[prompt]
            first.setdefault(row, number)
            first.setdefault(prompt, number)
