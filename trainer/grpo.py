"""GRPO with the work that a group shares done once: TRL's `GRPOTrainer`, the same loss, several times less arithmetic.

A GRPO group is one prompt and G completions of it. `SharedPrefixGRPOTrainer` computes the prompt once where TRL computes
it G times, in the rollout and in the loss, forward and backward. TRL's own code still makes the loss, the advantages and
the metrics; what is replaced is how completions are sampled and how their log-probabilities are computed. See
docs/training.md for the picture, and for what the model must be like (`why_not`).
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 # the name everyone knows it by
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.generation import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from trl import GRPOConfig, GRPOTrainer
from trl.data_utils import is_conversational
from trl.trainer.utils import split_tensor_dict

ATTENTION = "shared_prefix"
# Logits are made for so many of a chunk's vocabulary entries at a time: 64 MB in fp32, which also suits a CPU's caches.
LOGITS_PER_CHUNK = 1 << 24


class Layout(NamedTuple):
    """Where the tokens of a packed row are: `[prompt 1, its completions, prompt 2, its completions, …]`.

    `prompt` is a slice of the row, and so is `completions`, which holds `lengths` tokens of each completion in turn.
    """

    prompt: slice
    completions: slice
    lengths: list[int]


class Packed:
    """Sequences of some prompts as one row without padding: each prompt once, and equal completions of it once.

    A completion's tokens attend to its prompt and to themselves only, and have the positions they have in a sequence of
    their own. The last token of a completion predicts nothing that is scored, so it is left out.

    `input_ids`, `position_ids`: (1, N). `sources` (K,): the positions that predict a scored token; `targets` (K,): that
    token; `index` (B, C): where in K a row's scored tokens are, with K itself for padding.
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
                if gather is None:  # all of one length: they are a rectangle as they lie
                    rectangle = [each.unflatten(0, (len(group.lengths), -1)) for each in own]
                    out.append(attention(rectangle, prompt, scaling, query.is_cuda).flatten(0, 1))
                else:
                    pad, unpad = gather
                    rectangle = [each.index_select(0, pad.flatten()).unflatten(0, pad.shape) for each in own]
                    out.append(attention(rectangle, prompt, scaling, query.is_cuda).flatten(0, 1).index_select(0, unpad))
        return torch.cat(out)[None]


