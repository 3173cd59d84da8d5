"""What can be known of a base model from the names of its files and from the small ones among them."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import msgspec

from pipeline.validation.tokens import TOKENIZER_FILES
from tunedrop.config.model import RunConfig, check_lengths
from tunedrop.problems import Problem

# Those that are read, and the bytes that each may have: more than any known model's.
READ_FILES = {"config.json": 8 * 1024**2, **TOKENIZER_FILES}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")


def check_model(config: RunConfig, names: Collection[str], folder: Path, place: str) -> list[Problem]:
    """Return what is wrong with the base model whose files have these names, READ_FILES of them in `folder`.

    `place` is where the user keeps them, for messages.
    """
    if missing := missing_files(names):
        message = f"the base model '{config.model}' lacks {', '.join(missing)} in {place}"
        return [Problem("MODEL_MISSING", message, "upload its files there, or name another model", key="model")]
    contents = {name: _object(folder / name) for name in ("config.json", "tokenizer_config.json") if name in names}
    context = (contents["config.json"] or {}).get("max_position_embeddings")
    lengths = check_lengths(config, context) if isinstance(context, int) else []
    return [*_what_runs(config.model, names, contents), *lengths]


def missing_files(names: Collection[str]) -> list[str]:
    """Return which files a base model lacks whose files have these names."""
    missing = [name for name in ("config.json", "tokenizer.json") if name not in names]
    return missing if any(name.endswith(".safetensors") for name in names) else [*missing, "*.safetensors"]


def _what_runs(model: str, names: Collection[str], contents: dict[str, dict[str, Any] | None]) -> Iterator[Problem]:
    """Yield what in a model's folder runs code when the model is loaded, or cannot be read."""
    for name in sorted(names):
        if name.lower().endswith(PICKLES):
            message = f"'{name}' of the base model '{model}' is a pickle, which runs code when it is loaded"
            yield Problem("MODEL_RUNS_CODE", message, "delete it: *.safetensors hold the weights", key="model")
    for name, content in contents.items():
        if content is None:
            message = f"'{name}' of the base model '{model}' is no JSON object of at most {READ_FILES[name]} bytes"
            yield Problem("MODEL_CONFIG", message, "upload the model's own file again", key="model")
        elif "auto_map" in content:
            message = f"'{name}' of the base model '{model}' has an auto_map: the model needs Python code of its own"
            yield Problem("MODEL_RUNS_CODE", message, "use a model that transformers has the code of", key="model")


def parameters_of(model: str, folder: Path | None, weights: int) -> float | None:
    """Return how many parameters a model has.

    By the bytes of its weights and their type, which is in the `config.json` of its `folder`, else by its name ("…-0.6B",
    "…-135M"), which is all that a hub id says.
    """
    if weights and folder is not None and (folder / "config.json").exists():
        config = _object(folder / "config.json") or {}
        return weights / {"float32": 4, "float8_e4m3fn": 1}.get(str(config.get("dtype", config.get("torch_dtype"))), 2)
    named = re.findall(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([BbMm])(?![A-Za-z0-9])", model)
    return max((float(number) * {"b": 1e9, "m": 1e6}[unit.lower()] for number, unit in named), default=None)


def _object(file: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file that is not too large; None for anything else."""
    try:
        content = msgspec.json.decode(file.read_bytes()) if file.stat().st_size <= READ_FILES[file.name] else None
    except (msgspec.DecodeError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
