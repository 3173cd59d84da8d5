"""Reads a dataset of any accepted shape as canonical rows.

A canonical row is `{"id": str, "prompt": [{"role", "content"}, …], "answer": str, …extra columns}`. Canonical rows read back
unchanged: the trainer reads a user's file and the file that the Lambda prepared with the same code.
"""

import io
import re
from collections.abc import Iterator
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tunedrop.config.model import RunConfig
from tunedrop.dataset.readers import Broken, read_batches, refuse, suffix_of
from tunedrop.problems import Problem, nearest

Row = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
# Column names of the prompt and the answer, best first, compared without case, spaces, `_` and `-`.
PROMPT_NAMES = ("prompt", "question", "query", "instruction", "problem", "messages", "input", "text")
ANSWER_NAMES = (
    "answer referenceanswer groundtruth rewardmodel expectedanswer expectedoutput output response completion solution "
    "target expected reference label description"
).split()
OWN = frozenset({"id", "prompt", "answer"})
KNOWN_SHAPES = 1000
SHOWN = 60


class Shape(NamedTuple):
    """The roles of a row's columns: the names of the columns of prompt, answer and input, None without such a column."""

    prompt: str | None
    answer: str | None
    input: str | None  # only in instruction tables
    extra: tuple[str, ...]

    @property
    def columns(self) -> dict[str, str]:
        """The columns that a canonical row is made from, by part."""
        named = {"prompt": self.prompt, "answer": self.answer, "input": self.input}
        return {name: column for name, column in named.items() if column}


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


