"""The packages that a job works with, imported before its work: what does not fit together ends it at once, with the reason.

    python trainer/packages.py        # all of them, as the last step of trainer/Dockerfile does

It needs nothing but Python, so that an image can be tried before anything of the trainer is in it. In a job it costs
nothing: the process that works imports them first instead of later.
"""

import importlib
import platform
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

# What the heads of our modules import; these are light.
HEADS = ("msgspec", "psutil", "pydantic", "yaml")
_REWARDS = ("boto3", "botocore", "jsonschema", "math_verify", "rapidfuzz")
_MODELS = ("torch", "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto")
# What each stage imports where it needs it: what others are built on first, so that the reason names what is wrong.
# transformers and trl load their parts when they are asked for; so the parts are named.
STAGES: dict[str, tuple[str, ...]] = {
    "train": (
        *("numpy", "pyarrow", "datasets", *_MODELS),
        *("transformers.trainer", "accelerate", "peft", "bitsandbytes", "trl.trainer.grpo_trainer"),
        *("tensorboardX", "tqdm", "arro3.io", *_REWARDS),
    ),
    "test": (*_MODELS, *_REWARDS),
    "proofs": (*_MODELS, "peft"),
}
# Whose versions say why an import failed: what is built against each other.
TOLD = ("numpy", "pandas", "pyarrow", "torch", "transformers", "trl", "peft")
# AWS's image has it, peft imports it where it is, and it does not load without NVIDIA's driver. No job of ours needs it.
UNUSED = "transformer_engine"
# Of an import's own message: the reason of a failed job has 1,024 characters in all.
REASON_CHARACTERS = 500


class PackageError(Exception):
    """A package that the trainer needs cannot be imported. The message names it, versions, and what to do."""


def import_all(names: Iterable[str]) -> float:
    """Import these modules and return the seconds that it took. Raises PackageError for the first that cannot be."""
    began = time.monotonic()
    sys.modules.setdefault(UNUSED, None)  # type: ignore[arg-type] # importlib's way to say that there is none
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # a wheel built for another numpy or CUDA raises what it likes
            reason = f"{type(error).__name__}: {error}"[:REASON_CHARACTERS]
            raise PackageError(
                f"The container cannot import {name}: {reason}. It has Python {platform.python_version()}, "
                f"{', '.join(map(_installed, TOLD))}. The trainer runs on the stack's own image, with what "
                "trainer/requirements.lock adds: leave TrainingImageUri empty, or build an image with trainer/Dockerfile."
            ) from error
    return time.monotonic() - began


def _installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def main() -> None:
    """Import what any job imports, and say so; exits 1 with the reason."""
    try:
        seconds = import_all(HEADS + sum(STAGES.values(), ()))
    except PackageError as error:
        sys.exit(str(error))
    sys.stdout.write(f"{', '.join(map(_installed, TOLD))}: all that a job imports, in {seconds:.1f} s\n")


if __name__ == "__main__":
    main()
