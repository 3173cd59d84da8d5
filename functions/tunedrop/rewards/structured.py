"""Rewards for structured completions: JSON, JSON with a schema, and tool calls."""

import json
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from tunedrop.rewards.registry import reward
from tunedrop.rewards.sample import RewardError, Sample, elements, fenced, final_answer

_INVALID = object()  # not None, because null is valid JSON


def _schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Refuse a broken schema in a config. Where jsonschema is not installed, the training job refuses it."""
    with suppress(ModuleNotFoundError):
        validator(schema)
    return schema


def validator(schema: dict[str, Any]) -> Any:
    """Return jsonschema's validator for a schema, which retrieves nothing: a `$ref` names a place in the schema itself.

    Raises ValueError for a schema that is not valid, or refers to something else.
    """
    try:
        return _validator(json.dumps(schema))
    except RecursionError:
        raise ValueError("not a valid JSON Schema: nested too deeply") from None


@lru_cache(64)
def _validator(text: str) -> Any:
    from jsonschema import SchemaError, validators  # type: ignore[import-untyped]
    from jsonschema_specifications import REGISTRY  # type: ignore[import-untyped]
    from referencing.exceptions import Unresolvable

    schema = json.loads(text)
    kind = schema.get("$schema", "")
    if not isinstance(kind, str):
        raise ValueError("not a valid JSON Schema: $schema is not a text")
    check = validators.validator_for(schema)
    try:
        check.check_schema(schema)
        built = check(schema, registry=REGISTRY)
        for reference in _references(schema):
            built._resolver.lookup(reference)
    except SchemaError as error:
        raise ValueError(f"not a valid JSON Schema: {error.message[:300]}") from None
    except Unresolvable as error:
        message = f"the schema's reference '{error.ref[:200]}' is not a place in the schema: nothing is fetched"
        raise ValueError(f"{message}; put the schema under $defs, and refer to '#/$defs/…'") from None
    return built


def _references(schema: Any) -> Iterator[str]:
    """Yield all references in a schema."""
    parts = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            yield from (part[key] for key in ("$ref", "$dynamicRef", "$recursiveRef") if isinstance(part.get(key), str))
            parts += part.values()
        elif isinstance(part, list):
            parts += part


def _read(text: str) -> Any:
    """Return the JSON value of a text, which may stand in a code block. `_INVALID` for a text that is not JSON."""
    try:
        # Python's parser also accepts NaN and Infinity, which are not JSON.
        value = json.loads(fenced(text, "json") or text, parse_constant=_refuse)
        return value if value == value else _INVALID  # noqa: PLR0124 - raises where a comparison would nest too deeply
    except (ValueError, RecursionError):
        return _INVALID


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


@reward(measures="form")
def json_valid(sample: Sample, *, kind: Literal["any", "object", "array"] = "any") -> float:
    """1.0 when the final answer is JSON of this `kind`. The JSON may stand in a code block."""
    value = _read(final_answer(sample.completion))
    expected = {"any": object, "object": dict, "array": list}[kind]
    return float(value is not _INVALID and isinstance(value, expected))


@reward(measures="content")
def json_schema(
    sample: Sample, *, schema: Annotated[dict[str, Any], AfterValidator(_schema)] | None = None, partial: bool = False
) -> float:
    """1.0 when the final answer is JSON that conforms to `schema`. Without `schema`, the row's answer is the schema.

    With `partial`, JSON that does not conform scores 0.2. An object scores up to 0.8, by the share of the schema's
    properties that conform.
    """
    if schema is None:
        schema = _read(sample.answer)
        if not isinstance(schema, dict):
            raise RewardError("json_schema needs 'schema', or a row whose answer is a JSON Schema")
    value = _read(final_answer(sample.completion))
    if value is _INVALID:
        return 0.0
    try:
        check = validator(schema)
    except ValueError as error:
        raise RewardError(str(error)) from None
    from referencing.exceptions import Unresolvable

    try:
        return _conformance(check, value, partial)
    except RecursionError:  # the schema or the completion nests deeper than Python can follow
        return 0.0
    except Unresolvable as error:
        raise RewardError(f"the schema's reference '{error.ref[:200]}' is not a place in the schema") from None


def _conformance(check: Any, value: Any, partial: bool) -> float:
    """Return how far a JSON value conforms to a validator's schema."""
    if check.is_valid(value):
        return 1.0
    properties: dict[str, Any] | None = check.schema.get("properties")
    if not partial or not isinstance(value, dict) or not properties:
        return 0.2 if partial else 0.0
    good: int = sum(name in value and check.evolve(schema=each).is_valid(value[name]) for name, each in properties.items())
    return 0.2 + 0.6 * good / len(properties)


