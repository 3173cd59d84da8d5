"""Plain values as JSON, between the process of a program and the process of its tests.

Reading builds plain values and nothing else, whatever the other process sends: `decode` calls constructors of a closed table
with texts and numbers.
"""

import builtins
import importlib
import sys
from collections.abc import Callable
from functools import reduce
from types import ModuleType
from typing import Any

ATOMS: tuple[type, ...] = (type(None), bool, int, float, str)


def _items(value: Any) -> list[list[Any]]:
    return [[key, item] for key, item in value.items()]


def _bounds(value: Any) -> list[Any]:
    return [value.start, value.stop, value.step]


def _class(module: str, *names: str) -> Callable[[Any], Any]:
    """Return a function that imports a class, or its method, and calls it."""

    def make(part: Any) -> Any:
        function: Any = reduce(getattr, names, importlib.import_module(module))
        return function(part)

    return make


def _spread(type_: Callable[..., Any]) -> Callable[[Any], Any]:
    return lambda parts: type_(*parts)


# How a type's value is taken apart into simpler values, and put together again from these. Modules are imported when a value
# needs them. A defaultdict arrives as a dict: its factory stays where it is.
_TYPES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "builtins.tuple": (list, tuple),
    "builtins.set": (list, set),
    "builtins.frozenset": (list, frozenset),
    "builtins.dict": (_items, dict),
    "builtins.bytes": (lambda value: value.decode("latin-1"), lambda text: text.encode("latin-1")),
    "builtins.bytearray": (lambda value: value.decode("latin-1"), lambda text: bytearray(text.encode("latin-1"))),
    "builtins.complex": (lambda value: [value.real, value.imag], _spread(complex)),
    "builtins.range": (_bounds, _spread(range)),
    "builtins.slice": (_bounds, _spread(slice)),
    "collections.deque": (list, _class("collections", "deque")),
    "collections.Counter": (_items, lambda parts: importlib.import_module("collections").Counter(dict(parts))),
    "collections.OrderedDict": (_items, _class("collections", "OrderedDict")),
    "collections.defaultdict": (_items, dict),
    "decimal.Decimal": (str, _class("decimal", "Decimal")),
    "fractions.Fraction": (str, _class("fractions", "Fraction")),
    "datetime.date": (str, _class("datetime", "date", "fromisoformat")),
    "datetime.time": (str, _class("datetime", "time", "fromisoformat")),
    "datetime.datetime": (str, _class("datetime", "datetime", "fromisoformat")),
    "datetime.timedelta": (
        lambda value: [value.days, value.seconds, value.microseconds],
        lambda parts: importlib.import_module("datetime").timedelta(*parts),
    ),
}
# The plain content of an object whose class extends a plain type, whatever methods the class has.
CONTENTS: dict[type, Callable[[Any], Any]] = {
    int: int.__int__,
    float: float.__float__,
    str: str.__str__,
    bytes: bytes.__bytes__,
    list: lambda value: list(list.__iter__(value)),
    tuple: lambda value: tuple(tuple.__iter__(value)),
    set: lambda value: set(set.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
    dict: lambda value: dict(dict.items(value)),
}


def base_of(value: object) -> str | None:
    """Return the name of the plain type that an object's class extends; None for other objects."""
    return next((type_.__name__ for type_ in CONTENTS if isinstance(value, type_)), None)


def content(value: Any) -> Any:
    """Return an object's plain content. Raises TypeError for an object without one."""
    name = base_of(value)
    if name is None:
        raise TypeError(
            f"an object of the class {type(value).__name__} cannot be compared with a value: it is no plain value"
        )
    return CONTENTS[getattr(builtins, name)](value)


def is_builtin(value: object) -> bool:
    """Return whether a value is one of Python's own types."""
    return isinstance(value, type) and getattr(builtins, value.__name__, None) is value


def encode(value: Any, other: Callable[[Any], dict[str, Any]]) -> Any:
    """Return a value as JSON has it; `other` encodes what is no plain value, as an object with other keys than types."""
    type_ = type(value)
    if type_ in ATOMS:
        return value
    if type_ is list:
        return [encode(each, other) for each in value]
    name = f"{type_.__module__}.{type_.__qualname__}"
    if name in _TYPES:
        return {name: encode(_TYPES[name][0](value), other)}
    if is_builtin(value):
        return {"type": value.__name__}
    if isinstance(value, ModuleType) and value.__name__ in sys.stdlib_module_names:
        return {"module": value.__name__}
    return other(value)


def decode(value: Any, other: Callable[[str, Any], Any]) -> Any:
    """Return the value in JSON that `encode` made; `other` gets the key and the value of an object with another key.

    Raises an exception of any kind for other JSON: the other process sent it.
    """
    if isinstance(value, list):
        return [decode(each, other) for each in value]
    if not isinstance(value, dict):
        return value
    ((name, parts),) = value.items()
    if name in _TYPES:
        return _TYPES[name][1](decode(parts, other))
    if name == "type" and isinstance(vars(builtins)[parts], type):
        return vars(builtins)[parts]
    if name == "module" and parts in sys.stdlib_module_names:
        return importlib.import_module(parts)
    return other(name, parts)
