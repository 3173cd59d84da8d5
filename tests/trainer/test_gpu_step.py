"""The GPU benchmark's dry run, and the kernels that a GPU would launch, counted on the CPU."""

import functools
import json
import logging
import sys
from collections import Counter

import pytest
import torch
from tiny_model import make_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config

from benchmarks import gpu_step
from benchmarks.gpu_step import Shape
from trainer import shared_prefix, shared_prefix_sampling


def test_the_dry_run_finds_both_trainers_equal(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_step", "--tiny", "--out", str(tmp_path)])
    try:
        gpu_step.main()
    finally:
        logging.disable(logging.NOTSET)
    found = json.loads((tmp_path / "gpu_step.json").read_text())
    assert [each["holds"] for each in found if "holds" in each] == [True, True]
    assert [each["fp32_equal"] for each in found if each["part"] == "greedy"] == ["8/8"]
    assert {each["trainer"] for each in found if each["part"] == "rollout"} == {"stock TRL", "shared prefix"}
    assert found[-1]["part"] == "done"


FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh", "_unsafe_view"}


class Launches(TorchDispatchMode):  # type: ignore[misc] # torch is untyped here
    """Counts the operations that a GPU would launch a kernel for."""

    def __init__(self):
        super().__init__()
        self.count: Counter[str] = Counter()
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.paused and not func.is_view and func.overloadpacket.__name__ not in FREE:
            self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Attention(torch.autograd.Function):  # type: ignore[misc] # torch is untyped here
    """As many operations as flash attention launches kernels: one, and three backward."""

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(key, value)
        return query * 1

    @staticmethod
    def backward(ctx, grad):
        key, value = ctx.saved_tensors
        return grad * 1, key * 1, value * 1


class Norm(torch.autograd.Function):  # type: ignore[misc] # torch is untyped here
    """As many operations as a fused norm launches kernels: one, and one backward."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad * 1


SHAPE = Shape(24, 12, 4, 16)


def trainer(kind, layers, folder, dtype):
    config = Qwen3Config(**gpu_step.TINY.to_dict() | {"num_hidden_layers": layers, "layer_types": None})
    made = gpu_step.build(kind, make_tiny_model(folder / kind / str(layers)), config, SHAPE, SHAPE.total, dtype)
    if kind == "shared prefix":
        for module in made.model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = functools.partial(lambda norm, x: Norm.apply(x.to(norm.weight.dtype)), module)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_of_the_loss_launches_half_of_stocks_kernels(tmp_path, monkeypatch, dtype):
    def attention(query, key, value, *_, **__):
        return Attention.apply(query, key, value)

    monkeypatch.setattr(shared_prefix, "VARLEN", {"cpu": (attention, {torch.float32, torch.bfloat16})})
    monkeypatch.setattr(shared_prefix, "CHECKED", {"cpu"})

    def launches(kind, layers):
        made = trainer(kind, layers, tmp_path, dtype)
        ids, mask = gpu_step.sequences(made.model.config, SHAPE, ragged=True)
        with Launches() as counted:
            gpu_step.loss_pass(made, ids, mask, SHAPE.completion, SHAPE.total)
        return counted.count.total()

    layer = {kind: (launches(kind, 4) - launches(kind, 2)) / 2 for kind in gpu_step.TRAINERS}
    assert layer["shared prefix"] <= 0.5 * layer["stock TRL"]


def test_a_decoded_token_launches_a_graph_and_nothing_else(tmp_path, monkeypatch):
    launches = Launches()
    replays = 0

    def recorded(step, state, output):
        def replay():
            nonlocal replays
            replays += 1
            launches.paused = True
            step()
            launches.paused = False

        return replay

    monkeypatch.setitem(shared_prefix_sampling.GRAPHS, "cpu", recorded)
    made = trainer("shared prefix", 2, tmp_path, torch.float32)
    prompts = gpu_step.sequences(made.model.config, SHAPE)[0][:, : SHAPE.prompt].tolist()
    counts = []
    for limit in (50, 100):
        made.generation_config.max_new_tokens = limit
        launches.count.clear()
        with launches:
            made._generate_single_turn(prompts, None, {}, SHAPE.group)
        counts.append(launches.count.total())
    assert replays == 49 + 99
    looks = 100 // shared_prefix_sampling.LOOK - 50 // shared_prefix_sampling.LOOK
    assert counts[1] - counts[0] <= 3 * looks
