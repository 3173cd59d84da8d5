"""Candidates: the completions that the preflight scores for a row of the dataset."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tunedrop.config.model import RunConfig
from tunedrop.dataset.columns import REASONING_NAMES
from tunedrop.dataset.rows import Row
from tunedrop.forms import asked_form, in_form, texts_of
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
        yield Candidate(index, GOLD, filled(form, row["answer"], row))
        for kind, paraphrase in _paraphrases(row["answer"]) if paraphrased else ():
            yield Candidate(index, kind, filled(form, paraphrase, row))
        yield Candidate(index, "empty", "")
        answers = (other["answer"] for other in [*rows[index + 1 :], *rows[:index]])
        other = next((answer for answer in answers if _folded(answer) != _folded(row["answer"])), None)
        if other is not None:
            yield Candidate(index, "other_row", filled(form, other, row))
        yield Candidate(index, "echo", row["prompt"][-1]["content"])
        yield Candidate(index, "long", " ".join(words))
        if form != Form():
            yield Candidate(index, "form_only", filled(form, "…", row))


def _paraphrases(answer: str) -> Iterator[tuple[str, str]]:
    final = final_answer(answer)
    yield "final", final
    if "\n" not in final:
        yield "sentence", f"The answer is {final}."
    yield "spaced", f" {'  '.join(answer.split(' '))}\n"


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def filled(form: Form, answer: str, row: Row) -> str:
    """Return an answer in a form, with the row's reasoning, or a filler, where the form has room for it."""
    columns = texts_of(row)
    return in_form(form, answer, next((columns[name] for name in REASONING_NAMES if name in columns), _NO_REASONING), row)
