"""The time, as the run table writes it. Modules call `clock.now()`, so that a test can set the time in one place."""

from datetime import UTC, datetime, timedelta


def now() -> str:
    """Return the time: ISO 8601 in UTC with microseconds, which sorts as text."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def ago(age: timedelta) -> str:
    """Return the time `age` before now, in the format of `now`."""
    return (datetime.fromisoformat(now()) - age).isoformat(timespec="microseconds")
