"""The modules of a base model, from the headers of its safetensors files, and the check of `lora.target_modules`.

The format has the header's length in 8 bytes, then the header: a JSON object of tensors with their shapes
(https://huggingface.co/docs/safetensors/index#format).
"""

import re
from collections.abc import Iterable
from pathlib import Path

import msgspec

from tunedrop.config.model import RunConfig
from tunedrop.problems import Problem, nearest

ALL_LINEAR = "all-linear"
HEADER_BYTES = 8 * 1024**2  # of a file; a header has about 120 bytes a tensor


class _Tensor(msgspec.Struct):
    shape: list[int] = []


def header_bytes(start: bytes) -> int:
    """Return how many bytes of a safetensors file hold its header, from the file's first 8 bytes."""
    return 8 + int.from_bytes(start[:8], "little")


def modules_of(folder: Path) -> set[str]:
    """Return the names of the modules with a weight of two or more dimensions, which LoRA can adapt.

    A file may be cut after its header. The set is empty if a file has no header of the format: then nothing is known.
    """
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            length = header_bytes(stream.read(8))
            header = stream.read(length - 8) if length <= HEADER_BYTES else b""
        try:
            tensors = msgspec.json.decode(header, type=dict[str, _Tensor])
        except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
            return set()
        names |= {name.rpartition(".")[0] for name, tensor in tensors.items() if len(tensor.shape) >= 2}
    return names - {""}


def check_targets(config: RunConfig, folder: Path, multimodal: bool) -> list[Problem]:
    """Return a problem for each of `lora.target_modules` that the model in a folder lacks.

    PEFT matches a name with the end of a module's path, and a text with the whole path as a regular expression
    (`peft.tuners.tuners_utils.check_target_module_exists`). Transformers renames the paths of a `multimodal` model when it
    loads the model, and therefore no regular expression is checked then.
    """
    targets = config.lora.target_modules
    if targets == ALL_LINEAR or not (modules := modules_of(folder)):
        return []
    if isinstance(targets, str):
        return [] if multimodal else _check_pattern(targets, modules)
    last = {name.rpartition(".")[2] for name in modules} - {"lm_head"}
    missing = [name for name in targets if not _is_end(name, modules)]
    return [_missing(f"the model has no module '{name}'", nearest(name, last)) for name in missing]


def _is_end(name: str, modules: Iterable[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for module in modules)


def _check_pattern(pattern: str, modules: set[str]) -> list[Problem]:
    try:
        matched = any(re.fullmatch(pattern, name) for name in modules)
    except re.error as error:
        return [_missing(f"'{pattern}' is not a regular expression: {error}", "write a list of names, or all-linear")]
    if matched:
        return []
    hint = f"the pattern must match a module's whole path, such as {max(modules, key=lambda name: name.count('.'))}"
    if _is_end(pattern, modules):
        hint = f"write a list of names: [{pattern}]"
    return [_missing(f"no module's path matches '{pattern}'", hint)]


def _missing(message: str, hint: str) -> Problem:
    return Problem("CONFIG_VALUE", f"lora.target_modules: {message}", hint, key="lora.target_modules")
