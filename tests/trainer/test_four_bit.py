"""QLoRA on a CPU with the real bitsandbytes: nf4, double quantisation, bf16 or fp32 compute by the machine."""

from typing import Any
from unittest.mock import Mock

import pytest
import tiny_model
import torch
from bitsandbytes import functional
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from trainer import fused_lora, models, train
from trainer.fused_lora import FusedLora

from .conftest import Job


def prepare(job: Job, model, steps: int, config: dict[str, Any] | None = None, **more) -> Job:
    job.patch.setenv("SM_CHANNEL_MODELS", str(model))
    grpo = {"max_steps": steps, "lr_scheduler_type": "constant", "save_steps": 1} | more
    job.config(lora={"load_in_4bit": True, "r": 4}, grpo=grpo, learnability={"samples": 0}, **(config or {}))
    job.rows()
    return job


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return tiny_model.make_tiny_model(tmp_path_factory.mktemp("wide"), hidden_size=64)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, wide):
    with pytest.MonkeyPatch.context() as patch:
        job = prepare(Job(tmp_path_factory.mktemp("four_bit"), patch, wide), wide, steps=3)
        train.train(train.parse_flags([]))
        yield job


def test_the_weights_are_quantised_as_qlora_says(wide):
    weight = models.load_model(str(wide), **models.four_bit()).model.layers[0].mlp.up_proj.weight
    assert (weight.dtype, weight.quant_type, weight.quant_state.nested) == (torch.uint8, "nf4", True)


IDS = torch.arange(5, 69).view(4, 16)


def adapted(folder, scale=0.1, **load):
    model = get_peft_model(
        models.load_model(str(folder), **load), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    )
    lots = torch.Generator().manual_seed(0)
    for name, each in model.named_parameters():
        if "lora_B" in name:
            each.data = scale * torch.randn(each.shape, generator=lots)
    return model.train()  # in evaluation mode bitsandbytes repacks the weights


@torch.no_grad()
def log_probs(model):
    return model(input_ids=IDS).logits.float().log_softmax(-1)


def test_a_rollout_dequantizes_each_weight_once_and_computes_what_peft_does(wide, monkeypatch):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = adapted(wide, quantization_config=quantization, dtype=torch.float32)
    expected, state = (
        log_probs(model),
        {name: each.clone() for name, each in model.state_dict().items() if "quant" not in name},
    )
    dequantize = Mock(wraps=functional.dequantize_4bit)
    monkeypatch.setattr(functional, "dequantize_4bit", dequantize)
    fused = FusedLora(model, torch.float32)
    for _ in range(2):
        with fused.rollout():
            found = [log_probs(model) for _ in range(3)]
            for each in found:
                torch.testing.assert_close(each, expected, atol=1e-4, rtol=1e-4)
    assert dequantize.call_count == 2 * sum(len(layers) for layers in fused.quantized) == 2 * 7 * 2
    assert log_probs(model).equal(expected)  # outside of a rollout nothing has changed
    assert all(model.state_dict()[name].equal(each) for name, each in state.items())


def test_the_adapter_of_a_rollout_is_the_present_one(wide):
    model = adapted(wide, **models.four_bit(), dtype=torch.float32)
    fused = FusedLora(model, torch.float32)
    for name, each in model.named_parameters():
        if "lora_B" in name:
            each.data *= -2
    expected = log_probs(model)
    with fused.rollout():
        torch.testing.assert_close(log_probs(model), expected, atol=0.05, rtol=0.05)


def test_without_room_the_weights_stay_in_4_bits(wide, monkeypatch):
    monkeypatch.setattr(fused_lora, "MOST_OF_MEMORY", 0.0)
    fused = FusedLora(adapted(wide, **models.four_bit()), torch.float32)
    assert (fused.groups, fused.quantized) == ([], [])


def test_the_merged_model_is_bf16_base_and_adapter_never_4bit_weights(trained, wide):
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(trained.model / "merged")
    assert not hasattr(merged.config, "quantization_config")
    base = models.load_model(str(wide), dtype=torch.bfloat16).state_dict()
    assert {weights.dtype for weights in merged.state_dict().values()} == {torch.bfloat16}
    untouched = [name for name in base if "proj" not in name]
    assert all(merged.state_dict()[name].equal(base[name]) for name in untouched)


def test_the_proofs_say_how_far_the_4bit_model_was(trained):
    proofs = trained.training()["proofs"]
    assert proofs["adapter_effect"]["mean"] > 0.1
    assert proofs["merge_parity"]["error"] < proofs["merge_parity"]["from_4bit"]


def test_an_interrupted_run_ends_like_one_that_was_not(job, trained, wide):
    prepare(job, wide, steps=3)
    with job.patch.context() as patch:  # killed after two of three steps
        from trainer.progress import Progress

        def die(_self, _args, state, _control, **_):
            if state.global_step == 2:
                raise KeyboardInterrupt

        patch.setattr(Progress, "on_save", die, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train.train(train.parse_flags([]))
    assert not (job.model / "training.json").exists()
    train.train(train.parse_flags([]))
    assert [step["step"] for step in job.metrics()] == [1, 2, 3]
    whole, resumed = (each.model / "adapter/adapter_model.safetensors" for each in (trained, job))
    assert resumed.read_bytes() == whole.read_bytes()
    assert {each.dtype for each in load_file(whole).values()} == {torch.float32}


def test_a_run_on_4bit_weights_starts_from_an_adapter_and_stays_close_to_it(job, trained, wide):
    start = trained.model / "adapter"
    job.patch.setenv("SM_CHANNEL_START", str(start))
    more = {"start_from": "first-0123456789ab", "reference": "start"}
    prepare(job, wide, 2, more, beta=0.1, learning_rate=1e-12)
    train.train(train.parse_flags([]))
    assert [step["kl"] for step in job.metrics()] == pytest.approx([0.0, 0.0], abs=1e-3)
    whole, again = (load_file(each.model / "adapter/adapter_model.safetensors") for each in (trained, job))
    assert all(torch.allclose(again[name], each, atol=1e-9) for name, each in whole.items())
