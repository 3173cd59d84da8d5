"""Read a dataset in any accepted shape and give back one canonical row shape.

A canonical row is `{"id": str, "prompt": [{"role", "content"}, …], "answer": str, …extra columns}`; a file of canonical
rows reads back unchanged, so the trainer reads with the same code whether a Lambda prepared the file or not.
"""

import csv
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import msgspec

from tunedrop.problems import Problem
from tunedrop.run_config import RunConfig

Row = dict[str, Any]
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
# A JSON array cannot be read piece by piece with line numbers kept, so it is read whole.
MAX_ARRAY_BYTES = 256 * 1024**2
MAX_FIELD_BYTES = 16 * 1024**2
ROLES = ("system", "user", "assistant", "tool")
# Names that hold the prompt and the answer, the likeliest first, compared without case, spaces and underscores.
PROMPT_NAMES = ("prompt", "question", "query", "instruction", "problem", "messages", "input", "text")
ANSWER_NAMES = (
    "answer referenceanswer groundtruth rewardmodel expectedanswer expectedoutput output response completion solution "
    "target expected reference label description"
).split()


class Located(NamedTuple):
    """A record as read, and where: `line` of a text file (where it starts) and `row`, both from 1."""

    line: int | None
    row: int
    value: Any


class Records:
    """The rows of one file, and what the reader found out about its columns.

    Iterating gives canonical rows and, where a record cannot be used, a Problem with its line and row. `columns` says
    which columns were taken for the prompt and the answer, as of the last record read.
    """

    def __init__(self, path: Path, config: RunConfig):
        self.columns: dict[str, str] = {}
        self._config = config
        self._path = path
        self._keys: Any = None

    def __iter__(self) -> Iterator[Row | Problem]:
        suffix = self._path.suffix.lower()
        if suffix not in _READERS:
            yield Problem("UNKNOWN_FORMAT", f"'{self._path.name}' is none of {', '.join(DATA_SUFFIXES)}")
            return
        with self._path.open("rb") as file:
            start = file.read(4)
            file.seek(0)
            if suffix != ".parquet" and start[:2] in {b"\xff\xfe", b"\xfe\xff"}:
                yield Problem("ENCODING", "the file is UTF-16", "save it as UTF-8", line=1)
                return
            for item in _READERS[suffix](file):
                yield item if isinstance(item, Problem) else self._canonical(item)

    def _canonical(self, record: Located) -> Row | Problem:
        problem = partial(Problem, line=record.line, row=record.row)
        if not isinstance(record.value, dict):
            kind = type(record.value).__name__
            return problem("NOT_AN_OBJECT", f"expected an object with columns, found a {kind}")
        if record.value.keys() != self._keys:  # guess once for a table, again where the shape of rows changes
            self._keys = record.value.keys()
            self.columns = guess_columns(record.value, self._config)
        prompt = self._prompt(record.value)
        if isinstance(prompt, str):
            return problem(*_explain(prompt, record.value))
        answer = self._answer(record.value)
        if answer is None and "messages" in self.columns.values() and prompt[-1]["role"] == "assistant":
            answer = prompt.pop()["content"]  # OpenAI chat rows: the last assistant turn is the answer
        if answer is None:
            return problem(*_explain("NO_ANSWER", record.value))
        if not answer.strip():
            return problem("EMPTY_ANSWER", "the answer is empty", "every row needs an answer that rewards can compare with")
        if not prompt or prompt[-1]["role"] != "user":
            return problem(
                "BAD_MESSAGES", "the prompt must end with a user message", "the model answers the last user message"
            )
        if self._config.system_prompt and prompt[0]["role"] != "system":
            prompt.insert(0, {"role": "system", "content": self._config.system_prompt})
        used = set(self.columns.values())
        extra = {
            key: value for key, value in record.value.items() if key not in used and key not in {"id", "prompt", "answer"}
        }
        row_id = record.value.get("id")
        return {
            "id": f"row-{record.row}" if row_id is None else str(row_id),
            "prompt": prompt,
            "answer": answer,
        } | extra

    def _prompt(self, record: dict[str, Any]) -> list[dict[str, str]] | str:
        """Return the prompt as messages, or the code of what is wrong with it."""
        value = record.get(self.columns.get("prompt", ""))
        if isinstance(value, list):
            return _messages(value)
        if not isinstance(value, str):
            return "NO_PROMPT"
        detail = record.get(self.columns.get("input", ""))
        text = f"{value}\n\n{detail}" if isinstance(detail, str) and detail.strip() else value
        return [{"role": "user", "content": text}] if text.strip() else "EMPTY_PROMPT"

    def _answer(self, record: dict[str, Any]) -> str | None:
        value = record.get(self.columns.get("answer", ""))
        if isinstance(value, dict) and "ground_truth" in value:  # SageMaker RLVR and verl: reward_model.ground_truth
            value = value["ground_truth"]
        if value is None or isinstance(value, str):
            return value
        return msgspec.json.encode(value).decode()


