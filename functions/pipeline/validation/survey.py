"""Statistics of a dataset in one pass: lengths, duplicates, inference tests among the training rows, and tokens."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from pipeline.validation.duplicates import Duplicates
from pipeline.validation.lengths import summary
from pipeline.validation.section import Section
from pipeline.validation.tokens import PromptTokens, TokenCounter, TokenizerError, unusable_tokenizer
from tunedrop import control_tokens
from tunedrop.config.model import RunConfig
from tunedrop.dataset.rows import Row, Rows
from tunedrop.inference_tests import InferenceTest
from tunedrop.problems import Problem

SHOWN_EXAMPLES = 2
EXAMPLE_CHARACTERS = 4000
SHOWN = 10


class Survey:
    """Takes every batch of rows (`add`), then returns the section about the whole dataset (`finish`)."""

    def __init__(self, config: RunConfig, tests: Sequence[InferenceTest], counter: TokenCounter | None):
        self.dropped = 0  # rows that the job will drop because their prompts are too long
        self._problems: list[Problem] = []
        self._examples: list[dict[str, str]] = []
        self._config = config
        self._counter = counter
        self._counting: PromptTokens | None = None
        self._duplicates = Duplicates()
        self._prompts, self._answers = Counter[int](), Counter[int]()
        self._tests = tests
        self._controls = counter.controls if counter else control_tokens.KNOWN
        self._odd: dict[str, list[str]] = {}  # the first rows with each oddity of their texts
        self._odd_rows = Counter[str]()

    def add(self, batch: Rows, encoded: Sequence[bytes], hashes: Sequence[int]) -> None:
        """Add a batch of rows, with its prompts' texts as UTF-8 and their hashes."""
        answers = [row["answer"] for row in batch.rows]
        self._duplicates.add(batch.numbers, hashes, answers)
        self._prompts.update([len(text) - text.count("\0") for text in batch.texts])
        self._answers.update(map(len, answers))
        self._look_at(batch)
        if len(self._examples) < SHOWN_EXAMPLES:
            self._show(batch.rows)
        if self._counter:
            self._count(batch, list(map(len, encoded)))

    def _look_at(self, batch: Rows) -> None:
        """Note the rows with oddities. A search through the whole batch is many times as fast as one for each row."""
        prompts = [row["prompt"] for row in batch.rows]
        rest = [*(row["answer"] for row in batch.rows), *(prompt[0]["tools"] for prompt in prompts if "tools" in prompt[0])]
        whole = "\n".join([*batch.texts, *rest])  # NUL is between a prompt's messages, too
        if "\0" not in whole and not any(control_tokens.oddities(whole, self._controls)):
            return
        texts = ["\n".join([*_contents(row["prompt"]), row["answer"]]) for row in batch.rows]
        lines = batch.lines or [None] * len(texts)
        for each, number, line in zip(texts, batch.numbers, lines, strict=True):
            for oddity in control_tokens.oddities(each, self._controls):
                self._odd_rows[oddity] += 1
                if self._odd_rows[oddity] <= SHOWN:
                    self._odd.setdefault(oddity, []).append(f"row {number}" if line is None else f"line {line}")

    def _show(self, rows: Sequence[Row]) -> None:
        for row in rows[: SHOWN_EXAMPLES - len(self._examples)]:
            prompt = "\n".join(f"{message['role']}: {message['content']}" for message in row["prompt"])
            if self._counter:
                try:
                    (prompt,) = self._counter.render([row["prompt"]])
                except TokenizerError as error:
                    self._give_up(error)
            texts = {"id": row["id"], "prompt": prompt, "answer": row["answer"]}
            self._examples.append({name: text[:EXAMPLE_CHARACTERS] for name, text in texts.items()})

    def _count(self, batch: Rows, sizes: Sequence[int]) -> None:
        assert self._counter is not None
        try:
            self._counting = self._counting or PromptTokens(self._counter, self._config)
            over = self._counting.add(batch.rows, sizes)
        except TokenizerError as error:
            self._give_up(error)
            return
        if self._config.prompt_overflow == "reject":
            self._problems += [
                Problem(
                    "PROMPT_TOO_LONG",
                    f"the prompt has {tokens} tokens, more than the limit of {self._counting.limit}",
                    "shorten it, raise max_prompt_length, or set prompt_overflow to drop or truncate",
                    line=batch.lines[index],
                    row=batch.numbers[index],
                )
                for index, tokens in over
            ]
        elif self._config.prompt_overflow == "drop":
            self.dropped += len(over)

    def _give_up(self, error: TokenizerError) -> None:
        self._problems.append(unusable_tokenizer(self._config, error))
        self._counter = self._counting = None

    def finish(self, sample: Sequence[Row], roles: Collection[tuple[str, ...]], repeated: Sequence[str]) -> Section:
        """Return the section. `roles` are the orders of roles in the rows, `repeated` the ids of tests that repeat a row."""
        stats: dict[str, Any] = {}
        tokens: dict[str, Any] = {}
        warnings: list[str] = []
        if sample:
            stats = {
                "prompt_characters": summary(self._prompts),
                "answer_characters": summary(self._answers),
                "duplicates": self._duplicates.result(),
                "tests_in_training": repeated,
            }
            warnings += [*_duplicates(stats["duplicates"]), *_overlap(repeated), *self._oddities()]
            tokens, more = self._finish_tokens(sample, roles)
            warnings += more
        return Section({"stats": stats, "tokens": tokens, "examples": self._examples}, self._problems, warnings)

    def _oddities(self) -> Iterator[str]:
        """Yield a warning for each oddity of rows and of tests."""
        for oddity, places in self._odd.items():
            count = self._odd_rows[oddity]
            yield f"rows with {oddity}: {count} ({', '.join(places)}{', …' * (count > SHOWN)})"
        odd: dict[str, list[str]] = {}
        for test in self._tests:
            for oddity in control_tokens.oddities("\n".join([*_contents(test.prompt), test.reference]), self._controls):
                odd.setdefault(oddity, []).append(test.id)
        for oddity, ids in odd.items():
            yield f"inference tests with {oddity}: {len(ids)} ({_listed(ids)})"

    def _finish_tokens(self, sample: Sequence[Row], roles: Collection[tuple[str, ...]]) -> tuple[dict[str, Any], list[str]]:
        if self._counting is None:
            return {}, []
        try:
            self._problems += [*self._counting.refused(roles), *self._counting.without_tools(sample)]
            return self._counting.result(sample, self._tests)
        except TokenizerError as error:
            self._give_up(error)
            return {}, []


def _duplicates(duplicates: dict[str, Any]) -> Iterator[str]:
    if duplicates["exact"]:
        row, first = duplicates["exact_rows"][0]
        yield f"duplicate rows: {duplicates['exact']} (row {row} repeats row {first}, for example)"
    if duplicates["same_prompt"]:
        row, first = duplicates["same_prompt_rows"][0]
        yield (
            f"rows with an earlier row's prompt and another answer: {duplicates['same_prompt']} (rows {first} and {row}, "
            "for example); a reward can pay only one of the answers"
        )


def _overlap(tests: Sequence[str]) -> Iterator[str]:
    if tests:
        yield (
            f"inference tests that repeat a row's question (up to spacing, case and the form of numbers): {len(tests)} "
            f"({_listed(tests)}); they measure memory, not learning, and do not judge the model (unless "
            "tests.leave_out_rows)"
        )


def _contents(prompt: Sequence[dict[str, str]]) -> Iterator[str]:
    """Yield the texts of a prompt: its messages' contents, and its tools."""
    for message in prompt:
        yield message["content"]
        yield message.get("tools", "")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
