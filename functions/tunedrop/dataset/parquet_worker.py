"""Reads a Parquet file in a process of its own with limits.

A broken file can make Arrow's readers abort the process, and a page of a few kilobytes can unpack to gigabytes.

readers.py starts this file with the Parquet file as its input, and receives messages: a length in eight bytes, then
MessagePack of that length. A message is a list of rows; the last one is an error's text, empty without an error. This file
imports nothing of Tunedrop.
"""

import gc
import resource
import sys
from typing import Any

MEMORY_BYTES = 256 * 1024**2
NO_MEMORY = "PyObject pointer is null"  # arro3's panic if Python has no memory for a value
BATCH_ROWS = 32  # small, because a value that a page holds once is unpacked for every row that repeats it


def send(value: Any) -> None:
    """Write one message."""
    import msgspec

    message = msgspec.msgpack.encode(value)
    sys.stdout.buffer.write(len(message).to_bytes(8, "little") + message)


def main() -> None:
    """Send the rows of the Parquet file that is the input."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from arro3.io import read_parquet

    gc.disable()  # rows hold no cycles, and each batch is freed before the next
    error = ""
    try:
        for batch in read_parquet(sys.stdin.buffer, batch_size=BATCH_ROWS):
            send(batch.to_struct_array().to_pylist())
    except BaseException as raised:  # arro3 panics outside Exception
        if isinstance(raised, MemoryError) or str(raised) == NO_MEMORY:
            raise  # as in a crash, readers.py receives no last message
        error = str(raised)[:300] or type(raised).__name__
    send(error)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
