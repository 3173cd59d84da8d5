"""Rewards that read the text of one completion. Training and the inference tests score with the same functions.

The best score is 1.0. A penalty scores 0.0 or less. None means that the reward abstains.
"""

import logging
import re
import threading
import unicodedata
from collections import Counter
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from tunedrop.rewards.registry import Form, reward
from tunedrop.rewards.sample import RewardError, Sample, final_answer

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Unit = Literal["words", "characters"]
# Limits of what is compared, in characters and words. Comparing takes time by the product of both lengths.
MAX_COMPARED = 20_000
MAX_PARTIAL = 1_000
MAX_EXPRESSION = 1_000


def _compiled(pattern: object) -> object:
    """Compile a pattern. Raises ValueError for what cannot be compiled, as pydantic does for most."""
    try:
        return re.compile(pattern) if isinstance(pattern, str) else pattern
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"not a valid regular expression: {error}") from None


Pattern = Annotated[re.Pattern[str], BeforeValidator(_compiled)]

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")
# Powers of powers: sympy would compute numbers of millions of digits.
_TOWER = re.compile(r"\d\s*(?:\^|\*\*)\s*[{(]*\s*\d+\s*(?:\^|\*\*)|(?:\^|\*\*)\s*[{(]*\s*\d{5}|\d{4,}\s*!|!\s*!|\)\s*!")
_WORD = re.compile(r"\w+")
# Words without a topic. Two texts that share only such words are not related.
_STOPWORDS = frozenset(
    "a an and are as at be been but by can could did do does for from had has have he her his how i if in into is it "
    "its may me my no not of on or our she should so some such than that the their them then there these they this to "
    "was we were what when where which who why will with would you your".split()
)


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(" .!?,;:\"'`*")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _terms(text: str) -> set[str]:
    return {word for word in _words(text) if word not in _STOPWORDS}


def _size(text: str, unit: Unit) -> int:
    return len(text.split() if unit == "words" else text)


# --- the right answer ---


@reward(measures="answer")
def exact_match(sample: Sample, *, normalize: bool = True) -> float:
    """1.0 when the final answer is the row's answer. `normalize` ignores case, spacing and outer punctuation."""
    answer, expected = final_answer(sample.completion), final_answer(sample.answer)
    return float(_normal(answer) == _normal(expected) if normalize else answer == expected)


@reward(measures="answer")
def numeric(
    sample: Sample, *, tolerance: Annotated[float, Field(ge=0)] = 0.0, relative: Annotated[float, Field(ge=0)] = 0.0
) -> float | None:
    """1.0 when the last number of the final answer equals the last number of the row's answer.

    Abstains when the row's answer has no number. The numbers may differ by `tolerance`, or by the share `relative` of the
    row's number.
    """
    expected, number = (last_number(final_answer(text)) for text in (sample.answer, sample.completion))
    if expected is None:
        return None
    return float(number is not None and abs(number - expected) <= max(tolerance, relative * abs(expected)))


def last_number(text: str) -> float | None:
    """Return the last number in a text, None without one."""
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


@reward(measures="answer", imports="math_verify")
def math(sample: Sample) -> float | None:
    r"""1.0 when the final answer and the row's answer are mathematically equal: 0.5, 1/2 and \frac{1}{2}; {1,2} and {2,1}.

    math-verify reads LaTeX, `\boxed{}` and plain expressions. Abstains when it cannot read the row's answer. A final answer
    of more than 1,000 characters is no expression.
    """
    from math_verify import parse, verify  # type: ignore[import-untyped]

    # math-verify's timeouts use SIGALRM, which only the main thread can set. In other threads math-verify would warn in
    # every call.
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def read(text: str) -> list[object]:
        if len(text) > MAX_EXPRESSION or _TOWER.search(text):
            return []
        # Datasets hold bare LaTeX, which math-verify reads only between dollar signs.
        wrapped = f"${text}$" if "\\" in text and not re.search(r"\$|\\boxed|\\\(|\\\[", text) else text
        expressions: list[object] = parse(wrapped, parsing_timeout=seconds)
        return expressions

    expected = read(final_answer(sample.answer))
    if not expected:
        return None
    return float(verify(expected, read(final_answer(sample.completion)), timeout_seconds=seconds))


@reward(measures="answer")
def multiple_choice(sample: Sample, *, choices: Annotated[str, Field(pattern=r"^[A-Z]{2,26}$")] = "ABCD") -> float | None:
    """1.0 when the completion chooses the row's letter. Abstains when the row's answer names no letter.

    A choice is a letter alone, `(B)`, `B.`, `\\boxed{B}` or `the answer is B`. The last choice counts.
    """
    expected, choice = (_choice(final_answer(text), choices) for text in (sample.answer, sample.completion))
    return None if expected is None else float(choice == expected)


