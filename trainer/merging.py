"""Adds an adapter to the base weights, so that the sum keeps the adapter's effect.

Rounding the sum to the nearest bf16 value returns most weights to the base model's: next to a weight, bf16 has steps of 0.4
to 0.8 %, and an adapter's change is mostly smaller. Stochastic rounding takes the upper or the lower neighbour with a
probability that makes the mean right, and the products of a layer average over thousands of weights. Values that bf16 has
stay as they are. (Gupta et al., arXiv 1502.02551.)
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

SEED = 0  # a job that is done twice writes the same model


def exact_sums(model: "PeftModel") -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """Merge the model's adapter layer by layer. Yields each changed weight and its exact value in fp32.

    The caller assigns the weight's data before it goes on: only one layer exists in fp32.
    """
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    for module in model.modules():
        if isinstance(module, LoraLayer):
            weight = module.get_param() if isinstance(module, ParamWrapper) else module.get_base_layer().weight
            weight.data = weight.data.float()
            module.merge()
            yield weight, weight.data


def merge(model: "PeftModel", dtype: torch.dtype) -> "PreTrainedModel":
    """Return the bf16 base model with the adapter added: in fp32 exactly, in bf16 by stochastic rounding.

    The argument cannot be used any more.
    """
    draw = torch.Generator(model.device).manual_seed(SEED)

    def rounded(exact: Tensor) -> Tensor:
        return stochastic_bf16(exact, draw) if exact.dtype == torch.float32 != dtype else exact.to(dtype)

    for weight, exact in exact_sums(model):
        weight.data = rounded(exact)
    merged: PreTrainedModel = model.unload()
    for weight in merged.parameters():  # `modules_to_save` are fp32 as well
        weight.data = rounded(weight.data)
    return merged


def stochastic_bf16(exact: Tensor, draw: torch.Generator) -> Tensor:
    """Round fp32 values to one of the two neighbouring bf16 values; the mean over many draws is the exact value.

    bf16 is the upper half of fp32: a random number below 2^16 is added to the bits, and the lower half is cut off.
    """
    bits = exact.view(torch.int32)
    noise = torch.randint(1 << 16, bits.shape, dtype=torch.int32, generator=draw, device=bits.device)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).bfloat16()