def read_rows(path: Path, config: RunConfig) -> Records:
    """Return the rows of `path`, by its suffix (.jsonl, .json, .csv, .parquet), as an iterable of Row and Problem."""
    return Records(path, config)


def guess_columns(record: dict[str, Any], config: RunConfig) -> dict[str, str]:
    """Return which columns hold `prompt`, `answer` and, for instruction tables, `input`; what the config names wins."""
    by_name = {re.sub(r"[\s_-]", "", str(name)).casefold(): name for name in record}
    guessed = {}
    prompt = config.columns.prompt or next((by_name[name] for name in PROMPT_NAMES if name in by_name), None)
    answer = config.columns.answer or next(
        (by_name[name] for name in ANSWER_NAMES if name in by_name and by_name[name] != prompt), None
    )
    if prompt:
        guessed["prompt"] = prompt
    if answer:
        guessed["answer"] = answer
    if prompt and prompt == by_name.get("instruction") and "input" in by_name:
        guessed["input"] = by_name["input"]
    return guessed


def _explain(code: str, record: dict[str, Any]) -> tuple[str, str, str]:
    names = ", ".join(map(str, record))[:200]
    return {
        "NO_PROMPT": (code, f"no prompt among the columns: {names}", "name it in the config: columns: {prompt: …}"),
        "NO_ANSWER": (code, f"no answer among the columns: {names}", "name it in the config: columns: {answer: …}"),
        "EMPTY_PROMPT": (code, "the prompt is empty", "every row needs a prompt"),
        "BAD_MESSAGES": (
            code,
            "the prompt's messages are not a list of {role, content}",
            f"each message needs a role ({', '.join(ROLES)}) and a text as content",
        ),
    }[code]


def _messages(value: list[Any]) -> list[dict[str, str]] | str:
    messages = []
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            return "BAD_MESSAGES"
        content = message.get("content")
        if isinstance(content, list):  # content parts, as in OpenAI's and Nova's rows
            texts: list[Any] = [part.get("text") for part in content if isinstance(part, dict)]
            content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
        if not isinstance(content, str):
            return "BAD_MESSAGES"
        messages.append({"role": message["role"], "content": content})
    return messages or "EMPTY_PROMPT"


# --- JSON: one object per line, objects one after another over many lines, or one array ---

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_decode = msgspec.json.Decoder().decode


def _read_json(file: BinaryIO) -> Iterator[Located | Problem]:
    first = next((line for line in file if line.strip(b"\xef\xbb\xbf \t\r\n")), b"")
    file.seek(0)
    if first.strip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
        yield from _read_array(file)
    else:
        yield from _read_objects(file)