class Records:
    """The rows of one open file, and the columns that they come from."""

    def __init__(self, file: io.BufferedReader, suffix: str, config: RunConfig):
        self._taken: dict[tuple[str | None, ...], dict[str, str]] = {}
        self._file = file
        self._suffix = suffix
        self._config = config
        self._system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
        self._shapes: dict[tuple[str, ...], Shape] = {}
        self._orders: set[tuple[str, ...]] = set()  # valid orders of roles

    def batches(self) -> Iterator[Rows]:
        """Read the file in batches. A batch has every one of its records as a row or as a rejected record."""
        for values, number, lines in read_batches(self._file, self._suffix):
            if not number:
                yield Rows([], [], [], [], [], [value.problem for value in values])
                continue
            regular = self._regular(values, number)
            if regular:
                yield Rows(regular[0], list(range(number, number + len(values))), list(lines or []), regular[1], [], [])
                continue
            batch = Rows([], [], [], [], [], [])
            for index, value in enumerate(values):
                line = lines[index] if lines else None
                try:
                    row, text = self._canonical(value, number + index)
                except _BadRowError as error:
                    problem = msgspec.structs.replace(error.problem, line=line, row=number + index)
                    record = value.text.decode(errors="replace") if isinstance(value, Broken) else value
                    batch.rejected.append(RejectedRow(problem, record))
                    continue
                batch.rows.append(row)
                batch.texts.append(text)
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

    def _regular(self, values: list[Any], number: int) -> tuple[list[Row], list[str]] | None:
        """Return a batch's rows and texts as `_canonical` does, if all rows have one shape and no mistake; else None.

        Whole columns go through loops in C: files of millions of rows are quick.
        """
        if set(map(type, values)) != {dict} or len(names := set(map(tuple, values))) != 1:
            return None
        shape = self._shape(names.pop())
        columns = values[0].keys()
        if shape.prompt not in columns or shape.input or (shape.answer and shape.answer not in columns):
            return None
        prompts: list[Any] = list(map(itemgetter(shape.prompt), values))
        answers: list[Any] | None = [_answer(value[shape.answer]) for value in values] if shape.answer else None
        kinds = set(map(type, prompts))
        if kinds == {str}:
            texts = last = prompts
            prompts = [[{"role": "user", "content": text}] for text in texts]
        elif kinds == {list} and (grouped := self._conversations(prompts, answers)):
            prompts, contents, answers = grouped
            last = [group[-1] for group in contents]
            texts = list(map("\0".join, contents))
        else:
            return None
        if not answers or set(map(type, answers)) != {str} or _any_blank(answers) or _any_blank(last):
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
        self._take(shape)
        return rows, texts

    def _conversations(
        self, prompts: list[list[Any]], answers: list[Any] | None
    ) -> tuple[list[list[Any]], list[tuple[str, ...]], list[Any]] | None:
        """Return what `_conversation` returns, if all prompts are plain messages in a valid order; else None."""
        messages = list(chain.from_iterable(prompts))
        try:
            roles = list(map(itemgetter("role"), messages))
            texts = list(map(itemgetter("content"), messages))
            plain = set(map(type, texts)) == {str} and set(map(len, messages)) == {2} and set(roles).issubset(ROLES)
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
        if any(map(_wrong_order, orders)):
            return None
        self._remember(orders)
        return prompts, contents, answers

    def _canonical(self, record: Any, number: int) -> tuple[Row, str]:
        """Return a record as a canonical row, and its prompt's text. Raises _BadRowError."""
        if type(record) is not dict:
            raise _BadRowError(record.problem if isinstance(record, Broken) else _not_an_object(record))
        shape = self._shape(tuple(record))
        value, answer = record.get(shape.prompt), record.get(shape.answer)
        if type(value) is list:
            prompt, texts, answer = self._conversation(value, answer)
        elif type(value) is str:
            detail = record.get(shape.input) if shape.input else None
            text = f"{value}\n\n{detail}" if isinstance(detail, str) and detail.strip() else value
            prompt, texts = [{"role": "user", "content": text}], [text]
        else:
            raise _BadRowError(self._missing("prompt", shape, record))
        if not texts[-1] or texts[-1].isspace():
            raise _BadRowError(Problem("EMPTY_PROMPT", "the prompt is empty", "every row needs a prompt"))
        answer = _answer(answer)
        if answer is None:
            raise _BadRowError(self._missing("answer", shape, record))
        if not answer or answer.isspace():
            hint = "every row needs an answer that rewards can compare with"
            raise _BadRowError(Problem("EMPTY_ANSWER", "the answer is empty", hint))
        if self._system and prompt[0]["role"] != "system":
            prompt = self._system + prompt
        row = {"id": _id(record.get("id"), number), "prompt": prompt, "answer": answer}
        for name in shape.extra:
            row[name] = record[name]
        self._take(shape)
        return row, "\0".join(texts)

    def _conversation(self, value: list[Any], answer: Any) -> tuple[list[dict[str, str]], list[str], Any]:
        """Return messages as a prompt, their texts, and the answer: without an answer column, the last message is it."""
        prompt, roles, texts = _messages(value)
        if answer is None and roles[-1] == "assistant":  # OpenAI chat rows
            answer, prompt, roles = texts.pop(), prompt[:-1], roles[:-1]
        if roles not in self._orders:
            if problem := _wrong_order(roles):
                raise _BadRowError(problem)
            self._remember({roles})
        return prompt, texts, answer

    def _remember(self, orders: set[tuple[str, ...]]) -> None:
        if len(self._orders) < KNOWN_SHAPES:
            self._orders |= orders

    def _take(self, shape: Shape) -> None:
        if shape[:3] not in self._taken and len(self._taken) < KNOWN_SHAPES:
            self._taken[shape[:3]] = shape.columns

    def _shape(self, names: tuple[str, ...]) -> Shape:
        """Return the shape of rows with these columns."""
        if names not in self._shapes:
            if len(self._shapes) >= KNOWN_SHAPES:  # the column names are data: none will come again
                self._shapes.clear()
            self._shapes[names] = guess_shape(names, self._config)
        return self._shapes[names]

    def _missing(self, part: str, shape: Shape, record: dict[str, Any]) -> Problem:
        code, names = f"NO_{part.upper()}", ", ".join(map(str, record))[:200]
        column = shape.columns.get(part)
        if column in record:
            kind = "null" if record[column] is None else type(record[column]).__name__
            expected = "a string or messages" if part == "prompt" else "a string"
            return Problem(code, f"the {part} in '{column}' is {kind}, not {expected}", f"give every row its {part}")
        if column:
            return Problem(
                code, f"the config names the column '{column}', and the row has only: {names}", nearest(column, record)
            )
        return Problem(
            code, f"no column for the {part} among: {names}", f"name the column in the config: columns: {{{part}: …}}"
        )


class _BadRowError(Exception):
    def __init__(self, problem: Problem):
        self.problem = problem


def read_rows(path: Path, config: RunConfig) -> Iterator[Row | Problem]:
    """Read the rows and problems of a file. Its suffix is its format: one of DATA_SUFFIXES."""
    suffix = suffix_of(path.name)
    if problem := refuse(path.name, size=0):  # the limit of size is for the Lambda, which has little time
        yield problem
        return
    with path.open("rb") as file:
        for batch in Records(file, suffix, config).batches():
            yield from batch.rows
            yield from (rejected.problem for rejected in batch.rejected)
            yield from batch.failed


