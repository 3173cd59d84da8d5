"""A line's suite: the tests of its approved runs, each decoded and scored as in the run that brought it."""

from typing import Any

import msgspec


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
