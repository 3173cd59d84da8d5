"""Bedrock's list of architectures: what validation says about it."""

import pytest

from pipeline.validation.bedrock import ARCHITECTURES, MOST_POSITIONS, SOURCE, check_architecture, unchecked
from tunedrop.config.parse import parse_run_config


def config(model: str = "base", **serve: object):
    return parse_run_config({"model": model, "serve": {"target": "bedrock", **serve}})


@pytest.mark.parametrize("architecture", [*ARCHITECTURES])
def test_what_the_list_has_is_accepted(architecture):
    assert check_architecture(config(), {"architectures": [architecture], "max_position_embeddings": MOST_POSITIONS}) == []


@pytest.mark.parametrize("architectures", [["Gemma3ForCausalLM"], ["Qwen3NextForCausalLM"], [], None, "LlamaForCausalLM"])
def test_what_the_list_lacks_is_refused_with_its_source(architectures):
    (problem,) = check_architecture(config(), {"architectures": architectures})
    assert (problem.code, problem.key) == ("SERVE_TARGET", "serve.target")
    name = architectures[0] if isinstance(architectures, list) and architectures else "none"
    assert f"its architecture is {name}, which is not in {SOURCE}" in problem.message


def test_a_context_above_bedrocks_is_refused():
    model = {"architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 262_144}
    (problem,) = check_architecture(config(), model)
    assert "max_position_embeddings 262144, more than 131072" in problem.message


@pytest.mark.parametrize("serve", [{"target": "sagemaker"}, {"enabled": False}])
def test_other_targets_take_every_model(serve):
    assert check_architecture(config(**serve), {"architectures": ["Gemma3ForCausalLM"]}) == []
    assert unchecked(config("org/name", **serve)) == []


def test_a_model_of_the_hub_brings_a_warning():
    (warning,) = unchecked(config("org/name@main"))
    assert warning.startswith("serve.target: whether Bedrock can import 'org/name@main' shows when its import job fails")
    assert unchecked(config()) == []
