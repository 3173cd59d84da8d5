"""Computes LoRA layers with the weights and the adapter in one matrix product, in the loss and in a rollout.

PEFT adds the adapter's output to the layer's. In bf16 this loses small adapters: next to a number, bf16 has steps of 0.4 to
0.8 %, so the sum of a rounded output and a much smaller one is the rounded output again. Merging the adapter into the
weights loses it in the same way. Here one product adds both in fp32 and rounds once:

    h = x (s A)ᵀ        y = [x, h] [W, B]ᵀ

Layers that read the same input (queries, keys and values) are one product. W and B are parts of one matrix, of which the
layers' own weights are views: there is no second copy of the weights, and nothing is converted in a forward.

Weights in 4 bits stay as they are, and PEFT computes the loss with them. A rollout, which reads all weights for each token,
dequantizes them once, if a third of the memory suffices for them.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 # the usual name
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor

from trainer import models

# Names of layers of a block that read the same input, in every decoder that `trainer.shared_prefix_models` supports.
READ_ONE_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})

# The part of the memory that dequantized weights may take. Half is for keys and values (`tokens_that_fit`).
MOST_OF_MEMORY = 1 / 3


class Product(torch.autograd.Function):  # type: ignore[misc] # torch is untyped here
    """y = [x, h] [W, B]ᵀ (N, out) for x (N, in), with gradients for x, and for the adapters' parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: "FusedLayers", *_parameters: Tensor) -> Tensor:  # noqa: D102 # autograd's names
        both = layers.with_low_rank(x)
        ctx.save_for_backward(both)
        ctx.layers = layers
        return layers.product(both)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        layers: FusedLayers = ctx.layers
        (both,) = ctx.saved_tensors
        x, h = both.split([layers.inputs, layers.ranks], dim=1)
        weight, second = layers.weight.split([layers.inputs, layers.ranks], dim=1)
        grad_h = grad @ second
        grad_x = torch.addmm(grad @ weight, grad_h, layers.first) if ctx.needs_input_grad[0] else None
        firsts, seconds = torch.mm(grad_h.t(), x) * layers.scaling, torch.mm(grad.t(), h)
        grads = [firsts[rows].float() for _, rows in layers.blocks]
        grads += [seconds[block].float() for block in layers.blocks]
        return grad_x, None, *grads


