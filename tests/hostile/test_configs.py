"""Every key of a run config with every hostile value: a receipt, never an exception, and nothing that cannot be stored."""

import itertools
import json
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from pipeline.validation.internal import INTERNAL
from pipeline.validation.validate import read_config
from tunedrop.config.fields import config_fields
from tunedrop.config.model import RunConfig
from tunedrop.inference_tests import parse_tests
from tunedrop.problems import Problem, RejectedError
from tunedrop.rewards import REWARDS

# Values as a YAML file has them.
# ruff: noqa: E501
SCALARS = [
    *("null", "''", "0", "-1", "1", "5", "9223372036854775807", "9223372036854775808", "1" + "0" * 400, "-1" + "0" * 5000),
    *("0x" + "f" * 5000, "0b" + "1" * 9000, "1:" + ":".join(["59"] * 900), "1:59.5", "1e400", ".inf", "-.inf", ".nan", "1e-400"),
    *("yes", "a", "A" * 5000, "é", r'"\ud800"', r'"\ud83d\ude00"', r'"\0"', '"\\u202e"', "(", "(a+)+$", "(" * 3000, "a{9999999999}"),
    *("2001-13-45", "=", "<<", "*a", "&a b", "!!bool maybe", "!!int a", "!!timestamp x", "!!binary aGVsbG8=", "!!set {a}"),
    *("!!python/object:os.system x", "!a b", "{}", "[]", "[[]]", "[a, 1, null]", "{a: 1}", "{1: 2}", "{? [a] : b}", "{? {a: b} : c}"),
    *("[" * 3000, "[" * 90 + "]" * 90, "{a: " * 90 + "1" + "}" * 90, "'" + "[" * 9000 + "'", "'" + '{"a":' * 900 + "1" + "}" * 900 + "'"),
    *("'{\"a\": 1" + "0" * 5000 + "}'", "'{\"a\": NaN}'", "'{\"a\": \"\\ud800\"}'", "9999999999999999999h", "٣h", "{$schema: [1]}"),
    *("{$ref: 'http://127.0.0.1:9/x'}", "{$ref: '#'}", "{$ref: '#/$defs/a', $defs: {a: {$ref: '#/$defs/a'}}}", "{type: 5}", "{pattern: '('}"),
    *("{type: string_check, input: a, reference: b, operation: eq}", "{type: multi, graders: {a: {}}, calculate_output: a}"),
]  # fmt: skip


def keys() -> list[str]:
    """Return a config with one key and `%s` for its value, for every key there is."""
    found = [f"{section}: {{{name}: %s}}" for section in ("grpo", "lora") for name in config_fields()[section]]
    found += [
        f"{section}: {{{name}: {{{key}: %s}}}}"
        for section in ("grpo", "lora")
        for name, field in config_fields()[section].items()
        for key in field.get("keys", ())
    ]
    for name, field in RunConfig.model_fields.items():
        found.append(f"{name}: %s")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += [f"{name}: {{{key}: %s}}" for key in field.annotation.model_fields]
    found += [
        f"rewards: [{{type: {name}, {key}: %s}}]"
        for name, type_ in REWARDS.items()
        for key in [*type_.parameters.model_fields, "weight", "name", "clip", "only_if"]
    ]
    return [*found, "rewards: [{type: %s}]", "rewards: [%s]", "? %s\n: 1", "grpo: {? %s : 1}", "unknown: %s", "%s"]


def check(text: str) -> None:
    raw = text.encode("utf-8", "surrogatepass")
    config, about = read_config(raw, "base")
    problems: list[Problem] = about.problems
    assert not [str(problem) for problem in problems if problem.code == INTERNAL], text[:200]
    assert all(problem.message and len(str(problem)) < 1000 for problem in problems), text[:200]
    json.dumps(msgspec.to_builtins(problems)).encode()
    "".join(map(str, [*problems, *about.warnings, *about.receipt["fixes"]])).encode()
    stored = config.model_dump_json()
    assert RunConfig.model_validate_json(stored).model_dump_json() == stored, text[:200]
    with suppress(RejectedError):
        parse_tests(raw, RunConfig(model="base"))


pairs = list(itertools.product(keys(), SCALARS))


# A different part of the product in every run would make a test that fails now and then: the run takes every 40th pair.
@pytest.mark.parametrize("part", range(4))
def test_some_keys_with_some_values(part):
    for key, value in pairs[part * 10 :: 41]:
        check(key.replace("%s", value))


@pytest.mark.soak
@pytest.mark.parametrize("value", SCALARS, ids=range(len(SCALARS)))
def test_every_key_with_every_value(value):
    for key in keys():
        check(key.replace("%s", value))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_several_keys_with_hostile_values(data):
    lines = data.draw(st.lists(st.sampled_from(keys()), min_size=1, max_size=4, unique_by=lambda key: key.split(":")[0]))
    check("\n".join(line.replace("%s", data.draw(st.sampled_from(SCALARS))) for line in lines))


def test_a_config_of_many_unknown_keys_takes_no_minutes():
    _, about = read_config("".join(f"k{number}: v\n" for number in range(20_000)).encode(), "base")
    assert len(about.problems) == 100
