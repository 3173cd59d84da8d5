"""Requests held against botocore's service models, which say more than botocore checks.

botocore checks required members, types and unknown names. Lengths, ranges, patterns and enums are in the same models, and
the services refuse what breaks them: here they are checked, for every service alike.
"""

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from botocore.model import Shape
from botocore.validate import ParamValidator

if TYPE_CHECKING:
    import regex

_NUMBERS = ("integer", "long", "float", "double")


def shape_problems(shape: Shape, value: Any) -> str:
    """Say everything that keeps `value` from fitting `shape`; an empty string when it fits."""
    report = ParamValidator().validate(value, shape)
    if report.has_errors():
        return f"Parameter validation failed:\n{report.generate_report()}"
    found = list(violations(shape, value))
    plural = "s" if len(found) > 1 else ""
    return f"{len(found)} validation error{plural} detected: {'; '.join(found)}" if found else ""


def violations(shape: Shape, value: Any, path: str = "") -> Iterator[str]:
    """Yield one sentence, worded as AWS words it, for each constraint that `value` breaks anywhere below `path`."""
    rules = shape.metadata
    measure = "value" if shape.type_name in _NUMBERS else "length"
    size = value if shape.type_name in _NUMBERS else len(value) if shape.type_name in ("string", "list", "map") else None
    broken = []
    if size is not None and "max" in rules and size > rules["max"]:
        broken.append(f"Member must have {measure} less than or equal to {rules['max']}")
    if size is not None and "min" in rules and size < rules["min"]:
        broken.append(f"Member must have {measure} greater than or equal to {rules['min']}")
    if shape.type_name == "string" and shape.enum and value not in shape.enum:
        broken.append(f"Member must satisfy enum value set: [{', '.join(shape.enum)}]")
    if "pattern" in rules and not compiled(rules["pattern"]).fullmatch(value):
        broken.append(f"Member must satisfy regular expression pattern: {rules['pattern']}")
    for constraint in broken:
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


@functools.cache
def compiled(pattern: str) -> "regex.Pattern[str]":
    """Compile one of the models' patterns, which are Java's: with Unicode's classes, and surrogates for what is beyond."""
    import regex  # not in `.venv-deploy`, whose `tunedrop event` comes by here and checks nothing

    return regex.compile(pattern.replace(r"\uD800\uDC00-\uDBFF\uDFFF", r"\U00010000-\U0010FFFF"))
