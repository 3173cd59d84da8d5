"""The system's browser: playwright's own is not installed."""

import shutil
from pathlib import Path
from typing import Any

QUIET = "no-first-run disable-background-networking disable-component-update disable-sync disable-quic disable-gpu".split()
CHROMIUM_FLAGS = ["--no-sandbox", *(f"--{flag}" for flag in QUIET)]


def chromium() -> str:
    """Return where the browser is."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    assert path, "a browser opens the pages: install Chromium (`apt-get install chromium`) or Chrome"
    return path


def drag(page: Any, files: list[Path]) -> None:
    """Drop files on a page of the console, as from the desktop."""
    script = "files => files.reduce((all, [name, text]) => (all.items.add(new File([text], name)), all), new DataTransfer())"
    dragged = page.evaluate_handle(script, [[file.name, file.read_text()] for file in files])
    page.dispatch_event("#zone", "drop", {"dataTransfer": dragged})
