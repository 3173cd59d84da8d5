"""How far the sampler's log-probabilities of the sampled tokens are from those that the loss computes.

A sampler with other kernels, types or weights than the trainer samples from another policy than the one that learns. Then
GRPO's ratio is wrong from the first step. TRL measures the same for vLLM, and corrects it by importance sampling.
"""

import math
from typing import Any

import torch
from torch import Tensor


def mismatch(inputs: dict[str, Any], computed: Tensor, clip_max: float | None) -> dict[str, float]:
    """Return the mean and the 99th percentile of |sampler - trainer| in nats over the tokens of TRL's `inputs`.

    `computed` (B, C) are the loss's log-probabilities. With several steps on a rollout, those of the policy that sampled are
    in the inputs. `mismatch_clipped` is the share of tokens whose ratio of probabilities, trainer to sampler, exceeds
    `clip_max`: what TRL's importance correction would clip. Empty without the sampler's log-probabilities, or tokens.
    """
    sampled, mask = inputs.get("sampling_per_token_logps"), inputs["completion_mask"].bool()
    if sampled is None or not mask.any():
        return {}
    difference = (inputs.get("old_per_token_logps", computed) - sampled)[mask].float()
    distance, clipped = difference.abs(), difference > math.log(clip_max or math.inf)
    values = torch.stack([distance.mean(), distance.quantile(0.99), clipped.float().mean()])
    return dict(zip(("mismatch", "mismatch_p99", "mismatch_clipped"), values.tolist(), strict=True))
