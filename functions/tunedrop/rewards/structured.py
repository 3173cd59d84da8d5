"""Rewards for answers that are data: JSON, JSON with a schema, tool calls."""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from tunedrop.rewards.registry import reward
from tunedrop.rewards.sample import RewardError, Sample, fenced, final_answer

_NOTHING = object()  # not None: null is valid JSON


def _schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Refuse a broken schema when the config is read, wherever jsonschema is installed; elsewhere the trainer does."""
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
    """Return the JSON value that the text is, within a code block or bare; `_NOTHING` if it is none."""
    try:
        # NaN and Infinity are Python's additions, not JSON.
        return json.loads(fenced(text, "json") or text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _NOTHING


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


@reward(measures="form")
def json_valid(sample: Sample, *, kind: Literal["any", "object", "array"] = "any") -> float:
    """1.0 when the final answer is JSON (a code block around it is fine) of this `kind`."""
    value = _read(final_answer(sample.completion))
    expected = {"any": object, "object": dict, "array": list}[kind]
    return float(value is not _NOTHING and isinstance(value, expected))


@reward(measures="content")
def json_schema(
    sample: Sample, *, schema: Annotated[dict[str, Any], AfterValidator(_schema)] | None = None, partial: bool = False
) -> float:
    """1.0 when the final answer is JSON that conforms to `schema`, or to the row's answer where that is a schema.

    With `partial`, JSON that does not conform gets 0.2, and up to 0.8 for the share of the schema's properties that do.
    """
    from jsonschema import validators

    if schema is None:
        schema = _read(sample.answer)
        if not isinstance(schema, dict):
            raise RewardError("json_schema needs 'schema', or an answer that is a JSON Schema")
    value = _read(final_answer(sample.completion))
    if value is _NOTHING:
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
def tool_call(sample: Sample, *, partial: bool = True) -> float:
    """1.0 when the completion makes exactly the tool calls of the row's answer, in any order.

    The answer is a call `{"name", "arguments"}` or a list of them; OpenAI's `{"function": …}` is read too. The completion's
    calls are those of its messages, else `<tool_call>` elements, else JSON. With `partial`, a call with the right name gets
    half, and the other half by the share of right arguments; superfluous calls lower the score.
    """
    expected = _calls(_read(sample.answer))
    if not expected:
        raise RewardError("tool_call needs an answer that is a tool call: {name, arguments}")
    found = [call for turn in sample.turns for call in _calls(turn.get("tool_calls"))]
    if not found:
        tagged = re.findall(r"<tool_call>(.*?)</tool_call>", sample.completion, re.DOTALL)
        texts = tagged or [final_answer(sample.completion)]
        found = [call for text in texts for call in _calls(_read(text.strip()))]
    left = list(found)
    total = 0.0
    for call in expected:
        best = max(left, key=lambda each: _agreement(each, call), default=None)
        if best is not None and _agreement(best, call) > 0:
            total += _agreement(best, call)
            left.remove(best)
    score = total / max(len(expected), len(found))
    return score if partial or score == 1.0 else 0.0


def _calls(value: Any) -> list[tuple[str, Any]]:
    """Return the (name, arguments) of a call or of a list of calls; what is no call is left out."""
    calls = []
    for each in value if isinstance(value, list) else [value]:
        call = each.get("function", each) if isinstance(each, dict) else None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            continue
        arguments = call.get("arguments", call.get("parameters", {}))
        calls.append((call["name"], _read(arguments) if isinstance(arguments, str) else arguments))
    return calls


def _agreement(found: tuple[str, Any], expected: tuple[str, Any]) -> float:
    if found[0] != expected[0]:
        return 0.0
    if found[1] == expected[1]:
        return 1.0
    if not isinstance(found[1], dict) or not isinstance(expected[1], dict):
        return 0.5
    names = found[1].keys() | expected[1].keys()
    right: int = sum(found[1].get(name, _NOTHING) == expected[1].get(name, _NOTHING) for name in names)
    return 0.5 + 0.5 * right / len(names)
