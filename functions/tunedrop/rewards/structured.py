"""Rewards for structured completions: JSON, JSON with a schema, and tool calls."""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from tunedrop.rewards.registry import reward
from tunedrop.rewards.sample import RewardError, Sample, fenced, final_answer

_INVALID = object()  # not None, because null is valid JSON


def _schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Refuse a broken schema in a config. Where jsonschema is not installed, the training job refuses it."""
    try:
        from jsonschema import SchemaError, validators  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        return schema
    try:
        validators.validator_for(schema).check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"not a valid JSON Schema: {error.message}") from None
    return schema


def _read(text: str) -> Any:
    """Return the JSON value of a text, which may stand in a code block. `_INVALID` for a text that is not JSON."""
    try:
        # Python's parser also accepts NaN and Infinity, which are not JSON.
        return json.loads(fenced(text, "json") or text, parse_constant=_refuse)
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
    from jsonschema import validators

    if schema is None:
        schema = _read(sample.answer)
        if not isinstance(schema, dict):
            raise RewardError("json_schema needs 'schema', or a row whose answer is a JSON Schema")
    value = _read(final_answer(sample.completion))
    if value is _INVALID:
        return 0.0
    check = validators.validator_for(schema)
    if check(schema).is_valid(value):
        return 1.0
    properties: dict[str, Any] | None = schema.get("properties")
    if not partial or not isinstance(value, dict) or not properties:
        return 0.2 if partial else 0.0
    good: int = sum(name in value and check(each).is_valid(value[name]) for name, each in properties.items())
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
        tagged = re.findall(r"<tool_call>(.*?)</tool_call>", sample.completion, re.DOTALL)
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
