"""Sampling in which the completions of a prompt share its prefill and its key-value cache.

`sample` is a `custom_generate` for Transformers' `generate`: logits processors, stopping criteria and the generation config
come from there. Training samples with `sample`, and so does a test job that asks for several samples.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 # the usual name
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from trainer.shared_prefix import Packed, backbone


class Rollout:
    """The key-value cache of a rollout: the keys and values of each distinct prompt once, and of the completions' tokens.

    The first call has the prompts, packed into one row. Each later call has one token of each unfinished completion.
    """

    def __init__(self, prompts: list[list[int]], layers: int, device: torch.device):
        self._packed = Packed(prompts, [[]] * len(prompts), 0, device)
        order: dict[tuple[int, ...], int] = {}
        self.prompt_of = torch.tensor([order.setdefault(tuple(prompt), len(order)) for prompt in prompts], device=device)
        seen = [0] * len(order)
        slots = []
        for prompt in self.prompt_of.tolist():
            slots.append(seen[prompt])
            seen[prompt] += 1
        self._per_prompt = max(seen)
        self._slot = self.prompt_of * self._per_prompt + torch.tensor(slots, device=device)
        lengths = torch.tensor([group.prompt.stop - group.prompt.start for group in self._packed.layout], device=device)
        self.lengths = lengths[self.prompt_of]
        longest = int(lengths.max())
        self._padding = (torch.arange(longest, device=device) >= lengths[:, None])[:, None, None]
        self._prefix: list[tuple[Tensor, Tensor]] = []
        self._suffix: list[list[Tensor]] = [[] for _ in range(layers)]
        self._longest = longest
        self.steps = 0

    input_ids = property(lambda self: self._packed.input_ids)
    position_ids = property(lambda self: self._packed.position_ids)

    @property
    def last(self) -> Tensor:
        """The positions of the prompts' last tokens in the packed row, one per distinct prompt."""
        return torch.tensor([group.prompt.stop - 1 for group in self._packed.layout], device=self.lengths.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Return the attention output (B, L, H, D), and store the keys and values."""
        if len(self._prefix) == layer:
            slices = [group.prompt for group in self._packed.layout]
            self._prefix.append(
                tuple(
                    torch.nn.utils.rnn.pad_sequence([each[0, :, p].transpose(0, 1) for p in slices], batch_first=True)
                    .transpose(1, 2)
                    .contiguous()
                    for each in (key, value)
                )
            )  # (prompts, H_kv, longest, D)
            return self._packed.attend(layer, query, key, value, scaling)
        rows, heads, _, size = query.shape
        kv_heads = key.shape[1]
        shared = heads // kv_heads
        prefix_k, prefix_v = self._prefix[layer]
        own = self._suffix[layer]
        if not own:
            own[:] = [torch.empty(rows, kv_heads, 32, size, dtype=key.dtype, device=key.device) for _ in range(2)]
        elif own[0].shape[2] == self.steps:
            own[:] = [F.pad(each, (0, 0, 0, self.steps)) for each in own]
        own[0][:, :, self.steps] = key[:, :, 0]
        own[1][:, :, self.steps] = value[:, :, 0]
        own_k, own_v = (each[:, :, : self.steps + 1] for each in own)
        q = query[:, :, 0].unflatten(1, (kv_heads, shared)) * scaling
        by_prompt = self._by_prompt(q)
        scores = torch.matmul(by_prompt, prefix_k.transpose(2, 3)).masked_fill_(self._padding, -torch.inf)
        scores = torch.cat([self._by_row(scores), torch.matmul(q, own_k.transpose(2, 3))], dim=-1)
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        out = self._by_row(torch.matmul(self._by_prompt(weights[..., : self._longest]), prefix_v))
        out += torch.matmul(weights[..., self._longest :], own_v)
        return out.flatten(1, 2)[:, None]

    def _by_prompt(self, x: Tensor) -> Tensor:
        """(rows, H_kv, shared, X) → (prompts, H_kv, slots * shared, X), with zeros in empty slots."""
        prompts = self._padding.shape[0]
        if len(x) != prompts * self._per_prompt:
            x = x.new_zeros(prompts * self._per_prompt, *x.shape[1:]).index_copy_(0, self._slot, x)
        return x.unflatten(0, (prompts, self._per_prompt)).transpose(1, 2).flatten(2, 3)

    def _by_row(self, x: Tensor) -> Tensor:
        x = x.unflatten(2, (self._per_prompt, -1)).transpose(1, 2).flatten(0, 1)
        return x if len(x) == len(self._slot) else x.index_select(0, self._slot)

    def keep(self, rows: Tensor) -> None:
        """Remove all rows from the batch except `rows` (indices)."""
        self._slot, self.lengths = self._slot[rows], self.lengths[rows]
        for own in self._suffix:
            own[:] = [each[:, :, : self.steps].index_select(0, rows) for each in own]


def draw(scores: Tensor) -> Tensor:
    """Sample a token (B,) from each row of scores (B, V), as softmax and `multinomial` do, with one random number a row."""
    up_to = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    level = (1 - torch.rand_like(up_to[:, :1])) * up_to[:, -1:]  # in (0, 1]: never a token of probability 0
    return torch.searchsorted(up_to, level)[:, 0]


def sample(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    ended: Callable[[list[int], Tensor], None] | None = None,
    **model_kwargs: Any,
) -> Tensor:
    """Extend prompts (B, P), padded on the left, by sampled completions: (B, P + C). A `custom_generate` of `generate`.

    `ended` is called when rows leave the batch before the others, with their indices and completions (rows, C so far).
    """
    rows, width = input_ids.shape
    mask = model_kwargs["attention_mask"]  # None where nothing is padded
    real = input_ids.new_ones(input_ids.shape, dtype=torch.bool) if mask is None else mask.bool()
    prompts = [ids[each].tolist() for ids, each in zip(input_ids, real, strict=True)]
    cache = Rollout(prompts, model.config.num_hidden_layers, input_ids.device)
    head = model.get_output_embeddings()
    logits = head(backbone(model, cache, cache.input_ids, cache.position_ids)[0, cache.last])[cache.prompt_of]

    sequences = input_ids.new_full((rows, width + generation_config.max_new_tokens), generation_config.pad_token_id)
    sequences[:, :width] = input_ids
    row = torch.arange(rows, device=input_ids.device)
    finished = torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
    for end in range(width, sequences.shape[1]):
        scores = logits.float()
        if logits_processor:  # some keep a state per row: pass the whole batch, with the rows that left
            all_rows = scores.new_zeros(rows, scores.shape[1]).index_copy_(0, row, scores)
            scores = logits_processor(sequences[:, :end], all_rows)[row]
        tokens = draw(scores) if generation_config.do_sample else scores.argmax(-1)
        sequences[row, end] = tokens.where(~finished, generation_config.pad_token_id)
        finished |= stopping_criteria(sequences[row, : end + 1], None)
        left = int((~finished).sum())
        if left == 0:
            return sequences[:, : end + 1]
        if left <= 0.9 * len(row):  # removing rows copies the cache: wait for a tenth of them
            if ended is not None:
                gone = row[finished]
                ended(gone.tolist(), sequences[gone, width : end + 1])
            staying = (~finished).nonzero()[:, 0]
            cache.keep(staying)
            row, tokens, finished = row[staying], tokens[staying], finished[staying]
        hidden = backbone(model, cache, tokens[:, None], cache.lengths[:, None] + cache.steps)
        cache.steps += 1
        logits = head(hidden[:, -1])
    return sequences
