"""Reads a dataset of any accepted shape as canonical rows.

A canonical row is `{"id": str, "prompt": [{"role", "content"}, …], "answer": str, …other columns}`. With `CANONICAL`
as the config's columns, canonical rows read back unchanged: the trainer reads a user's file and the file that the Lambda
prepared with the same code.
"""

import io
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tunedrop.config.model import Columns, RunConfig
from tunedrop.dataset import messages, options
from tunedrop.dataset.answers import holds_texts, read_answer
from tunedrop.dataset.bad_row import BadRowError
from tunedrop.dataset.batches import Broken
from tunedrop.dataset.columns import MISSING, OWN, Shape, guess_shape, inspect, template_fields, value_at
from tunedrop.dataset.prompts import check_record, check_seen, compose, naming_hint, prompt_value
from tunedrop.dataset.readers import read_batches, refuse, suffix_of
from tunedrop.problems import Problem, nearest
from tunedrop.rewards.registry import ALL_COLUMNS
from tunedrop.rewards.sample import ACCEPTED

Row = dict[str, Any]
CANONICAL = Columns(prompt="{prompt}", answer="answer")
KNOWN_SHAPES = 1000
HEAD_ROWS = 1024


class RejectedRow(NamedTuple):
    """A record that cannot be used: the problem, and the record, or its text if it cannot be decoded."""

    problem: Problem
    record: Any


class Rows(NamedTuple):
    """A batch of canonical rows, and for each row its number in the file, its line, and its prompt's text.

    NUL separates the messages in a text. The config's system prompt is not part of it. `failed` has the problems that ended
    the reading.
    """

    rows: list[Row]
    numbers: list[int]
    lines: list[int | None]
    texts: list[str]
    rejected: list[RejectedRow]
    failed: list[Problem]


class _Reading(NamedTuple):
    """How to read rows with the same columns: their shape, and what the first of these rows show about their options.

    `first_option` is the number of the first option in answers, 0 or 1. `listed`: the prompts list the options already.
    """

    shape: Shape
    first_option: int = 0
    listed: bool = False


