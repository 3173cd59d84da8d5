"""Attention over rows that contain each prompt once, although a group has several completions of it.

A GRPO group is one prompt and G completions of it. `Packed` puts some groups into one row without padding, and
`shared_prefix_attention` lets each completion see its prompt and itself. Everything else in a model works token by token,
so it runs on such a row unchanged. docs/training.md has the picture, and trainer/shared_prefix_models.py the models.

The loss (trainer/run_trainer.py) and sampling (trainer/shared_prefix_sampling.py) are built on this module. It needs torch
and Transformers only: a test job samples without TRL and PEFT.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 # the usual name
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

log = logging.getLogger("trainer")

ATTENTION = "shared_prefix"

# Kernels for sequences of different lengths in one call, and the types in which they compute, by the type of the device.
VARLEN: dict[str, tuple[Callable[..., Any], set[torch.dtype]]] = {"cuda": (varlen_attn, {torch.bfloat16, torch.float16})}
# The devices on which such a kernel has computed what `attention` does.
CHECKED: set[str] = set()
# The largest relative difference that the types' rounding explains.
TOLERANCE = 2e-2


class Layout(NamedTuple):
    """The positions of a prompt and of its completions in a packed row `[prompt 1, its completions, prompt 2, …]`.

    `prompt` and `completions` are slices of the row. `lengths` are the tokens of each completion, in order.
    """

    prompt: slice
    completions: slice
    lengths: list[int]


class Sequences(NamedTuple):
    """The prompts and completions of a packed row as sequences of one kernel call, in the order of the row.

    The queries of a sequence are its own tokens, its keys and values the tokens `keys` of the row: a prompt's own, or the
    prompt's and the completion's own. `cu_q` and `cu_k` are the sequences' ends, after a 0, in queries and in `keys`.
    """

    keys: Tensor
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int

    @classmethod
    def of(cls, layout: list[Layout], device: torch.device) -> "Sequences":
        """Return the sequences of a packed row."""
        keys: list[int] = []
        queries, ends = [0], [0]
        for group in layout:
            start = group.completions.start
            for length in [0, *group.lengths]:
                keys += range(group.prompt.start, group.prompt.stop)
                keys += range(start, start + length)
                queries.append(queries[-1] + (length or _size(group.prompt)))
                ends.append(len(keys))
                start += length
        cu_q, cu_k = (torch.tensor(each, dtype=torch.int32) for each in (queries, ends))
        return cls(
            torch.tensor(keys, device=device),
            cu_q.to(device),
            cu_k.to(device),
            int(cu_q.diff().max()),
            int(cu_k.diff().max()),
        )


class Gather(torch.autograd.Function):  # type: ignore[misc] # torch is untyped here
    """Selects tokens (K, …) of a row (N, …), some several times. Their gradients are added in fp32."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, index: Tensor) -> Tensor:  # noqa: D102 # autograd's names
        ctx.save_for_backward(index)
        ctx.shape = row.shape
        return row.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape, dtype=torch.float32).index_add_(0, index, grad.float()).to(grad.dtype), None


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
        self._sequences = Sequences.of(self.layout, device) if device.type in VARLEN else None

    def attend(self, _layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Return the attention output (1, N, H, D) of `query` (1, H, N, D), `key` and `value` (1, H_kv, N, D)."""
        # Under autocast rotary embeddings are fp32. One conversion here replaces one in each product.
        flat = [each[0].transpose(0, 1).to(value.dtype) for each in (query, key, value)]  # (N, heads, D)
        kernel, types = VARLEN.get(query.device.type, (None, set()))
        if kernel is None or query.dtype not in types:
            return self._by_groups(flat, scaling)
        if query.device.type not in CHECKED:
            self._check(kernel, flat, scaling)
        if query.device.type not in CHECKED:
            return self._by_groups(flat, scaling)
        return self._at_once(kernel, flat, scaling)

    def _check(self, kernel: Callable[..., Any], flat: list[Tensor], scaling: float) -> None:
        """Compare the kernel with `attention`, once for each type of device. If it does not work, it is not used again."""
        device = flat[0].device.type
        try:
            with torch.no_grad():
                expected = self._by_groups(flat, scaling)
                off = (self._at_once(kernel, flat, scaling) - expected).abs().max() / expected.abs().max()
            reason = "" if off <= TOLERANCE else f"its output differs by {float(off):.2g}"
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error)
        if reason:
            log.warning("attention group by group, without %s: %s", getattr(kernel, "__name__", kernel), reason)
            del VARLEN[device]
        else:
            CHECKED.add(device)

    def _at_once(self, kernel: Callable[..., Any], flat: list[Tensor], scaling: float) -> Tensor:
        """Return the attention output (1, N, H, D) of all sequences by one kernel."""
        assert self._sequences is not None
        keys, cu_q, cu_k, max_q, max_k = self._sequences
        query, key, value = flat
        gathered = [Gather.apply(each, keys) for each in (key, value)]
        out: Tensor = kernel(query, *gathered, cu_q, cu_k, max_q, max_k, scale=scaling, window_size=(-1, 0), enable_gqa=True)
        return out[None]

    def _by_groups(self, flat: list[Tensor], scaling: float) -> Tensor:
        """Return the attention output (1, N, H, D), by two calls for each group."""
        fused = flat[0].is_cuda
        # One split: the gradient of a slice would be a row of zeros for each slice.
        sizes = [size for group in self.layout for size in (_size(group.prompt), _size(group.completions))]
        parts = [each.split(sizes) for each in flat]
        out = []
        for number, (group, gather) in enumerate(zip(self.layout, self._gathers, strict=True)):
            prompt, own = ([each[2 * number + offset] for each in parts] for offset in (0, 1))
            out.append(attention([each[None] for each in prompt], None, scaling, fused)[0])
            if group.lengths:
                if gather is None:  # all of one length: already a rectangle
                    rectangle = [each.unflatten(0, (len(group.lengths), -1)) for each in own]
                    out.append(attention(rectangle, prompt, scaling, fused).flatten(0, 1))
                else:
                    pad, unpad = gather
                    rectangle = [each.index_select(0, pad.flatten()).unflatten(0, pad.shape) for each in own]
                    out.append(attention(rectangle, prompt, scaling, fused).flatten(0, 1).index_select(0, unpad))
        return torch.cat(out)[None]


def _size(part: slice) -> int:
    return int(part.stop - part.start)


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
    mask = _mask(length, shared, q.dtype, q.device)
    if fused:
        if prefix is not None:
            k, v = (
                torch.cat([far.transpose(0, 1)[:, None].expand(-1, sequences, -1, -1), near], dim=2)
                for far, near in zip(prefix[1:], (k, v), strict=True)
            )
            mask = F.pad(mask, (len(prefix[1]), 0))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    else:
        q = q * scaling
        scores = torch.matmul(q, k.transpose(2, 3)) + mask
        if prefix is not None:
            far_k, far_v = (each.transpose(0, 1) for each in prefix[1:])  # (H_kv, P, D)
            far = torch.matmul(q.flatten(1, 2), far_k.transpose(1, 2)).unflatten(1, (sequences, -1))
            weights = torch.cat([far, scores], dim=-1).softmax(-1)
            far, near = weights.split([far_k.shape[1], length], dim=-1)
            out = torch.matmul(far.flatten(1, 2), far_v).unflatten(1, (sequences, -1)) + torch.matmul(near, v)
        else:
            out = torch.matmul(scores.softmax(-1), v)
    return out.unflatten(2, (shared, length)).permute(1, 3, 0, 2, 4).reshape(sequences, length, heads, size)


@functools.lru_cache(maxsize=64)  # the layers of a model, forward and backward, need the same few
def _mask(length: int, shared: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what to add to the scores (shared * length, length) of a causal attention."""
    return torch.full((length, length), -torch.inf, dtype=dtype, device=device).triu(1).repeat(shared, 1)


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
