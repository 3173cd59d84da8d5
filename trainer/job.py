"""The entry point of a job's container: `python -m trainer.job {train|test}`.

This process is PID 1 of the container, because the launch plan starts it with `exec`. It gets SageMaker's SIGTERM for a stop
or a spot interruption, and forwards it to every rank. It does the work in child processes, with torchrun for more than one
GPU or host. If the job fails, it writes the reason to `/opt/ml/output/failure`, which becomes the job's `FailureReason`:
https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo-output.html
"""

import json
import logging
import os
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from trainer.packages import HEADS, PackageError, import_all
from tunedrop.problems import RejectedError

MODULES = {"train": "trainer.train", "test": "trainer.test_model"}
INPUT_CONFIG = Path("/opt/ml/input/config")
# SageMaker shows the first 1,024 characters of the failure file.
REASON_CHARACTERS = 1024
TRACEBACK_FRAMES = 4
STOPPED = 128 + signal.SIGTERM  # the shell's exit code of a process that SIGTERM ended
STARTED = "TUNEDROP_STARTED"


class JobError(Exception):
    """A mistake that the user can fix, such as a missing file or a limit that is too low. It is shown without traceback."""


# Errors whose messages are complete without a traceback.
MESSAGES = (JobError, RejectedError, PackageError)


def started() -> float:
    """Return the start of the job's container in seconds since 1970; in a shell, the start of this process."""
    return float(os.environ.get(STARTED) or psutil.Process().create_time())


def describe(error: BaseException) -> str:
    """Return why a job failed, in at most 1,024 characters: the message, and for a bug the end of the traceback."""
    if isinstance(error, MESSAGES):
        return str(error)[:REASON_CHARACTERS]
    frames = traceback.extract_tb(error.__traceback__)[-TRACEBACK_FRAMES:]
    trace = "\n".join(f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames)
    reason = f"{type(error).__name__}: {error}"
    length = max(REASON_CHARACTERS - len(trace) - len("\nTraceback, innermost last:\n"), REASON_CHARACTERS // 2)
    return f"{reason[:length]}\nTraceback, innermost last:\n{trace}"


@contextmanager
def failure_reported() -> Iterator[None]:
    """Write the reason of an error in the block to the failure file, and exit with 1. A bug also prints its traceback.

    The first rank that fails knows the cause. An existing reason stays.
    """
    try:
        yield
    except Exception as error:
        report(describe(error))
        if isinstance(error, MESSAGES):
            sys.exit(f"The job failed: {error}")
        raise


def report(reason: str) -> None:
    """Write the reason of a failure to SageMaker's failure file, unless the file exists. A shell has no such file."""
    file = os.environ.get("SM_OUTPUT_FAILURE")
    if file and not Path(file).exists():
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(reason)


def set_up_logging() -> None:
    """Log plain lines to stdout, which people read and from which SageMaker extracts metrics."""
    logging.basicConfig(stream=sys.stdout, level=logging.WARNING, format="%(message)s", force=True)
    # Only the first rank logs.
    logging.getLogger("trainer").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    # Warnings that do not help the reader of a run: deprecations in pinned packages, an optional CPU kernel for 4 bits.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork


def read_hyperparameters() -> dict[str, Any]:
    """Return the job's hyperparameters: `SM_HPS`, which ModelTrainer's driver sets, else SageMaker's own file."""
    if "SM_HPS" in os.environ:
        hyperparameters: dict[str, Any] = json.loads(os.environ["SM_HPS"])
    else:
        path = INPUT_CONFIG / "hyperparameters.json"
        hyperparameters = json.loads(path.read_text()) if path.exists() else {}
    return hyperparameters


def command(stage: str, hyperparameters: dict[str, Any], *, gpus: int, hosts: list[str], host: str) -> list[str]:
    """Return the command that runs a stage. Training on several GPUs or hosts uses torchrun."""
    flags = [part for key, value in hyperparameters.items() for part in (f"--{key}", str(value))]
    if stage == "test" or max(gpus, 1) * len(hosts) == 1:
        return [sys.executable, "-m", MODULES[stage], *flags]
    torchrun = ["torch.distributed.run", f"--nproc-per-node={max(gpus, 1)}", f"--nnodes={len(hosts)}"]
    rendezvous = [f"--node-rank={sorted(hosts).index(host)}", f"--master-addr={min(hosts)}", "--master-port=7777"]
    return [sys.executable, "-m", *torchrun, *rendezvous, "-m", MODULES[stage], *flags]


def ranks(pid: int, distributed: bool) -> list[int]:
    """Return the ids of the processes that do the work: `pid`, or with torchrun its children.

    The ranks get signals from this process and not through torchrun, which kills them after 30 seconds. SageMaker waits 120.
    """
    if not distributed:
        return [pid]
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def run(stage: str) -> int:
    """Run a stage to its end and return the exit code: 0, 143 after SIGTERM, else the code of the failed process."""
    gpus, hosts = int(os.environ.get("SM_NUM_GPUS", "0")), json.loads(os.environ.get("SM_HOSTS", '["localhost"]'))
    host = os.environ.get("SM_CURRENT_HOST", "localhost")
    arguments = command(stage, read_hyperparameters(), gpus=gpus, hosts=hosts, host=host)
    os.environ[STARTED] = str(psutil.Process().create_time())  # `exec` keeps the process and its start time
    process: subprocess.Popen[bytes] | None = None
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if process is not None:
            for pid in ranks(process.pid, "torch.distributed.run" in arguments):
                os.kill(pid, number)

    signal.signal(signal.SIGTERM, forward)
    process = subprocess.Popen(arguments)  # noqa: S603 - our own command
    if received:  # the signal arrived while the process was starting
        forward(received[0], None)
    code = process.wait()
    if received:
        return STOPPED
    if code < 0:
        name = signal.Signals(-code).name
        hint = ": the machine probably ran out of memory" if -code == signal.SIGKILL else ""
        report(f"The {stage} process was killed by {name}{hint}.")
        return 128 - code
    if code:
        report(f"The {stage} process ended with exit code {code}. See the end of the job's log.")
    return code


def main() -> None:
    """Run the stage that the command line names."""
    if sys.argv[1:] not in [[stage] for stage in MODULES]:
        sys.exit("usage: python -m trainer.job {train|test}")
    with failure_reported():
        import_all(HEADS)
        code = run(sys.argv[1])
    sys.exit(code)


if __name__ == "__main__":
    main()
