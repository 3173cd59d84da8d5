"""`lora.target_modules` against the modules in the headers of a model's safetensors files."""

import json

import pytest

from pipeline.validation.modules import HEADER_BYTES, check_targets, modules_of
from tunedrop.config.parse import load_run_config

LAYER = {
    "self_attn.q_proj.weight": [8, 8],
    "self_attn.q_proj.bias": [8],
    "self_attn.v_proj.weight": [8, 8],
    "mlp.up_proj.weight": [16, 8],
    "input_layernorm.weight": [8],
}


def save(path, shapes, metadata=True):
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    raw = json.dumps(header | ({"__metadata__": {"format": "pt"}} if metadata else {})).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)


@pytest.fixture
def model(tmp_path):
    """A model of two shards with a layer each."""
    for layer in range(2):
        shapes = {f"model.layers.{layer}.{name}": shape for name, shape in LAYER.items()}
        shapes |= {"model.embed_tokens.weight": [32, 8]} if layer == 0 else {}
        save(tmp_path / f"model-{layer}.safetensors", shapes, metadata=layer == 0)
    return tmp_path


TARGETS = [
    # target_modules, the words of the problems
    ("all-linear", []),
    ("[q_proj, v_proj]", []),
    ("[self_attn.q_proj]", []),
    ("[model.layers.1.mlp.up_proj]", []),
    ("[embed_tokens]", []),
    ('".*[.](q|v)_proj"', []),
    ("[q_poj]", ["no module 'q_poj' (did you mean 'q_proj'?)"]),
    ("[q_proj, c_attn, Wqkv]", ["no module 'c_attn' (valid keys: embed_tokens, q_proj,", "no module 'Wqkv'"]),
    ("[proj]", ["no module 'proj'"]),  # the end of a name is no module
    ("[input_layernorm]", ["no module 'input_layernorm'"]),  # LoRA adapts no vector
    ("[model.layers.2.mlp.up_proj]", ["no module 'model.layers.2.mlp.up_proj'"]),
    (
        '".*[.]c_attn"',
        ["no module's path matches '.*[.]c_attn' (the pattern must match a module's whole path, such as model.l"],
    ),
    ("q_proj", ["no module's path matches 'q_proj' (write a list of names: [q_proj])"]),
    ('"(q_proj"', ["is not a regular expression"]),
]


@pytest.mark.parametrize(("targets", "words"), TARGETS, ids=[targets for targets, _ in TARGETS])
def test_modules_that_the_model_lacks_are_named(model, targets, words):
    config = load_run_config(f"lora: {{target_modules: {targets}}}".encode(), default_model="base")
    problems = check_targets(config, model, multimodal=False)
    assert [problem.key for problem in problems] == ["lora.target_modules"] * len(words)
    assert all(expected in str(problem) for problem, expected in zip(problems, words, strict=True))


def test_a_regular_expression_is_not_held_against_a_multimodal_models_paths(model):
    config = load_run_config(b"lora: {target_modules: 'model.language_model.*q_proj'}", default_model="base")
    assert check_targets(config, model, multimodal=True) == []
    assert len(check_targets(config, model, multimodal=False)) == 1


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b"x" * 64, (HEADER_BYTES + 1).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"\xff\xfe"]
)
def test_nothing_is_said_of_weights_that_cannot_be_read(model, raw):
    (model / "other.safetensors").write_bytes(raw)
    assert modules_of(model) == set()
    config = load_run_config(b"lora: {target_modules: [nothing]}", default_model="base")
    assert check_targets(config, model, multimodal=False) == []
