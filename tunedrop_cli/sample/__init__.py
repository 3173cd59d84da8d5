"""A sample dataset: one-digit additions, written by `python -m tunedrop_cli.sample`."""

from pathlib import Path

_FOLDER = Path(__file__).parent
DATA = _FOLDER / "additions.jsonl"
CONFIG = _FOLDER / "additions.yaml"
TESTS = _FOLDER / "additions.tests.json"
