"""A limit on the CPU time of one score: the last resort against patterns and texts that would take for ever."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SECONDS = 2.0


class DeadlineError(BaseException):
    """A score took too long. Not an Exception: libraries catch these."""


def _raise(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of a signal's handler
    raise DeadlineError


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise DeadlineError if the block takes more than `seconds` of the process's CPU time.

    The limit ends Python code and the matching of regular expressions (CPython's `re` handles signals while it matches), and
    no other C code. In other threads than the main one, where Python cannot handle signals, there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _raise)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)  # again and again: a library may catch the first error
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
