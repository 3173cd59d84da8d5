"""A training with little memory, in a process of its own. tests/trainer/test_memory_probe.py forks it from a new process."""

import ctypes
import os
import resource
from pathlib import Path
from typing import Any

import torch

import trainer.run_trainer  # noqa: F401 - before the fork, because it takes seconds
from trainer import memory_probe, train

M_MMAP_THRESHOLD = -3  # <malloc.h>
FITS = 42  # the exit code if the memory suffices


def run(megabytes: int, environment: dict[str, str], folder: Path) -> None:
    """Train in a folder with so much more address space than there is in use when the training begins."""
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    # Large blocks are mapped anew, within the limit, and unmapped when they are free: the heap keeps none of them.
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    begin = memory_probe.MemoryProbe.on_train_begin

    def with_limit(*args: Any, **kwargs: Any) -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20,) * 2)
        begin(*args, **kwargs)
        raise SystemExit(FITS)

    memory_probe.MemoryProbe.on_train_begin = with_limit  # type: ignore[method-assign] # in this process alone
    train.main([])
