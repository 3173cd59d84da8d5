"""Two processes that use each other's objects: the process of a program, and the process of its tests.

Plain values travel (values.py). Any other object stays in its process, and the other process has a `Remote` of it. What one
does with a Remote, such as a call, an attribute or an iteration, happens in the object's process. Each message is a line of
JSON.

A comparison of a Remote with a plain value happens where the value is, with the plain content of the object. An object
whose `__eq__` is always true therefore equals nothing, and a program never sees the value that a test expects.
"""

import builtins
import importlib
import io
import json
import operator
import socket
import sys
from collections.abc import Callable
from typing import Any

from tunedrop.programs import values

COMPARISONS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")


def _call(function: Any, arguments: list[Any], named: dict[str, Any]) -> Any:
    return function(*arguments, **named)


# What one process can ask of an object in the other one.
OPERATIONS: dict[str, Callable[..., Any]] = {
    "__call__": _call,
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
    "content": values.content,
    "__instancecheck__": lambda class_, value: isinstance(value, class_),
    "__subclasscheck__": lambda class_, value: issubclass(value, class_),
    "__enter__": lambda value: value.__enter__(),
    "__exit__": lambda value, *_: value.__exit__(None, None, None),
    "__reversed__": reversed,
    "__round__": round,
    **{f"__{each.__name__}__": each for each in (iter, next, len, hash, str, repr, bool, int, float, abs)},
    **{name: getattr(operator, name) for name in ("__getitem__", "__setitem__", "__delitem__", "__contains__")},
    **{name: getattr(operator, name) for name in ("__neg__", "__pos__", "__invert__", "__index__", *COMPARISONS)},
    **{f"__{name}__": getattr(operator, f"__{name}__") for name in _BINARY},
    **{f"__r{name}__": lambda a, b, name=name: getattr(operator, f"__{name}__")(b, a) for name in _BINARY},
}
# With a plain value, these happen in the process where the value is: an object that learns the value could answer what a
# test wants to hear. `abs(result - 4) < 0.1` compares, too, and so does `result.startswith("four")`.
_MEASURING = ("sub", "truediv", "floordiv", "mod", "and", "or", "xor")
_HERE = {*COMPARISONS, "__contains__", *(f"__{prefix}{name}__" for name in _MEASURING for prefix in ("", "r"))}
_TRUTHS = {name for type_ in values.CONTENTS for name in dir(type_) if name.startswith(("is", "startswith", "endswith"))}