def guess_shape(names: tuple[str, ...], config: RunConfig) -> Shape:
    """Return the columns of prompt, answer and, in instruction tables, input. The config's names win."""
    by_name = {re.sub(r"[\s_-]", "", str(name)).casefold(): name for name in names}
    prompt = config.columns.prompt or next((by_name[name] for name in PROMPT_NAMES if name in by_name), None)
    answer = config.columns.answer or next(
        (by_name[name] for name in ANSWER_NAMES if name in by_name and by_name[name] != prompt), None
    )
    detail = by_name.get("input") if prompt and prompt == by_name.get("instruction") else None
    used = OWN | {prompt, answer, detail}
    return Shape(prompt, answer, detail, tuple(name for name in names if name not in used))


def _messages(value: list[Any]) -> tuple[list[dict[str, str]], tuple[str, ...], list[str]]:
    """Return messages with only role and content, their roles, and their contents."""
    try:
        roles = tuple([message["role"] for message in value])
        texts = [message["content"] for message in value]
        hash(roles)  # raises TypeError if a role is a list or an object
        plain = sum(map(len, value)) == 2 * len(value) and set(map(type, texts)) == {str}
    except (TypeError, KeyError):
        plain = False
    if plain and "developer" not in roles:
        return value, roles, texts
    if not value:
        raise _BadRowError(Problem("EMPTY_PROMPT", "the prompt has no messages", "every row needs a prompt"))
    messages = [_message(message, number) for number, message in enumerate(value, 1)]
    return messages, tuple([message["role"] for message in messages]), [message["content"] for message in messages]


def _message(message: Any, number: int) -> dict[str, str]:
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        shown = ", ".join(map(str, message))[:SHOWN] if isinstance(message, dict) else f"a {type(message).__name__}"
        text = f"message {number} needs a role and a content, and has: {shown}"
        raise _BadRowError(Problem("BAD_MESSAGES", text, 'a message is {"role": "user", "content": "…"}'))
    role, content = message["role"], message["content"]
    if isinstance(content, list):  # content parts, as in OpenAI's and Nova's rows
        texts: list[Any] = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    if not isinstance(content, str) or not isinstance(role, str):
        part = "role" if isinstance(content, str) else "content"
        raise _BadRowError(
            Problem("BAD_MESSAGES", f"the {part} of message {number} is not a string", "Tunedrop trains on text only")
        )
    # OpenAI's newer models call the system message "developer".
    return {"role": "system" if role == "developer" else role, "content": content}


def _wrong_order(roles: tuple[str, ...]) -> Problem | None:
    """Return the problem with the order of a prompt's roles, or None."""
    unknown = next((role for role in roles if role not in ROLES), None)
    if unknown is not None:
        message = f"the role '{unknown[:SHOWN]}' is not one of {', '.join(ROLES)}"
        return Problem("BAD_MESSAGES", message, nearest(unknown, ROLES))
    order = ", ".join(roles[:8]) + (", …" if len(roles) > 8 else "")
    turns = roles[1:] if roles[:1] == ("system",) else roles
    if "system" in turns:
        return Problem("ROLE_ORDER", f"a system message must come first; the roles are: {order}", "move it to the beginning")
    if not turns or turns[-1] != "user":
        hint = "the model answers the last user message"
        return Problem("ROLE_ORDER", f"the prompt must end with a user message; the roles are: {order or 'none'}", hint)
    if turns[0] != "user":
        return Problem(
            "ROLE_ORDER", f"the first turn must be the user's; the roles are: {order}", "remove the turns before it"
        )
    return None


def _any_blank(texts: list[str]) -> bool:
    return not all(texts) or any(map(str.isspace, texts))


def _id(value: Any, number: int) -> str:
    return f"row-{number}" if value is None else str(value)


def _answer(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and "ground_truth" in value:  # SageMaker RLVR and verl: reward_model.ground_truth
        value = value["ground_truth"]
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and value[0].get("role") == "assistant":
        value = value[0].get("content")  # TRL's conversational completion
    if value is None or isinstance(value, str):
        return value
    return msgspec.json.encode(value).decode()


def _not_an_object(value: Any) -> Problem:
    hint = 'each row is an object such as {"prompt": "…", "answer": "…"}'
    return Problem("NOT_AN_OBJECT", f"expected an object with columns, got a {type(value).__name__}", hint)
