"""The folders of a job: SageMaker's folders inside its container, the current directory in a shell."""

import os
from pathlib import Path

from trainer.job import JobError


def channel(name: str) -> Path | None:
    """Return the folder of an input channel, or None when the job has no such channel."""
    value = os.environ.get(f"SM_CHANNEL_{name.upper()}")
    return Path(value) if value else None


def channel_file(name: str) -> Path | None:
    """Return the file of a channel that holds one object, or None when the job has no such channel.

    Raises JobError when the channel does not hold exactly one file.
    """
    folder = channel(name)
    if folder is None:
        return None
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if len(files) != 1:
        raise JobError(f"The channel '{name}' must hold one file, but it holds {[path.name for path in files] or 'none'}.")
    return files[0]


def model_dir() -> Path:
    """Return the folder of the job's results (`/opt/ml/model`), which SageMaker uploads."""
    return Path(os.environ.get("SM_MODEL_DIR", "output/model"))


def checkpoint_dir() -> Path:
    """Return the folder of the checkpoints. SageMaker keeps `/opt/ml/checkpoints` in sync with S3."""
    return Path("/opt/ml/checkpoints" if "SM_MODEL_DIR" in os.environ else "output/checkpoints")
