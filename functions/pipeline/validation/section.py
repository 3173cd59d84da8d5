"""One step of validation returns one section of the receipt."""

from typing import Any, NamedTuple

from tunedrop.problems import Problem


class Section(NamedTuple):
    """The result of one validation step.

    `receipt` holds the step's part of the receipt. Each of `problems` rejects the dataset. `warnings` do not.
    """

    receipt: dict[str, Any]
    problems: list[Problem]
    warnings: list[str]