class FusedLayers:
    """LoRA layers that read one input, in a type in which they compute.

    `weight` (out, in + ranks) is [W, B], `first` (ranks, in) is s A, `scaling` (ranks, 1) is s. `blocks` are the rows of
    `weight` and the ranks that belong to each adapter.
    """

    def __init__(self, layers: Sequence[LoraLayer], dtype: torch.dtype):
        self.layers = layers
        self.sizes, self.inputs = [layer.out_features for layer in layers], layers[0].in_features
        self.blocks: list[tuple[slice, slice]] = []
        self.scalings: list[float] = []
        firsts, seconds = [], []
        outputs = ranks = 0
        for layer, size in zip(layers, self.sizes, strict=True):
            for name in layer.active_adapters:
                rank = layer.r[name]
                self.blocks.append((slice(outputs, outputs + size), slice(ranks, ranks + rank)))
                self.scalings.append(layer.scaling[name])
                firsts.append(layer.lora_A[name].weight)
                seconds.append(layer.lora_B[name].weight)
                ranks += rank
            outputs += size
        self.ranks = -(-ranks // 8) * 8  # GPUs multiply faster if rows begin at multiples of 16 bytes
        self.parameters = firsts + seconds
        self.weight = firsts[0].new_zeros(outputs, self.inputs + self.ranks, dtype=dtype)
        self.first = firsts[0].new_zeros(self.ranks, self.inputs, dtype=dtype)
        self.scaling = self.first.new_zeros(self.ranks, 1)
        for (_, rows), scaling in zip(self.blocks, self.scalings, strict=True):
            self.scaling[rows] = scaling
        self.bias = self._biases()
        for rows, layer in zip(self._base_rows(), layers, strict=True):
            rows.copy_(dense_weight(layer))
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def _base_rows(self) -> list[Tensor]:
        """Return each layer's rows of W in `weight`."""
        return [rows[:, : self.inputs] for rows in self.weight.split(self.sizes)]

    def replace_base_weights(self) -> None:
        """Have the layers' base weights be views of `weight`, which frees their own memory."""
        for rows, layer in zip(self._base_rows(), self.layers, strict=True):
            layer.get_base_layer().weight.data = rows

    def _biases(self) -> Tensor | None:
        biases = [layer.get_base_layer().bias for layer in self.layers]
        if all(bias is None for bias in biases):
            return None
        sized = zip(biases, self.sizes, strict=True)
        return torch.cat([self.weight.new_zeros(size) if bias is None else bias.detach() for bias, size in sized]).to(
            self.weight
        )

    def copies(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the places of s A and B in `first` and `weight`."""
        return [self.first[rows] for _, rows in self.blocks], [
            self.weight[out, self.inputs + rows.start : self.inputs + rows.stop] for out, rows in self.blocks
        ]

    def with_low_rank(self, x: Tensor) -> Tensor:
        """Return [x, h] (N, in + ranks)."""
        x = x.to(self.weight.dtype)
        return torch.cat([x, F.linear(x, self.first)], dim=1)

    def product(self, both: Tensor) -> Tensor:
        """Return y (N, out) for [x, h]."""
        return F.linear(both, self.weight, self.bias)

    def forward(self, number: int, x: Tensor) -> Tensor:
        """Return the output (…, out) of the layer with this number for inputs (…, in). Computes all layers at the first."""
        if x is not self._input or number not in self._outputs:
            flat = x.flatten(0, -2)
            with torch.autocast(x.device.type, enabled=False):
                if torch.is_grad_enabled():
                    out = Product.apply(flat, self, *self.parameters)
                else:
                    out = self.product(self.with_low_rank(flat))
            self._input, self._outputs = x, dict(enumerate(out.unflatten(0, x.shape[:-1]).split(self.sizes, dim=-1)))
        output = self._outputs.pop(number)
        if not self._outputs:
            self._input = None
        return output


class FusedLora:
    """A PEFT model's LoRA layers, which compute as this module says, in one type.

    `groups` are the layers that are always fused, `quantized` those that are fused in rollouts only. Both are empty for
    models with other adapters: DoRA, trained biases and adapters of embeddings are not fused.
    """

    def __init__(self, model: PeftModel, dtype: torch.dtype):
        self._model, self._dtype = model, dtype
        self._fresh = False
        self.groups: list[FusedLayers] = []
        self.quantized: list[list[LoraLayer]] = []
        layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        inputs: dict[tuple[str, str], list[LoraLayer]] = {}
        for name, layer in layers.items():
            parent, _, own = name.rpartition(".")
            together = next((",".join(sorted(names)) for names in READ_ONE_INPUT if own in names), own)
            inputs.setdefault((parent, together), []).append(layer)
        if all(map(_plain, layers.values())):
            self.groups = [FusedLayers(group, dtype) for group in inputs.values()]
        elif all(_plain(layer) or _four_bit(layer) for layer in layers.values()) and _room(layers.values(), dtype):
            self.quantized = list(inputs.values())
        self._copy_adapters = adapter_copier(self.groups)
        for group in self.groups:
            group.replace_base_weights()
            self._attach(group)
        if self.groups:
            model.get_base_model().register_forward_pre_hook(lambda *_: self.refresh())

    def _attach(self, group: FusedLayers) -> None:
        for number, layer in enumerate(group.layers):
            layer.forward = functools.partial(self._forward, layer, layer.forward, group, number)

    def refresh(self) -> None:
        """Copy the adapters' present parameters into the products' matrices. Runs before every forward of the model."""
        if not self._fresh:
            self._copy_adapters()

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """Run the whole model in this type for the block, in which the adapter does not change.

        The model's own tensors come back unchanged. Dequantized weights exist in the block only.
        """
        own = [FusedLayers(layers, self._dtype) for layers in self.quantized]
        for group in own:
            self._attach(group)
        inside = {id(layer.get_base_layer().weight) for group in self.groups + own for layer in group.layers}
        frozen = [each for each in self._model.parameters() if each.is_floating_point() and not each.requires_grad]
        adapter_copier(self.groups + own)()
        self._fresh = True
        try:
            with models.converted((each for each in frozen if id(each) not in inside), self._dtype):
                yield
        finally:
            self._fresh = False
            for layer in [layer for group in own for layer in group.layers]:
                del layer.forward

    def _forward(
        self, layer: LoraLayer, stock: Any, group: FusedLayers, number: int, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Compute a layer: fused, or as PEFT does where the adapter is off or has dropout, which a rollout has not."""
        dropout = layer.training and any(getattr(each, "p", 0.0) for each in layer.lora_dropout.values())
        if layer.disable_adapters or (dropout and not self._fresh):
            output: Tensor = stock(x, *args, **kwargs)
            return output
        return group.forward(number, x)


def adapter_copier(groups: Sequence[FusedLayers]) -> Callable[[], None]:
    """Return a function that copies the adapters' present parameters into the matrices of these products."""
    copies = [group.copies() for group in groups]
    places = [place for each in copies for part in each for place in part]
    parameters = [parameter for group in groups for parameter in group.parameters]
    scalings = [factor for group in groups for factor in group.scalings + [1.0] * len(group.scalings)]

    def copy() -> None:
        if places:
            with torch.no_grad():
                torch._foreach_copy_(places, torch._foreach_mul(parameters, scalings))

    return copy


def dense_weight(layer: LoraLayer) -> Tensor:
    """Return the base weights (out, in) of a layer, dequantized if they are in 4 bits."""
    weight = layer.get_base_layer().weight
    if not _four_bit(layer):
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def _low_rank(layer: LoraLayer) -> bool:
    return not layer.lora_variant and not any(layer.lora_bias.values())


def _plain(layer: LoraLayer) -> bool:
    """Return whether a layer is a low-rank matrix beside plain weights."""
    return type(layer) is LoraLinear and _low_rank(layer)


def _four_bit(layer: LoraLayer) -> bool:
    """Return whether a layer is a low-rank matrix beside weights in 4 bits."""
    return hasattr(getattr(layer.get_base_layer(), "weight", None), "quant_state") and _low_rank(layer)


def _room(layers: Iterable[LoraLayer], dtype: torch.dtype) -> bool:
    """Return whether the weights of these layers take at most a part of the GPU's free memory, or of a CPU's memory."""
    size = sum(layer.out_features * layer.in_features for layer in layers) * dtype.itemsize
    on_gpu = torch.cuda.is_available()
    memory = torch.cuda.mem_get_info()[0] if on_gpu else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return bool(size <= MOST_OF_MEMORY * memory)
