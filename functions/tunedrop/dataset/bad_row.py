"""The exception for a row that cannot be used."""

from tunedrop.problems import Problem


class BadRowError(Exception):
    """A row cannot be used; `problem` says why."""

    def __init__(self, code: str, message: str, hint: str = ""):
        self.problem = Problem(code, message, hint)
        super().__init__(message)
