"""Checks of a base model by the names of its files and the content of its small files."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from pipeline.validation.bedrock import check_architecture
from pipeline.validation.modules import check_targets
from pipeline.validation.tokens import TOKENIZER_FILES
from tunedrop.config.model import RunConfig
from tunedrop.config.schedule import check_lengths
from tunedrop.problems import Problem

# The files that a check reads, and the most bytes of each: more than any known model's file has.
READ_FILES = {"config.json": 8 * 1024**2, **TOKENIZER_FILES}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")


class ModelFiles(NamedTuple):
    """A base model's files: sizes in bytes by name, a folder with READ_FILES, and the user's location of them.

    Where the config names `lora.target_modules`, the folder has the weights' files too, at least their headers.
    """

    sizes: dict[str, int]
    folder: Path
    location: str

    @property
    def weights(self) -> int:
        """The bytes of the weights."""
        return sum(size for name, size in self.sizes.items() if name.endswith(".safetensors"))


def check_model(config: RunConfig, model: ModelFiles) -> list[Problem]:
    """Return what is wrong with the config's base model."""
    if missing := missing_files(model.sizes):
        message = f"the base model '{config.model}' lacks {', '.join(missing)} in {model.location}"
        return [Problem("MODEL_MISSING", message, "upload these files, or name another model", key="model")]
    names = model.sizes.keys() & {"config.json", "tokenizer_config.json"}
    contents = {name: _object(model.folder / name) for name in sorted(names)}
    context = (contents["config.json"] or {}).get("max_position_embeddings")
    lengths = check_lengths(config, context) if isinstance(context, int) else []
    targets = check_targets(config, model.folder, multimodal="text_config" in (contents["config.json"] or {}))
    imports = check_architecture(config, contents["config.json"] or {})
    return [*_unsafe(config.model, model.sizes, contents), *lengths, *targets, *imports]


def missing_files(names: Collection[str]) -> list[str]:
    """Return the files that a base model with these file names lacks."""
    missing = [name for name in ("config.json", "tokenizer.json") if name not in names]
    return missing if any(name.endswith(".safetensors") for name in names) else [*missing, "*.safetensors"]


def _unsafe(model: str, names: Collection[str], contents: dict[str, dict[str, Any] | None]) -> Iterator[Problem]:
    """Yield files that run code when the model is loaded, and JSON files that cannot be read."""
    for name in sorted(names):
        if name.lower().endswith(PICKLES):
            message = f"'{name}' of the base model '{model}' is a pickle, and a pickle can run code when it is loaded"
            yield Problem("MODEL_RUNS_CODE", message, "delete it: *.safetensors hold the weights", key="model")
    for name, content in contents.items():
        if content is None:
            message = f"'{name}' of the base model '{model}' is not a JSON object of at most {READ_FILES[name]} bytes"
            yield Problem("MODEL_CONFIG", message, "upload the model's own file again", key="model")
        elif "auto_map" in content:
            message = f"'{name}' of the base model '{model}' has an auto_map: the model runs Python code of its own"
            yield Problem("MODEL_RUNS_CODE", message, "use a model whose code is part of transformers", key="model")


def parameters_of(name: str, model: ModelFiles | None) -> float | None:
    """Return the number of a model's parameters, None if unknown.

    It is the bytes of the weights by their type in `config.json`; without weights, the number in the model's name
    ("…-0.6B", "…-135M").
    """
    if model and model.weights and (model.folder / "config.json").exists():
        config = _object(model.folder / "config.json") or {}
        dtype = str(config.get("dtype", config.get("torch_dtype")))
        return model.weights / {"float32": 4, "float8_e4m3fn": 1}.get(dtype, 2)
    sizes = re.findall(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([BbMm])(?![A-Za-z0-9])", name)
    return max((float(number) * {"b": 1e9, "m": 1e6}[unit.lower()] for number, unit in sizes), default=None)


def _object(file: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None for other content or a file above its limit."""
    try:
        content = msgspec.json.decode(file.read_bytes()) if file.stat().st_size <= READ_FILES[file.name] else None
    except (msgspec.DecodeError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
