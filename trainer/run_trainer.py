"""The trainer of a run: TRL's `GRPOTrainer` with a shared-prefix step, resumable checkpoints and a run's metrics.

    trainer = SharedPrefixRunTrainer(model=…, args=…, …, run=identity(config, rows), record=record)
    trainer = StockRunTrainer(…)  # the same for models that `trainer.shared_prefix_models` does not support

Only this module, `trainer.whole_checkpoints` and `trainer.sft_trainer` use private names of TRL and of Transformers'
`Trainer`: they override their hooks, and offer public methods to the other modules. tests/trainer/test_run_trainer.py has
a contract test for each private name.

`SharedPrefixGRPOTrainer` computes the prompt of a group once, where TRL computes it for each completion, in the rollout and
in the loss. TRL's own code still makes the loss, the advantages and the metrics. docs/training.md has the picture.
"""

import copy
import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import LogitsProcessorList, StoppingCriteriaList
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.trainer.utils import split_tensor_dict

from trainer.curriculum import ByEpoch, Curriculum
from trainer.dataset import chat_ids
from trainer.fused_lora import FusedLora
from trainer.fused_norms import fuse_norms
from trainer.latest_rollout import Rollout
from trainer.learnability import DIGITS
from trainer.progress import memory_gb, ordered_samples
from trainer.rollout_mismatch import mismatch
from trainer.shared_prefix import ATTENTION, Packed, backbone
from trainer.shared_prefix_models import unsupported
from trainer.shared_prefix_sampling import Decoder, sample
from trainer.token_log_probs import TokenLogProbs
from trainer.whole_checkpoints import WholeCheckpoints
from tunedrop.dataset.rows import Row


