"""Sample datasets, written by `python -m tunedrop_cli.sample`.

`counting`, the demo's, asks for the number after another one. `additions` asks for sums of one-digit numbers; the benchmarks
train on it.
"""

from pathlib import Path

_FOLDER = Path(__file__).parent
DATA = _FOLDER / "counting.jsonl"
CONFIG = _FOLDER / "counting.yaml"
TESTS = _FOLDER / "counting.tests.json"
