"""A draft of a rubric for free texts: what most of a dataset's answers have in common, as points that a judge can check.

It measures form: length, structure, beginning and end, numbers, sources, and how much of an answer the question says. What
makes an answer right is for people to add.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import median

# A draft needs some answers, and names what so many of them have.
FEWEST_ANSWERS = 8
MOST = 2 / 3
# The share of an answer's longer words that its question says.
GROUNDED = 0.6
OPENING_WORDS = 3
_STRUCTURES: dict[str, Callable[[str], object]] = {
    "Has numbered steps.": re.compile(r"(?m)^\s*\d+[.)] ").search,
    "Has a list of points.": re.compile(r"(?m)^\s*[-*•] ").search,
    "Has headings.": re.compile(r"(?m)^#{1,6} |^\*\*[^*\n]+\*\*:?$").search,
    "Shows code in a block.": re.compile(r"```").search,
    "Has a table.": re.compile(r"(?m)^\s*\|.*\|\s*$").search,
    "Names its sources.": re.compile(r"https?://|\[\d+\]|\(\d{4}\)").search,
    "Gives figures.": re.compile(r"\d").search,
    "Ends with a question.": re.compile(r"\?\s*$").search,
    "Is a single paragraph.": lambda text: "\n" not in text.strip(),
}


def rubric_draft(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Return points that most of the answers meet, from pairs of a question and its answer; none for too few answers."""
    if len(pairs) < FEWEST_ANSWERS:
        return []
    return ["Answers the question correctly and completely, and invents nothing.", *_points(pairs)]


def _points(pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    answers = [answer for _, answer in pairs]
    lengths = sorted(len(answer.split()) for answer in answers)
    low, high = lengths[len(lengths) // 10], lengths[-1 - len(lengths) // 10]
    yield f"Has {low} to {high} words." if low < high else f"Has {low} words."
    for point, has in _STRUCTURES.items():
        if sum(bool(has(answer)) for answer in answers) >= MOST * len(answers):
            yield point
    for verb, words in (("Begins", slice(OPENING_WORDS)), ("Ends", slice(-OPENING_WORDS, None))):
        phrase, count = Counter(" ".join(answer.split()[words]) for answer in answers).most_common(1)[0]
        if count >= MOST * len(answers):
            yield f"{verb} with “{phrase}”."
    if median(_said(question, answer) for question, answer in pairs) >= GROUNDED:
        yield "Uses what the question says, and adds no facts of its own."


def _said(question: str, answer: str) -> float:
    """Return the share of an answer's longer words that its question has, too."""
    asked, answered = (set(re.findall(r"\w{4,}", text.casefold())) for text in (question, answer))
    return len(asked & answered) / len(answered) if answered else 0.0
