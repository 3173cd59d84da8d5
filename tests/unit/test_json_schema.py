"""A schema fetches nothing: neither one of a config nor one of a row."""

import socket
import urllib.request

import pytest

from tunedrop.config.parse import parse_run_config
from tunedrop.problems import RejectedError
from tunedrop.rewards import Reward, RewardError, RewardSpec, Sample
from tunedrop.rewards.structured import validator

ELSEWHERE = [
    "http://127.0.0.1:9/schema",
    "file:///etc/hostname",
    "other.json",
    "//host/x",
    "#/$defs/missing",
    "#missing",
    "urn:x:y",
]
SHAPES = {
    "at the top": lambda place: {"$ref": place},
    "in a property": lambda place: {"properties": {"a": {"$ref": place}}},
    "in a list": lambda place: {"anyOf": [{"type": "string"}, {"items": {"$ref": place}}]},
    "dynamic": lambda place: {"$dynamicRef": place},
    "recursive": lambda place: {"$schema": "https://json-schema.org/draft/2019-09/schema", "$ref": place},
    "of draft 4": lambda place: {"$schema": "http://json-schema.org/draft-04/schema#", "not": {"$ref": place}},
    "under an id": lambda place: {"$id": "http://127.0.0.1:9/base/", "not": {"$ref": place}},
}


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch):
    def fetch(*arguments, **_):
        fetched.append(arguments)
        raise OSError

    fetched: list[object] = []
    monkeypatch.setattr(urllib.request, "urlopen", fetch)
    monkeypatch.setattr(socket, "create_connection", fetch)
    yield
    assert not fetched


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("place", ELSEWHERE)
def test_a_reference_names_a_place_in_the_schema(shape, place):
    schema = SHAPES[shape](place)
    with pytest.raises(ValueError, match="not a place in the schema"):
        validator(schema)
    with pytest.raises(RejectedError, match="not a place in the schema"):
        parse_run_config({"model": "base", "rewards": [{"type": "json_schema", "schema": schema}]})
    row = str(schema).replace("'", '"')
    with pytest.raises(RewardError, match="not a place in the schema"):
        Reward(RewardSpec(type="json_schema")).score_samples([Sample('{"a": 1}', row)])


def test_an_unknown_dialect_is_not_fetched():
    assert validator({"$schema": "http://127.0.0.1:9/dialect", "type": "object"}).is_valid({})


def test_references_into_the_schema_work():
    schema = {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}}
    assert validator(schema).is_valid([[[]], []])
    assert not validator(schema).is_valid([[[1]]])


@pytest.mark.parametrize(
    "schema", [{"pattern": "^(a+)+$"}, {"patternProperties": {"^(a+)+$": {}}, "additionalProperties": False}], ids=str
)
def test_a_pattern_that_backtracks_without_end_abstains(schema, monkeypatch):
    monkeypatch.setattr("tunedrop.rewards.reward.SECONDS", 0.2)
    reward = Reward(RewardSpec.model_validate({"type": "json_schema", "schema": schema}))
    hostile = "a" * 40 + "b"
    assert reward.score_samples([Sample(f'"{hostile}"' if "pattern" in schema else f'{{"{hostile}": 1}}', "")]) == [None]
    assert reward.expired == 1