class Records:
    """Reads records as canonical rows, and knows the columns that the rows come from."""

    def __init__(self, config: RunConfig):
        self.notes: Counter[str] = Counter()  # how the file was read, with the number of rows
        self.extra: dict[str, None] = {}  # the columns that are neither prompt nor answer
        self._taken: dict[tuple[Any, ...], dict[str, str]] = {}
        self._config = config
        self._kept = config.reward_columns()
        self._system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
        self._readings: dict[tuple[str, ...], _Reading] = {}
        self._orders: set[tuple[str, ...]] = set()  # valid orders of roles

    def batches(self, file: io.BufferedReader, suffix: str) -> Iterator[Rows]:
        """Read a file in batches. A batch has every one of its records as a row or as a rejected record."""
        for values, number, lines, notes in read_batches(file, suffix):
            self.notes.update(notes)
            if not number:
                yield Rows([], [], [], [], [], [value.problem for value in values])
                continue
            if number == 1 and suffix.startswith((".csv", ".tsv")) and (problem := self._no_header(values[0])):
                yield Rows([], [], [], [], [], [problem])
                return
            regular = self._regular(values, number)
            if regular:
                yield Rows(regular[0], list(range(number, number + len(values))), list(lines or []), regular[1], [], [])
                continue
            batch = Rows([], [], [], [], [], [])
            for index, value in enumerate(values):
                line = lines[index] if lines else None
                try:
                    row, prompt = self.row(value, number + index, values)
                except BadRowError as error:
                    problem = msgspec.structs.replace(error.problem, line=line, row=number + index)
                    record = value.text.decode(errors="replace") if isinstance(value, Broken) else value
                    batch.rejected.append(RejectedRow(problem, record))
                    continue
                batch.rows.append(row)
                batch.texts.append(prompt)
                batch.numbers.append(number + index)
                batch.lines.append(line)
            yield batch

    @property
    def roles(self) -> list[tuple[str, ...]]:
        """The orders of roles in the prompts, system prompt included."""
        orders = self._orders | {("user",)}
        return sorted({("system", *order) if self._system and order[0] != "system" else order for order in orders})

    @property
    def variants(self) -> list[dict[str, str]]:
        """The columns that the usable rows come from, by part: one mapping or several, the first row's first."""
        return list(self._taken.values())

    def _no_header(self, first: Any) -> Problem | None:
        """Return a problem if a table's first line is a row: no column is known, and one name is not like a name."""
        if type(first) is not dict:
            return None
        shape = guess_shape(tuple(first), self._config)
        names = [name for name in first if len(name) > 40 or name.rstrip().endswith("?") or name.strip().isdecimal()]
        if shape.prompt or not names:
            return None
        shown = ", ".join(f"'{name[: messages.SHOWN]}'" for name in list(first)[:4])
        hint = "add a first line with the columns' names, such as: question,answer"
        return Problem("NO_HEADER", f"the first line seems to be a row, not the names of columns: {shown}", hint, line=1)

    def _regular(self, values: list[Any], number: int) -> tuple[list[Row], list[str]] | None:
        """Return a batch's rows and texts as `row` does, if all rows have one plain shape and no mistake; else None.

        Whole columns go through loops in C: files of millions of rows are quick.
        """
        if set(map(type, values)) != {dict} or len(names := set(map(tuple, values))) != 1:
            return None
        shape = self._reading(names.pop(), values).shape
        columns = values[0].keys()
        if not shape.plain or not {shape.prompt, shape.answer or shape.prompt} <= columns or self._keeps(shape):
            return None
        prompts: list[Any] = list(map(itemgetter(shape.prompt), values))
        answers: list[Any] | None = list(map(itemgetter(shape.answer), values)) if shape.answer else None
        kinds = set(map(type, prompts))
        if kinds == {str}:
            texts = last = prompts
            prompts = [[{"role": "user", "content": each}] for each in texts]
        elif kinds == {list} and (grouped := self._conversations(prompts, answers)):
            prompts, contents, answers = grouped
            last = [group[-1] for group in contents]
            texts = list(map("\0".join, contents))
        else:
            return None
        if (
            not answers
            or set(map(type, answers)) != {str}
            or _any_odd(answers, shape.answer)
            or _any_blank(last)
            or _unusual(texts)
        ):
            return None
        if self._system:
            prompts = [prompt if prompt[0]["role"] == "system" else self._system + prompt for prompt in prompts]
        if "id" in columns:
            ids = [_id(value["id"], row) for row, value in enumerate(values, number)]
        else:
            ids = [f"row-{row}" for row in range(number, number + len(values))]
        rows = [{"id": i, "prompt": p, "answer": a} for i, p, a in zip(ids, prompts, answers, strict=True)]
        for name in shape.extra:
            for row, value in zip(rows, values, strict=True):
                row[name] = value[name]
        self._take(shape, "")
        return rows, texts

    def _keeps(self, shape: Shape) -> bool:
        """Return whether rewards read the prompt's or the answer's column by its own name."""
        return not self._kept.isdisjoint({shape.prompt, shape.answer, ALL_COLUMNS} - OWN)

    def _conversations(
        self, prompts: list[list[Any]], answers: list[Any] | None
    ) -> tuple[list[list[Any]], list[tuple[str, ...]], list[Any]] | None:
        """Return what `_conversation` returns, if all prompts are plain messages in a valid order; else None."""
        each_message = list(chain.from_iterable(prompts))
        try:
            roles = list(map(itemgetter("role"), each_message))
            texts = list(map(itemgetter("content"), each_message))
            plain = set(map(type, texts)) == {str} and set(map(len, each_message)) == {2}
            plain = plain and set(roles).issubset(messages.ROLES)
        except (TypeError, KeyError, IndexError):
            return None
        lengths = list(map(len, prompts))
        if not plain or 0 in lengths:
            return None
        each_role, each_text = iter(roles), iter(texts)
        orders = {tuple(islice(each_role, length)) for length in lengths}
        contents = [tuple(islice(each_text, length)) for length in lengths]
        if answers is None:
            if any(order[-1] != "assistant" for order in orders):
                return None
            orders = {order[:-1] for order in orders}
            answers = [group[-1] for group in contents]
            contents = [group[:-1] for group in contents]
            prompts = [prompt[:-1] for prompt in prompts]
        if any(map(messages.wrong_order, orders)):
            return None
        self._remember(orders)
        return prompts, contents, answers

    def row(self, record: Any, number: int, batch: list[Any]) -> tuple[Row, str]:
        """Return a record as a canonical row, and its prompt's text. Raises BadRowError.

        `number` is the record's number, and `batch` has it and its neighbours.
        """
        if type(record) is not dict:
            raise _bad(record.problem) if isinstance(record, Broken) else _not_an_object(record)
        reading = self._reading(tuple(record), batch)
        shape = reading.shape
        check_record(record, shape)
        choices = self._options(record, shape)
        prompt, last = self._prompt(record, reading, choices)
        texts = [message["content"] for message in prompt]
        if not texts[-1] or texts[-1].isspace():
            raise BadRowError("EMPTY_PROMPT", "the prompt is empty", "every row needs a prompt")
        check_seen(record, shape, "\n".join(texts))
        if self._system and prompt[0]["role"] != "system":
            prompt = [*self._system, *prompt]
        if shape.tools and record[shape.tools]:
            prompt = [prompt[0] | {"tools": messages.tools(record[shape.tools])}, *prompt[1:]]
        row = {"id": _id(record.get("id"), number), "prompt": prompt}
        row |= self._answer(record, reading, choices, last)
        for name in shape.extra:
            row[name] = record[name]
        if self._keeps(shape):
            row |= {name: record[name] for name in shape[:2] if name and name in record and name not in OWN}
        return row, "\0".join(texts)

    def _answer(
        self, record: dict[str, Any], reading: _Reading, choices: options.Options | None, last: str | None
    ) -> dict[str, Any]:
        """Return the row's `answer`, and the accepted answers if there are several. `last`: an assistant's last message."""
        shape, value = reading.shape, last
        if value is None and shape.answer:
            value = value_at(record, shape.answer)
        found = read_answer(None if value is MISSING else value, shape.answer or "")
        if found.text is None:
            raise self._missing("answer", shape, record)
        if not found.text or found.text.isspace():
            raise BadRowError(
                "EMPTY_ANSWER", "the answer is empty", "every row needs an answer that rewards can compare with"
            )
        self._take(shape, "" if choices else found.key)
        if choices:
            return {"answer": options.letter_of(value, choices, reading.first_option)}
        return {"answer": found.text} | ({ACCEPTED: found.accepted} if found.accepted else {})

    def _options(self, record: dict[str, Any], shape: Shape) -> options.Options | None:
        """Return the row's options; None where the row has none."""
        if not shape.options or all(record.get(name) in (None, "", [], {}) for name in shape.options):
            return None
        return options.read_options(record, shape.options, shape.option_labels)

    def _prompt(
        self, record: dict[str, Any], reading: _Reading, choices: options.Options | None
    ) -> tuple[list[messages.Message], Any]:
        """Return a row's prompt, and its answer where the prompt's last message is the answer."""
        shape, answer = reading.shape, None
        lines = choices.lines if choices and not reading.listed else ""
        value = prompt_value(record, shape, lines)
        if type(value) is str and (held := messages.from_text(value)):
            self.notes["prompts that hold a chat template's marks or messages as JSON, read as messages"] += 1
            value = held
        if type(value) is list:
            has_answer = shape.answer is not None and record.get(shape.answer) is not None
            prompt, answer = self._conversation(value, has_answer)
            prompt = [*prompt[:-1], prompt[-1] | {"content": compose(record, shape, prompt[-1]["content"], lines)}]
        elif type(value) is str:
            prompt = [{"role": "user", "content": compose(record, shape, value, lines)}]
        else:
            raise self._missing("prompt", shape, record)
        if shape.history and record[shape.history]:
            before = messages.history(record[shape.history])
            prompt = [*prompt[:-1], *before, prompt[-1]]
            if problem := messages.wrong_order(tuple(message["role"] for message in prompt)):
                raise _bad(problem)
        if shape.system and record[shape.system] and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": messages.system(record[shape.system])}, *prompt]
        self._remember({tuple(message["role"] for message in prompt)})
        return prompt, answer

    def _conversation(self, value: list[Any], has_answer: bool) -> tuple[list[messages.Message], Any]:
        """Return messages as a prompt, and the answer: without an answer column, the last message is it."""
        prompt, roles, texts = messages.messages_of(value)
        answer = None
        if not has_answer and roles[-1] == "assistant":  # OpenAI chat rows
            answer, prompt, roles = texts[-1], prompt[:-1], roles[:-1]
        if roles not in self._orders and (problem := messages.wrong_order(roles)):
            raise _bad(problem)
        return prompt, answer

    def _remember(self, orders: set[tuple[str, ...]]) -> None:
        if len(self._orders) < KNOWN_SHAPES:
            self._orders |= orders

    def _take(self, shape: Shape, key: str) -> None:
        known = (*shape[:-1], key)
        if known not in self._taken and len(self._taken) < KNOWN_SHAPES:
            columns = shape.columns
            self._taken[known] = columns | {"answer": f"{columns['answer']}.{key}"} if key else columns
            self.extra.update(dict.fromkeys(shape.extra))

    def _reading(self, names: tuple[str, ...], batch: list[Any]) -> _Reading:
        """Return how to read rows with these columns. The batch's rows with these columns decide what names do not say."""
        if names not in self._readings:
            if len(self._readings) >= KNOWN_SHAPES:  # the column names are data: none will come again
                self._readings.clear()
            same = [row for row in batch[:HEAD_ROWS] if type(row) is dict and tuple(row) == names]
            reading = _Reading(inspect(guess_shape(names, self._config), same))
            if reading.shape.options:
                reading = self._with_options(reading, same)
            self._readings[names] = reading
        return self._readings[names]

    def _with_options(self, reading: _Reading, rows: list[dict[str, Any]]) -> _Reading:
        shape, pairs, listed = reading.shape, [], []
        probe = Records(self._config)  # counts no note of a row that is read again
        for row in rows:
            try:
                if choices := self._options(row, shape):
                    pairs.append((value_at(row, shape.answer) if shape.answer else None, choices))
                    prompt = probe._prompt(row, reading._replace(listed=True), None)[0]
                    listed.append(choices.shown_in(prompt[-1]["content"]))
            except BadRowError:
                continue
        return _Reading(shape, options.first_number(pairs), bool(listed) and all(listed))

    def _missing(self, part: str, shape: Shape, record: dict[str, Any]) -> BadRowError:
        code, names = f"NO_{part.upper()}", ", ".join(name[: messages.SHOWN] for name in map(str, record))[:200]
        column = shape.columns.get(part)
        if column in record:
            kind = "null" if record[column] is None else type(record[column]).__name__
            expected = "a string or messages" if part == "prompt" else "a string"
            return BadRowError(code, f"the {part} in '{column}' is {kind}, not {expected}", f"give every row its {part}")
        if column:
            missing = next((field for field in template_fields(column) if value_at(record, field) is MISSING), column)
            message = f"the config names the column '{missing}', and the row has only: {names}"
            return BadRowError(code, message, nearest(missing, record))
        return BadRowError(code, f"no column for the {part} among: {names}", naming_hint(part, record))


