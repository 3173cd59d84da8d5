"""Reads a Parquet file through a process with limits (parquet_worker.py), which bound what a hostile file can take."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from tunedrop.sandboxed_process import Worker

WORKER = Path(__file__).with_name("parquet_worker.py")
SECONDS = 300.0


class ParquetError(Exception):
    """The rest of a Parquet file cannot be read; the message says why."""


def read_parquet(file: io.BufferedReader) -> Iterator[tuple[list[Any], int]]:
    """Yield rows and the bytes that they took as a message. Raises ParquetError after the last rows that can be read."""
    worker = Worker(WORKER, SECONDS, stdin=file)
    assert worker.process.stdout is not None
    try:
        while isinstance((message := _message(worker.process.stdout))[0], list):
            yield message
        if message[0] is None:
            worker.blame()
            raise ParquetError(f"the reader crashed, or exceeded its memory limit or {SECONDS:.0f} s")
        if message[0]:
            raise ParquetError(message[0])
    finally:
        worker.close()


def _message(output: IO[bytes]) -> tuple[Any, int]:
    """Return the worker's next message and its bytes.

    Rows, at the end an error's text, which is empty without an error. None if the worker died.
    """
    length = int.from_bytes(output.read(8), "little")
    message = output.read(length)
    if not length or len(message) < length:
        return None, 0
    return msgspec.msgpack.decode(message), length
