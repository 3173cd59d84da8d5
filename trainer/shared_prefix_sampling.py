"""Sampling in which the completions of a prompt share its prefill and its keys and values.

`sample` is a `custom_generate` for Transformers' `generate`: logits processors, stopping criteria and the generation config
come from there. Training samples with `sample`, and so does a test job that asks for several samples.

A decoder samples token by token from buffers that are allocated once. On a GPU a CUDA graph repeats the step, because a
step's kernels are small and Python launches them more slowly than the GPU runs them.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 # the usual name
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.generation import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trainer.cuda_graph import capture
from trainer.shared_prefix import Packed, backbone

log = logging.getLogger("trainer")

# Processors and criteria that depend on a step's scores and tokens only. A graph repeats them; others need Python.
OF_ONE_STEP = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    MaxLengthCriteria,
    EosTokenCriteria,
)
# How a step is repeated, by the type of the device. Elsewhere Python runs it every time.
GRAPHS: dict[str, Callable[..., Callable[[], None]]] = {"cuda": capture}
# A graph reads keys and values of a fixed length. A longer one reads more than it needs; capturing one takes about 35 ms.
WINDOW = 128
# Tokens of a vocabulary that a CPU adds up together.
BLOCK = 128
# Tokens between two looks at the ends of completions. A look makes the GPU wait for Python.
LOOK = 8


def tokens_that_fit(config: PretrainedConfig) -> int | None:
    """Return for how many tokens a GPU's free memory has room for keys and values, half of it kept free. None on a CPU.

    A token's share of the logits counts for 256 tokens, a short completion.
    """
    if not torch.cuda.is_available():
        return None
    text = config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    of_token = 2 * 2 * text.num_hidden_layers * heads * size + 12 * text.vocab_size / 256
    return int(0.5 * torch.cuda.mem_get_info()[0] / of_token)


class Cache:
    """The keys and values of a rollout: of each distinct prompt once, and of the completions' tokens.

    The first call has the prompts, packed into one row. Each later call has one token of each completion in the batch, the
    token number `at` (1,) of its completion, which sees the first `window` tokens of its completion. `hidden_ahead`
    (window,) is minus infinity at tokens after `at`, or None if there are none.
    """

    def __init__(self, prompts: list[list[int]], layers: int, limit: int, device: torch.device):
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
        self._longest = int(lengths.max())
        self._padding = (torch.arange(self._longest, device=device) >= lengths[:, None])[:, None, None]
        self._prefix: list[tuple[Tensor, Tensor]] = []
        self._own: list[tuple[Tensor, Tensor]] = []
        self._layers, self._limit = layers, limit
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.window = 1
        self.hidden_ahead: Tensor | None = None

    input_ids = property(lambda self: self._packed.input_ids)
    position_ids = property(lambda self: self._packed.position_ids)

    @property
    def last(self) -> Tensor:
        """The positions of the prompts' last tokens in the packed row, one per distinct prompt."""
        return torch.tensor([group.prompt.stop - 1 for group in self._packed.layout], device=self.lengths.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Return the attention output (B, L, H, D), and store the keys and values."""
        if len(self._prefix) == layer:
            self._store_prompts(key, value)
            return self._packed.attend(layer, query, key, value, scaling)
        kv_heads = key.shape[1]
        prefix_k, prefix_v = self._prefix[layer]
        for own, new in zip(self._own[layer], (key, value), strict=True):
            own.index_copy_(2, self.at, new)
        own_k, own_v = (own[:, :, : self.window] for own in self._own[layer])
        q = query[:, :, 0].unflatten(1, (kv_heads, -1)) * scaling  # (rows, H_kv, shared, D)
        far = torch.matmul(self._by_prompt(q), prefix_k.transpose(2, 3)).masked_fill_(self._padding, -torch.inf)
        near = torch.matmul(q, own_k.transpose(2, 3))
        if self.hidden_ahead is not None:
            near += self.hidden_ahead
        weights = torch.cat([self._by_row(far), near], dim=-1).softmax(-1, dtype=torch.float32).to(query.dtype)
        out = self._by_row(torch.matmul(self._by_prompt(weights[..., : self._longest]), prefix_v))
        out += torch.matmul(weights[..., self._longest :], own_v)
        return out.flatten(1, 2)[:, None]

    def _store_prompts(self, key: Tensor, value: Tensor) -> None:
        """Keep a layer's keys and values (1, H_kv, N, D) of the packed prompts, and make room for the completions'."""
        slices = [group.prompt for group in self._packed.layout]
        padded = (
            torch.nn.utils.rnn.pad_sequence([each[0, :, part].transpose(0, 1) for part in slices], batch_first=True)
            .transpose(1, 2)
            .contiguous()
            for each in (key, value)
        )
        self._prefix.append(tuple(padded))  # (prompts, H_kv, longest, D)
        # Zeros: what a window contains beyond the present token has the weight 0, and 0 times NaN would be NaN.
        shape = (len(self._slot), key.shape[1], self._limit, key.shape[3])
        self._own.append((key.new_zeros(shape), value.new_zeros(shape)))

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
        self._own = [(keys.index_select(0, rows), values.index_select(0, rows)) for keys, values in self._own]


class Decoder:
    """The state of a rollout: the batch of completions that have not ended, and its next token.

    `sequences` (B, width + limit) are the prompts, padded on the left, and their completions, of which `written` tokens are
    known. `rows` (batch,) are the batch's rows in `sequences`. `finished` and `tokens` (batch,) are of its latest token.
    `log_probs` (B, limit) are those of the sampled tokens, 0 for greedy ones.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        mask: Tensor | None,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
    ):
        self._model, self._head = model, model.get_output_embeddings()
        self._processors, self._criteria, self._config = processors, criteria, config
        rows, self.width = input_ids.shape
        self.limit = config.max_new_tokens
        real = input_ids.new_ones(input_ids.shape, dtype=torch.bool) if mask is None else mask.bool()
        prompts = [ids[each].tolist() for ids, each in zip(input_ids.cpu(), real.cpu(), strict=True)]
        self._cache = Cache(prompts, model.config.num_hidden_layers, self.limit, input_ids.device)
        self.sequences = input_ids.new_full((rows, self.width + self.limit), config.pad_token_id)
        self.sequences[:, : self.width] = input_ids
        self.log_probs = torch.zeros(rows, self.limit, device=input_ids.device)
        self.rows = torch.arange(rows, device=input_ids.device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
        self.of_one_step = all(type(each) in OF_ONE_STEP for each in [*processors, *criteria])
        ends = [each.eos_token_id for each in criteria if isinstance(each, EosTokenCriteria)]
        self._ends = torch.cat(ends).to(input_ids.device) if ends else input_ids.new_empty(0)
        self.tokens: Tensor
        self.written = 0
        cache = self._cache
        self.logits = self._head(backbone(model, cache, cache.input_ids, cache.position_ids)[0, cache.last])[cache.prompt_of]
        self._pick()
        self.written = 1

    def step(self) -> None:
        """Sample the next token of every completion in the batch."""
        self._cache.window = self.written
        self._step()

    def _step(self) -> None:
        self._advance()
        self._cache.at += 1
        self._pick()

    def repeat(self) -> tuple[Callable[[], None], int]:
        """Return a function that does `step` in fixed buffers, and how often it can."""
        cache = self._cache
        cache.window = min(self.limit, (self.written // WINDOW + 1) * WINDOW)
        steps = torch.arange(cache.window, device=cache.at.device)
        ahead = cache.hidden_ahead = self.logits.new_zeros(cache.window)
        # The graph reads and writes these tensors in place.
        self.tokens, self.finished, self.logits = self.tokens.clone(), self.finished.clone(), self.logits.clone()
        state = (self.tokens, self.finished, cache.at)

        def step() -> None:
            tokens, finished, logits = self.tokens, self.finished, self.logits
            ahead.copy_(torch.zeros_like(ahead).masked_fill_(steps > cache.at, -torch.inf))
            self._step()
            tokens.copy_(self.tokens)
            finished.copy_(self.finished)
            logits.copy_(self.logits)
            self.tokens, self.finished, self.logits = tokens, finished, logits

        return GRAPHS[self.tokens.device.type](step, state, self.logits), cache.window - self.written

    def _advance(self) -> None:
        """Compute the logits after the latest tokens."""
        positions = (self._cache.lengths + self._cache.at)[:, None]
        self.logits = self._head(backbone(self._model, self._cache, self.tokens[:, None], positions)[:, -1])

    def _pick(self) -> None:
        """Sample a token for each completion in the batch from its logits, and write it."""
        cache, config = self._cache, self._config
        scores = self.logits.float()
        if self.of_one_step:
            scores = self._processors(self.sequences, scores)
        elif self._processors:  # some keep a state per row: pass the whole batch, with the rows that left
            end = self.width + self.written
            every = scores.new_zeros(len(self.sequences), scores.shape[1]).index_copy_(0, self.rows, scores)
            scores = self._processors(self.sequences[:, :end], every)[self.rows]
        if config.do_sample:
            drawn, log_probs = draw(scores)
            self.log_probs.index_put_((self.rows, cache.at.expand(len(self.rows))), log_probs)
        else:
            drawn = scores.argmax(-1)
        self.tokens = drawn.where(~self.finished, config.pad_token_id)
        self.sequences.index_put_((self.rows, (cache.at + self.width).expand(len(self.rows))), self.tokens)
        if self.of_one_step:
            self.finished = self.finished | (self.tokens[:, None] == self._ends).any(1)
        else:
            end = self.width + self.written + 1
            self.finished = self.finished | self._criteria(self.sequences[self.rows, :end], None)

    def remove_finished(self, ended: Callable[[list[int], Tensor], None] | None) -> None:
        """Remove the completions that have ended from the batch, and pass them to `ended`."""
        gone = self.rows[self.finished]
        if ended is not None and len(gone):
            ended(gone.tolist(), self.sequences[gone, self.width : self.width + self.written])
        staying = (~self.finished).nonzero()[:, 0]
        self._cache.keep(staying)
        self.rows, self.tokens, self.finished = self.rows[staying], self.tokens[staying], self.finished[staying]
        self.logits = self.logits[staying]


def draw(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Sample a token (B,) from each row of scores (B, V), as softmax and `multinomial` do. Return its log-probability too.

    On a CPU with one random number a row, which selects a block of tokens and a token of the block. On a GPU with one for
    each score, which needs no sums: the smallest of exponential times with the rates p belongs to each token with the
    probability p.
    """
    p = scores.softmax(-1)
    drawn = (p / torch.empty_like(p).exponential_()).argmax(-1) if scores.is_cuda else _draw_by_block(p)
    return drawn, p.gather(1, drawn[:, None])[:, 0].log()


def _draw_by_block(p: Tensor) -> Tensor:
    """Sample a token (B,) from each row of probabilities (B, V)."""
    missing = -p.shape[1] % BLOCK
    blocks = (F.pad(p, (0, missing)) if missing else p).unflatten(1, (-1, BLOCK))
    ends = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    level = (1 - torch.rand_like(ends[:, :1])) * ends[:, -1:]  # in (0, 1]: never a block of probability 0
    block = torch.searchsorted(ends, level)
    inside = blocks.take_along_dim(block[:, :, None], dim=1)[:, 0].cumsum(-1, dtype=torch.float64)
    begin = F.pad(ends, (1, 0)).take_along_dim(block, dim=1)
    # Both sums round differently. The limits keep the level within the block, and above tokens of probability 0.
    level = torch.minimum((level - begin).clamp(min=torch.finfo(torch.float64).tiny), inside[:, -1:])
    return (block * BLOCK + torch.searchsorted(inside, level))[:, 0]


def sample(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    ended: Callable[[list[int], Tensor], None] | None = None,
    token_log_probs: list[Tensor] | None = None,
    **model_kwargs: Any,
) -> Tensor:
    """Extend prompts (B, P), padded on the left, by sampled completions: (B, P + C). A `custom_generate` of `generate`.

    `ended` is called when rows leave the batch before the others, with their indices and completions (rows, C so far).
    `token_log_probs` receives the log-probabilities (B, limit) of the sampled tokens.
    """
    mask = model_kwargs["attention_mask"]  # None where nothing is padded
    decoder = Decoder(model, input_ids, mask, logits_processor, stopping_criteria, generation_config)
    if token_log_probs is not None:
        token_log_probs.append(decoder.log_probs)
    graph = decoder.of_one_step and input_ids.device.type in GRAPHS
    repeat, repeats = decoder.step, 0
    while True:
        if not graph or decoder.written % LOOK == 0 or decoder.written == decoder.limit:
            left = int((~decoder.finished).sum())
            if left == 0 or decoder.written == decoder.limit:
                return decoder.sequences[:, : decoder.width + decoder.written]
            # Removing rows copies the keys and values, and needs another graph: wait for enough of them.
            if left <= (0.5 if repeats else 0.9) * len(decoder.rows):
                decoder.remove_finished(ended)
                repeats = 0
        if not graph:
            decoder.step()
        else:
            if repeats == 0:
                repeat, repeats = decoder.repeat()
            repeat()
            repeats -= 1
        decoder.written += 1
