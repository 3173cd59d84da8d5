"""The reward functions: each scores one completion, and tests score with the same function that trained.

Every function takes a `Sample` and keyword-only parameters, which are what a run config may set, and returns a score
(1.0 is the best answer) or None to abstain.
"""

import re
from typing import Any, Literal, NamedTuple

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")
_WORD = re.compile(r"\w+")
# Words that carry no topic: an overlap of these says nothing about relevance.
_STOPWORDS = frozenset(
    "a an and are as at be been but by can could did do does for from had has have he her his how i if in into is it "
    "its may me my no not of on or our she should so some such than that the their them then there these they this to "
    "was we were what when where which who why will with would you your".split()
)


class Sample(NamedTuple):
    """What a reward sees: a completion's text, its row's answer, last user message and other columns."""

    completion: str
    answer: str
    question: str = ""
    columns: dict[str, Any] = {}  # noqa: RUF012 - never written to: a NamedTuple default is shared on purpose


def final_answer(completion: str) -> str:
    """Return what the completion gives as its answer.

    The content of the last `<answer>` element if there is one, else what follows the last `</think>`, else everything.
    """
    tagged = re.findall(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    return (tagged[-1] if tagged else completion.rpartition("</think>")[2]).strip()


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .!?,;:\"'`*")


def _terms(text: str) -> set[str]:
    return {word for word in _WORD.findall(text.casefold()) if word not in _STOPWORDS}


def exact_match(sample: Sample, *, normalize: bool = True) -> float:
    """1.0 when the final answer is the row's answer; `normalize` ignores case, spacing and outer punctuation."""
    found = final_answer(sample.completion)
    return float(_normal(found) == _normal(sample.answer) if normalize else found == sample.answer)


def contains(sample: Sample, *, text: str | None = None, ignore_case: bool = True) -> float:
    """1.0 when the completion contains `text`, or the row's answer when no `text` is given."""
    needle, haystack = sample.answer if text is None else text, sample.completion
    return float(needle.casefold() in haystack.casefold() if ignore_case else needle in haystack)


def regex(sample: Sample, *, pattern: re.Pattern[str], full: bool = False) -> float:
    """1.0 when `pattern` is found in the completion (`full`: matches all of it)."""
    return float(bool(pattern.fullmatch(sample.completion) if full else pattern.search(sample.completion)))


def xml_format(
    sample: Sample, *, mode: Literal["strict", "soft"] = "strict", tags: tuple[str, ...] = ("reasoning", "answer")
) -> float:
    """1.0 when the completion is exactly the `tags` elements in order, each once and not empty.

    `soft` gives each tag an equal share, half for `<tag>` and half for `</tag>` appearing exactly once.
    """
    text = sample.completion
    if mode == "soft":
        marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
        return sum(text.count(mark) == 1 for mark in marks) / len(marks)
    elements = r"\s*".join(
        rf"<{re.escape(tag)}>(?!\s*</)((?:(?!</?{re.escape(tag)}>).)*)</{re.escape(tag)}>" for tag in tags
    )
    return float(bool(re.fullmatch(rf"\s*{elements}\s*", text, re.DOTALL)))


def think_format(sample: Sample) -> float:
    """1.0 when the completion is one `<think>…</think>` and then an answer (as TRL's think_format_reward)."""
    return float(bool(re.fullmatch(r"<think>(?!.*<think>)(.*?)</think>(?!.*</think>)\s*\S.*", sample.completion, re.DOTALL)))


def numeric(sample: Sample, *, tolerance: float = 0.0) -> float | None:
    """1.0 when the final answer's last number is the row's, within `tolerance`; abstains if the row has none."""
    expected, found = _last_number(sample.answer), _last_number(final_answer(sample.completion))
    if expected is None:
        return None
    return float(found is not None and abs(found - expected) <= tolerance)


def _last_number(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def length(sample: Sample, *, minimum: int = 0, maximum: int = 200, unit: Literal["words", "characters"] = "words") -> float:
    """1.0 inside [`minimum`, `maximum`], falling linearly to 0.0 at nothing below and at twice the maximum above."""
    size = len(sample.completion.split() if unit == "words" else sample.completion)
    if size < minimum:
        return size / minimum
    return max(0.0, min(1.0, 2.0 - size / maximum)) if size > maximum else 1.0


def relevance(sample: Sample, *, reference_weight: float = 0.7) -> float | None:
    """Share of the reference's terms, and of the question's, that the completion uses; abstains when neither has terms.

    Terms are case-folded words less stop words; `reference_weight` weighs the reference against the question.
    """
    said = _terms(sample.completion)
    parts = [(_terms(sample.answer), reference_weight), (_terms(sample.question), 1.0 - reference_weight)]
    parts = [(terms, weight) for terms, weight in parts if terms and weight > 0]
    total = sum(weight for _, weight in parts)
    return sum(weight * len(terms & said) / len(terms) for terms, weight in parts) / total if parts else None
