"""When two prompts ask the same question: they are equal up to spacing, case, and the form of their numbers.

`1,000`, `1000` and `1000.0` are one number. Such prompts are one question where tests judge a model: a test that repeats a
row measures memory, and tests that repeat each other are one piece of evidence.
"""

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(\.[0-9]+)?")
_LETTERS = bytes(range(ord("a"), ord("z") + 1))
_LOWER = bytes(range(256)).lower()
_OTHERS = bytes(set(range(256)) - set(_LETTERS) - set(_LETTERS.upper()))


def prompt_text(prompt: Sequence[dict[str, str]]) -> str:
    """Return the messages' contents as one text, which zero characters separate, as in `tunedrop.dataset.rows.Rows`."""
    return "\0".join(message["content"] for message in prompt)


def question(text: str) -> str:
    """Return a text's question: two prompts ask the same question if this is equal for their texts."""
    # Bars keep numbers apart where spaces go: "1 23" is not "12 3".
    return "".join(_NUMBER.sub(_number, text).lower().split())


def _number(match: re.Match[str]) -> str:
    whole, part = match[1].replace(",", "").lstrip("0"), (match[2] or "").rstrip("0").rstrip(".")
    return f"|{whole or 0}{part}|"


_FORMS_OF_NUMBERS = b",.0|"
_LEFT_OUT = b" \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f" + _FORMS_OF_NUMBERS


def sketches(texts: Sequence[str], encoded: Sequence[bytes]) -> list[bytes]:
    """Return texts, also given as UTF-8, without spaces, case, and what forms of numbers differ in; quickly.

    Texts with the same question have one sketch. Few others share one, such as those that ask for 10 and for 100.
    """
    return [
        raw.translate(_LOWER, _LEFT_OUT)
        if text.isascii()
        else "".join(text.lower().split()).encode().translate(None, _FORMS_OF_NUMBERS)
        for text, raw in zip(texts, encoded, strict=True)
    ]


def outline(text: bytes) -> bytes:
    """Return the ASCII letters of a text in UTF-8, in lower case, quickly. Texts with the same question have one outline."""
    return text.translate(_LOWER, _OTHERS)