def read_rows(path: Path, config: RunConfig) -> Iterator[Row | Problem]:
    """Read the rows and problems of a file. Its suffix is its format: one of DATA_SUFFIXES."""
    suffix = suffix_of(path.name)
    if problem := refuse(path.name, size=0):  # the limit of size is for the Lambda, which has little time
        yield problem
        return
    with path.open("rb") as file:
        for batch in Records(config).batches(file, suffix):
            yield from batch.rows
            yield from (rejected.problem for rejected in batch.rejected)
            yield from batch.failed


# What may be messages, media, or a chat template's marks in a prompt, by the first character. `from_text` looks closer.
_UNUSUAL = {
    "<": ("<|", "<image>", "<video>", "<audio>", "<start_of_turn>", "<\uff5c"),
    "[": ("[INST]", "[{", "[ {", "[\n"),
}


def _unusual(prompts: list[str]) -> bool:
    joined = "\0".join(prompts)  # a search for one character is many times as fast as one for a mark
    return any(mark in joined for first, marks in _UNUSUAL.items() if first in joined for mark in marks)


def _any_odd(answers: list[str], column: str | None) -> bool:
    return _any_blank(answers) or (column is not None and any(holds_texts(each, column) for each in answers))


def _any_blank(texts: list[str]) -> bool:
    return not all(texts) or any(map(str.isspace, texts))


def _id(value: Any, number: int) -> str:
    return f"row-{number}" if value is None else str(value)


def _bad(problem: Problem) -> BadRowError:
    return BadRowError(problem.code, problem.message, problem.hint)


def _not_an_object(value: Any) -> BadRowError:
    hint = 'each row is an object such as {"prompt": "…", "answer": "…"}'
    return BadRowError("NOT_AN_OBJECT", f"expected an object with columns, got a {type(value).__name__}", hint)
