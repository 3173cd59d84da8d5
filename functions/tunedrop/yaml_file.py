"""Reads YAML, and JSON, which is a part of YAML, as plain values: no file can name a type, or expand without bound."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

# A config has some hundred values, and a file of inference tests some thousand.
MAX_VALUES = 1_000_000
MAX_DEPTH = 100
# The longest double that people write out has some 300 digits: 1e308.
MAX_DIGITS = 400
_TEXT_TAG = "tag:yaml.org,2002:str"
_NULLS = {"", "~", "null", "Null", "NULL"}
# YAML 1.1's words.
_BOOLEANS = {
    written: value
    for value, words in {True: "yes true on", False: "no false off"}.items()
    for word in words.split()
    for written in (word, word.title(), word.upper())
}
# The forms of numbers, what reads them, and what they must stay below. YAML 1.1 reads 1e-5 as text, because it has no dot. A
# config means the number. YAML 1.1 reads 010 as 8. A config means 10, and an expected answer means its text: 010 stays text,
# and so do 0x10 and 0b10.
_NUMBERS: list[tuple[re.Pattern[str], Callable[[str], float], float]] = [
    (re.compile(r"[-+]?(?:0|[1-9][0-9_]*)"), int, 2**63),
    (re.compile(r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"), float, math.inf),
    (re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+"), float, math.inf),
    (re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"), lambda _: math.inf, math.inf),
]
# JSON writes a character above U+FFFF as two escapes, which libyaml refuses.
_PAIR = re.compile(r"(?<!\\)((?:\\\\)*)(\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})")


class YamlError(ValueError):
    """A text is not YAML, or has a value that is not accepted.

    `line` is its line, counted from 1, and `key` its dotted key, if they are known.
    """

    def __init__(self, message: str, line: int | None = None, key: str | None = None):
        self.line = line
        self.key = key
        super().__init__(message)


def read_yaml(text: str) -> Any:
    """Return the value of a text with one document: None, bool, int of 64 bits, finite float, str, list or dict.

    Keys are scalars. Dates stay texts. Raises YamlError for broken YAML, and for anchors, aliases, tags (`!!str` is
    accepted), repeated keys, lone surrogates, numbers out of range, and more than MAX_DEPTH levels or MAX_VALUES values.
    """
    events = iter(yaml.parse(_PAIR.sub(lambda pair: pair[1] + _character(pair[2]), text), Loader=yaml.CSafeLoader))
    reader = _Reader(events)
    try:
        return reader.document()
    except YamlError as error:
        error.key = ".".join(str(key)[:80] for key in reader.path) or None
        raise
    except yaml.MarkedYAMLError as error:
        raise YamlError(error.problem or str(error), error.problem_mark.line + 1 if error.problem_mark else None) from None
    except (yaml.YAMLError, UnicodeEncodeError) as error:
        raise YamlError(str(error).partition("\n")[0]) from None


def _character(escapes: str) -> str:
    return escapes.encode("ascii").decode("unicode_escape").encode("utf-16", "surrogatepass").decode("utf-16")


class _Reader:
    def __init__(self, events: Iterator[yaml.Event]):
        self._events = events
        self.path: list[Any] = []  # the keys to the value that is being read
        self._values = self._depth = 0

    def document(self) -> Any:
        next(self._events)  # the stream's start
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return None
        value = self._value(next(self._events))
        next(self._events)  # the document's end
        if isinstance(event := next(self._events), yaml.DocumentStartEvent):
            raise _error("a second document is not accepted", event)
        return value

    def _value(self, event: yaml.Event) -> Any:
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _error("anchors and aliases are not accepted", event)
        tag = getattr(event, "tag", None)
        if tag not in {None, "!", _TEXT_TAG} or (tag and not isinstance(event, yaml.ScalarEvent)):
            raise _error(f"the tag '{tag[:80]}' is not accepted: write the value without it", event)
        self._values += 1
        if self._values > MAX_VALUES:
            raise _error(f"more than {MAX_VALUES:,} values are not accepted", event)
        if isinstance(event, yaml.ScalarEvent):
            # `implicit` says whether the scalar is plain, so that its form decides its type.
            return _scalar(event) if event.implicit[0] and tag is None else event.value
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _error(f"nested too deeply: more than {MAX_DEPTH} levels", event)
        value = self._list() if isinstance(event, yaml.SequenceStartEvent) else self._mapping()
        self._depth -= 1
        return value

    def _list(self) -> list[Any]:
        values = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            values.append(self._value(event))
        return values

    def _mapping(self) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._value(event)
            if isinstance(key, list | dict):
                raise _error("a list or a mapping cannot be a key", event)
            if key in values:
                raise _error(f"the key '{str(key)[:80]}' is given twice", event)
            self.path.append(key)
            values[key] = self._value(next(self._events))
            self.path.pop()
        return values


def _scalar(event: yaml.ScalarEvent) -> Any:
    """Return the value of a plain scalar: YAML 1.1's null, boolean, integer or float, else its text."""
    text = event.value
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    for pattern, read, limit in _NUMBERS:
        if pattern.fullmatch(text):
            number = read(text.replace("_", "")) if len(text) <= MAX_DIGITS else math.inf
            if abs(number) >= limit:
                kind = "a finite number" if limit == math.inf else "a number of at most 64 bits"
                raise _error(f"'{text[:40]}' must be {kind}", event)
            return number
    return text


def _error(message: str, event: yaml.Event) -> YamlError:
    return YamlError(message, event.start_mark.line + 1 if event.start_mark else None)
