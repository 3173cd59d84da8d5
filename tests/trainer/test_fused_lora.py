"""Fused LoRA layers compared with PEFT's, and how much of a small adapter a rollout keeps."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from trainer.fused_lora import FusedLora

SMALL: dict[str, Any] = {
    "vocab_size": 105, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.2, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "qwen3": Qwen3Config(head_dim=16, num_key_value_heads=1, **SMALL),
    "llama with biases": LlamaConfig(num_key_value_heads=2, tie_word_embeddings=True, attention_bias=True, **SMALL),
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"target_modules": "all-linear"},
    "some": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "ranks": {"target_modules": "all-linear", "rank_pattern": {"k_proj": 2, "up_proj": 7}, "use_rslora": True},
}
IDS = torch.arange(5, 101).view(4, 24)


def adapted(config, scale=0.1, **lora):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, each in base.named_parameters():
        if name.endswith("bias"):
            each.data.normal_()
    lora = {"task_type": "CAUSAL_LM", "r": 4, "lora_dropout": 0.5} | lora
    model = get_peft_model(base, LoraConfig(**lora))
    for name, each in model.named_parameters():
        if "lora_B" in name:
            each.data.normal_().mul_(scale)
    return model


@torch.no_grad()
def log_probs(model):
    return model(input_ids=IDS).logits.float().log_softmax(-1).flatten(0, 1)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", MODELS)
def test_a_fused_model_computes_what_peft_does(name, adapter):
    stock = adapted(MODELS[name], **ADAPTERS[adapter]).eval()
    expected = log_probs(stock)
    with stock.disable_adapter():
        without = log_probs(stock)
    model = adapted(MODELS[name], **ADAPTERS[adapter])
    fused = FusedLora(model, torch.float32)
    torch.testing.assert_close(log_probs(model.eval()), expected, atol=1e-4, rtol=1e-4)
    model.train()
    with fused.rollout():  # which has no dropout
        torch.testing.assert_close(log_probs(model), expected, atol=1e-4, rtol=1e-4)
    assert not log_probs(model).isclose(expected, atol=1e-4, rtol=1e-4).all()  # the loss has
    with model.disable_adapter():
        torch.testing.assert_close(log_probs(model), without, atol=1e-4, rtol=1e-4)
    for key, each in stock.state_dict().items():
        assert model.state_dict()[key].equal(each), key


@pytest.mark.parametrize("name", MODELS)
def test_its_gradients_are_those_of_peft(name):
    def gradients(*, fused):
        model = adapted(MODELS[name], **ADAPTERS["ranks"]).eval()
        if fused:
            FusedLora(model, torch.float32)
        weights = torch.randn(IDS.numel(), 105, generator=torch.Generator().manual_seed(2))
        (model(input_ids=IDS).logits.log_softmax(-1).flatten(0, 1) * weights).sum().backward()
        return {key: each.grad for key, each in model.named_parameters() if each.requires_grad}

    expected, found = gradients(fused=False), gradients(fused=True)
    assert len(expected) == 2 * 7 * 2
    for key, each in expected.items():
        assert each.norm() > 0
        torch.testing.assert_close(found[key], each, atol=1e-3, rtol=1e-3)


def test_it_sees_every_change_of_the_adapter():
    stock, model = (adapted(MODELS["qwen3"], **ADAPTERS["all"]).eval() for _ in range(2))
    FusedLora(model, torch.float32)
    for _ in range(2):
        for one, other in zip(stock.parameters(), model.parameters(), strict=True):
            if one.requires_grad:
                one.data += 0.1
                other.data += 0.1
        torch.testing.assert_close(log_probs(model), log_probs(stock), atol=1e-4, rtol=1e-4)


def test_layers_that_read_one_input_are_one_product():
    model = adapted(MODELS["qwen3"], **ADAPTERS["all"]).eval()
    fused = FusedLora(model, torch.float32)
    assert [len(each.layers) for each in fused.groups] == [3, 1, 2, 1] * 2
    with fused.rollout(), torch.profiler.profile() as profile:
        log_probs(model)
    products = {event.key: event.count for event in profile.key_averages()}
    assert products["aten::mm"] == 2 * 4 * 2 + 1  # two for each input, and the head


def test_there_is_no_second_copy_of_the_weights():
    model = adapted(MODELS["qwen3"], **ADAPTERS["all"])
    for group in FusedLora(model, torch.bfloat16).groups:
        for layer in group.layers:
            weight = layer.get_base_layer().weight
            assert weight.dtype == torch.bfloat16
            assert weight.untyped_storage().data_ptr() == group.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "lora",
    [{"use_dora": True}, {"lora_bias": True}, {"target_modules": ["q_proj", "embed_tokens"]}],
    ids=lambda lora: next(iter(lora)),
)
def test_an_adapter_that_is_more_than_low_rank_matrices_is_not_fused(lora):
    model = adapted(MODELS["qwen3"], **{"target_modules": "all-linear", "lora_dropout": 0.0} | lora)
    assert FusedLora(model, torch.float32).groups == []


def test_bf16_keeps_a_small_adapter_that_merging_and_adding_outputs_lose():
    """The share of the adapter's change that the output of a layer has, over many inputs."""
    model = adapted(MODELS["qwen3"], 3e-4, target_modules=["down_proj"], lora_dropout=0.0)
    weight = model.base_model.model.model.layers[0].mlp.down_proj.get_base_layer().weight.data.bfloat16()  # as published
    fused = FusedLora(model, torch.bfloat16)
    fused.refresh()
    group = fused.groups[0]
    (layer,) = group.layers
    delta = layer.get_delta_weight("default").detach()
    x = torch.randn(2000, weight.shape[1], generator=torch.Generator().manual_seed(2)).bfloat16()
    change = x.float() @ delta.T

    def kept(out):
        without = torch.nn.functional.linear(x, weight).float()
        return float(((out.float() - without) * change).sum() / (change * change).sum())

    with torch.no_grad():
        assert kept(group.forward(0, x)) == pytest.approx(1.0, abs=0.1)
    assert kept(torch.nn.functional.linear(x, (weight + delta).bfloat16())) < 0.7
    assert kept(torch.nn.functional.linear(x, weight) + (x @ delta.bfloat16().T)) < 0.7
