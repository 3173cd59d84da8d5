"""Attention over rows that contain each prompt once, although a group has several completions of it.

A GRPO group is one prompt and G completions of it. `Packed` puts some groups into one row without padding, and
`shared_prefix_attention` lets each completion see its prompt and itself. Everything else in a model works token by token,
so it runs on such a row unchanged. docs/training.md has the picture, and trainer/shared_prefix_models.py the models.

The loss (trainer/run_trainer.py) and sampling (trainer/shared_prefix_sampling.py) are built on this module. It needs torch
and Transformers only: a test job samples without TRL and PEFT.
"""

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 # the usual name
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION = "shared_prefix"


class Layout(NamedTuple):
    """The positions of a prompt and of its completions in a packed row `[prompt 1, its completions, prompt 2, …]`.

    `prompt` and `completions` are slices of the row. `lengths` are the tokens of each completion, in order.
    """

    prompt: slice
    completions: slice
    lengths: list[int]


class Packed:
    """Prompts and completions as one row without padding, with each prompt once and equal completions of a prompt once.

    The tokens of a completion attend to its prompt and to each other. They have the same positions as in a separate
    sequence. The last token of a completion is left out, because it predicts no scored token.

    `input_ids`, `position_ids`: (1, N). `sources` (K,): the positions that predict a scored token. `targets` (K,): the
    scored tokens. `index` (B, C): the index in K of each scored token of a sequence, K for padding.
    """

    def __init__(self, prompts: list[list[int]], completions: list[list[int]], width: int, device: torch.device):
        groups: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            groups.setdefault(tuple(prompt), {}).setdefault(tuple(completion), []).append(row)
        tokens: list[int] = []
        positions: list[int] = []
        sources: list[int] = []
        targets: list[int] = []
        first = [0] * len(prompts)
        self.layout: list[Layout] = []
        for prefix, members in groups.items():
            start = len(tokens)
            tokens += prefix
            positions += range(len(prefix))
            end = len(tokens)
            lengths = []
            for suffix, rows in members.items():
                for row in rows:
                    first[row] = len(sources)
                if suffix:
                    sources += [end - 1, *range(len(tokens), len(tokens) + len(suffix) - 1)]
                    targets += suffix
                    tokens += suffix[:-1]
                    positions += range(len(prefix), len(prefix) + len(suffix) - 1)
                    if len(suffix) > 1:
                        lengths.append(len(suffix) - 1)
            self.layout.append(Layout(slice(start, end), slice(end, len(tokens)), lengths))
        self.input_ids = torch.tensor([tokens], device=device)
        self.position_ids = torch.tensor([positions], device=device)
        self.sources = torch.tensor(sources, dtype=torch.long, device=device)
        self.targets = torch.tensor(targets, dtype=torch.long, device=device)
        length = torch.tensor([len(completion) for completion in completions])[:, None]
        step = torch.arange(width)[None]
        self.index = torch.where(step < length, torch.tensor(first)[:, None] + step, len(sources)).to(device)
        self._gathers = [_gather(group.lengths, device) for group in self.layout]

    def attend(self, _layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Return the attention output (1, N, H, D) of `query` (1, H, N, D), `key` and `value` (1, H_kv, N, D)."""
        flat = [each[0].transpose(0, 1) for each in (query, key, value)]  # (N, heads, D)
        out = []
        for group, gather in zip(self.layout, self._gathers, strict=True):
            prompt = [each[group.prompt] for each in flat]
            out.append(attention([each[None] for each in prompt], None, scaling, query.is_cuda)[0])
            if group.lengths:
                own = [each[group.completions] for each in flat]
                if gather is None:  # all of one length: already a rectangle
                    rectangle = [each.unflatten(0, (len(group.lengths), -1)) for each in own]
                    out.append(attention(rectangle, prompt, scaling, query.is_cuda).flatten(0, 1))
                else:
                    pad, unpad = gather
                    rectangle = [each.index_select(0, pad.flatten()).unflatten(0, pad.shape) for each in own]
                    out.append(attention(rectangle, prompt, scaling, query.is_cuda).flatten(0, 1).index_select(0, unpad))
        return torch.cat(out)[None]


def _gather(lengths: list[int], device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Return indices (G, L) that pad completions to a rectangle, and indices that undo it. None for equal lengths."""
    if len(set(lengths)) <= 1:
        return None
    length = torch.tensor(lengths)[:, None]
    step = torch.arange(max(lengths))[None]
    real = step < length
    pad = torch.where(real, length.cumsum(0) - length + step, 0)
    return pad.to(device), real.flatten().nonzero()[:, 0].to(device)


def attention(qkv: list[Tensor], prefix: list[Tensor] | None, scaling: float, fused: bool) -> Tensor:
    """Return the attention (G, L, heads, D) of G sequences to themselves, causally, and to a common prefix.

    `qkv`: the queries, keys and values (G, L, heads, D) of the sequences; keys and values may have fewer heads. `prefix`:
    the same of the prefix (P, heads, D); its queries are not used. `fused`: with SDPA's kernels, for GPUs. Otherwise with
    matrix products, because the backward of SDPA's CPU kernel takes two to three times as long in bf16.
    """
    q, k, v = qkv
    sequences, length, heads, size = q.shape
    shared = heads // k.shape[2]
    # The query heads of a key head are stacked. Neither the keys nor the prefix need to be repeated.
    q = q.unflatten(2, (-1, shared)).permute(2, 0, 3, 1, 4).flatten(2, 3)  # (H_kv, G, shared * L, D)
    k, v = (each.permute(2, 0, 1, 3) for each in (k, v))  # (H_kv, G, L, D)
    mask = torch.full((length, length), -torch.inf, dtype=q.dtype, device=q.device).triu(1).repeat(shared, 1)
    if fused:
        if prefix is not None:
            k, v = (
                torch.cat([far.transpose(0, 1)[:, None].expand(-1, sequences, -1, -1), near], dim=2)
                for far, near in zip(prefix[1:], (k, v), strict=True)
            )
            mask = F.pad(mask, (len(prefix[1]), 0))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    else:
        scores = torch.matmul(q * scaling, k.transpose(2, 3)) + mask
        if prefix is not None:
            far_k, far_v = (each.transpose(0, 1) for each in prefix[1:])  # (H_kv, P, D)
            far = torch.matmul((q * scaling).flatten(1, 2), far_k.transpose(1, 2)).unflatten(1, (sequences, -1))
            weights = torch.cat([far, scores], dim=-1).softmax(-1)
            far, near = weights.split([far_k.shape[1], length], dim=-1)
            out = torch.matmul(far.flatten(1, 2), far_v).unflatten(1, (sequences, -1)) + torch.matmul(near, v)
        else:
            out = torch.matmul(scores.softmax(-1), v)
    return out.unflatten(2, (shared, length)).permute(1, 3, 0, 2, 4).reshape(sequences, length, heads, size)


class SharedPrefix(Protocol):
    """Computes attention for the tokens of a call: `Packed` for a whole row, a sampling cache for one token per row."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Return the attention output (B, L, H, D) of `query` (B, H, L, D), `key` and `value` (B, H_kv, L, D)."""


def shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    shared_prefix: SharedPrefix | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention for Transformers: by `shared_prefix` if the model was called with it, else by plain SDPA."""
    if shared_prefix is None:
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return out
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return shared_prefix.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(ATTENTION, shared_prefix_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def backbone(model: PreTrainedModel, shared_prefix: SharedPrefix, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Return the last hidden states (B, L, hidden) of a causal language model under `shared_prefix`."""
    # Transformers passes a 4-D mask on unchanged. No shape fits this mask: any other attention would raise.
    no_mask = torch.empty(1, 1, 0, 0, device=input_ids.device)
    hidden: Tensor = model.base_model(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=no_mask,
        use_cache=False,
        shared_prefix=shared_prefix,
    ).last_hidden_state
    return hidden
