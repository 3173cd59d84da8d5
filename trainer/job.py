"""What a job's container executes: `python -m trainer.job {train|test}`.

It is PID 1 of the container (the launch plan starts it with `exec`), so SageMaker's SIGTERM for a stop or a spot
interruption arrives here. It starts the work in child processes (torchrun when there is more than one GPU or host), hands
signals on to every rank, and sees to it that a failed job leaves its reason in `/opt/ml/output/failure`, which becomes
the job's `FailureReason`: https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo-output.html
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
STOPPED = 128 + signal.SIGTERM  # the shell's exit code for "ended by SIGTERM"
STARTED = "TUNEDROP_STARTED"


class JobError(Exception):
    """Something the user can put right (files missing, a limit too low). Its message is shown without a traceback."""


# Errors whose messages say all that there is to say.
MESSAGES = (JobError, RejectedError, PackageError)


def started() -> float:
    """Return when the job's container started, in seconds since 1970; in a shell, when this process did."""
    return float(os.environ.get(STARTED) or psutil.Process().create_time())


def describe(error: BaseException) -> str:
    """Say why a job failed, the reason first and within 1,024 characters: a user's error is its message only."""
    if isinstance(error, MESSAGES):
        return str(error)[:REASON_CHARACTERS]
    frames = traceback.extract_tb(error.__traceback__)[-TRACEBACK_FRAMES:]
    where = "\n".join(f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames)
    reason = f"{type(error).__name__}: {error}"
    room = max(REASON_CHARACTERS - len(where) - len("\nTraceback, innermost last:\n"), REASON_CHARACTERS // 2)
    return f"{reason[:room]}\nTraceback, innermost last:\n{where}"


@contextmanager
def failure_reported() -> Iterator[None]:
    """Write what ends the block to the failure file and exit 1; errors that are not the user's also print their traceback.

    The first rank that fails is the one that knows why, so a reason that is already there stays.
    """
    try:
        yield
    except Exception as error:
        report(describe(error))
        if isinstance(error, MESSAGES):
            sys.exit(f"The job failed: {error}")
        raise


def report(reason: str) -> None:
    """Leave the reason of a failure where SageMaker looks for it, unless there is one; a shell has no such place."""
    place = os.environ.get("SM_OUTPUT_FAILURE")
    if place and not Path(place).exists():
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Path(place).write_text(reason)


def set_up_logging() -> None:
    """Send plain lines to stdout: what people follow and SageMaker reads metrics from."""
    logging.basicConfig(stream=sys.stdout, level=logging.WARNING, format="%(message)s", force=True)
    # One rank says what all do.
    logging.getLogger("trainer").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    # Not for the reader of a run: what the pinned versions will deprecate, and an optional CPU kernel for 4-bit weights.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer's threads and forks do not mix


def read_hyperparameters() -> dict[str, Any]:
    """Return the job's hyperparameters: `SM_HPS`, which ModelTrainer's driver sets, else SageMaker's own file."""
    if "SM_HPS" in os.environ:
        given: dict[str, Any] = json.loads(os.environ["SM_HPS"])
    else:
        path = INPUT_CONFIG / "hyperparameters.json"
        given = json.loads(path.read_text()) if path.exists() else {}
    return given


def command(stage: str, hyperparameters: dict[str, Any], *, gpus: int, hosts: list[str], host: str) -> list[str]:
    """Return the command that runs a stage; training on several GPUs or hosts goes through torchrun."""
    flags = [part for key, value in hyperparameters.items() for part in (f"--{key}", str(value))]
    if stage == "test" or max(gpus, 1) * len(hosts) == 1:
        return [sys.executable, "-m", MODULES[stage], *flags]
    torchrun = ["torch.distributed.run", f"--nproc-per-node={max(gpus, 1)}", f"--nnodes={len(hosts)}"]
    rendezvous = [f"--node-rank={sorted(hosts).index(host)}", f"--master-addr={min(hosts)}", "--master-port=7777"]
    return [sys.executable, "-m", *torchrun, *rendezvous, "-m", MODULES[stage], *flags]


def ranks(pid: int, distributed: bool) -> list[int]:
    """Return the ids of the processes that do the work: `pid`, or with torchrun its children.

    Ranks get their signals from here and not through torchrun, which would kill them 30 seconds later, long before
    SageMaker's 120 are over.
    """
    if not distributed:
        return [pid]
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def run(stage: str) -> int:
    """Run a stage to its end and return the exit code: 0, 143 after a SIGTERM, else the failure's."""
    gpus, hosts = int(os.environ.get("SM_NUM_GPUS", "0")), json.loads(os.environ.get("SM_HOSTS", '["localhost"]'))
    host = os.environ.get("SM_CURRENT_HOST", "localhost")
    arguments = command(stage, read_hyperparameters(), gpus=gpus, hosts=hosts, host=host)
    os.environ[STARTED] = str(psutil.Process().create_time())  # PID 1 stays the same process through every exec
    process: subprocess.Popen[bytes] | None = None
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if process is not None:
            for pid in ranks(process.pid, "torch.distributed.run" in arguments):
                os.kill(pid, number)

    signal.signal(signal.SIGTERM, forward)
    process = subprocess.Popen(arguments)  # noqa: S603 - our own command
    if received:  # the signal came while the process was being made
        forward(received[0], None)
    code = process.wait()
    if received:
        return STOPPED
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; most often the machine ran out of memory" if -code == signal.SIGKILL else ""
        report(f"The {stage} process was killed by {name}{hint}.")
        return 128 - code
    if code:
        report(f"The {stage} process ended with exit code {code}; its log says why.")
    return code


def main() -> None:
    """Run the stage named on the command line."""
    if sys.argv[1:] not in [[stage] for stage in MODULES]:
        sys.exit("usage: python -m trainer.job {train|test}")
    with failure_reported():
        import_all(HEADS)
        code = run(sys.argv[1])
    sys.exit(code)


if __name__ == "__main__":
    main()
