"""A prompt's text from the columns that belong to the question, in the usual order.

The order is the instruction, the context, the question, an instruction's input, the options.
"""

from collections.abc import Mapping
from typing import Any

from tunedrop.dataset.bad_row import BadRowError
from tunedrop.dataset.columns import WRONG, Shape, fill, is_template, normal, text, value_at
from tunedrop.dataset.messages import MEDIA_HINT, SHOWN

# A shorter text can stand in a prompt by chance.
CONTAINED_CHARACTERS = 20


def check_record(record: Mapping[str, Any], shape: Shape) -> None:
    """Raise BadRowError for a row with media, with an answer that the dataset marks as wrong, or with a pair of answers."""
    for name in shape.media:
        if record[name]:
            raise BadRowError("MEDIA", f"the row has media in the column '{name}'", MEDIA_HINT)
    if shape.mark and str(record[shape.mark]).casefold() in WRONG:
        hint = (
            "leave out the rows whose answers are marked as wrong: GRPO needs a right answer to compare with; if the column "
            f"says something else, write in the config: columns: {{ignore: [{shape.mark}]}}"
        )
        raise BadRowError("MARKED_WRONG", f"the column '{shape.mark}' marks the row's answer as wrong", hint)
    if shape.rejected:
        hint = "GRPO needs a right answer; if the chosen answers are right, write in the config: columns: {answer: chosen}"
        raise BadRowError("PREFERENCES", "the row is a preference: a 'chosen' and a 'rejected' answer", hint)


def prompt_value(record: Mapping[str, Any], shape: Shape, lines: str) -> Any:
    """Return the value of the prompt's column or template; `lines` are the options. MISSING or None without a prompt."""
    if shape.prompt is None:
        return None
    if is_template(shape.prompt):
        return fill(shape.prompt, record, {shape.options[0]: lines} if lines else {})
    return value_at(record, shape.prompt)


def compose(record: Mapping[str, Any], shape: Shape, question: str, lines: str) -> str:
    """Return a question with the row's instruction, context, input and options.

    A context that stands in the question already is not repeated. Raises BadRowError for a context that is not a text.
    """
    if shape.plain or is_template(shape.prompt):
        return question
    is_instruction = normal(shape.prompt) == "instruction"
    before = [shape.instruction] if shape.instruction else []
    contexts = [_paragraphs(record[name], name) for name in shape.contexts]
    parts = [*(_paragraphs(record[name], name) for name in before), *([] if is_instruction else contexts)]
    parts = [part for part in parts if part and not (len(part) >= CONTAINED_CHARACTERS and part in question)]
    after = [
        *(contexts if is_instruction else []),
        _paragraphs(record[shape.input], shape.input) if shape.input else "",
        lines,
    ]
    return "\n\n".join([*parts, question, *filter(str.strip, after)])


def _paragraphs(value: Any, name: str) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return text(value) if value else ""
    if shown := _table(value) or _passages(value):
        return shown
    raise unseen(name, f"is a {type(value).__name__}, and the model would not see it")


# The key of the texts in an object with passages: of PubMedQA, HotpotQA, MS MARCO and MuSiQue.
_PASSAGE_KEYS = "contexts sentences passage_text paragraph_text text content passage paragraph".split()


def _passages(value: Any) -> str:
    """Return passages with their titles, from an object with lists or from a list of objects; empty for other values."""
    if isinstance(value, list):
        shown = [_passages(each) for each in value if isinstance(each, dict)]
        return "\n\n".join(shown) if len(shown) == len(value) and all(shown) else ""
    key = next((key for key in _PASSAGE_KEYS if key in value), None) if isinstance(value, dict) else None
    if key is None:
        return ""
    texts, titles = value[key], value.get("title")
    if isinstance(texts, str):
        texts, titles = [texts], [titles]
    if isinstance(texts, list):
        texts = [
            "".join(each) if isinstance(each, list) and all(isinstance(part, str) for part in each) else each
            for each in texts
        ]
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        return ""
    titled = isinstance(titles, list) and len(titles) == len(texts) and all(isinstance(title, str) for title in titles)
    return (
        "\n\n".join(f"{title}\n{each}" for title, each in zip(titles, texts, strict=True)) if titled else "\n\n".join(texts)
    )


def _table(value: Any) -> str:
    """Return a table as lines with bars between the cells: a list of rows, or a header and rows; empty for other values."""
    if isinstance(value, dict) and {"header", "rows"} <= value.keys():
        value = [value["header"], *value["rows"]] if isinstance(value["rows"], list) else []
    if not isinstance(value, list) or not all(isinstance(line, list) for line in value):
        return ""
    return "\n".join(" | ".join(map(text, line)) for line in value)


def check_seen(record: Mapping[str, Any], shape: Shape, prompt: str) -> None:
    """Raise BadRowError if a column that may belong to the question is not in the prompt."""
    for name in shape.question:
        value = record[name]
        if isinstance(value, list):
            texts = [message.get("content") if isinstance(message, dict) else message for message in value]
            value = next((each for each in texts if isinstance(each, str)), None)
        if isinstance(value, str) and value.strip() and value.strip() not in prompt and prompt not in value:
            raise unseen(name, "may belong to the question, and the model does not see it")


def unseen(name: str, what: str) -> BadRowError:
    """Return the error for a column that the model does not see, and `what` speaks against that."""
    hint = (
        f'decide in the config: columns: {{prompt: "{{{name}}} …"}} shows columns in a template, and '
        f"columns: {{ignore: [{name}]}} leaves the column out"
    )
    return BadRowError("UNSEEN_COLUMN", f"the column '{name[:SHOWN]}' {what}", hint)


def naming_hint(part: str, record: Mapping[str, Any]) -> str:
    """Return how to name the columns of a part, with the row's own text columns where a prompt has none."""
    texts = [name for name, value in record.items() if isinstance(value, str) and len(name) <= SHOWN]
    if part == "prompt" and texts:
        shown = "\\n\\n".join(f"{{{name}}}" for name in texts[:2])
        return f'name the columns in the config: columns: {{prompt: "{shown}", answer: …}}'
    return f"name the column in the config: columns: {{{part}: …}}"