@reward(measures="answer")
def json_match(sample: Sample, *, partial: bool = True) -> float | None:
    """1.0 when the final answer is the JSON value of the row's answer, in any order of keys.

    With `partial`, an object scores the share of the keys, of both objects, that have equal values. Abstains when the row's
    answer is not JSON.
    """
    expected = _read(final_answer(sample.answer))
    if expected is _INVALID:
        return None
    value = _read(final_answer(sample.completion))
    if value is _INVALID:
        return 0.0
    if value == expected or not partial or not isinstance(value, dict) or not isinstance(expected, dict):
        return float(value == expected)
    keys = value.keys() | expected.keys()
    equal: int = sum(value.get(key, _INVALID) == expected.get(key, _INVALID) for key in keys)
    return equal / len(keys)


@reward(measures="answer")
def tool_call(sample: Sample, *, partial: bool = True) -> float:
    """1.0 when the completion makes exactly the tool calls of the row's answer, in any order.

    The answer is a call `{"name", "arguments"}` or a list of calls. OpenAI's `{"function": …}` is accepted too. The
    completion's calls come from the `tool_calls` of its messages, else from `<tool_call>` elements, else from JSON. With
    `partial`, a call with the right name scores one half, plus up to one half by the share of right arguments.
    Superfluous calls lower the score.
    """
    expected = _calls(_read(sample.answer))
    if not expected:
        raise RewardError("tool_call needs a row whose answer is a tool call: {name, arguments}")
    made = [call for turn in sample.turns for call in _calls(turn.get("tool_calls"))]
    if not made:
        tagged = elements(sample.completion, "tool_call")
        texts = tagged or [final_answer(sample.completion)]
        made = [call for text in texts for call in _calls(_read(text.strip()))]
    unmatched = list(made)
    total = 0.0
    for call in expected:
        best = max(unmatched, key=lambda each: _agreement(each, call), default=None)
        if best is not None and _agreement(best, call) > 0:
            total += _agreement(best, call)
            unmatched.remove(best)
    score = total / max(len(expected), len(made))
    return score if partial or score == 1.0 else 0.0


def _calls(value: Any) -> list[tuple[str, Any]]:
    """Return the (name, arguments) of a call or of a list of calls. Values that are not calls are left out."""
    calls = []
    for each in value if isinstance(value, list) else [value]:
        call = each.get("function", each) if isinstance(each, dict) else None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            continue
        arguments = call.get("arguments", call.get("parameters", {}))
        calls.append((call["name"], _read(arguments) if isinstance(arguments, str) else arguments))
    return calls


def _agreement(made: tuple[str, Any], expected: tuple[str, Any]) -> float:
    (name, arguments), (expected_name, expected_arguments) = made, expected
    if name != expected_name:
        return 0.0
    if arguments == expected_arguments:
        return 1.0
    if not isinstance(arguments, dict) or not isinstance(expected_arguments, dict):
        return 0.5
    keys = arguments.keys() | expected_arguments.keys()
    right: int = sum(arguments.get(key, _INVALID) == expected_arguments.get(key, _INVALID) for key in keys)
    return 0.5 + 0.5 * right / len(keys)
