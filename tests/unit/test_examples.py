"""The example configs are what the product itself accepts, as it is, for the instances they name."""

from pathlib import Path

import pytest

from release import sizing
from tunedrop.config.instances import gpus
from tunedrop.config.parse import load_run_config
from tunedrop.config.rules import check_instances, config_warnings
from tunedrop.config.schedule import fit_batches

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
RANKS = {"one_gpu": 1, "one_gpu_4bit": 1, "four_gpus": 4, "eight_gpus": 8, "two_nodes": 16}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_accepted_without_a_fix_or_a_warning(path):
    config = load_run_config(path.read_bytes(), default_model="none")
    assert fit_batches(config) == (config, [])
    assert config_warnings(config) == []
    assert config.compute.instance_type is not None
    assert check_instances(config, config.compute.instance_type) == []
    assert {config.compute.instance_count * (gpus(name) or 0) for name in config.compute.instance_type} == {RANKS[path.stem]}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_fits_by_the_sizing_formula(path):
    config = load_run_config(path.read_bytes(), default_model="none")
    model = next(each for each in sizing.MODELS if config.model.split("/")[1].startswith(each.name))
    settings = sizing.Settings(
        sequences=config.grpo_value("per_device_train_batch_size"),
        group=config.grpo_value("num_generations"),
        steps_per_generation=config.grpo_value("gradient_accumulation_steps"),
        prompt=config.max_prompt_length,
        completion=config.grpo_value("max_completion_length"),
        rank=config.lora.r,
        load_in_4bit=config.lora.load_in_4bit,
    )
    needed = sizing.memory(model, settings).total / sizing.GB
    assert config.compute.instance_type is not None
    for name in config.compute.instance_type:
        family = name.rpartition(".")[0]
        room = next(room for label, room in sizing.INSTANCES.items() if family in label.split(" (")[0].split(", "))
        assert needed <= room, f"{needed:.0f} of {room:.0f} GB"


def test_every_example_is_known():
    assert {path.stem for path in EXAMPLES} == set(RANKS)