class SharedPrefixGRPOTrainer(GRPOTrainer):  # type: ignore[misc] # TRL is untyped here
    """A `trl.GRPOTrainer` with the same constructor and config, for LoRA on a model for which `unsupported` is None.

    Raises ValueError for other models, and for tools, environments and rollout functions. If a reward function has a method
    `begin`, the trainer calls it with completions that end while others are sampled; the parameters are the function's.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        whole = self.accelerator.unwrap_model(self.model)
        adapters = list(whole.peft_config.values()) if isinstance(whole, PeftModel) else []
        if not adapters or any(each.peft_type != "LORA" for each in adapters):
            raise ValueError("SharedPrefixGRPOTrainer trains LoRA adapters only: pass a LoraConfig, or use trl.GRPOTrainer.")
        self._base: PreTrainedModel = whole.get_base_model()
        reason = unsupported(self._base, self.args, adapters[0])
        if self.tools or self.environment_factories is not None or self.rollout_func is not None:
            reason = "tools, environments or a rollout function"
        if reason:
            raise ValueError(f"SharedPrefixGRPOTrainer cannot train this model, use trl.GRPOTrainer: {reason}.")
        self._learns: Tensor | None = None
        self._generation_inputs: list[dict[str, Any]] | None = None
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
        half = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        self._fused = FusedLora(whole, half or self._base.dtype)
        if self.args.device.type == "cuda":
            fuse_norms(self._base)

    def _sampling(self) -> AbstractContextManager[None]:
        """Return the context of a rollout: the training's type, with the adapter."""
        autocast: AbstractContextManager[None] = self.accelerator.autocast()
        return self._fused.rollout() if self._fused.groups or self._fused.quantized else autocast

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """As TRL's, but shuffles groups instead of sequences: a micro-batch holds whole groups."""
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
        """As TRL's. Rewards with a method `begin` start on completions that end while others are sampled."""
        self._generation_inputs = inputs if any(hasattr(reward, "begin") for reward in self.reward_funcs) else None
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self._generation_inputs = None

    def _begin_rewards(self, rows: list[int], completions: Tensor) -> None:
        """Pass completions (rows, C), padded after their end, to the rewards with a method `begin`."""
        assert self._generation_inputs is not None
        ends = [next(at for at, token in enumerate(ids) if token in self.eos_token_ids) + 1 for ids in completions.tolist()]
        ids = [ids[:end] for ids, end in zip(completions.tolist(), ends, strict=True)]
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        columns = {name: [self._generation_inputs[row][name] for row in rows] for name in self._generation_inputs[0]}
        prompts = columns.pop("prompt")
        conversational = is_conversational({"prompt": prompts[0]})
        messages = [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts
        for reward in self.reward_funcs:
            if hasattr(reward, "begin"):
                reward.begin(prompts=prompts, completions=messages, **columns)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's with vLLM, with log-probabilities of the tokens; samples with shared prefills and fused LoRA layers."""
        ended = {} if self._generation_inputs is None else {"ended": self._begin_rewards}
        found: list[Tensor] = []
        chosen = functools.partial(sample, token_log_probs=found, **ended)
        self._base.generate = functools.partial(self._base.generate, custom_generate=chosen)
        try:
            with self._sampling():
                ids, _ = super()._generate_single_turn(*args, **kwargs)
        finally:
            del self._base.generate
        return ids, [row[: len(each)] for row, each in zip(found[0].tolist(), ids, strict=True)]

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
        """Return log-probabilities and entropies (B, C) of the completions in sequences (B, P + C), and None.

        `batch_size` limits the sequences that are computed at once, but whole groups stay together.
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

        every_row = list(range(len(prompts)))
        if self._learns is None:
            size = max(batch_size, self.num_generations) if batch_size else len(prompts)
            parts = [every_row[start : start + size] for start in range(0, len(prompts), size)]
            scored = [score(rows) for rows in parts]
        else:
            learning = {tuple(prompts[row]) for row in self._learns.nonzero()[:, 0].tolist()}
            parts = [[row for row in every_row if (tuple(prompts[row]) in learning) == learns] for learns in (True, False)]
            with torch.no_grad():
                without_gradient = score(parts[1]) if parts[1] else None
            scored = ([score(parts[0])] if parts[0] else []) + ([without_gradient] if without_gradient else [])
        order = torch.tensor([row for rows in parts for row in rows], device=input_ids.device).argsort()
        logps, entropies = (torch.cat(each)[order] for each in zip(*scored, strict=True))
        self._computed = logps.detach()
        return logps, entropies if compute_entropy else None, None

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        """As TRL's, without a backward for groups whose advantages are all zero, if there is no KL and no entropy term."""
        if self.beta == 0.0 and not self._entropy_bonus_enabled and self.accelerator.num_processes == 1:
            self._learns = inputs["advantages"] != 0
        try:
            loss: Tensor = super()._compute_loss(model, inputs)
        finally:
            self._learns = None
        for name, value in mismatch(inputs, self._computed, self.args.vllm_importance_sampling_clip_max).items():
            self._metrics["train"][name].append(value)
        if torch.is_grad_enabled() and not loss.requires_grad:
            # No group has an advantage. The gradients must be zeros, as TRL's, not None.
            loss = loss + sum(0.0 * each.sum() for each in self.model.parameters() if each.requires_grad)
        return loss


class _RunMethods(WholeCheckpoints):
    """Adds to a `GRPOTrainer` what a run needs: whole checkpoints, resumption, metrics for alerts, public methods.

    `prompt_limit` is the most tokens of a prompt. `curriculum` chooses the prompts of each rollout, None: a random order.
    All other arguments are `WholeCheckpoints`' and `GRPOTrainer`'s.
    """

    train_dataset: Any
    OWN: tuple[str, ...] = (*WholeCheckpoints.OWN, "_base", "_fused", "_buffered_inputs", "ref_model")
    _known: tuple[list[list[int]], Tensor, list[list[float]] | None] | None = None
    _ended: list[tuple[int, int, bool]]
    _flat: float  # the share of the latest rollout's groups whose completions all got the same reward, or none
    _places: Tensor | None = None
    sampler_log_probs: list[list[float]] | None = None  # of the latest completions, by token
    rollout: Rollout | None = None  # the latest one

    def __init__(self, *args: Any, prompt_limit: int, curriculum: Curriculum | None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.prompt_limit, self.curriculum = prompt_limit, curriculum
        # TRL makes an adapter on 4-bit weights bf16, in which small steps get lost. PEFT makes a resumed adapter fp32.
        for weights in self.model.parameters():
            if weights.requires_grad:
                weights.data = weights.data.float()

    # ---- public methods ----------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """The number of rows that it trains on."""
        return len(self.train_dataset)

    def row_order(self) -> list[int]:
        """Return the indices of the training rows in the order in which the first epoch takes them."""
        return list(dict.fromkeys(self._get_train_sampler()))

    def keep_rows(self, indices: Sequence[int]) -> None:
        """Train on these rows only."""
        self.train_dataset = self.train_dataset.select(indices)

    def complete(self, prompts: Sequence[Any], samples: int) -> list[list[int]]:
        """Return the token ids of one completion per prompt, as training samples. Each prompt is there `samples` times."""
        return self._generate_single_turn(self._tokenize_prompts(prompts)[0], None, {}, samples)[0]  # type: ignore[no-any-return]

    def _tokenize_prompts(self, prompts: Sequence[Any]) -> Any:
        """Tokenize prompts with their own tools (`messages.tools`); TRL gives all prompts the same."""
        return [chat_ids(prompt, self.processing_class, self.chat_template_kwargs) for prompt in prompts], None, {}

    def was_cut(self, ids: list[int]) -> bool:
        """Return whether the limit of tokens cut a completion: it does not end by itself."""
        return not ids or ids[-1] not in {*self.eos_token_ids, self._tokenizer.pad_token_id}

    def completion_log_probs(self, input_ids: Tensor, attention_mask: Tensor, completion: int) -> Tensor:
        """Return the log-probabilities (B, C) of the last `completion` tokens of sequences (B, P + C), as the loss does."""
        log_probs: Tensor = self._get_per_token_logps_and_entropies(
            self.model, input_ids, attention_mask, completion, compute_entropy=True
        )[0]
        return log_probs

    def add_metric(self, name: str, value: float) -> None:
        """Add a value to a metric of the current logging step; TRL logs the mean."""
        self._metrics["train"][name].append(value)

    def latest_samples(self) -> list[dict[str, Any]]:
        """Return the completions of the latest rollout as `ordered_samples` does."""
        logs = self._logs
        return ordered_samples(logs["prompt"], logs["completion"], logs["rewards"])

    def telling(self, rows: Sequence[Row], code: str) -> list[str]:
        """Return the prompt ids of the latest groups that show an alert best. `rows` are those of the training."""
        return [] if self.rollout is None else self.rollout.telling(code, rows, self.num_generations)

    def save_now(self) -> None:
        """Write a checkpoint of the weights as they are."""
        self._save_checkpoint(self.model, None)

    # ---- the rollout, and the curriculum's groups --------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        """As TRL's, and keeps the rollout. A curriculum replaces the rows; their completions and rewards are known then."""
        if self.curriculum is not None:
            ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
            groups = self.curriculum.rollout(self, len(inputs) * ranks // self.num_generations)
            own = slice(rank * len(inputs), (rank + 1) * len(inputs))
            ids = [each for group in groups for each in group.ids][own]
            log_probs = [each for group in groups for each in group.log_probs or []][own]
            self._known = ids, torch.cat([group.rewards for group in groups]).to(self.args.device), log_probs or None
            inputs = [group.row for group in groups for _ in group.ids][own]
        try:
            batch = super()._generate_and_score_completions(inputs)
        finally:
            self._known = None
        # TRL's own value is that of the whole batch if `scale_rewards` is batch.
        self._metrics["train"]["frac_reward_zero_std"][-1] = self._flat
        batch["place"] = torch.arange(len(inputs), device=self.args.device)
        rows, tokens, cut = (list(each) for each in zip(*self._ended, strict=True))
        self.rollout = Rollout(
            rows,
            [completion[-1]["content"] for completion in self._logs["completion"]],
            tokens,
            cut,
            {name: list(values) for name, values in self._logs["rewards"].items()},
            list(self._logs["advantages"]),
            gather_object([fmean(each) for each in self.sampler_log_probs or []]) or None,
            torch.full((len(inputs),), torch.nan, device=self.args.device),
        )
        return batch

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        ids, log_probs = (self._known[0], self._known[2]) if self._known else super()._generate_single_turn(*args, **kwargs)
        self.sampler_log_probs = log_probs
        return ids, log_probs

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        self._places = inputs["place"]
        try:
            loss: Tensor = super()._compute_loss(model, inputs)
        finally:
            self._places = None
        return loss

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        """As TRL's. Keeps the means of the loss's log-probabilities with the rollout."""
        found = super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        if self._places is not None and self.rollout is not None:
            self.rollout.note_log_probs(self._places, found[0], attention_mask[:, -logits_to_keep:])
        return found

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: list[list[int]]) -> Any:
        """As TRL's. Adds the metrics that alerts need: rewards of cut and of finished completions, and the best reward."""
        known = self._known
        rewards = known[1] if known else super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        own = [(each["row"], len(ids), self.was_cut(ids)) for each, ids in zip(inputs, completion_ids_list, strict=True)]
        self._ended = gather_object(own)
        cut = torch.tensor([was_cut for _, _, was_cut in self._ended], device=rewards.device)
        totals = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        silent = rewards.isnan().all(dim=1)
        high, low = (totals.masked_fill(silent, none).view(-1, self.num_generations) for none in (-torch.inf, torch.inf))
        self._flat = float((high.amax(dim=1) - low.amin(dim=1) < 10**-DIGITS).float().mean())
        self._log_metric("answers", float(len(totals)))
        self._log_metric("abstained", float(rewards.isnan().float().mean()))
        self._log_metric("reward_best", float(totals.max()))
        for name, chosen in (("reward_truncated", totals[cut]), ("reward_finished", totals[~cut])):
            if len(chosen):
                self._log_metric(name, float(chosen.mean()))
        self._log_metric("memory_gb", memory_gb())
        return rewards

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return ByEpoch(super()._get_train_sampler(dataset), lambda: self.args.seed + int(self.state.epoch or 0))

    def save_more(self, folder: Path) -> None:
        """Save the rollout in use."""
        torch.save(self._rollout(), folder / f"rollout_{self.accelerator.process_index}.pt")

    def _rollout(self) -> dict[str, Any]:
        """Return the position in the rollout: several steps use one rollout, with `num_iterations` for example."""
        in_use = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        inputs = self._buffered_inputs if in_use else None
        kept = asdict(self.rollout) if in_use and self.rollout else None
        return {"step": self._step, "inputs": inputs, "kept": kept, "metrics": dict(self._metrics["train"])}

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = Path(checkpoint or "", f"rollout_{self.accelerator.process_index}.pt")
        if checkpoint and path.exists():  # a rank that the interrupted run did not have starts with a new rollout
            rollout = torch.load(path, map_location=self.args.device, weights_only=True)
            self._step, self._buffered_inputs = rollout["step"], rollout["inputs"]
            self.rollout = Rollout(**rollout["kept"]) if rollout["kept"] else None
            self._metrics["train"].update(rollout["metrics"])


class StockRunTrainer(_RunMethods, GRPOTrainer):  # type: ignore[misc] # TRL is untyped here
    """The trainer of a run with TRL's own rollout and loss."""

    def probe_rollout(self, prompts: Tensor) -> None:
        """Do nothing: the memory of a rollout by Transformers grows with its tokens."""


class SharedPrefixRunTrainer(_RunMethods, SharedPrefixGRPOTrainer):
    """The trainer of a run that shares the prompt of a group."""

    def probe_rollout(self, prompts: Tensor) -> None:
        """Allocate all memory of a rollout of these prompts (B, P), and sample two tokens."""
        config = copy.copy(self.generation_config)
        config.max_new_tokens = self.args.max_completion_length
        self.model.train()  # in evaluation mode, 4-bit layers repack their weights
        with torch.no_grad(), self._sampling():
            Decoder(self._base, prompts, None, LogitsProcessorList(), StoppingCriteriaList(), config).step()


RunTrainer = StockRunTrainer | SharedPrefixRunTrainer
