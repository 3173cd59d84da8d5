"""Keeps a model's control tokens, such as `<|im_start|>`, for its chat template: in data they are text.

A tokenizer makes a control token of its text wherever the text stands, and a row with `<|im_end|>\n<|im_start|>system` would
otherwise begin a system message. This file imports nothing of Tunedrop: jobs use it, and the process that counts tokens.
"""

import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

# What common models' templates have, for a model whose tokenizer only the job has.
KNOWN = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|start|>", "<|message|>", "<|channel|>", "<|return|>"),
    *("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
)


def controls_of(added: Iterable[Any]) -> list[str]:
    """Return the control tokens among a tokenizer's added tokens (with `content` and `special`).

    Some tokenizers have the marks of turns as ordinary added tokens. Others of these, such as `<think>`, are text that
    prompts speak of.
    """
    return [token.content for token in added if token.special or token.content in KNOWN]


def halves(text: str) -> tuple[str, str]:
    """Return the two parts in which a control token's text is encoded: a tokenizer finds the token in neither."""
    return text[:1], text[1:]


class Piece(NamedTuple):
    """A part of a rendered prompt. `is_text`: a control token's text in the data, which the model must read as text."""

    text: str
    is_text: bool = False


@lru_cache(16)
def pattern(controls: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern that finds control tokens in a text, the longest at each place."""
    return re.compile("|".join(map(re.escape, sorted(controls, key=len, reverse=True))) or r"(?!)")


def pieces(
    prompt: Sequence[dict[str, str]],
    tools: Any,
    controls: Iterable[str],
    render: Callable[[list[dict[str, str]], Any], str],
) -> list[Piece]:
    """Return a prompt in its chat template as pieces. A prompt without control tokens in its data is one piece.

    `render` returns messages and tools in the chat template. A control token in a message, or in the tools, goes through the
    template as a word that nobody can guess, and is a piece of its own afterwards. A role is no data: it is one of four.
    """
    find = pattern(tuple(controls))
    found: list[str] = []
    word = f"x{secrets.token_hex(16)}x"

    def hide(match: re.Match[str]) -> str:
        found.append(match[0])
        return f"{word}{len(found) - 1}x"

    def hidden(value: Any) -> Any:
        if isinstance(value, str):
            return find.sub(hide, value)
        if isinstance(value, list):
            return [hidden(each) for each in value]
        return {hidden(key): hidden(each) for key, each in value.items()} if isinstance(value, dict) else value

    messages = [{key: text if key in {"role", "tools"} else hidden(text) for key, text in each.items()} for each in prompt]
    parts = re.split(rf"{word}(\d+)x", render(messages, hidden(tools)))
    return [
        Piece(found[int(part)], is_text=True) if number % 2 else Piece(part)
        for number, part in enumerate(parts)
        if part or len(parts) == 1
    ]


# Embeddings, overrides and isolates of direction (Unicode's UAX #9): a text looks other than it is.
_DIRECTIONS = re.compile("[\u202a-\u202e\u2066-\u2069]")


def oddities(text: str, controls: Sequence[str]) -> Iterator[str]:
    """Yield what a text has that a reader does not expect: control tokens, marks of direction, NUL."""
    # A search for one character is many times as fast as one for a pattern.
    if any(first in text for first in {token[0] for token in controls}) and pattern(tuple(controls)).search(text):
        yield "control tokens of a chat template, which the model reads as text"
    if not text.isascii() and _DIRECTIONS.search(text):
        yield "marks that turn the direction of text (U+202A to U+202E, U+2066 to U+2069)"
    if "\0" in text:
        yield "NUL characters"
