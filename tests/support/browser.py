"""The system's browser: playwright's own is not installed."""

import shutil

QUIET = "no-first-run disable-background-networking disable-component-update disable-sync disable-quic disable-gpu".split()
CHROMIUM_FLAGS = ["--no-sandbox", *(f"--{flag}" for flag in QUIET)]


def chromium() -> str:
    """Return where the browser is."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    assert path, "a browser opens the pages: install Chromium (`apt-get install chromium`) or Chrome"
    return path
