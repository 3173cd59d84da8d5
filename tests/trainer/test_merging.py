"""Merging an adapter: stochastic rounding, and every kind of adapter that PEFT merges."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trainer.merging import merge, stochastic_bf16


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.floats(width=32, allow_nan=False), st.integers(0, 99))
def test_a_value_becomes_one_of_its_two_neighbours(value, seed):
    exact = torch.tensor([value])
    found = stochastic_bf16(exact, draw(seed)).double()
    nearest = exact.bfloat16().double()
    if exact.bfloat16().float().equal(exact):
        assert found.equal(exact.double())  # a value that bf16 has stays
    elif nearest.isfinite() and found.isfinite():
        assert abs(found - exact.double()) < 2 * max(abs(exact.double()) * 2.0**-8, torch.tensor(2.0**-133))
        assert abs(found) >= 0
    assert found.sign().equal(exact.sign().double()) or found == 0


@pytest.mark.parametrize("value", [1.001, -0.37, 3e-5, 123.4])
def test_the_mean_of_many_draws_is_the_value(value):
    rounded = stochastic_bf16(torch.full((40_000,), value), draw()).double()
    assert len(rounded.unique()) == 2
    step = float(rounded.max() - rounded.min())
    assert float(rounded.mean()) == pytest.approx(value, abs=0.02 * step)


def test_nan_and_infinity_stay():
    found = stochastic_bf16(torch.tensor([torch.nan, torch.inf, -torch.inf]), draw())
    assert found[0].isnan()
    assert found[1:].tolist() == [torch.inf, -torch.inf]


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "saved modules": {"modules_to_save": ["lm_head"]},
    "an embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "a parameter": {"target_modules": [], "target_parameters": ["mlp.up_proj.weight", "self_attn.q_proj.weight"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_computes_what_base_and_adapter_do(tiny, kind):
    def adapted():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
        model = get_peft_model(
            base, LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"} | KINDS[kind])
        )
        noise = draw(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float() + 0.1 * torch.randn(parameter.shape, generator=noise)
        return model

    ids = torch.arange(5, 40)[None]
    exact = merge(adapted(), torch.float32)
    assert {each.dtype for each in exact.parameters()} == {torch.float32}
    rounded, again = (merge(adapted(), torch.bfloat16) for _ in range(2))
    with torch.no_grad():
        expected = adapted().float()(input_ids=ids).logits
        torch.testing.assert_close(exact(input_ids=ids).logits, expected, atol=1e-3, rtol=1e-3)
        for (name, one), other, right in zip(
            rounded.named_parameters(), again.parameters(), exact.parameters(), strict=True
        ):
            assert one.dtype == torch.bfloat16
            assert one.equal(other), name  # a job that is done twice writes the same model
            assert one.float().isclose(right, rtol=2.0**-7).all(), name
