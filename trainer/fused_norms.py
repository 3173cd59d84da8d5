"""Computes RMS norms by torch's fused kernel on a GPU. Transformers computes them in six kernels, and eleven backward."""

import functools

import torch
import torch.nn.functional as F  # noqa: N812 # the usual name
from torch import Tensor
from transformers import PreTrainedModel


def rms_norm(module: torch.nn.Module, x: Tensor) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) · weight (…, N), rounded once."""
    weight: Tensor = module.weight
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, module.variance_epsilon)


def fuse_norms(model: PreTrainedModel) -> int:
    """Let the model's RMS norms compute by `rms_norm`, and return their number. Norms that compute otherwise stay."""
    fused = 0
    for module in model.modules():
        if not (type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")):
            continue
        x = torch.linspace(-2, 3, module.weight.numel(), device=module.weight.device).to(module.weight)
        with torch.no_grad():
            if not module(x).isclose(rms_norm(module, x), rtol=2e-2, atol=1e-5).all():
                continue
        module.forward = functools.partial(rms_norm, module)
        fused += 1
    return fused
