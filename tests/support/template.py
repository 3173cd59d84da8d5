"""template.yaml as data, and its intrinsic functions resolved for a stack with given names."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]
TEMPLATE = Path(__file__).parents[2] / "template.yaml"


class _Loader(yaml.SafeLoader):
    """YAML with CloudFormation's short forms (`!Ref x`), read as their long ones (`{"Ref": "x"}`)."""


def _long_form(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Json:
    if isinstance(node, yaml.ScalarNode):
        value: Any = loader.construct_scalar(node)
        if suffix == "GetAtt":
            value = value.split(".", 1)
    elif isinstance(node, yaml.SequenceNode):
        value = loader.construct_sequence(node, deep=True)
    else:
        assert isinstance(node, yaml.MappingNode)
        value = loader.construct_mapping(node, deep=True)
    return {suffix if suffix in ("Ref", "Condition") else f"Fn::{suffix}": value}


_Loader.add_multi_constructor("!", _long_form)


def load_template(path: Path = TEMPLATE) -> Json:
    """Return a template with every intrinsic function in its long form."""
    return yaml.load(path.read_text(), _Loader)


@cache
def _mappings() -> Json:
    return load_template()["Mappings"]


def of_type(template: Json, kind: str) -> dict[str, Json]:
    """Return the properties of the resources of a type, by logical id."""
    return {name: r.get("Properties", {}) for name, r in template["Resources"].items() if r["Type"] == kind}


def listed(value: Any) -> list[Any]:
    """Return a value that may be one or several as a list."""
    return value if isinstance(value, list) else [value]


# The intrinsic functions of nothing but their arguments.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Fn::Select": lambda index, items: items[int(index)],
    "Fn::Split": lambda separator, text: text.split(separator),
    "Fn::FindInMap": lambda name, key, entry: _mappings()[name][key][entry],
    "Fn::Join": lambda separator, items: separator.join(items),
}


def resolve(value: Any, known: dict[str, str], conditions: dict[str, bool] | None = None) -> Any:
    """Replace intrinsic functions; `known` has values by `Name` (Ref) and `Name.Attribute`. NoValue items go away."""

    def do(value: Any) -> Any:
        return resolve(value, known, conditions)

    match value:
        case {"Ref": name}:
            return None if name == "AWS::NoValue" else known[name]
        case {"Fn::GetAtt": [name, attribute]}:
            return known[f"{name}.{attribute}"]
        case {"Fn::Sub": str(text)}:
            return re.sub(r"\$\{([^}]+)}", lambda match: known[match[1]], text)
        case {"Fn::Sub": [text, more]}:
            return resolve({"Fn::Sub": text}, known | do(more), conditions)
        case {"Fn::If": [condition, yes, no]}:
            return do(yes if (conditions or {})[condition] else no)
        case dict() if len(value) == 1 and (name := next(iter(value))) in _FUNCTIONS:
            return _FUNCTIONS[name](*do(value[name]))
        case dict():
            return {key: done for key, item in value.items() if (done := do(item)) is not None}
        case list():
            return [done for item in value if (done := do(item)) is not None]
    return value
