"""The fields of a run config are those of the installed TRL and PEFT, and reach them with the same values."""

import enum
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from release import fields
from tunedrop.config.fields import MANAGED_GRPO, MANAGED_LORA, NOT_INSTALLED, config_fields
from tunedrop.config.model import RunConfig
from tunedrop.config.parse import load_run_config
from tunedrop.config.schedule import fit_batches
from tunedrop.problems import RejectedError

GIVEN = [(section, name) for section in ("grpo", "lora") for name in config_fields()[section]]
FREE = [each for each in GIVEN if each[1] not in MANAGED_GRPO | MANAGED_LORA]

# Values for fields whose default says nothing about what they take, or is all that this machine can do.
VALUES: dict[str, Any] = {
    "accelerator_config": {"split_batches": False},
    "alora_invocation_tokens": [1, 2],
    "chat_template_kwargs": {"enable_thinking": False},
    "debug": "",
    "fsdp": None,
    "fsdp_config": {"version": 2},
    "generation_kwargs": {"no_repeat_ngram_size": 3},
    "hub_strategy": "end",
    "include_num_input_tokens_seen": "all",
    "init_lora_weights": "gaussian",
    "loftq_config": {"loftq_bits": 8},
    "layer_replication": [[0, 4], [2, 5]],
    "lora_bias": False,
    "layers_pattern": None,
    "layers_to_transform": None,
    "num_generations": 4,
    "pad_to_multiple_of": 64,
    "tf32": False,
    "trainable_token_indices": [1, 2],
    "use_vllm": False,
    "target_modules": ["q_proj", "v_proj"],
    "torch_compile_backend": None,
    "torch_compile_mode": None,
}
REFUSED = object()
# What another field must be for this one to be accepted, by Tunedrop or by TRL.
TOGETHER: dict[str, dict[str, Any]] = {
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
    "dataloader_persistent_workers": {"dataloader_num_workers": 1},
    "bf16": {"fp16": False},
    "fp16": {"bf16": False},
    "bf16_full_eval": {"fp16_full_eval": False},
    "layers_to_transform": {"target_modules": ["q_proj"]},
    "loftq_config": {"init_lora_weights": "loftq"},
}
# Fields of dataclasses of their own: what is in the mapping arrives in that dataclass.
NESTED = {
    "arrow_config": {"top_k": 2},
    "corda_config": {"corda_method": "kpm"},
    "eva_config": {"rho": 3.0},
    "kasa_config": {"beta": 0.5},
    "lora_ga_config": {"scale": "stable"},
    "monteclora_config": {"num_samples": 3},
    "use_bdlora": {"nblocks": 2},
    "velora_config": {"num_groups": 4},
}


@pytest.fixture(scope="module")
def configs() -> dict[str, type]:
    from peft import LoraConfig
    from trl import GRPOConfig

    return {"grpo": GRPOConfig, "lora": LoraConfig}


def candidate(section: str, name: str) -> Any:
    """A value that differs from the default, as YAML could have it."""
    if name in VALUES | NESTED:
        return (VALUES | NESTED)[name]
    field = config_fields()[section][name]
    default = field.get("default")
    if "choices" in field:
        return next(choice for choice in field["choices"] if choice != default)
    if "bool" in field["types"]:
        return not default
    if "float" in field["types"]:
        return 0.5
    if "int" in field["types"]:
        return 8 if default != 8 else 16
    if "list" in field["types"]:
        return ["a", "b"]
    return {"key": "value"} if "dict" in field["types"] else "text"


def plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value


# Refused by a rule whatever they are set to besides their default, with tests of their own.
ONLY_DEFAULT = {"auto_find_batch_size", "sync_ref_model", *NOT_INSTALLED}


@pytest.mark.parametrize(("section", "name"), [each for each in FREE if each[1] not in ONLY_DEFAULT])
@pytest.mark.filterwarnings("ignore")
def test_every_field_arrives_with_the_value_that_the_yaml_gave(configs, tmp_path, section, name):
    value = candidate(section, name)
    given = {section: {name: value} | TOGETHER.get(name, {})}
    config = load_run_config(json.dumps(given).encode(), default_model="base")
    if section == "grpo":
        made = configs["grpo"](**config.grpo | {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True})
    else:
        made = configs["lora"](task_type="CAUSAL_LM", **config.lora.peft_kwargs())
    arrived = plain(getattr(made, name))
    if name in NESTED:
        assert {key: plain(getattr(arrived, key)) for key in value} == value
    elif name in {"accelerator_config", "fsdp_config", "loftq_config"}:
        assert value.items() <= (arrived if isinstance(arrived, dict) else vars(arrived)).items()
    elif name in {"debug", "exclude_modules", "target_modules"}:  # kept as a set
        assert sorted(arrived) == sorted(value)
    else:
        assert arrived == value


