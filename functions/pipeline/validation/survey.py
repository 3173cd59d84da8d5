"""What one pass over a dataset's rows finds: lengths, repetitions, tests that are trained on, and tokens."""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from pipeline.validation.duplicates import Duplicates
from pipeline.validation.lengths import summary
from pipeline.validation.tokens import PromptTokens, TokenCounter, TokenizerError, unusable_tokenizer
from tunedrop.config.model import RunConfig
from tunedrop.dataset.rows import Row, Rows
from tunedrop.inference_tests import InferenceTest
from tunedrop.problems import Problem

SHOWN_EXAMPLES = 2
EXAMPLE_CHARACTERS = 4000
SHOWN = 10


class Survey:
    """Looks at every batch of rows (`add`), then at a sample and the whole (`finish`)."""

    def __init__(self, config: RunConfig, tests: Sequence[InferenceTest], counter: TokenCounter | None):
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.stats: dict[str, Any] = {}
        self.tokens: dict[str, Any] = {}
        self.examples: list[dict[str, str]] = []
        self.dropped = 0  # rows that the job will leave out for the length of their prompts
        self._config = config
        self._counter = counter
        self._counting: PromptTokens | None = None
        self._duplicates = Duplicates()
        self._prompts, self._answers = Counter[int](), Counter[int]()
        self._asked = {_question(test): test.id for test in tests}
        self._trained: set[str] = set()  # questions of tests that rows have, too

    def add(self, batch: Rows, encoded: Sequence[bytes], hashes: Sequence[int]) -> None:
        """Look at a batch, whose prompts' texts are given as UTF-8 and as hashes, too."""
        answers = [row["answer"] for row in batch.rows]
        self._duplicates.add(batch.numbers, hashes, answers)
        self._prompts.update([len(text) - text.count("\0") for text in batch.texts])
        self._answers.update(map(len, answers))
        if self._asked:
            asked = {*batch.texts, *(text.partition("\0")[2] for text in batch.texts)}  # without their system messages
            self._trained |= self._asked.keys() & asked
        if len(self.examples) < SHOWN_EXAMPLES:
            self._show(batch.rows)
        if self._counter:
            self._count(batch, list(map(len, encoded)))

    def _show(self, rows: Sequence[Row]) -> None:
        for row in rows[: SHOWN_EXAMPLES - len(self.examples)]:
            prompt = "\n".join(f"{message['role']}: {message['content']}" for message in row["prompt"])
            if self._counter:
                try:
                    (prompt,) = self._counter.render([row["prompt"]])
                except TokenizerError as error:
                    self._give_up(error)
            texts = {"id": row["id"], "prompt": prompt, "answer": row["answer"]}
            self.examples.append({name: text[:EXAMPLE_CHARACTERS] for name, text in texts.items()})

    def _count(self, batch: Rows, sizes: Sequence[int]) -> None:
        assert self._counter is not None
        try:
            self._counting = self._counting or PromptTokens(self._counter, self._config)
            over = self._counting.add(batch.rows, sizes)
        except TokenizerError as error:
            self._give_up(error)
            return
        if self._config.prompt_overflow == "reject":
            self.problems += [
                Problem(
                    "PROMPT_TOO_LONG",
                    f"the prompt has {tokens} tokens, more than the limit of {self._counting.limit}",
                    "shorten it, raise max_prompt_length, or let prompt_overflow drop or truncate such rows",
                    line=batch.lines[index],
                    row=batch.numbers[index],
                )
                for index, tokens in over
            ]
        elif self._config.prompt_overflow == "drop":
            self.dropped += len(over)

    def _give_up(self, error: TokenizerError) -> None:
        self.problems.append(unusable_tokenizer(self._config, error))
        self._counter = self._counting = None

    def finish(self, sample: Sequence[Row], roles: Collection[tuple[str, ...]], variants: Sequence[dict[str, str]]) -> None:
        """Sum up, with a sample of the rows, the orders of roles and the columns that were taken."""
        if not sample:
            return
        duplicates = self._duplicates.found()
        self.stats = {
            "prompt_characters": summary(self._prompts),
            "answer_characters": summary(self._answers),
            "duplicates": duplicates,
            "tests_in_training": sorted(self._asked[question] for question in self._trained),
        }
        self._warn(duplicates, variants)
        if self._counting:
            try:
                self.problems += self._counting.refused(roles)
                self.tokens, warnings = self._counting.result(sample)
                self.warnings += warnings
            except TokenizerError as error:
                self._give_up(error)

    def _warn(self, duplicates: dict[str, Any], variants: Sequence[dict[str, str]]) -> None:
        exact, same = duplicates["exact"], duplicates["same_prompt"]
        if exact:
            first, other = duplicates["exact_rows"][0]
            self.warnings.append(f"{exact} rows repeat another one, row {first} row {other} for example: it counts twice")
        if same:
            first, other = duplicates["same_prompt_rows"][0]
            self.warnings.append(
                f"{same} rows ask what another one asks and expect another answer, rows {other} and {first} for example: "
                "a reward can pay only one of them"
            )
        if tests := self.stats["tests_in_training"]:
            shown = ", ".join(tests[:SHOWN]) + (", …" if len(tests) > SHOWN else "")
            self.warnings.append(
                f"{len(tests)} inference tests ask what rows ask that are trained on: {shown}; "
                "such tests show what was memorised, not what was learnt"
            )
        if len(variants) > 1:
            shown = "; ".join(str(columns) for columns in variants[:3])
            self.warnings.append(f"rows have their prompt and answer in different columns: {shown}")


def _question(test: InferenceTest) -> str:
    """Return what a test asks, as the text of a row's prompt has it."""
    return "\0".join(message["content"] for message in test.prompt if message["role"] != "system")
