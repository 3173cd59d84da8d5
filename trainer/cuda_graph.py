"""Captures a function as a CUDA graph, which launches all its kernels at once."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

log = logging.getLogger("trainer")

# The largest relative difference between a graph's output and Python's. The kernels are the same ones.
TOLERANCE = 1e-2


class _Graphs:
    """What the graphs of a process share: their memory, and whether the first one was right."""

    pool = None
    usable: bool | None = None


def captured() -> bool:
    """Return whether a graph of this process has worked."""
    return _Graphs.usable is True


def capture(step: Callable[[], None], state: Sequence[Tensor], output: Tensor) -> Callable[[], None]:
    """Return a function that does `step` as a graph, or `step` itself if that is impossible, which the log says.

    `step` reads and writes fixed tensors; it changes `state` and writes `output`. The first graph of a process must write
    what `step` writes. (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs)
    """
    if _Graphs.usable is False:
        return step
    before = [each.clone() for each in state]
    try:
        if _Graphs.usable is None:  # this also makes the libraries allocate what they need
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)
            _restore(state, before)
            expected = output.clone()
            _Graphs.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=_Graphs.pool):
            step()
        if _Graphs.usable is None:
            graph.replay()
            off = (output.float() - expected.float()).abs().max() / expected.float().abs().max()
            _restore(state, before)
            if not off <= TOLERANCE:
                raise RuntimeError(f"its output differs from Python's by {float(off):.2g}")
    except RuntimeError as error:
        log.warning("sampling without a CUDA graph: %s", error)
        _Graphs.usable = False
        _restore(state, before)
        return step
    _Graphs.usable = True
    replay: Callable[[], None] = graph.replay
    return replay


def _restore(state: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    for each, value in zip(state, before, strict=True):
        each.copy_(value)
