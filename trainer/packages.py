"""Imports the packages of a job before its work begins. Packages that do not fit together end the job with the reason.

    python trainer/packages.py        # imports all packages; the last step of trainer/Dockerfile

This module needs only Python: it can test an image that does not have the trainer yet. In a job it costs no time, because
the working process imports its packages early instead of later.
"""

import importlib
import os
import platform
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

# Imports at the heads of our modules; all of them are light.
HEADS = ("msgspec", "psutil", "pydantic", "yaml")
_REWARDS = ("boto3", "botocore", "jsonschema", "jsonschema_specifications", "math_verify", "rapidfuzz", "referencing")
_MODELS = (
    "torch",
    "huggingface_hub",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)
# The later imports of each stage. Packages that others build on come first: the message of a failed import then names the
# package at fault.
# transformers and trl load their submodules lazily, which is why submodules are listed.
STAGES: dict[str, tuple[str, ...]] = {
    "train": (
        *("numpy", "pyarrow", "datasets", *_MODELS),
        *("transformers.trainer", "accelerate", "safetensors", "peft", "bitsandbytes", "trl.trainer.grpo_trainer"),
        *("tensorboardX", "tqdm", "arro3.io", *_REWARDS),
    ),
    "test": (*_MODELS, *_REWARDS),
    "proofs": (*_MODELS, "peft", *_REWARDS),
}
# Packages that are built against each other: their versions explain a failed import.
EXPLAINING = ("numpy", "pandas", "pyarrow", "torch", "transformers", "trl", "peft")
# AWS's image has this package, and peft imports it, which fails without NVIDIA's driver. No job needs the package.
UNUSED = "transformer_engine"
# Limit of an import error's message: the reason of a failed job has 1,024 characters in all.
REASON_CHARACTERS = 500


class PackageError(Exception):
    """A package of the trainer cannot be imported. The message has the package, the versions, and the remedy."""


def import_all(names: Iterable[str]) -> float:
    """Import these modules and return the seconds that it took. Raises PackageError for the first that fails."""
    began = time.monotonic()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # accelerate imports mlflow, which would report its use
    sys.modules.setdefault(UNUSED, None)  # type: ignore[arg-type] # importlib's mark of a missing module
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # a wheel for another numpy or CUDA may raise any error
            reason = f"{type(error).__name__}: {error}"[:REASON_CHARACTERS]
            raise PackageError(
                f"The container cannot import {name}: {reason}. It has Python {platform.python_version()}, "
                f"{', '.join(map(_installed, EXPLAINING))}. The trainer runs on the stack's default image with the "
                "packages of trainer/requirements.lock: leave TrainingImageUri empty, or build an image with "
                "trainer/Dockerfile."
            ) from error
    return time.monotonic() - began


def _installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def main() -> None:
    """Import the packages of all jobs and print the versions. Exits with 1 and the reason if an import fails."""
    try:
        seconds = import_all(HEADS + sum(STAGES.values(), ()))
    except PackageError as error:
        sys.exit(str(error))
    sys.stdout.write(f"{', '.join(map(_installed, EXPLAINING))}: imported all packages of a job in {seconds:.1f} s\n")


if __name__ == "__main__":
    main()