class Remote:
    """An object in the other process."""

    __slots__ = ("__base", "__number", "__peer")

    def __init__(self, peer: "Peer", number: int, base: str | None):
        object.__setattr__(self, "_Remote__peer", peer)
        object.__setattr__(self, "_Remote__number", number)
        object.__setattr__(self, "_Remote__base", base)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The plain type that the object extends, for isinstance."""
        return next((type_ for type_ in values.CONTENTS if type_.__name__ == self.__base), Remote)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call the object."""
        return self.__peer.ask("__call__", self, list(arguments), named)

    def __getattr__(self, name: str) -> Any:
        if name in _TRUTHS:
            return getattr(self.__peer.ask("content", self), name)
        return self.__peer.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__peer.ask("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        self.__peer.ask("delattr", self, name)

    def __exit__(self, *_: object) -> Any:
        return self.__peer.ask("__exit__", self)

    @staticmethod
    def number(remote: "Remote") -> int:
        """Return the number of the object in its process."""
        number: int = remote.__number
        return number

    @staticmethod
    def forward(name: str) -> Callable[..., Any]:
        """Return the method of an operation."""

        def method(self: Remote, *arguments: Any) -> Any:
            if name not in _HERE or type(arguments[0]) is Remote:
                return self.__peer.ask(name, self, *arguments)
            if arguments[0] is None and name in {"__eq__", "__ne__"}:  # None is never in another process
                return name == "__ne__"
            return OPERATIONS[name](self.__peer.ask("content", self), *arguments)

        return method


for _name in OPERATIONS:
    if _name.startswith("__") and _name not in vars(Remote):
        setattr(Remote, _name, Remote.forward(_name))


class Peer:
    """This process's end of the connection. `allow` says whether the other process may do something with an object here."""

    def __init__(
        self, connection: socket.socket, allow: Callable[[str, list[Any]], bool], operations: dict[str, Callable[..., Any]]
    ):
        self._stream = connection.makefile("rwb")
        self._allow = allow
        self._operations = operations
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._remotes: dict[int, Any] = {}  # an object has one Remote: `is` works

    def ask(self, operation: str, *arguments: Any) -> Any:
        """Return the result of an operation in the other process.

        Raises the exception that it raised there, with the same class if the class is Python's own or a Remote's; EOFError
        if the other process has ended.
        """
        self._send([operation, *(self._encode(each) for each in arguments)])
        while (message := self._receive())[0] not in {"result", "error"}:
            self._answer(message)
        kind, value, printed, changed = message
        sys.stdout.write(printed)
        for argument, new in zip(_arguments(operation, arguments), changed, strict=False):
            _change(argument, self._decode(new))
        if kind == "result":
            return self._decode(value)
        raise self._error(*value)

    def serve(self) -> None:
        """Answer the other process until it ends."""
        while True:
            try:
                message = self._receive()
            except EOFError:
                return
            self._answer(message)

    def _answer(self, message: list[Any]) -> None:
        printed, before_it = _Printed(), sys.stdout
        sys.stdout = printed
        changed: list[Any] = []
        try:
            operation, *encoded = message
            arguments = [self._decode(each) for each in encoded]
            before = [json.dumps(self._encode(each)) for each in _arguments(operation, arguments)]
            theirs = operation in self._operations or encoded[0].keys() == {"yours"}  # what this process gave them
            if not (theirs and self._allow(operation, arguments)):
                raise AttributeError(f"a program may not use {operation} of this object")
            value = self._encode((OPERATIONS | self._operations)[operation](*arguments))
            after = [self._encode(each) for each in _arguments(operation, arguments)]
            changed = after if [json.dumps(each) for each in after] != before else []
            answer = ["result", value]
        except BaseException as error:  # noqa: BLE001 - the other process gets it
            answer = ["error", [self._encode(type(error)), self._encode([each for each in error.args if _is_atom(each)])]]
        sys.stdout = before_it
        self._send([*answer, printed.text(), changed])

    def _send(self, message: list[Any]) -> None:
        self._stream.write(json.dumps(message).encode() + b"\n")
        self._stream.flush()

    def _receive(self) -> list[Any]:
        line = self._stream.readline()
        if not line.endswith(b"\n"):
            raise EOFError("the program's process has ended")
        message: list[Any] = json.loads(line)
        return message

    def _encode(self, value: Any) -> Any:
        return values.encode(value, self._encode_object)

    def _encode_object(self, value: Any) -> dict[str, Any]:
        if type(value) is Remote:
            return {"yours": Remote.number(value)}
        number = vars(value).get("_tunedrop_number") if isinstance(value, type) else None
        if number is not None:
            return {"yours": number}
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)
        described: dict[str, Any] = {"number": self._numbers[id(value)], "base": values.base_of(value)}
        if isinstance(value, type) and issubclass(value, BaseException):
            bases = (class_.__name__ for class_ in value.__mro__ if values.is_builtin(class_))
            described |= {"exception": next(bases), "module": value.__module__, "name": value.__name__}
        return {"object": described}

    def _decode(self, value: Any) -> Any:
        return values.decode(value, self._decode_object)

    def _decode_object(self, kind: str, described: Any) -> Any:
        if kind == "yours":
            return self._objects[described]
        if kind != "object":
            raise TypeError(f"no value: {kind}")
        number = described["number"]
        if number not in self._remotes:
            self._remotes[number] = (
                _exception(described, number) if "exception" in described else Remote(self, number, described["base"])
            )
        return self._remotes[number]

    def _error(self, class_: Any, arguments: Any) -> BaseException:
        type_ = self._decode(class_)
        if not (isinstance(type_, type) and issubclass(type_, BaseException)):
            raise TypeError(f"no exception: {type_}")
        values_ = self._decode(arguments)
        try:
            return type_(*values_)
        except TypeError:  # UnicodeDecodeError and others need arguments that did not travel
            return type_.__new__(type_)


def _arguments(operation: str, arguments: Any) -> list[Any]:
    """Return the arguments of a call that the function can change."""
    return [each for each in arguments[1] if type(each) in (list, dict, set)] if operation == "__call__" else []


def _change(argument: Any, new: Any) -> None:
    """Give a list, dict or set the content that a function in the other process left in it."""
    argument.clear()
    (argument.extend if type(argument) is list else argument.update)(new)


def _exception(described: dict[str, Any], number: int) -> type[BaseException]:
    """Return the exception class that another process describes: the standard library's own, or one of the same base.

    unittest's are left out: a program could end a test as skipped.
    """
    module, name = described["module"], described["name"]
    if module.partition(".")[0] in sys.stdlib_module_names - {"unittest"}:
        class_ = getattr(importlib.import_module(module), name)
    else:
        class_ = type(name, (vars(builtins)[described["exception"]],), {"_tunedrop_number": number})
    if not (isinstance(class_, type) and issubclass(class_, BaseException)):
        raise TypeError(f"no exception: {name}")
    return class_


def _is_atom(value: Any) -> bool:
    return type(value) in values.ATOMS


class _Printed(io.TextIOWrapper):
    """Standard output that keeps what is printed. `sys.stdout.buffer` works, too."""

    def __init__(self) -> None:
        self._bytes = io.BytesIO()
        super().__init__(self._bytes, encoding="utf-8", errors="surrogatepass", write_through=True)

    def text(self) -> str:
        """Return what was printed."""
        return self._bytes.getvalue().decode(errors="replace")
