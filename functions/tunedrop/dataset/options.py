"""Multiple choice: the options of a question as letters, and the answer's letter.

The usual form, as in lm-evaluation-harness's tasks: each option stands in a line of its own after the question, "A. …", and
the letter is the answer.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from tunedrop.dataset.bad_row import BadRowError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTERED = re.compile(r"\(?([A-Za-z])[).:](?:\s|$)")
# An option with its own letter in a list, and between commas in a text: "A)21", "a ) 4 , b ) 8".
_OWN_LETTER = re.compile(r"\(?([A-Za-z])(?:\s?\)|[.:](?=\s))\s*")
_BETWEEN_COMMAS = re.compile(r"(?:^|,)\s*\(?([A-Za-z])\s*\)")


class Options(NamedTuple):
    """A row's options and the labels that the dataset gives them (empty: their numbers)."""

    texts: list[str]
    labels: list[str]

    @property
    def lines(self) -> str:
        """The options as a prompt shows them."""
        return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, self.texts, strict=False))

    def shown_in(self, prompt: str) -> bool:
        """Return whether a prompt already lists the options with their letters."""
        places = [
            re.search(rf"(?<![A-Za-z]){letter}\)?[.):]\s*{re.escape(text.strip())}", prompt)
            for letter, text in zip(LETTERS, self.texts, strict=False)
        ]
        return all(places)


def read_options(record: Mapping[str, Any], columns: Sequence[str], labels: Sequence[str]) -> Options:
    """Return a row's options from one column, or from a column for each option with these labels. Raises BadRowError."""
    if len(columns) > 1:
        pairs = [
            (str(record[name]), label) for name, label in zip(columns, labels, strict=True) if record[name] not in {None, ""}
        ]
    else:
        pairs = _pairs(record[columns[0]])
    if not 2 <= len(pairs) <= len(LETTERS):
        hint = 'options are a list of texts, {"A": "…", "B": "…"}, or {"text": [...], "label": [...]}'
        raise BadRowError("BAD_OPTIONS", f"the column '{', '.join(columns)}' is not a list of 2 to 26 options", hint)
    return Options([text for text, _ in pairs], [label for _, label in pairs])


def _pairs(value: Any) -> list[tuple[str, str]]:
    """Return the options and their labels in a column's value; none for a value that has no options."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except msgspec.DecodeError:
            return _of_text(value)
    if isinstance(value, dict):
        value = {str(name).casefold(): each for name, each in value.items()}
        texts = value.get("text", value.get("texts"))
        if isinstance(texts, list):
            labels = value.get("label", value.get("labels")) or [""] * len(texts)
            return [(str(text), str(label)) for text, label in zip(texts, labels, strict=False)]
        return [(str(text), str(label)) for label, text in value.items() if isinstance(text, str | int | float)]
    if isinstance(value, list) and all(isinstance(each, dict) for each in value):
        named = [{str(name).casefold(): each for name, each in option.items()} for option in value]
        texts = [
            next((option[key] for key in ("text", "content", "value", "option") if key in option), None) for option in named
        ]
        labels = [next((option[key] for key in ("label", "key", "id", "letter") if key in option), "") for option in named]
        return [(str(text), str(label)) for text, label in zip(texts, labels, strict=True) if text is not None]
    return _of_list(list(map(str, value))) if isinstance(value, list) else []


def _of_text(value: str) -> list[tuple[str, str]]:
    """Return the options of a text: a list in Python's notation (as pandas writes it), lettered lines, or lettered parts."""
    try:
        listed = ast.literal_eval(value) if value.startswith("[") else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        listed = None
    if isinstance(listed, list):
        return _of_list(list(map(str, listed)))
    lines = [(match, line) for line in value.splitlines() if (match := _LETTERED.match(line.strip()))]
    if len(lines) > 1:
        return [(line.strip()[match.end() :].strip(), match[1]) for match, line in lines]
    _, *parts = _BETWEEN_COMMAS.split(value)
    return [(text.strip(), label) for label, text in zip(parts[::2], parts[1::2], strict=True)]


def _of_list(texts: list[str]) -> list[tuple[str, str]]:
    matches = [_OWN_LETTER.match(text) for text in texts]
    letters = "".join(match[1].upper() for match in matches if match)
    if len(letters) == len(texts) and LETTERS.startswith(letters):
        return [(text[match.end() :], match[1]) for text, match in zip(texts, matches, strict=True) if match]
    return [(text, "") for text in texts]


def first_number(answers: Sequence[tuple[Any, Options]]) -> int:
    """Return the number of the first option, 0 or 1, from the numbers in some rows' answers."""
    return int(any(_number(answer) == len(options.texts) and answer not in options.texts for answer, options in answers))


def _number(answer: Any) -> int | None:
    if isinstance(answer, float) and answer.is_integer():
        return int(answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer
    text = answer.strip() if isinstance(answer, str) else ""
    return int(text) if text.isdecimal() and len(text) < 4 else None


def letter_of(answer: Any, options: Options, first: int) -> str:
    """Return the letter of an answer: a label, a letter, a number from `first`, or an option's text. Raises BadRowError."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    written = " ".join(str(answer).split()).casefold()
    number = _number(answer)
    for names in (options.labels, options.texts if isinstance(answer, str) else []):
        folded = [" ".join(name.split()).casefold() for name in names]
        if written in folded:
            return LETTERS[folded.index(written)]
    if number is not None and first <= number < len(options.texts) + first:
        return LETTERS[number - first]
    lettered = _LETTERED.match(f"{answer}".strip() + " ") or re.fullmatch(r"\W*([A-Za-z])\W*", str(answer))
    if lettered and lettered[1].upper() in LETTERS[: len(options.texts)]:
        return lettered[1].upper()
    letters = f"A to {LETTERS[len(options.texts) - 1]}"
    hint = f"give the letter, the number from {first}, or the text of an option"
    raise BadRowError("BAD_OPTION", f"the answer '{str(answer)[:60]}' is none of the options {letters}", hint)