def _choice(text: str, choices: str) -> str | None:
    # A lowercase letter is a choice only at the end: "the answer is a", but not "the answer is a cat".
    letter = rf"([{choices}]|[{choices.lower()}](?=[).]|\W*+$))"
    stripped = text.strip(" \n.:()[]*`\"'")
    if re.fullmatch(letter, stripped):
        return stripped.upper()
    mark = r"[*(\[\"'`]*+"
    named = re.findall(
        rf"(?:(?i:answer|option|choice)(?:\s++(?i:is|would be))?\s*+:?\s*+{mark}|\\boxed\{{\s*+(?:\\text\{{)?){letter}\b",
        text,
    )
    if not named:  # a letter with a mark at the beginning of a line: "B) Paris", "(B) Paris", "B. Paris"
        named = re.findall(rf"(?m)^[^\S\n]*+[*(\[]*+{letter}[)\].:*]", text)
        named = named if len({name.upper() for name in named}) == 1 else []  # a list of all options chooses none
    return str(named[-1]).upper() if named else None


@reward(measures=lambda parameters, _: "answer" if parameters["text"] is None else "content")
def contains(sample: Sample, *, text: str | None = None, ignore_case: bool = True) -> float:
    """1.0 when the completion contains `text`. Without `text`, 1.0 when the completion contains the row's answer."""
    needle, haystack = sample.answer if text is None else text, sample.completion
    return float(needle.casefold() in haystack.casefold() if ignore_case else needle in haystack)


@reward(measures="form")
def regex(sample: Sample, *, pattern: Pattern, full: bool = False) -> float:
    """1.0 when `pattern` matches a part of the completion. With `full`, `pattern` must match the whole completion."""
    return float(bool(pattern.fullmatch(sample.completion) if full else pattern.search(sample.completion)))


# --- the right form ---


@reward(measures="form", form=lambda parameters: Form(tags=parameters["tags"]))
def xml_format(
    sample: Sample,
    *,
    mode: Literal["strict", "soft", "partial"] = "strict",
    tags: Annotated[tuple[str, ...], Field(min_length=1)] = ("reasoning", "answer"),
) -> float:
    """1.0 when the completion consists of the elements `tags`, in order, each once and not empty.

    The mode `soft` allows text around and between the elements. The mode `partial` gives each tag an equal share: half for
    exactly one `<tag>`, half for exactly one `</tag>`.
    """
    text = sample.completion
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    once = [text.count(mark) == 1 for mark in marks]
    if mode == "partial":
        return sum(once) / len(marks)
    if not all(once):
        return 0.0
    places = [text.index(mark) for mark in marks]
    if places != sorted(places):
        return 0.0
    ends = [place + len(mark) for place, mark in zip(places, marks, strict=True)]
    contents = [text[begin:end] for begin, end in zip(ends[::2], places[1::2], strict=True)]
    around = [text[begin:end] for begin, end in zip([0, *ends[1::2]], [*places[::2], len(text)], strict=True)]
    return float(all(map(str.strip, contents)) and (mode == "soft" or not any(map(str.strip, around))))


@reward(measures="form", form=lambda _: Form(think=True))
def think_format(sample: Sample, *, mode: Literal["strict", "soft", "partial"] = "strict") -> float:
    """1.0 when the completion is one `<think>…</think>` and then an answer (as TRL's think_format_reward).

    In the mode `soft`, `<think>` may be missing: some chat templates already write it. The mode `partial` gives a third
    for `<think>` at the start, a third for exactly one `</think>`, and a third for an answer after `</think>`.
    """
    before, closed, after = sample.completion.partition("</think>")
    opened = before.lstrip().startswith("<think>")
    parts = [opened and sample.completion.count("<think>") == 1, sample.completion.count("</think>") == 1]
    parts.append(bool(closed and after.strip()))
    if mode == "partial":
        return sum(parts) / 3
    if mode == "soft" and "<think>" not in sample.completion:
        parts[0] = True
    return float(all(parts))


# --- length and repetition ---


@reward(measures="form")
def length(sample: Sample, *, minimum: Annotated[int, Field(ge=0)] = 0, maximum: Count = 200, unit: Unit = "words") -> float:
    """1.0 from `minimum` to `maximum`. Falls linearly to 0.0 at an empty completion and at twice the maximum."""
    size = _size(sample.completion, unit)
    if size < minimum:
        return size / minimum
    return max(0.0, min(1.0, 2.0 - size / maximum)) if size > maximum else 1.0


@reward(measures="form", penalty=True)
def overlong_penalty(sample: Sample, *, maximum: Count = 200, buffer: Count = 50, unit: Unit = "words") -> float:
    """DAPO's soft overlong penalty: 0.0 up to `maximum` - `buffer`, then falls linearly to -1.0 at `maximum`."""
    over = _size(sample.completion, unit) - (maximum - buffer)
    return -min(1.0, max(0.0, over / buffer))


@reward(measures="form", penalty=True)
def repetition_penalty(
    sample: Sample, *, ngram: Annotated[int, Field(ge=1, le=100)] = 3, max_penalty: Annotated[float, Field(le=0)] = -1.0
) -> float:
    """`max_penalty` times the share of the completion's word n-grams that repeat an earlier n-gram (Yeo et al., 2025)."""
    words = _words(sample.completion)
    grams = list(zip(*(words[start:] for start in range(ngram)), strict=False))
    return max_penalty * (1 - len(set(grams)) / len(grams)) if grams else 0.0


