"""Writes the sample's rows and inference tests: `python -m tunedrop_cli.sample` rewrites the committed files.

No row has a sum of the tests, in either order of the numbers: the tests do not measure memory.
"""

import json
import random
from itertools import combinations_with_replacement
from pathlib import Path

PHRASINGS = ("What is {a} + {b}?", "How much is {a} plus {b}?", "{a} + {b} = ?")
HELD_OUT_PAIRS = 15


def main() -> None:
    """Write `additions.jsonl` and `additions.tests.json` beside this file."""
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
    folder = Path(__file__).parent
    (folder / "additions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "additions.tests.json").write_text(json.dumps({"evaluations": tests}, indent=1) + "\n")


if __name__ == "__main__":
    main()
