"""Which models and configs the shared-prefix trainer and sampler support, and the reason where they do not.

This module reads three private names of Transformers' models, which have no public counterpart: `_is_stateful`,
`_supports_attention_backend` and `config._attn_implementation`. tests/trainer/test_run_trainer.py checks that they exist.
They are here and not in trainer/run_trainer.py because a test job asks the same question without TRL.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel
    from trl import GRPOConfig


# Factors on attention scores or logits, by the names that models' configs give them.
SCALES = (
    "attn_logit_softcapping final_logit_softcapping logit_scale logits_scaling output_multiplier lm_head_multiplier".split()
)
# Entries of `generation_kwargs` that ask `generate` for another method than sampling.
NOT_SAMPLING = {"num_beams", "num_beam_groups", "prompt_lookup_num_tokens", "assistant_early_exit", "force_words_ids"}


def unsupported_model(model: "PreTrainedModel") -> str | None:
    """Return the reason why a model cannot share prompts in the loss and in `sample`, None if it can."""
    config = model.config
    kinds = getattr(config, "layer_types", None) or []
    scales = [name for name in SCALES if getattr(config, name, None) is not None]
    reasons = {
        "the model is multimodal": config.get_text_config() is not config,
        "the model has an encoder": config.is_encoder_decoder,
        "the model keeps a recurrent state": model._is_stateful,
        "the model does not use Transformers' attention interface": not model._supports_attention_backend,
        f"attention implementation {config._attn_implementation} instead of sdpa": config._attn_implementation != "sdpa",
        f"not all layers use full attention ({', '.join(sorted(set(kinds)))})": bool(set(kinds) - {"full_attention"}),
        "sliding-window attention": not kinds and getattr(config, "sliding_window", None) is not None,
        "attention dropout": bool(getattr(config, "attention_dropout", 0.0)),
        f"scaled logits ({', '.join(scales)})": bool(scales),
        "mixture of experts": hasattr(config, "router_aux_loss_coef"),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def unsupported(model: "PreTrainedModel", args: "GRPOConfig", lora: "LoraConfig") -> str | None:
    """Return the reason why a model, config and adapter need stock TRL, None if `SharedPrefixGRPOTrainer` can train them."""
    more = [name for name in ("modules_to_save", "trainable_token_indices") if getattr(lora, name)]
    reasons = {
        f"LoRA is not all that is trained ({', '.join(more)})": bool(more),
        "cast_lm_head_to_fp32": args.cast_lm_head_to_fp32,
        "use_transformers_continuous_batching": args.use_transformers_continuous_batching,
        "generation_kwargs ask for another method than sampling": bool(set(args.generation_kwargs or {}) & NOT_SAMPLING),
        "FSDP or DeepSpeed shards the weights": bool(args.fsdp) or args.deepspeed is not None,
    }
    return unsupported_model(model) or next((reason for reason, holds in reasons.items() if holds), None)
