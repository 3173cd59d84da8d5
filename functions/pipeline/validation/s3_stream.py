"""Reads an S3 object during its download: a thread downloads and hashes the bytes while the caller works on them."""

import hashlib
import io
import queue
import shutil
import threading
from pathlib import Path
from typing import Any, Self

from tunedrop.dataset.batches import BLOCK_BYTES
from tunedrop.dataset.readers import suffix_of

CHUNK_BYTES = 1024**2
CHUNKS_AHEAD = 16


class S3Stream(io.RawIOBase):
    """The bytes of a GetObject answer's body. `drain` reads the rest; then `size` and `sha256` are known.

    A context manager: its thread ends with it. An error of the download is raised where the caller reads.
    """

    def __init__(self, body: Any):
        self.size = 0
        self._body = body
        self._digest = hashlib.sha256()
        self._chunks: queue.Queue[bytes | Exception] = queue.Queue(CHUNKS_AHEAD)
        self._rest = memoryview(b"")
        self._ended = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._download, daemon=True, name="s3-stream")
        self._thread.start()

    def _download(self) -> None:
        try:
            while (chunk := self._body.read(CHUNK_BYTES)) and not self._stop.is_set():
                self._digest.update(chunk)
                self._chunks.put(chunk)
            self._chunks.put(b"")
        except Exception as error:  # noqa: BLE001 - raised again in the reader's thread
            self._chunks.put(error)

    @property
    def sha256(self) -> str:
        """The SHA-256 of all bytes, as hex."""
        assert self._ended
        return self._digest.hexdigest()

    def readable(self) -> bool:
        """Return True, as io.RawIOBase asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with the next bytes and return their number, 0 at the end. Raises the download's error."""
        if not self._rest and not self._ended:
            chunk = self._chunks.get()
            if isinstance(chunk, Exception):
                raise chunk
            self._ended = not chunk
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        self.size += count
        return count

    def drain(self) -> None:
        """Read the rest."""
        while self.read(CHUNK_BYTES):
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        while self._thread.is_alive():  # the thread may wait for space in the queue
            try:
                self._chunks.get(timeout=0.05)
            except queue.Empty:
                continue
        self._body.close()


class Download:
    """An S3 object that is read once or not at all. A context manager: the connection closes with it.

    `scratch` is a folder for a copy of a Parquet file, which is read from its end.
    """

    def __init__(self, name: str, answer: dict[str, Any], scratch: Path):
        self.size: int = answer["ContentLength"]
        self._etag: str = answer["ETag"]
        self._body = answer["Body"]
        self._copy = scratch / "data" if suffix_of(name) == ".parquet" else None
        self._stream: S3Stream | None = None
        self._reader: io.BufferedReader | None = None

    def open(self) -> io.BufferedReader:
        """Begin the download and return a reader, which can seek if the object is a Parquet file."""
        self._stream = S3Stream(self._body)
        if self._copy is None:
            self._reader = io.BufferedReader(self._stream, BLOCK_BYTES)
        else:
            with self._copy.open("wb") as out:
                shutil.copyfileobj(self._stream, out, CHUNK_BYTES)
            self._reader = self._copy.open("rb")
        return self._reader

    @property
    def sha256(self) -> str | None:
        """The SHA-256 of all bytes, as hex; None if the object was not read."""
        if self._stream is None:
            return None
        self._stream.drain()
        return self._stream.sha256

    @property
    def identity(self) -> str:
        """The text that pins the object's content: its SHA-256, or its ETag if the object was not read."""
        return self.sha256 or f"not read: {self._etag}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._stream is None:
            self._body.close()
        else:
            self._stream.__exit__()
        if self._reader is not None:
            self._reader.close()