def _gather(lengths: list[int], device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Return the indices (G, L) that pad ragged completions to a rectangle and those that undo it, None if it is one."""
    if len(set(lengths)) <= 1:
        return None
    length = torch.tensor(lengths)[:, None]
    step = torch.arange(max(lengths))[None]
    real = step < length
    pad = torch.where(real, length.cumsum(0) - length + step, 0)
    return pad.to(device), real.flatten().nonzero()[:, 0].to(device)


def attention(qkv: list[Tensor], prefix: list[Tensor] | None, scaling: float, fused: bool) -> Tensor:
    """Return what G sequences (G, L, heads, D) see in themselves, causally, and in all of one prefix.

    `qkv`: their queries, keys and values (G, L, heads, D), with fewer heads in the keys and values where the model has
    fewer. `prefix`: the same of the prefix (P, heads, D), of which the queries are not needed. `fused`: with SDPA's kernels,
    else in matrix products, because the backward of SDPA's CPU kernel takes two to three times as long in bf16.
    """
    q, k, v = qkv
    sequences, length, heads, size = q.shape
    shared = heads // k.shape[2]
    # The query heads of a key head stand below each other, so that neither keys nor the prefix have to be repeated.
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


class Rollout:
    """The key-value cache of a rollout: each prompt's keys and values once, and those of its completions' tokens.

    It takes the prompts packed in one row first, then one token of each unfinished completion at a time.
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
        """Positions of the prompts' last tokens in the packed row, one per distinct prompt."""
        return torch.tensor([group.prompt.stop - 1 for group in self._packed.layout], device=self.lengths.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Return the attention output (B, L, H, D), and keep the keys and values."""
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
        """(rows, H_kv, shared, X) → (prompts, H_kv, slots * shared, X), with zeros where no row is."""
        prompts = self._padding.shape[0]
        if len(x) != prompts * self._per_prompt:
            x = x.new_zeros(prompts * self._per_prompt, *x.shape[1:]).index_copy_(0, self._slot, x)
        return x.unflatten(0, (prompts, self._per_prompt)).transpose(1, 2).flatten(2, 3)

    def _by_row(self, x: Tensor) -> Tensor:
        x = x.unflatten(2, (self._per_prompt, -1)).transpose(1, 2).flatten(0, 1)
        return x if len(x) == len(self._slot) else x.index_select(0, self._slot)

    def keep(self, rows: Tensor) -> None:
        """Let all but `rows` (indices) leave the batch."""
        self._slot, self.lengths = self._slot[rows], self.lengths[rows]
        for own in self._suffix:
            own[:] = [each[:, :, : self.steps].index_select(0, rows) for each in own]


def shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    shared_prefix: Packed | Rollout | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: by `shared_prefix` where the model was called with one, else plain SDPA."""
    if shared_prefix is None:
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return out
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return shared_prefix.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(ATTENTION, shared_prefix_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def backbone(model: PreTrainedModel, shared_prefix: Packed | Rollout, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Return the last hidden states (B, L, hidden) of a causal language model under `shared_prefix`."""
    # A mask of four dimensions is handed on as it is. This one fits nothing: any other attention would raise.
    nothing = torch.empty(1, 1, 0, 0, device=input_ids.device)
    hidden: Tensor = model.base_model(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=nothing,
        use_cache=False,
        shared_prefix=shared_prefix,
    ).last_hidden_state
    return hidden


class TokenLogProbs(torch.autograd.Function):  # type: ignore[misc] # torch is untyped here
    """Log-probabilities of the targets (K,) and entropies (K,) from hidden states (K, hidden), logits made in chunks.

    A log-probability's gradient is a vector of hidden size times one incoming number, so the forward keeps that vector
    and no logits, and the backward is a product per token.
    """

    @staticmethod
    def forward(  # noqa: D102 # autograd's own names
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
            size = max(1, LOGITS_PER_CHUNK // len(weight))
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


@contextmanager
def merged(model: PeftModel, dtype: torch.dtype | None) -> Iterator[bool]:
    """Put the adapter into the base weights, and all weights into `dtype` where given; yields False if it cannot.

    The merged weights are new tensors that stand in for the model's own, which come back untouched. Quantized weights,
    and adapters that are more than a low-rank matrix (DoRA, trained biases, saved modules), stay as they are.
    """
    adapters = [module for module in model.modules() if isinstance(module, LoraLayer)]
    plain = all(type(each) is LoraLinear and not each.lora_variant and not any(each.lora_bias.values()) for each in adapters)
    if not plain:
        yield False
        return
    own = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        with torch.no_grad():
            for module in adapters:
                weight = module.get_base_layer().weight
                deltas = [module.get_delta_weight(name) for name in module.active_adapters if name in module.lora_A]
                weight.data = sum(deltas, start=weight).to(dtype or weight.dtype)
            for parameter, _ in own:
                parameter.data = parameter.data.to(dtype or parameter.dtype)
        with model.disable_adapter():
            yield True
    finally:
        for parameter, data in own:
            parameter.data = data


def draw(scores: Tensor) -> Tensor:
    """Draw a token (B,) from each row of scores (B, V), as softmax and `multinomial` do, with one random number per row."""
    up_to = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    level = (1 - torch.rand_like(up_to[:, :1])) * up_to[:, -1:]  # in (0, 1]: no token without probability is met
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
    """Extend prompts (B, P), padded on the left, by what is sampled: (B, P + C). A `custom_generate` of `generate`.

    `ended` is told of rows that leave before the others: their indices, and their completions (rows, C so far).
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
        if logits_processor:  # some keep something per row: they see the whole batch, also who has left it
            everyone = scores.new_zeros(rows, scores.shape[1]).index_copy_(0, row, scores)
            scores = logits_processor(sequences[:, :end], everyone)[row]
        tokens = draw(scores) if generation_config.do_sample else scores.argmax(-1)
        sequences[row, end] = tokens.where(~finished, generation_config.pad_token_id)
        finished |= stopping_criteria(sequences[row, : end + 1], None)
        left = int((~finished).sum())
        if left == 0:
            return sequences[:, : end + 1]
        if left <= 0.9 * len(row):  # leaving copies the cache, so not for every single row
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


# Factors that a model's configuration puts on its scores or logits, under the names that models give them.
SCALES = (
    "attn_logit_softcapping final_logit_softcapping logit_scale logits_scaling output_multiplier lm_head_multiplier".split()
)
NOT_SAMPLING = {"num_beams", "num_beam_groups", "prompt_lookup_num_tokens", "assistant_early_exit", "force_words_ids"}


def why_not_model(model: PreTrainedModel) -> str | None:
    """Say why a model cannot share prompts in `sample` and the loss, or None when it can."""
    config = model.config
    kinds = getattr(config, "layer_types", None) or []
    scales = [name for name in SCALES if getattr(config, name, None) is not None]
    reasons = {
        "the model is multimodal": config.get_text_config() is not config,
        "the model has an encoder": config.is_encoder_decoder,
        "the model keeps a state beside attention": model._is_stateful,
        "its attention is of its own making": not model._supports_attention_backend,
        f"attention implementation {config._attn_implementation} instead of sdpa": config._attn_implementation != "sdpa",
        f"not all layers attend fully ({', '.join(sorted(set(kinds)))})": bool(set(kinds) - {"full_attention"}),
        "sliding-window attention": not kinds and getattr(config, "sliding_window", None) is not None,
        "attention dropout": bool(getattr(config, "attention_dropout", 0.0)),
        f"scaled logits ({', '.join(scales)})": bool(scales),
        "mixture of experts": hasattr(config, "router_aux_loss_coef"),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def why_not(model: PreTrainedModel, args: GRPOConfig, lora: LoraConfig) -> str | None:
    """Say why a model, config and adapter need stock TRL, or None when `SharedPrefixGRPOTrainer` can take them."""
    beside = [name for name in ("modules_to_save", "trainable_token_indices") if getattr(lora, name)]
    reasons = {
        f"more is trained beside LoRA ({', '.join(beside)})": bool(beside),
        "cast_lm_head_to_fp32": args.cast_lm_head_to_fp32,
        "use_transformers_continuous_batching": args.use_transformers_continuous_batching,
        "generation_kwargs ask for more than sampling": bool(set(args.generation_kwargs or {}) & NOT_SAMPLING),
        "FSDP or DeepSpeed shards the weights": bool(args.fsdp) or args.deepspeed is not None,
    }
    return why_not_model(model) or next((reason for reason, holds in reasons.items() if holds), None)


class SharedPrefixGRPOTrainer(GRPOTrainer):  # type: ignore[misc] # TRL is untyped here
    """`trl.GRPOTrainer`, same constructor and config, for LoRA on a model that `why_not` has nothing against.

    Raises ValueError for anything else, and for tools, environments and rollout functions. A reward function with a method
    `begin`, called as the function itself, is told of completions that end while others are sampled.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        whole = self.accelerator.unwrap_model(self.model)
        adapters = list(whole.peft_config.values()) if isinstance(whole, PeftModel) else []
        if not adapters or any(each.peft_type != "LORA" for each in adapters):
            raise ValueError("SharedPrefixGRPOTrainer trains LoRA adapters only: give a LoraConfig, or use trl.GRPOTrainer.")
        self._base: PreTrainedModel = whole.get_base_model()
        reason = why_not(self._base, self.args, adapters[0])
        if self.tools or self.environment_factories is not None or self.rollout_func is not None:
            reason = "tools, environments or a rollout function"
        if reason:
            raise ValueError(f"SharedPrefixGRPOTrainer cannot train this, use trl.GRPOTrainer: {reason}.")
        self._learns: Tensor | None = None
        self._asked: list[dict[str, Any]] | None = None
        self._buffered_inputs: list[dict[str, Tensor]] | None = None
        self._base.set_attn_implementation(ATTENTION)
        stock_forward = self._base.forward

        @functools.wraps(stock_forward)  # `generate` looks at the signature
        def forward(*args: Any, shared_prefix: Packed | None = None, **kwargs: Any) -> Any:
            if shared_prefix is None:
                return stock_forward(*args, **kwargs)
            hidden = backbone(self._base, shared_prefix, kwargs["input_ids"], kwargs["position_ids"])
            return TokenLogProbs.apply(
                hidden[0].index_select(0, shared_prefix.sources),
                self._base.get_output_embeddings(),
                shared_prefix.targets,
                self.temperature,
                self._entropy_bonus_enabled,
            )

        self._base.forward = forward

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """As TRL's, but groups are shuffled, not single sequences: a micro-batch holds whole groups."""
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            group = batch["prompt_ids"].unique_consecutive(dim=0, return_inverse=True)[1]
            order = torch.randperm(int(group[-1]) + 1, device=group.device)[group].argsort(stable=True)
            batch = {name: each[order] if each.ndim else each for name, each in batch.items()}
            self._buffered_inputs = split_tensor_dict(batch, steps)
        return self._buffered_inputs[self._step % steps]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        """As TRL's. Rewards that can begin early do so with completions that end while others are sampled."""
        self._asked = inputs if any(hasattr(reward, "begin") for reward in self.reward_funcs) else None
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self._asked = None

    def _begin_rewards(self, rows: list[int], completions: Tensor) -> None:
        """Hand completions (rows, C), padded after their end, to the rewards that can begin early."""
        assert self._asked is not None
        ends = [next(at for at, token in enumerate(ids) if token in self.eos_token_ids) + 1 for ids in completions.tolist()]
        ids = [ids[:end] for ids, end in zip(completions.tolist(), ends, strict=True)]
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        columns = {name: [self._asked[row][name] for row in rows] for name in self._asked[0]}
        prompts = columns.pop("prompt")
        conversational = is_conversational({"prompt": prompts[0]})
        answers = [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts
        for reward in self.reward_funcs:
            if hasattr(reward, "begin"):
                reward.begin(prompts=prompts, completions=answers, **columns)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's, but its call of `generate` samples with a `Rollout`, from merged weights."""
        if self.use_vllm:
            return super()._generate_single_turn(*args, **kwargs)
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        ended = {} if self._asked is None else {"ended": self._begin_rewards}
        generate = functools.partial(self._base.generate, custom_generate=functools.partial(sample, **ended))
        with merged(self.accelerator.unwrap_model(self.model), dtype) as whole:
            self._base.generate = generate
            try:
                with nullcontext() if whole else self.accelerator.autocast():
                    return super()._generate_single_turn(*args, **kwargs)
            finally:
                del self._base.generate

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Return log-probabilities and entropies (B, C) of the completions in sequences (B, P + C), and no third thing.

        `batch_size` bounds how many sequences are computed at once, but whole groups stay together.
        """
        mask = attention_mask.bool()
        split = input_ids.shape[1] - logits_to_keep
        prompts = [ids[:split][real[:split]].tolist() for ids, real in zip(input_ids, mask, strict=True)]
        completions = [ids[split:][real[split:]].tolist() for ids, real in zip(input_ids, mask, strict=True)]

        def score(rows: list[int]) -> list[Tensor]:
            packed = Packed(
                [prompts[row] for row in rows], [completions[row] for row in rows], logits_to_keep, input_ids.device
            )
            with self.accelerator.autocast():
                scored = model(input_ids=packed.input_ids, position_ids=packed.position_ids, shared_prefix=packed)
            return [torch.cat([each, each.new_zeros(1)])[packed.index] for each in scored]

        everything = list(range(len(prompts)))
        if self._learns is None:
            size = max(batch_size, self.num_generations) if batch_size else len(prompts)
            parts = [everything[start : start + size] for start in range(0, len(prompts), size)]
            scored = [score(rows) for rows in parts]
        else:
            learning = {tuple(prompts[row]) for row in self._learns.nonzero()[:, 0].tolist()}
            parts = [[row for row in everything if (tuple(prompts[row]) in learning) == learns] for learns in (True, False)]
            with torch.no_grad():
                still = score(parts[1]) if parts[1] else None
            scored = ([score(parts[0])] if parts[0] else []) + ([still] if still else [])
        order = torch.tensor([row for rows in parts for row in rows], device=input_ids.device).argsort()
        logps, entropies = (torch.cat(each)[order] for each in zip(*scored, strict=True))
        return logps, entropies if compute_entropy else None, None

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        """As TRL's. Groups whose advantages are all zero have no gradient without a KL or entropy term: no backward."""
        if self.beta == 0.0 and not self._entropy_bonus_enabled and self.accelerator.num_processes == 1:
            self._learns = inputs["advantages"] != 0
        try:
            loss: Tensor = super()._compute_loss(model, inputs)
        finally:
            self._learns = None
        if torch.is_grad_enabled() and not loss.requires_grad:
            # Nothing to learn here; the gradients are zeros, as TRL's would be, not absent.
            loss = loss + sum(0.0 * each.sum() for each in self.model.parameters() if each.requires_grad)
        return loss