def _read_array(file: BinaryIO) -> Iterator[Located | Problem]:
    raw = file.read(MAX_ARRAY_BYTES + 1).removeprefix(b"\xef\xbb\xbf")
    if len(raw) > MAX_ARRAY_BYTES:
        yield Problem(
            "TOO_LARGE", f"a JSON array may have {MAX_ARRAY_BYTES // 1024**2} MiB", "write one object per line instead"
        )
        return
    try:
        values = msgspec.json.decode(raw, type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        place = re.search(r"byte (\d+)", str(error))
        line = raw.count(b"\n", 0, int(place[1])) + 1 if place else None
        yield Problem("BAD_JSON", f"the array is not valid JSON: {_reason(error)}", line=line)
        return
    position, line = 0, 1
    for row, value in enumerate(values, 1):
        start = raw.index(bytes(value), position)
        line += raw.count(b"\n", position, start)
        position = start
        yield _decoded(bytes(value), line, row)


def _read_objects(file: BinaryIO) -> Iterator[Located | Problem]:
    """One object per line, or pretty-printed objects one after another: an object ends where its braces balance."""
    row, start, depth = 0, 0, 0
    pending: list[bytes] = []
    for number, raw in enumerate(file, 1):
        line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        if not line.strip():
            continue
        if pending and line[:1] == b"{":  # a new object at the margin: the one before it was never closed
            row += 1
            yield Problem("BAD_JSON", "this object is never closed", "check its braces and quotes", line=start, row=row)
            pending, depth = [], 0
        if not pending:
            start = number
        pending.append(line)
        bare = _STRING.sub(b"", line)
        depth += bare.count(b"{") + bare.count(b"[") - bare.count(b"}") - bare.count(b"]")
        if depth <= 0:
            for value in _split(b"".join(pending)):
                row += 1
                yield _decoded(value, start, row)
            pending, depth = [], 0
    if pending:
        yield Problem("BAD_JSON", "this object is never closed", "the file may have been cut off", line=start, row=row + 1)


def _split(text: bytes) -> list[bytes]:
    """Split objects that share a line, such as the end of one and the start of the next."""
    if not re.search(rb"}\s*,?\s*{", _STRING.sub(b"", text)):
        return [text]
    parts, depth, begin = [], 0, 0
    for token in re.finditer(rb'"(?:[^"\\]|\\.)*"|[{}]', text):
        depth += {b"{": 1, b"}": -1}.get(token[0], 0)
        if depth == 0 and token[0] == b"}":
            parts.append(text[begin : token.end()].strip(b" \t\r\n,"))
            begin = token.end()
    rest = text[begin:].strip(b" \t\r\n,")
    return [*parts, rest] if rest else parts


def _decoded(raw: bytes, line: int, row: int) -> Located | Problem:
    try:
        return Located(line, row, _decode(raw))
    except UnicodeDecodeError as error:
        message = f"not UTF-8: byte {error.object[error.start : error.start + 1]!r}"
        return Problem("ENCODING", message, "save the file as UTF-8", line=line, row=row)
    except (msgspec.DecodeError, RecursionError) as error:
        straight = _straighten(raw)
        if straight != raw:
            return _decoded(straight, line, row)
        return Problem("BAD_JSON", f"not valid JSON: {_reason(error)}", line=line, row=row)


def _straighten(raw: bytes) -> bytes:
    """Turn curly quotes that stand where JSON needs straight ones (text editors put them there); others stay."""
    text = re.sub(r"([{\[,:]\s*)[“”]", r'\1"', raw.decode(errors="surrogateescape"))
    return re.sub(r"[“”](?=\s*[,:}\]])", '"', text).encode(errors="surrogateescape")


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error).removeprefix("JSON is malformed: ")


# --- tables ---


def _read_csv(file: BinaryIO) -> Iterator[Located | Problem]:
    csv.field_size_limit(MAX_FIELD_BYTES)
    lines = (line.decode("utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(file))
    reader, row = csv.reader(lines, strict=True), 0
    header: list[str] = []
    try:
        for values in reader:
            if not values:
                continue
            if not header:
                header = values
                continue
            row += 1
            if len(values) != len(header):
                message = f"{len(values)} fields, the header has {len(header)}"
                yield Problem("BAD_CSV", message, "quote fields that contain commas", line=reader.line_num, row=row)
            else:
                yield Located(reader.line_num, row, dict(zip(header, values, strict=True)))
    except csv.Error as error:
        yield Problem("BAD_CSV", f"not valid CSV: {error}", line=reader.line_num, row=row + 1)
    except UnicodeDecodeError as error:
        message = f"not UTF-8: byte {error.object[error.start : error.start + 1]!r}"
        yield Problem("ENCODING", message, "save the file as UTF-8", line=reader.line_num + 1, row=row + 1)


def _read_parquet(file: BinaryIO) -> Iterator[Located | Problem]:
    # 35 MB of shared libraries: only a Parquet file pays for loading them.
    from arro3.io import read_parquet

    row = 0
    try:
        for batch in read_parquet(file):
            for value in batch.to_struct_array().to_pylist():
                row += 1
                yield Located(None, row, value)
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # noqa: BLE001 - arro3 panics outside Exception on a broken file
        yield Problem("BAD_PARQUET", f"not a readable Parquet file: {str(error)[:300]}", row=row + 1)


_Reader = Callable[[BinaryIO], Iterator[Located | Problem]]
_READERS: dict[Literal[".jsonl", ".json", ".csv", ".parquet"] | str, _Reader] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
