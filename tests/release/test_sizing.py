"""The sizing formula compared with the tensors that a small model keeps for its backward, and the table in the docs."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from release import sizing
from trainer import shared_prefix
from trainer.fused_lora import FusedLora
from trainer.token_log_probs import LOGITS_PER_CHUNK

DOCS = Path(__file__).parents[2] / "docs"
SETTINGS = sizing.Settings(sequences=16, group=8, prompt=100, completion=60)


def llama(model: sizing.Model) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        tie_word_embeddings=model.tied,
    )
    adapted = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=SETTINGS.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    FusedLora(adapted, torch.float32)
    return adapted


SMALL = [
    sizing.Model("plain", 1000, 256, 768, 4, 8, 4, 32, False),
    sizing.Model("wide heads, tied", 1000, 320, 640, 6, 5, 5, 64, True),
    sizing.Model("one key head", 1000, 128, 512, 8, 4, 1, 32, False),
]


@pytest.mark.parametrize("model", SMALL, ids=lambda model: model.name)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_keeps_what_the_formula_says(model, checkpointing):
    """Counts the storages that autograd saves in the packed forward; with checkpointing those of one layer come later."""
    settings = SETTINGS._replace(checkpointing=checkpointing)
    whole = llama(model)
    base = whole.get_base_model()
    base.set_attn_implementation(shared_prefix.ATTENTION)
    if checkpointing:
        base.activation_checkpointing_enable()
        whole.enable_input_require_grads()
    whole.train()
    draw = torch.Generator().manual_seed(0)
    prompts, completions = (
        torch.randint(model.vocabulary, (16, length), generator=draw).tolist()
        for length in (settings.prompt, settings.completion)
    )
    packed = shared_prefix.Packed(
        [prompts[row // 8] for row in range(16)], completions, settings.completion, torch.device("cpu")
    )
    parameters = {weights.untyped_storage().data_ptr() for weights in whole.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in parameters:
            saved[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        shared_prefix.backbone(base, packed, packed.input_ids, packed.position_ids)
    kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    scored = settings.sequences * settings.completion * model.hidden * 4
    reckoned = sizing.memory(model, settings, width=4).loss - 3 * sizing.CHUNK - scored
    if checkpointing:
        one_layer = sizing.memory(model._replace(layers=1), settings._replace(checkpointing=False), width=4).loss
        reckoned -= one_layer - 3 * sizing.CHUNK - scored
        kept -= packed.input_ids.shape[1] * model.hidden * 4  # the embeddings and the last norm, once
    assert reckoned == pytest.approx(kept, rel=0.15)


@pytest.mark.parametrize("model", SMALL, ids=lambda model: model.name)
def test_parameters_are_counted(model):
    whole = llama(model)
    trained = sum(weights.numel() for weights in whole.parameters() if weights.requires_grad)
    norms = (2 * model.layers + 1) * model.hidden
    assert trained == model.adapter(SETTINGS.rank)
    assert whole.num_parameters() - trained - norms == model.in_layers + model.beside


def test_the_docs_show_what_the_script_prints():
    assert "\n".join(sizing.table()) in (DOCS / "sizing.md").read_text()


def test_logits_are_reckoned_in_the_trainers_chunks():
    assert 4 * LOGITS_PER_CHUNK["cuda"] == sizing.CHUNK
