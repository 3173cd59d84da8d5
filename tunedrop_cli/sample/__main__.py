"""Writes the samples' rows and inference tests: `python -m tunedrop_cli.sample` rewrites the committed files.

No row of `counting` has a number of its tests, and no row of `additions` a sum of its tests, in either order of the numbers:
the tests do not measure memory.
"""

import json
import random
from collections.abc import Sequence
from itertools import combinations_with_replacement
from pathlib import Path

PHRASINGS = ("What is {a} + {b}?", "How much is {a} plus {b}?", "{a} + {b} = ?")
HELD_OUT_PAIRS = 15
HELD_OUT_NUMBERS = 30


def main() -> None:
    """Write `additions` and `counting` beside this file."""
    write("additions", *additions())
    write("counting", *counting())


def additions() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return rows and tests that ask for sums."""
    generator = random.Random(0)
    pairs = list(combinations_with_replacement(range(10), 2))
    generator.shuffle(pairs)
    held_out, training = pairs[:HELD_OUT_PAIRS], pairs[HELD_OUT_PAIRS:]

    def both_orders(some: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return sorted({order for a, b in some for order in ((a, b), (b, a))})

    rows = [
        {"question": phrasing.format(a=a, b=b), "answer": str(a + b)}
        for a, b in both_orders(training)
        for phrasing in PHRASINGS
    ]
    tests = [
        {"id": f"{a}+{b}", "prompt": generator.choice(PHRASINGS).format(a=a, b=b), "description": str(a + b)}
        for a, b in both_orders(held_out)
    ]
    return rows, tests


def counting() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return rows and tests that ask for the number after a two-digit number."""
    numbers = list(range(10, 100))
    random.Random(0).shuffle(numbers)
    held_out, training = sorted(numbers[:HELD_OUT_NUMBERS]), sorted(numbers[HELD_OUT_NUMBERS:])
    question = "What is one more than {}?"
    rows = [{"question": question.format(number), "answer": str(number + 1)} for number in training]
    tests = [{"id": str(n), "prompt": question.format(n), "description": str(n + 1)} for n in held_out]
    return rows, tests


def write(name: str, rows: Sequence[dict[str, str]], tests: Sequence[dict[str, str]]) -> None:
    """Write a sample's rows and tests."""
    folder = Path(__file__).parent
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.tests.json").write_text(json.dumps({"evaluations": tests}, indent=1) + "\n")


if __name__ == "__main__":
    main()
