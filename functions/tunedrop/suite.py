"""A line's suite: the tests of its approved runs, each decoded and scored as in the run that brought it."""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Sequence
from itertools import zip_longest
from typing import Any

import msgspec

from tunedrop.questions import prompt_text, question


class SuitePart(msgspec.Struct, frozen=True, kw_only=True):
    """The tests of one run, as in a file of inference tests.

    `decoding` are the run's settings in its own test job (`generation` in `inference.json`), `rewards` the rewards that
    scored there, `chat_template_kwargs` the run's arguments for the chat template.
    """

    run_id: str
    decoding: dict[str, Any]
    rewards: list[dict[str, Any]]
    chat_template_kwargs: dict[str, Any] = {}
    tests: list[dict[str, Any]]


class Suite(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `suite.json`, oldest run first."""

    parts: list[SuitePart]


def question_of(test: dict[str, Any]) -> str:
    """Return the question of a test in the format of a test file."""
    return question(prompt_text(test["messages"]))


def select(suite: Suite, most: int, without: Collection[str] = ()) -> Suite:
    """Return a suite with at most `most` tests: no question twice, and none of the questions `without`.

    Of two tests with one question, the newer run's stays. Must-pass tests come first; then the tags take turns, so that each
    keeps about the same number of tests. A test without tags has its run as its tag. Within a tag, a hash of the question
    decides, so that the selection is the same in every call.
    """
    seen = set(without)
    groups: dict[tuple[bool, str], list[tuple[str, str, int]]] = defaultdict(list)
    for part in reversed(suite.parts):
        for at, test in enumerate(part.tests):
            asked = question_of(test)
            if asked not in seen:
                seen.add(asked)
                tag = min(test.get("tags") or [part.run_id])
                order = hashlib.sha256(asked.encode()).hexdigest()
                groups[not test.get("must_pass", False), tag].append((order, part.run_id, at))
    chosen: list[tuple[str, int]] = []
    for later in (False, True):  # must-pass tests, then the others
        turns = zip_longest(*(sorted(groups[key]) for key in sorted(groups) if key[0] is later))
        chosen += [(run_id, at) for turn in turns for _, run_id, at in filter(None, turn)]
    kept = set(chosen[:most])
    parts = [
        msgspec.structs.replace(part, tests=[test for at, test in enumerate(part.tests) if (part.run_id, at) in kept])
        for part in suite.parts
    ]
    return Suite(parts=[part for part in parts if part.tests])


def overlap(tests: Sequence[str], others: Collection[str]) -> float:
    """Return the share of questions that are among other questions."""
    return sum(each in others for each in tests) / len(tests) if tests else 0.0
