"""Measures in some hundredths of a second whether bf16 pays on this machine's CPU.

The flags of a CPU's model do not say what its libraries use, or what a hypervisor lets through.
"""

import time
from functools import cache, partial

import torch

# bf16 pays where a matrix product is this many times faster than in fp32: autocast itself costs time.
BF16_PAYS = 1.5
_TRIES = 8


@cache
def fast_bf16() -> bool:
    """Return whether one core multiplies matrices of bf16 faster than of fp32: about 3 times with AMX, 0.1 with AVX2.

    The shapes are the rows of a rollout and a layer of a small model. The shortest of several tries counts, because other
    processes can only make a try longer.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, several threads wait for each other in both types
    try:
        return _seconds(torch.float32) > BF16_PAYS * _seconds(torch.bfloat16)
    finally:
        torch.set_num_threads(threads)


def _seconds(dtype: torch.dtype) -> float:
    """Return the time of a small matrix product."""
    product = partial(torch.nn.functional.linear, torch.ones(64, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype))
    times = []
    for _ in range(_TRIES):
        started = time.perf_counter()
        product()
        times.append(time.perf_counter() - started)
    return min(times)
