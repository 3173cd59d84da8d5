"""Candidates: the completions that the preflight scores for a row of the dataset."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tunedrop.config.model import RunConfig
from tunedrop.dataset.columns import REASONING_NAMES, normal
from tunedrop.dataset.rows import Row
from tunedrop.rewards.registry import Form
from tunedrop.rewards.sample import final_answer

# The dataset's own answer, and the kinds of wrong answers with the words that messages use for them.
GOLD = "gold"
WRONG = {
    "empty": "an empty answer",
    "other_row": "another row's answer",
    "echo": "a copy of the prompt",
    "long": "a long meaningless text",
    "form_only": "the form without an answer",
}
# Right answers in other words than the dataset's.
PARAPHRASES = {"final": "final answer alone", "sentence": "in a sentence", "spaced": "other spacing"}
_FILLER = (
    "lorem ipsum dolor sit amet consectetur adipiscing elit sed do eiusmod tempor incididunt ut labore et dolore".split()
)
_NO_REASONING = "First I read the question."


class Candidate(NamedTuple):
    """A completion that the preflight scores: the index of its row, its kind, and its text.

    The kind is GOLD, a key of PARAPHRASES or a key of WRONG.
    """

    row: int
    kind: str
    text: str


def candidates(rows: Sequence[Row], config: RunConfig, *, paraphrased: bool) -> Iterator[Candidate]:
    """Yield each row's candidates: its answer, paraphrases if asked, and wrong answers of every kind that the rows allow."""
    words = -(-int(config.grpo_value("max_completion_length")) // len(_FILLER)) * _FILLER
    for index, row in enumerate(rows):
        form = asked_form(config, row)
        yield Candidate(index, GOLD, in_form(form, row["answer"], row))
        for kind, paraphrase in _paraphrases(row["answer"]) if paraphrased else ():
            yield Candidate(index, kind, in_form(form, paraphrase, row))
        yield Candidate(index, "empty", "")
        answers = (other["answer"] for other in [*rows[index + 1 :], *rows[:index]])
        other = next((answer for answer in answers if _folded(answer) != _folded(row["answer"])), None)
        if other is not None:
            yield Candidate(index, "other_row", in_form(form, other, row))
        yield Candidate(index, "echo", row["prompt"][-1]["content"])
        yield Candidate(index, "long", " ".join(words))
        if form != Form():
            yield Candidate(index, "form_only", in_form(form, "…", row))


def _paraphrases(answer: str) -> Iterator[tuple[str, str]]:
    final = final_answer(answer)
    yield "final", final
    if "\n" not in final:
        yield "sentence", f"The answer is {final}."
    yield "spaced", f" {'  '.join(answer.split(' '))}\n"


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def asked_form(config: RunConfig, row: Mapping[str, Any]) -> Form:
    r"""Return the form that the run asks for.

    The rewards' trait `form` comes first. A system message that shows `<answer>`, `<think>` or `\boxed{}` asks for these.
    """
    system = next((message["content"] for message in row["prompt"] if message["role"] == "system"), "")
    shown = [tag for tag in dict.fromkeys(re.findall(r"<([A-Za-z_]+)>", system)) if f"</{tag}>" in system]
    tags = tuple(tag for tag in shown if tag != "think") if "answer" in shown else ()
    form = Form(tags, think="think" in shown)
    for spec in config.rewards:
        if spec.reward_type.form:
            wanted = spec.reward_type.form(spec.parameters)
            form = Form(wanted.tags or form.tags, wanted.think or form.think)
    return form._replace(boxed=r"\boxed{" in system and not form.tags)


def in_form(form: Form, answer: str, row: Mapping[str, Any]) -> str:
    """Return an answer in a form, with the row's reasoning where the form has room for it. Existing elements stay."""
    columns = {normal(name): value for name, value in row.items() if isinstance(value, str)}
    reasoning = next((columns[name] for name in REASONING_NAMES if columns.get(name, "").strip()), _NO_REASONING)
    text = rf"\boxed{{{answer}}}" if form.boxed and r"\boxed" not in answer else answer
    if not all(f"<{tag}>" in answer for tag in form.tags):
        last = "answer" if "answer" in form.tags else form.tags[-1]
        contents = {tag: answer if tag == last else columns.get(tag.casefold()) or reasoning for tag in form.tags}
        text = "\n".join(f"<{tag}>\n{content}\n</{tag}>" for tag, content in contents.items())
    return f"<think>\n{reasoning}\n</think>\n{text}" if form.think and "</think>" not in answer else text
