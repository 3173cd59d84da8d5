"""Fused RMS norms compared with those of the models."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config

from trainer.fused_norms import fuse_norms

SMALL = {
    "vocab_size": 105, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(("config", "count"), [(LlamaConfig(**SMALL), 5), (Qwen3Config(**SMALL), 9)])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_output_and_gradient_are_the_models(config, count, dtype, close):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, each in model.named_parameters():
        if "norm" in name:
            each.data.uniform_(0.5, 2)
    embedded = model.get_input_embeddings()(torch.arange(5, 40)[None]).detach()

    def computed():
        inputs = embedded.clone().requires_grad_()
        logits = model(inputs_embeds=inputs).logits
        logits.float().log_softmax(-1)[..., 7].sum().backward()
        return logits, inputs.grad

    expected = computed()
    assert fuse_norms(model) == count
    for found, right in zip(computed(), expected, strict=True):
        assert (found - right).norm() <= close * right.norm()


def test_another_norm_stays_as_it_is():
    """Gemma's norms multiply by 1 + weight."""
    model = AutoModelForCausalLM.from_config(Gemma2Config(**SMALL))
    for name, each in model.named_parameters():
        if "norm" in name:
            each.data.uniform_(0.5, 2)
    assert fuse_norms(model) == 0
