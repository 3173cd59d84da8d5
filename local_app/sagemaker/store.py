"""The emulator's state in one SQLite file. Every change is written at once and survives kill -9."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from local_app.common import Json


class Store:
    """Documents by kind and name, and the outbox of undelivered events.

    A change and its event are written in one transaction: neither exists without the other. `changed` is set after each
    transaction. Any thread may use the store; transactions run one at a time and do not nest.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        self.changed = threading.Event()
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("CREATE TABLE IF NOT EXISTS document (kind, name, body, PRIMARY KEY (kind, name))")
        self._db.execute("CREATE TABLE IF NOT EXISTS outbox (id INTEGER PRIMARY KEY AUTOINCREMENT, event)")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit all writes of the block together, or none of them after an exception."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        self.changed.set()

    def get(self, kind: str, name: str) -> Json | None:
        """Return a document, or None."""
        with self._lock:
            row = self._db.execute("SELECT body FROM document WHERE kind = ? AND name = ?", (kind, name)).fetchone()
        return json.loads(row[0]) if row else None

    def all(self, kind: str) -> list[Json]:
        """Return all documents of a kind, oldest first."""
        with self._lock:
            rows = self._db.execute("SELECT body FROM document WHERE kind = ? ORDER BY rowid", (kind,)).fetchall()
        return [json.loads(body) for (body,) in rows]

    def put(self, kind: str, name: str, body: Json) -> None:
        """Write a document (inside a transaction)."""
        assert self._db.in_transaction
        self._db.execute(
            "INSERT INTO document VALUES (?, ?, ?) ON CONFLICT (kind, name) DO UPDATE SET body = excluded.body",
            (kind, name, json.dumps(body)),
        )

    def delete(self, kind: str, name: str) -> None:
        """Remove a document (inside a transaction)."""
        assert self._db.in_transaction
        self._db.execute("DELETE FROM document WHERE kind = ? AND name = ?", (kind, name))

    def enqueue(self, event: Json) -> None:
        """Add an event to the outbox (inside a transaction)."""
        assert self._db.in_transaction
        self._db.execute("INSERT INTO outbox (event) VALUES (?)", (json.dumps(event),))

    def oldest_event(self) -> tuple[int, Json] | None:
        """Return the number and content of the next event to deliver, or None."""
        with self._lock:
            row = self._db.execute("SELECT id, event FROM outbox ORDER BY id LIMIT 1").fetchone()
        return (row[0], json.loads(row[1])) if row else None

    def delivered(self, number: int) -> None:
        """Remove a delivered event from the outbox."""
        with self.transaction():
            self._db.execute("DELETE FROM outbox WHERE id = ?", (number,))

    def undelivered(self) -> int:
        """Count the events in the outbox."""
        with self._lock:
            return int(self._db.execute("SELECT count(*) FROM outbox").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()
