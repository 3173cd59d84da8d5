"""Measures the sizes of functions and layers, and each handler's import time, beside the SageMaker SDK's.

    .venv/bin/python benchmarks/cold_start.py

Each import runs in a new process whose path has only the built function and its layers. The result is the median of several
imports.
"""

import os
import statistics
import subprocess
import sys
from pathlib import Path

from local_app.build import build

RUNS = 7
HANDLERS = ("validate_dataset", "start_training", "test_model", "publish_results", "reconcile", "deploy_model")
TIMED = "import sys, time; sys.path[:0] = {paths!r}; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"


def import_seconds(statement: str, paths: list[str], *options: str) -> float:
    """Return the median seconds that an import statement takes in a fresh interpreter."""
    environment = {"PATH": os.environ["PATH"], "AWS_DEFAULT_REGION": "us-east-1", "POWERTOOLS_SERVICE_NAME": "benchmark"}
    # Without this variable, X-Ray's SDK creates a client that it does not create on Lambda.
    environment["LAMBDA_TASK_ROOT"] = paths[0] if paths else ""
    command = [sys.executable, *options, "-c", TIMED.format(paths=paths, statement=statement)]
    runs = [
        float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()[-1])
        for _ in range(RUNS + 1)
    ]
    return statistics.median(runs[1:])  # the first import also writes the byte code


def size(folder: str) -> int:
    """Return the size of a folder's files in bytes, without byte code."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def main() -> None:
    """Print the figures."""
    built = build(print)
    sdk = "from sagemaker.train import ModelTrainer"
    print(f"{sdk}: {(baseline := import_seconds(sdk, [])):.3f} s")
    for handler in HANDLERS:
        paths = built.paths(handler)
        megabytes = " + ".join(f"{size(path) / 1e6:.1f}" for path in paths)
        seconds = import_seconds(f"import {handler}.app", paths, "-S")
        print(f"{handler + '.app':24} {seconds:.3f} s, {seconds / baseline:.2f} of ModelTrainer's; {megabytes} MB")


if __name__ == "__main__":
    main()