# --- similarity and relevance ---


@reward(measures="answer")
def similarity(
    sample: Sample, *, method: Literal["ratio", "partial", "token_sort", "token_set", "weighted"] = "ratio"
) -> float:
    """Similarity of the final answer and the row's answer, 0 to 1 (rapidfuzz). Ignores case and spacing."""
    return similar(final_answer(sample.completion), sample.answer, method)


def similar(one: str, other: str, method: str = "ratio") -> float:
    """Return the rapidfuzz similarity of the beginnings of two texts, 0 to 1."""
    from rapidfuzz import fuzz

    name = {"ratio": "ratio", "weighted": "WRatio"}.get(method, f"{method}_ratio")
    limit = MAX_PARTIAL if method in {"partial", "weighted"} else MAX_COMPARED
    return float(getattr(fuzz, name)(_normal(one)[:limit], _normal(other)[:limit])) / 100


@reward(measures="answer")
def rouge(
    sample: Sample,
    *,
    variant: Literal["1", "2", "3", "4", "5", "l"] = "l",
    measure: Literal["f1", "precision", "recall"] = "f1",
) -> float:
    """ROUGE of the final answer and the row's answer: word n-grams (`1` to `5`), or longest common subsequence (`l`).

    The first 20,000 words count.
    """
    return rouge_score(final_answer(sample.completion), sample.answer, variant, measure)


def rouge_score(candidate: str, reference: str, variant: str = "l", measure: str = "f1") -> float:
    """Return ROUGE-N or ROUGE-L (Lin, 2004) of the case-folded words of two texts."""
    words, expected = (_words(text)[:MAX_COMPARED] for text in (candidate, reference))
    if variant == "l":
        from rapidfuzz.distance import LCSseq

        shared, sizes = LCSseq.similarity(words, expected), (len(words), len(expected))
    else:
        grams = [Counter(zip(*(text[start:] for start in range(int(variant))), strict=False)) for text in (words, expected)]
        shared, sizes = (grams[0] & grams[1]).total(), (grams[0].total(), grams[1].total())
    if not shared:
        return 0.0
    precision, recall = shared / sizes[0], shared / sizes[1]
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall)}[measure]


@reward(measures="answer")
def relevance(sample: Sample, *, reference_weight: Share = 0.7) -> float | None:
    """Share of the terms of the row's answer and of the question that the completion uses. Abstains without terms.

    Terms are case-folded words without stop words. `reference_weight` is the weight of the answer's share; the question's
    share has the rest.
    """
    used = _terms(sample.completion)
    parts = [(_terms(sample.answer), reference_weight), (_terms(sample.question), 1.0 - reference_weight)]
    parts = [(terms, weight) for terms, weight in parts if terms and weight > 0]
    total = sum(weight for _, weight in parts)
    return sum(weight * len(terms & used) / len(terms) for terms, weight in parts) / total if parts else None


@reward(measures="content")
def keywords(sample: Sample, *, terms: list[str] | None = None, column: str | None = None) -> float | None:
    """Share of `terms`, or of the list in the row's `column`, that the completion has as whole words.

    Abstains without terms.
    """
    expected = terms if column is None else sample.column(column)
    if not isinstance(expected, list):
        raise RewardError("keywords needs 'terms', or a 'column' with a list of terms")
    text = sample.completion.casefold()
    matches = [re.search(rf"(?<!\w){re.escape(str(term).casefold())}(?!\w)", text) for term in expected]
    return sum(match is not None for match in matches) / len(expected) if expected else None


@reward(measures="content")
def citations(sample: Sample, *, minimum: Count = 1, column: str | None = None) -> float:
    """1.0 when the completion cites at least `minimum` sources as `[1]`, `[2]`, …. Fewer sources give their share.

    With `column`, a list of the row's sources, the score is multiplied by the share of the cited numbers that exist.
    """
    groups = re.findall(r"\[(\d++(?:\s*+,\s*+\d++)*+)\]", sample.completion)
    # No row has so many sources that a number needs more than nine digits.
    cited = {int(number.strip()[:10]) for group in groups for number in group.split(",")}
    if not cited:
        return 0.0
    real = cited if column is None else {number for number in cited if 1 <= number <= len(sample.column(column))}
    return min(1.0, len(real) / minimum) * len(real) / len(cited)


@reward(measures="content")
def quotes(sample: Sample, *, column: str | None = None, minimum_words: Count = 3) -> float:
    """Share of the completion's quotations that the row's `column` contains word for word. Without `column`, the question.

    A quotation has at least `minimum_words` words between double quotes. A completion without quotations scores 0.0.
    """
    source = sample.question if column is None else sample.column(column)
    words = " ".join(_words(source if isinstance(source, str) else " ".join(map(str, source))))
    quoted = [_words(text) for text in re.findall(r"[\"“„«]([^\"“”„«»]+)[\"”“»]", sample.completion)]
    quoted = [each for each in quoted if len(each) >= minimum_words]
    padded = f" {words} "
    return sum(f" {' '.join(each)} " in padded for each in quoted) / len(quoted) if quoted else 0.0
