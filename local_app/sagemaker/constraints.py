"""Checks requests against botocore's service models, with the constraints that botocore itself does not check.

botocore checks required members, types and unknown names. The same models also have lengths, ranges, patterns and enums,
which the services enforce. The checks here work for every service.
"""

import functools
from collections.abc import Iterator
from typing import Any

import regex
from botocore.model import Shape
from botocore.validate import ParamValidator

_NUMBERS = ("integer", "long", "float", "double")


def shape_problems(shape: Shape, value: Any) -> str:
    """Return all reasons why `value` does not fit `shape`; an empty string when it fits."""
    report = ParamValidator().validate(value, shape)
    if report.has_errors():
        return f"Parameter validation failed:\n{report.generate_report()}"
    errors = list(violations(shape, value))
    plural = "s" if len(errors) > 1 else ""
    return f"{len(errors)} validation error{plural} detected: {'; '.join(errors)}" if errors else ""


def violations(shape: Shape, value: Any, path: str = "") -> Iterator[str]:
    """Yield one sentence, in AWS's words, for each constraint that `value` breaks anywhere below `path`."""
    for constraint in _broken_constraints(shape, value):
        yield f"Value '{value}' at '{path}' failed to satisfy constraint: {constraint}"
    if shape.type_name == "structure":
        for name, member in value.items():
            lower = name[0].lower() + name[1:]
            yield from violations(shape.members[name], member, f"{path}.{lower}" if path else lower)
    elif shape.type_name == "list":
        for number, member in enumerate(value, start=1):
            yield from violations(shape.member, member, f"{path}.{number}.member")
    elif shape.type_name == "map":
        for key, member in value.items():
            yield from violations(shape.key, key, f"{path} (key)")
            yield from violations(shape.value, member, f"{path}.{key}")


def _broken_constraints(shape: Shape, value: Any) -> Iterator[str]:
    """Yield the constraints of one shape that a value breaks."""
    rules = shape.metadata
    measure = "value" if shape.type_name in _NUMBERS else "length"
    size = value if shape.type_name in _NUMBERS else len(value) if shape.type_name in ("string", "list", "map") else None
    if size is not None and size > rules.get("max", size):
        yield f"Member must have {measure} less than or equal to {rules['max']}"
    if size is not None and size < rules.get("min", size):
        yield f"Member must have {measure} greater than or equal to {rules['min']}"
    if shape.type_name == "string" and shape.enum and value not in shape.enum:
        yield f"Member must satisfy enum value set: [{', '.join(shape.enum)}]"
    if "pattern" in rules and not compiled(rules["pattern"]).fullmatch(value):
        yield f"Member must satisfy regular expression pattern: {rules['pattern']}"


@functools.cache
def compiled(pattern: str) -> regex.Pattern[str]:
    """Compile a pattern of the models. They are Java's patterns: with Unicode classes, and with surrogates above U+FFFF."""
    return regex.compile(pattern.replace(r"\uD800\uDC00-\uDBFF\uDFFF", r"\U00010000-\U0010FFFF"))
