"""The result of one step of the validation."""

from typing import Any, NamedTuple

from tunedrop.problems import Problem


class Section(NamedTuple):
    """A step's part of the receipt, the problems that reject the run, and the warnings."""

    receipt: dict[str, Any]
    problems: list[Problem]
    warnings: list[str]
