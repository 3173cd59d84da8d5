"""Log-probabilities and entropies of tokens from hidden states, without keeping their logits."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 # the usual name
from torch import Tensor

# The number of logits that exist at a time, by the type of the device: 64 MB in fp32, near the size of a CPU's caches, and
# 256 MB on a GPU, which reads the whole head for each chunk.
LOGITS_PER_CHUNK = {"cpu": 1 << 24, "cuda": 1 << 26}


class TokenLogProbs(torch.autograd.Function):  # type: ignore[misc] # torch is untyped here
    """Log-probabilities of the targets (K,) and entropies (K,) from hidden states (K, hidden), with logits in chunks.

    The gradient of a log-probability is a vector of hidden size times one incoming number. The forward keeps this vector and
    no logits, and the backward is one product per token.
    """

    @staticmethod
    def forward(  # noqa: D102 # autograd's names
        ctx: Any, hidden: Tensor, head: torch.nn.Linear, targets: Tensor, temperature: float, entropy_grad: bool
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        learns = ctx.needs_input_grad[0]
        logps, entropies = (torch.empty(len(targets), device=hidden.device) for _ in range(2))
        slopes = torch.empty(hidden.shape, device=hidden.device) if learns else None
        entropy_slopes = torch.empty(hidden.shape, device=hidden.device) if learns and entropy_grad else None
        with torch.autocast(device, enabled=False):
            weight = head.weight.to(dtype)
            bias = None if head.bias is None else head.bias.to(dtype)
            size = max(1, LOGITS_PER_CHUNK[device] // len(weight))
            for start in range(0, len(targets), size):
                part = slice(start, start + size)
                target = targets[part, None]
                z = F.linear(hidden[part].to(dtype), weight, bias).float().div_(temperature)
                z -= z.amax(-1, keepdim=True)
                p = z.exp()
                total = p.sum(-1, keepdim=True)
                p /= total
                entropy = total.log() - torch.linalg.vecdot(p, z)[:, None]
                logps[part] = (z.gather(-1, target) - total.log())[:, 0]
                entropies[part] = entropy[:, 0]
                if entropy_slopes is not None:
                    # d entropy / d z = -p (log p + entropy)
                    steps = p * (total.log() - z - entropy)
                    entropy_slopes[part] = torch.mm(steps.to(dtype), weight).float() / temperature
                if slopes is not None:
                    # d log p(target) / d z = [is target] - p
                    p.neg_().scatter_add_(-1, target, torch.ones_like(entropy))
                    slopes[part] = torch.mm(p.to(dtype), weight).float() / temperature
        ctx.save_for_backward(slopes, entropy_slopes)
        ctx.dtype = hidden.dtype
        if not entropy_grad:
            ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, entropy_grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # noqa: D102
        slopes, entropy_slopes = ctx.saved_tensors
        total = grad[:, None] * slopes
        if entropy_slopes is not None:
            total += entropy_grad[:, None] * entropy_slopes
        return total.to(ctx.dtype), None, None, None, None
