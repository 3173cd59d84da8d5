"""No text of a config can be a path, a host, or a module to import: tried with every field of the pinned TRL and PEFT."""

import pytest

from tunedrop.config.fields import MANAGED_GRPO, MANAGED_LORA, MODULE_NAMES, config_fields
from tunedrop.config.parse import parse_run_config
from tunedrop.problems import RejectedError

PLACES = [
    "http://host/x",
    "host:8080",
    "/etc/passwd",
    "../up",
    "os.system",
    "file.json",
    "s3://b/k",
    "C:\\x",
    "org/name",
    '{"a": "/x"}',
]


def texts(fields, path=()):
    """Yield the way to every text that a section can hold: a field, an item of its list, a key of its mapping."""
    for name, field in fields.items():
        kinds = field["types"]
        if name in MANAGED_GRPO | MANAGED_LORA and not path:
            continue
        if "str" in kinds:
            yield name, lambda value, name=name: {name: value}
        if "list" in kinds and ("str" in field.get("items", ["str"])):
            yield f"{name}[]", lambda value, name=name: {name: [value]}
        if "dict" in kinds and "keys" in field:
            for inner, make in texts(field["keys"], (*path, name)):
                yield f"{name}.{inner}", lambda value, name=name, make=make: {name: make(value)}
        elif "dict" in kinds:
            yield f"{name}.any", lambda value, name=name: {name: {"any": value}}
            yield f"{name}.any.deep[]", lambda value, name=name: {name: {"any": {"deep": [value]}}}


# The model's own modules have dots in their names.
ALL = [
    (section, name, make)
    for section in ("grpo", "lora")
    for name, make in texts(config_fields()[section])
    if name.removesuffix("[]").rpartition(".")[2] not in MODULE_NAMES
]


@pytest.mark.parametrize(("section", "name", "make"), ALL, ids=[f"{section}.{name}" for section, name, _ in ALL])
def test_no_text_is_a_place(section, name, make):
    for place in PLACES:
        if name == "optim_args" and set(place).isdisjoint("/:\\"):
            continue  # numbers have dots: scale=0.25
        with pytest.raises(RejectedError):
            parse_run_config({"model": "base", section: make(place)})


def test_there_is_much_to_try():
    assert len(ALL) > 60


def test_names_and_numbers_are_taken():
    lora = {"target_modules": r".*\.q_proj", "rank_pattern": {r"^model\.layers": 4}, "layer_replication": [[0, 4], [2, 6]]}
    grpo = {
        "optim_args": "rank=64, scale=0.25",
        "torch_compile_mode": "max-autotune",
        "generation_kwargs": {"a": [1.5, "b"]},
    }
    parse_run_config({"model": "base", "lora": lora, "grpo": grpo})


@pytest.mark.parametrize("pairs", [[[0, 10**9]], [[0, 600], [0, 600]], [[4, 4]], [[0]], [["a", "b"]], [[-1, 2]]], ids=str)
def test_layers_are_replicated_within_a_limit(pairs):
    with pytest.raises(RejectedError, match="layer_replication"):
        parse_run_config({"model": "base", "lora": {"layer_replication": pairs}})
