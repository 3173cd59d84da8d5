"""Finds duplicate rows, and rows with the same prompt and another answer, in about 24 bytes of memory a row."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from xxhash import xxh3_64_intdigest

SHOWN = 10
_BUCKETS = 256


class Duplicates:
    """Keeps two hashes of each row, of its prompt and of its prompt and answer. `result` compares the hashes of all rows.

    The hashes have 64 bits: the chance that two of ten million different prompts share one is 1 in 370,000.
    """

    def __init__(self) -> None:
        self._numbers = array("I")
        self._prompts = array("Q")
        self._rows = array("Q")

    def add(self, numbers: Sequence[int], prompts: Sequence[int], answers: Iterable[str]) -> None:
        """Add rows: their numbers in the file, the hashes of their prompts, and their answers."""
        self._numbers.extend(numbers)
        self._prompts.extend(prompts)
        self._rows.extend(map(xxh3_64_intdigest, map(str.encode, answers), prompts))  # the prompt's hash is the seed

    def result(self) -> dict[str, Any]:
        """Return how many rows repeat an earlier row, how many repeat only its prompt, and the first pairs of both.

        `{"exact": 2, "same_prompt": 1, "exact_rows": [[row, the row it repeats], …], "same_prompt_rows": [[…], …]}`, and
        `rows`: a digest of all rows in any order.
        """
        # Buckets: one set of all hashes would take ten times the memory of these arrays.
        buckets = [array("I") for _ in range(_BUCKETS)]
        for index, prompt in enumerate(self._prompts):
            buckets[prompt % _BUCKETS].append(index)
        counts, rows = {"exact": 0, "same_prompt": 0}, {"exact": list[list[int]](), "same_prompt": list[list[int]]()}
        for bucket in buckets:
            if len({self._prompts[index] for index in bucket}) < len(bucket):
                pairs = {kind: list[list[int]]() for kind in rows}  # the first of this bucket, which may hold all rows
                for kind, number, first in self._repeated(bucket):
                    counts[kind] += 1
                    if len(pairs[kind]) < SHOWN:
                        pairs[kind].append([number, first])
                rows = {kind: sorted(shown + pairs[kind])[:SHOWN] for kind, shown in rows.items()}
        digest = f"{sum(self._rows) % 2**64:016x}"
        return counts | {f"{kind}_rows": shown for kind, shown in rows.items()} | {"rows": digest}

    def _repeated(self, bucket: "array[int]") -> Iterator[tuple[str, int, int]]:
        """Yield the repetitions of a bucket: the kind, the row's number, and the number of the row that it repeats."""
        first: dict[int, int] = {}
        for index in bucket:
            prompt, row, number = self._prompts[index], self._rows[index], self._numbers[index]
            if row in first:
                yield "exact", number, first[row]
            elif prompt in first:
                yield "same_prompt", number, first[prompt]
            first.setdefault(row, number)
            first.setdefault(prompt, number)
