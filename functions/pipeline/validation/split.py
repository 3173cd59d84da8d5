"""Splits rows into training and held-out rows. The questions with the lowest hashes are held out, in any order of rows.

Without a test file, the held-out rows have two tasks: some choose the checkpoint, the others judge it as inference tests.
Rows that chose a checkpoint cannot judge it, because the best of many checkpoints owes a part of its score to chance.
"""

import heapq
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import msgspec
from xxhash import xxh3_64_intdigest

from pipeline.publish.comparison import FEW_TESTS
from tunedrop.dataset.rows import Row
from tunedrop.questions import prompt_text, question

MAX_HELDOUT = 256
MOST_CHOOSING = 64  # the trainer's evaluations use no more rows
_POOL = MAX_HELDOUT + 1  # one more than can be held out: its rank is the limit
_ABOVE_ALL = 2**64


def choosing_questions(questions: int) -> int:
    """Return how many of the held-out questions choose the checkpoint: a quarter, if that leaves enough for the gate."""
    return max(0, min(MOST_CHOOSING, questions // 4, questions - FEW_TESTS))


def divide(heldout: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Divide held-out rows into those that choose the checkpoint and those that judge it. No question is in both parts.

    The rows' order in the file does not matter.
    """
    by_row = [question(prompt_text(row["prompt"])) for row in heldout]
    ordered = sorted(set(by_row), key=lambda each: xxh3_64_intdigest(each.encode()))
    chosen = set(ordered[: choosing_questions(len(ordered))])
    choosing = [row for row, each in zip(heldout, by_row, strict=True) if each in chosen]
    return choosing, [row for row, each in zip(heldout, by_row, strict=True) if each not in chosen]


class Split:
    """Writes `train.jsonl` while rows come in, and keeps back at most MAX_HELDOUT + 1 rows.

    All rows with one question have the same rank: no held-out question is among the training rows. A row that was kept back
    comes later in `train.jsonl` than in the dataset. A context manager: the file is complete when it ends after `finish`.
    """

    def __init__(self, folder: Path, fraction: float):
        self._fraction = fraction
        self._train = (folder / "train.jsonl").open("wb")
        self._encoder = msgspec.json.Encoder()
        self._pool: list[tuple[int, int, int, int]] = []  # a heap of (-rank, -number, place in the file, size)
        self._pooled = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed with the object
        self.rows = 0

    @property
    def written(self) -> int:
        """The bytes of training rows written so far."""
        return self._train.tell()

    def add(self, rows: Sequence[Row], ranks: Sequence[int], numbers: Sequence[int]) -> None:
        """Add rows. Their ranks are the hashes of their prompts' sketches; numbers are those in the file."""
        self.rows += len(rows)
        bound = -self._pool[0][0] if len(self._pool) == _POOL else _ABOVE_ALL
        low = {index for index, rank in enumerate(ranks) if rank < bound}
        self._train.write(self._encoder.encode_lines([row for index, row in enumerate(rows) if index not in low]))
        for index in sorted(low):
            entry = self._put(self._encoder.encode(rows[index]) + b"\n", ranks[index], numbers[index])
            if len(self._pool) < _POOL:
                heapq.heappush(self._pool, entry)
            else:
                self._train.write(self._get(heapq.heappushpop(self._pool, entry)))

    def _put(self, raw: bytes, rank: int, number: int) -> tuple[int, int, int, int]:
        place = self._pooled.seek(0, 2)
        self._pooled.write(raw)
        return -rank, -number, place, len(raw)

    def _get(self, entry: tuple[int, int, int, int]) -> bytes:
        self._pooled.seek(entry[2])
        return self._pooled.read(entry[3])

    def finish(self) -> tuple[list[Row], list[Row]]:
        """Write the rest. Return the held-out rows, and a sample of all rows: those kept back at the end."""
        ranks = sorted(-rank for rank, *_ in self._pool)
        count = min(MAX_HELDOUT, round(self.rows * self._fraction))
        limit = ranks[count] if count else 0
        sample, heldout = [], []
        for entry in sorted(self._pool, key=lambda entry: -entry[1]):
            raw = self._get(entry)
            row = msgspec.json.decode(raw)
            sample.append(row)
            if -entry[0] < limit:
                heldout.append(row)
            else:
                self._train.write(raw)
        return heldout, sample

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._train.close()
        self._pooled.close()
