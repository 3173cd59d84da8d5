"""Read an S3 object while it is still being downloaded: a thread fetches and hashes, the caller works on what is there."""

import hashlib
import io
import queue
import threading
from typing import Any, Self

CHUNK_BYTES = 1024**2
CHUNKS_AHEAD = 16


class S3Stream(io.RawIOBase):
    """The bytes of a GetObject answer's body; `drain` reads what is left, after which `size` and `sha256` are known.

    A context manager: the thread ends with it. What goes wrong while downloading is raised where it is read.
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
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with what comes next; 0 at the end. Raises what the download raised."""
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
        """Read what is left."""
        while self.read(CHUNK_BYTES):
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        while self._thread.is_alive():  # it may wait for room
            try:
                self._chunks.get(timeout=0.05)
            except queue.Empty:
                continue
        self._body.close()