def values_of(field: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of a field's types, right and wrong: what a range, a choice or a nested mapping forbids is drawn too."""
    numbers = [1.5, *(field[key] for key in field if key.lower().endswith("imum"))]
    texts = st.sampled_from([*field.get("choices", []), "x", "", "1", '{"a": 1}', "{", "none", "pissa_niter_4"])
    keys = st.sampled_from([*field.get("keys", {}), "x"])
    drawn: dict[str, st.SearchStrategy[Any]] = {
        "bool": st.booleans(),
        "int": st.integers(-2, 20) | st.integers() | st.sampled_from(numbers),
        "float": st.floats(0, 3) | st.floats() | st.sampled_from(numbers),
        "str": texts,
        "list": st.lists(st.sampled_from(["q_proj", "v_proj", "a"]) | st.integers(0, 3) | st.just([0, 4]), max_size=3),
        "dict": st.dictionaries(keys, st.integers(0, 2) | texts | st.booleans() | st.lists(texts, max_size=2), max_size=3),
        "null": st.none(),
    }
    return st.one_of(*(drawn[kind] for kind in field["types"]), st.sampled_from([True, 1, "x", None, [], {}]))


@st.composite
def drawn_configs(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    """Configs with one to four fields each of `grpo` and `lora`, and sometimes the fields that go together."""
    chosen = draw(st.lists(st.sampled_from(FREE), min_size=2, max_size=8, unique=True))
    config: dict[str, dict[str, Any]] = {"grpo": {}, "lora": {}}
    for section, name in chosen:
        config[section] |= TOGETHER.get(name, {}) if draw(st.booleans()) else {}
        config[section][name] = draw(values_of(config_fields()[section][name]))
    return config


def accepted(given_config: dict[str, dict[str, Any]]) -> RunConfig:
    """Return the config of what validation accepts: without the fields that it refuses."""
    while True:
        try:
            return fit_batches(load_run_config(json.dumps(given_config).encode(), default_model="base"))[0]
        except RejectedError as error:
            for problem in error.problems:
                section, name = str(problem.key).split(".")[:2]
                if given_config[section].pop(name, REFUSED) is REFUSED:
                    given_config[section].clear()  # a rule names the key to change, which may not be the one that is set


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(given_config=drawn_configs())
@pytest.mark.filterwarnings("ignore")
def test_what_validation_accepts_the_pinned_packages_construct(configs, given_config):
    config = accepted(given_config)
    # A machine without a GPU: check_instances refuses TF32 there.
    if not config.grpo.get("tf32"):
        configs["grpo"](**config.grpo | {"output_dir": "unused", "report_to": [], "use_cpu": True})
    configs["lora"](task_type="CAUSAL_LM", **config.lora.peft_kwargs())


@pytest.mark.parametrize(("section", "name"), FREE)
def test_a_misspelt_field_is_refused_with_the_right_one(section, name):
    middle = len(name) // 2
    misspelt = name[:middle] + name[middle] + name[middle:]
    with pytest.raises(RejectedError) as caught:
        load_run_config(json.dumps({section: {misspelt: 1}}).encode(), default_model="base")
    (problem,) = caught.value.problems
    assert (problem.code, problem.key) == ("CONFIG_KEY", f"{section}.{misspelt}")
    assert problem.hint == f"did you mean '{name}'?"


def test_the_committed_fields_are_those_of_the_installed_versions():
    assert config_fields() == json.loads(json.dumps(fields.describe())), (
        "run: python -m release.fields > functions/tunedrop/config/trl_fields.json"
    )


def test_every_bound_and_choice_is_of_a_field():
    known = {name for _, name in GIVEN}
    for section, name in GIVEN:
        known |= {f"{name}.{key}" for key in config_fields()[section][name].get("keys", {})}
    assert set(fields.RANGES) <= known
    assert set(fields.CHOICES) <= known
