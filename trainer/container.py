"""Checks a job's container before the work begins: its packages fit together, and torch can use its GPUs."""

import os
import re
from pathlib import Path

from trainer.job import JobError
from trainer.packages import STAGES, import_all

DRIVER = Path("/proc/driver/nvidia/version")
# The oldest driver that runs programs made for a CUDA of this major version, without NVIDIA's compatibility libraries:
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
DRIVERS = {"12": "525.60.13", "13": "580.65.06"}


def check(stage: str) -> float:
    """Import the packages of a stage and check the GPUs; return the seconds that the imports took.

    Raises PackageError or JobError with the reason why the job cannot run in this container.
    """
    seconds = import_all(STAGES[stage])
    check_gpus()
    return seconds


def check_gpus() -> None:
    """Raise JobError if the instance has GPUs (`SM_NUM_GPUS`) that torch cannot use: the job would train on the CPU."""
    expected = int(os.environ.get("SM_NUM_GPUS", "0"))
    if not expected:
        return
    import torch

    # Transformers and PEFT use the same call.
    if not torch.cuda.is_available():
        raise JobError(f"The instance has {expected} GPU(s), but torch can use none: {_reason()}. {_needs()}")
    # sm_75 is compute capability 7.5. sm_90a and sm_100f are 9.0 and 10.0 with features of one chip, or of its family.
    oldest = min(int(match[1]) for name in torch.cuda.get_arch_list() if (match := re.match(r"sm_(\d+)", name)))
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < oldest:
        raise JobError(
            f"The GPU is a {torch.cuda.get_device_name()} of compute capability {major}.{minor}, and the image's torch "
            f"{torch.__version__} is built for {oldest / 10} and newer: choose a newer instance type, such as ml.g5.xlarge."
        )


def _reason() -> str:
    import torch

    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:  # a build without CUDA asserts
        return str(error).strip().rstrip(".")
    return "torch gives no reason"


def _needs() -> str:
    """Return torch's CUDA version, the driver's version, and the remedy, in sentences."""
    import torch

    match = re.search(r"Kernel Module.*?\s(\d[\d.]+)", DRIVER.read_text()) if DRIVER.exists() else None
    driver = f"driver is {match[1]}" if match else "driver is missing"
    if torch.version.cuda is None:
        return (
            f"The image's torch {torch.__version__} is built without CUDA, and NVIDIA's {driver}: choose an image for GPUs."
        )
    needed = DRIVERS.get(torch.version.cuda.partition(".")[0], "a newer one")
    return (
        f"The image's torch {torch.__version__} is built for CUDA {torch.version.cuda}, which needs driver {needed} or "
        f"newer. NVIDIA's {driver}. Choose a newer instance type, or an image for an older CUDA (TrainingImageUri)."
    )
