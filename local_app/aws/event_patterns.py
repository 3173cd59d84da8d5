"""The complexity of an EventBridge rule's pattern, by the measure of AWS's own matcher. EventBridge refuses complex rules.

The measure is event-ruler's `MachineComplexityEvaluator`: the largest number of prefixes of one field's wildcard patterns
that one value can match. EventBridge's limit is not published. event-ruler's README names 10 for one rule; AWS accepted
patterns of 9 and refused patterns of 12 (https://github.com/aws/event-ruler#wildcard-matching,
https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-create-pattern-operators.html#eb-filtering-wildcard-matching-complexity).
"""

from collections.abc import Iterator
from typing import Any

MOST_COMPLEX = 10  # EventBridge's limit, see above
TOO_COMPLEX = (
    "Rule is too complex - try using fewer wildcard characters or fewer repeating character sequences after a wildcard "
    "character"
)
_EVALUATED = 100  # the search ends here: it would take long, and the exact number does not matter


def complexity(pattern: dict[str, Any]) -> int:
    """Return the complexity of a pattern's most complex field: 0 without wildcards, 100 at most."""
    return max((_of_field(frozenset(wildcards)) for wildcards in _fields(pattern) if wildcards), default=0)


def _fields(pattern: Any) -> Iterator[list[str]]:
    """Yield the wildcard patterns of each field. The matcher sees a string with its quotes."""
    for name, value in pattern.items():
        if isinstance(value, dict):
            yield from _fields(value)
        elif name == "$or":
            for each in value:
                yield from _fields(each)
        else:
            yield [f'"{text}"' for item in value if isinstance(item, dict) for text in _wildcards(item)]


def _wildcards(item: dict[str, Any]) -> list[str]:
    """Return the texts of `{"wildcard": …}` and `{"anything-but": {"wildcard": …}}`."""
    patterns = item.get("wildcard")
    if isinstance(item.get("anything-but"), dict):
        patterns = item["anything-but"].get("wildcard")
    return [] if patterns is None else [patterns] if isinstance(patterns, str) else list(patterns)


def _of_field(patterns: frozenset[str]) -> int:
    """Return the largest number of these patterns' prefixes that one value matches, over every set that a value reaches."""
    tokens = [_tokens(pattern) for pattern in sorted(patterns)]
    # The letters of the patterns, and None for every other letter.
    alphabet = {letter for each in tokens for letter in each if letter != "*"} | {None}
    start = frozenset((number, place) for number, each in enumerate(tokens) for place in _with_stars(each, 0))
    seen, queue, most = {start}, [start], 0
    while queue:
        at = queue.pop()
        for letter in alphabet:
            reached = frozenset(
                (number, next_place)
                for number, place in at
                for place_after in _after(tokens[number], place, letter)
                for next_place in _with_stars(tokens[number], place_after)
            )
            if reached in seen or not reached:
                continue
            most = max(most, len(reached))
            if most >= _EVALUATED:
                return _EVALUATED
            seen.add(reached)
            queue.append(reached)
    return most


def _tokens(pattern: str) -> list[str]:
    """Split a pattern into its letters and `*`. `\\*` and `\\\\` are one letter each."""
    tokens, letters = [], iter(pattern)
    for letter in letters:
        tokens.append(f"\\{next(letters)}" if letter == "\\" else letter)
    return tokens


def _after(tokens: list[str], place: int, letter: str | None) -> list[int]:
    """Return the lengths of the prefixes that match after one more letter than the prefix of length `place`."""
    stays = [place] if place and tokens[place - 1] == "*" else []
    return [*stays, place + 1] if place < len(tokens) and tokens[place] == letter else stays


def _with_stars(tokens: list[str], place: int) -> list[int]:
    """Return a prefix's length and, where a `*` follows, the length with the `*`, which also matches no letter."""
    return [place, place + 1] if place < len(tokens) and tokens[place] == "*" else [place]
