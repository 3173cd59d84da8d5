"""How complex an EventBridge rule's pattern is, by the measure of AWS's own matcher: EventBridge refuses complex rules.

The measure is event-ruler's `MachineComplexityEvaluator`: how many prefixes of the wildcard patterns of one field some
value can match at once. EventBridge's limit is not published; event-ruler's README names 10 for one rule, and patterns of 9
were seen accepted and of 12 refused (https://github.com/aws/event-ruler#wildcard-matching,
https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-create-pattern-operators.html#eb-filtering-wildcard-matching-complexity).
"""

from collections.abc import Iterator
from typing import Any

MOST_COMPLEX = 10  # what EventBridge takes
TOO_COMPLEX = (
    "Rule is too complex - try using fewer wildcard characters or fewer repeating character sequences after a wildcard "
    "character"
)
_EVALUATED = 100  # more is not counted: the search would take long, and nobody asks how much too complex a rule is


def complexity(pattern: dict[str, Any]) -> int:
    """Return the complexity of a rule's pattern: that of its most complex field, 0 without wildcards, 100 at most."""
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
    given = item.get("wildcard")
    if isinstance(item.get("anything-but"), dict):
        given = item["anything-but"].get("wildcard")
    return [] if given is None else [given] if isinstance(given, str) else list(given)


def _of_field(patterns: frozenset[str]) -> int:
    """Return how many prefixes of these patterns one value can match, by walking all sets of prefixes that values reach."""
    tokens = [_tokens(pattern) for pattern in sorted(patterns)]
    # Beside the letters of the patterns, one that is in none of them: None.
    alphabet = {letter for each in tokens for letter in each if letter != "*"} | {None}
    start = frozenset((number, place) for number, each in enumerate(tokens) for place in _with_stars(each, 0))
    seen, queue, most = {start}, [start], 0
    while queue:
        at = queue.pop()
        for letter in alphabet:
            reached = frozenset(
                (number, there)
                for number, place in at
                for place_after in _after(tokens[number], place, letter)
                for there in _with_stars(tokens[number], place_after)
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
    """Split a pattern into its letters and `*`; `\\*` and `\\\\` are letters, which two characters stand for."""
    found, letters = [], iter(pattern)
    for letter in letters:
        found.append(f"\\{next(letters)}" if letter == "\\" else letter)
    return found


def _after(tokens: list[str], place: int, letter: str | None) -> list[int]:
    """Return the prefixes, as their lengths, that match one letter more than the prefix of length `place`."""
    stays = [place] if place and tokens[place - 1] == "*" else []
    return [*stays, place + 1] if place < len(tokens) and tokens[place] == letter else stays


def _with_stars(tokens: list[str], place: int) -> list[int]:
    """Return a prefix and, where a `*` follows it, the prefix with that: a `*` matches nothing, too."""
    return [place, place + 1] if place < len(tokens) and tokens[place] == "*" else [place]
