"""The inference tests that judge the tuned model: not those that repeat a row of the dataset, training or held-out.

A test that repeats a training row measures memory. One that repeats a held-out row has chosen the checkpoint.
"""

from collections.abc import Collection, Sequence
from math import ceil

import msgspec

from pipeline.publish.comparison import FEW_TESTS
from tunedrop.config.model import RunConfig
from tunedrop.dataset.rows import Row
from tunedrop.inference_tests import InferenceTest, tests_from_rows
from tunedrop.questions import outline, prompt_text, question

MOST_HELDOUT_FRACTION = 0.5  # RunConfig.heldout_fraction's maximum


class RepeatedTests:
    """Finds the rows that ask a test's question (`find`), then has the ids of the tests that repeat a row.

    A test without a system message of its own also repeats a row that has one.
    """

    def __init__(self, tests: Sequence[InferenceTest], config: RunConfig):
        self._ids: dict[str, list[str]] = {}
        self._outlines: set[bytes] = set()
        self._found: set[str] = set()
        self.rows = 0  # how many rows ask a test's question
        for test in tests:
            added = test.prompt[0] == {"role": "system", "content": config.system_prompt}
            text = prompt_text(test.prompt[1:] if added else test.prompt)
            self._ids.setdefault(question(text), []).append(test.id)
            self._outlines.add(outline(text.encode()))

    def find(self, texts: Sequence[str], encoded: Sequence[bytes]) -> set[int]:
        """Return the indices of the rows that ask a test's question.

        The rows are their prompts' texts (as in `tunedrop.dataset.rows.Rows`), also as UTF-8.
        """
        if not self._ids:
            return set()
        repeating = set()
        for index, (text, raw) in enumerate(zip(texts, encoded, strict=True)):
            # The whole prompt, and the prompt without its first message.
            asked = []
            if outline(raw) in self._outlines:
                asked.append(question(text))
            if outline(raw.partition(b"\0")[2]) in self._outlines:
                asked.append(question(text.partition("\0")[2]))
            if found := self._ids.keys() & asked:
                self._found |= found
                repeating.add(index)
        self.rows += len(repeating)
        return repeating

    def ids(self) -> list[str]:
        """Return the ids of the tests that repeat a row, in order."""
        return sorted(name for each in self._found for name in self._ids[each])


def judges_from_file(tests: Sequence[InferenceTest], repeated: Collection[str]) -> tuple[list[InferenceTest], list[str]]:
    """Return a test file's tests, with marks on those whose ids are `repeated`, and a warning if the others are too few."""
    marked = [msgspec.structs.replace(test, judges=test.judges and test.id not in repeated) for test in tests]
    found = _questions([test for test in marked if test.judges])
    warning = (
        f"different questions in the inference tests that judge the model: {found}; the gate needs at least {FEW_TESTS} to "
        f"decide: add {FEW_TESTS - found}"
    )
    return marked, [warning] if found < FEW_TESTS else []


def judges_from_rows(judging: Sequence[Row], rows: int, fraction: float) -> tuple[list[InferenceTest], list[str]]:
    """Return held-out rows as tests, and a warning if they are too few. `fraction` of the dataset's `rows` is held out."""
    tests = tests_from_rows(judging)
    found = _questions(tests)
    return tests, [_few_rows(found, rows, fraction)] if 0 < found < FEW_TESTS else []


def _few_rows(found: int, rows: int, fraction: float) -> str:
    more, larger = ceil(rows * FEW_TESTS / found) - rows, ceil(100 * fraction * FEW_TESTS / found) / 100
    other = f", set heldout_fraction to {larger:g}" if larger <= MOST_HELDOUT_FRACTION else ""
    return (
        f"there is no test file, and only {found} different held-out questions judge the model; the gate needs at least "
        f"{FEW_TESTS} to decide: add about {more} rows{other}, or upload a test file"
    )


def _questions(tests: Sequence[InferenceTest]) -> int:
    return len({question(prompt_text(test.prompt)) for test in tests})
