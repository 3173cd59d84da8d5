"""Reads a Parquet file in a process of its own with limits: on a file that is broken, Arrow's readers can abort the process.

readers.py starts this file with the Parquet file as its input, and gets messages: each the length of what follows, in eight
bytes, and MessagePack. They are lists of rows, and at the end an error's text or an empty one. It imports nothing of
Tunedrop.
"""

import resource
import sys
from typing import Any

MEMORY_BYTES = 256 * 1024**2
NO_MEMORY = "PyObject pointer is null"  # arro3's panic when Python has no memory for a value
BATCH_ROWS = 32  # a value that a page has once and rows repeat is unpacked for each of them


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

    error = ""
    try:
        for batch in read_parquet(sys.stdin.buffer, batch_size=BATCH_ROWS):
            send(batch.to_struct_array().to_pylist())
    except BaseException as raised:  # arro3 panics outside Exception
        if isinstance(raised, MemoryError) or str(raised) == NO_MEMORY:
            raise  # like a crash: who reads the messages finds no end of them
        error = str(raised)[:300] or type(raised).__name__
    send(error)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
