"""Botocore and moto with the same answers in less time: both work the same things out again and again."""

from functools import cache
from typing import Any

from botocore.loaders import JSONFileLoader


def quick_botocore() -> None:
    """Read each file of botocore's once in a process, not once in every session: EC2's model has 3 MB."""
    load_file, files = JSONFileLoader.load_file, {}

    def kept(loader: JSONFileLoader, path: str) -> Any:
        if path not in files:
            files[path] = load_file(loader, path)
        return files[path]

    JSONFileLoader.load_file = kept


def quick_moto() -> None:
    """Keep what depends on a service alone, and send DynamoDB's values as they are kept: in the form of the wire already."""
    from moto.core import responses
    from moto.core.base_backend import BaseBackend
    from moto.core.serialize import BaseJSONSerializer

    find, serialize = BaseBackend.urls.fget, BaseJSONSerializer._serialize_type_structure
    urls: dict[type[BaseBackend], Any] = {}

    def kept(backend: BaseBackend) -> Any:
        return urls.get(type(backend)) or urls.setdefault(type(backend), find(backend))

    def serialize_type_structure(self: BaseJSONSerializer, serialized: Any, value: Any, shape: Any, key: str) -> None:
        if shape.name == "AttributeValue" and isinstance(value, dict):
            self._default_serialize(serialized, value, shape, key)
        else:
            serialize(self, serialized, value, shape, key)

    BaseBackend.urls = property(kept)
    BaseJSONSerializer._serialize_type_structure = serialize_type_structure
    responses.method_names_from_class = cache(responses.method_names_from_class)
