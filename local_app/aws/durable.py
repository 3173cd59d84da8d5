"""Files that survive a kill and a power cut, and requests that end in an error when the disk refuses one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

# What the disk refused during the request in progress; None outside of a request.
_refused: ContextVar[list[str] | None] = ContextVar("refused", default=None)


def write(path: Path, data: bytes) -> None:
    """Replace a file with `data`, readable by this user only. The file is on the disk when this returns.

    Raises OSError if the disk refuses it; the old file is then as it was. After a refusal, a request writes nothing more.
    """
    if _refused.get():
        raise OSError(f"{path} is not written, because the disk refused another file of the request")
    draft = path.with_name(f"{path.name}.tmp")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        _sync_folder(path.parent)  # the new name too
    except OSError as error:
        draft.unlink(missing_ok=True)
        refuse(str(error))
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse(reason: str) -> None:
    """Note that the disk refused something: the request in progress must not be acknowledged."""
    refused = _refused.get()
    if refused is not None:
        refused.append(reason)


@contextmanager
def request() -> Iterator[list[str]]:
    """Begin a request; yields the list of what the disk refuses until its end."""
    refused: list[str] = []
    token = _refused.set(refused)
    try:
        yield refused
    finally:
        _refused.reset(token)
