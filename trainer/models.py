"""Finds and loads the models of a run."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import folders
from trainer.job import JobError

# What is downloaded of a model on the hub: weights, config, tokenizer, chat template, and the model card with its licence.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "README.md"]

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def locate(name: str) -> str:
    """Return the folder of the run's base model: in the channel `models`, or, without channel, `name` or a download.

    The channel holds the model's files, or a folder `name` with them. Without channel, `name` is a folder or a hub id,
    `org/name@revision`; without revision, the hub's main branch. Raises JobError when there is no such model.
    """
    channel = folders.channel("models")
    if channel is None:
        return name if Path(name).is_dir() else _download(name)
    for folder in (channel, channel / name):
        if (folder / "config.json").is_file():
            if not any(folder.glob("*.safetensors")):
                raise JobError(f"No weights for model '{name}': {folder} has a config.json but no *.safetensors file.")
            return str(folder)
    names = ", ".join(sorted(path.name for path in channel.iterdir())[:10]) if channel.is_dir() else ""
    raise JobError(
        f"No model '{name}' in the models channel: expected config.json, the tokenizer and *.safetensors in {channel} "
        f"or {channel / name}, but the channel holds {names or 'nothing'}. Upload the files to models/{name}/ in the data "
        "bucket."
    )


def _download(model: str) -> str:
    """Download a model of the hub at its revision, without pickles and other weights, and return its folder.

    All that loads the model, vLLM and PEFT included, then reads the same commit. Raises JobError.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = model.partition("@")
    try:
        folder = snapshot_download(name, revision=revision or None, allow_patterns=HUB_FILES)
    except (OSError, ValueError) as error:
        raise JobError(f"The model '{model}' cannot be downloaded from the hub: {error}") from None
    if not any(Path(folder).glob("*.safetensors")):
        raise JobError(f"The model '{model}' has no *.safetensors file on the hub.")
    return folder


def load_options(location: str) -> dict[str, Any]:
    """Return the arguments with which every model and tokenizer is loaded: no code of the model, no hub for a folder."""
    return {
        "pretrained_model_name_or_path": location,
        "trust_remote_code": False,
        "local_files_only": Path(location).is_dir(),
    }


def load_tokenizer(location: str) -> "PreTrainedTokenizerBase":
    """Load a tokenizer that pads on the left, as generation needs. Raises JobError without a chat template."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**load_options(location), padding_side="left")
    if not tokenizer.chat_template:
        raise JobError(
            f"The tokenizer of '{location}' has no chat template and cannot encode a conversation. Use an instruct "
            "model, or add a chat_template.jinja to the model's files."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(location: str, **kwargs: Any) -> "PreTrainedModel":
    """Load a causal language model; `kwargs` go to `from_pretrained` (dtype, device_map, quantization_config)."""
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(**load_options(location), use_safetensors=True, **kwargs)
    return model


@contextmanager
def converted(parameters: "Iterable[torch.nn.Parameter]", dtype: "torch.dtype") -> Iterator[None]:
    """Have these parameters in another type for the block. Their own tensors come back unchanged."""
    own = [(parameter, parameter.data) for parameter in parameters]
    try:
        for parameter, data in own:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in own:
            parameter.data = data


@contextmanager
def seen_logits(model: "torch.nn.Module", see: "Callable[[torch.Tensor], None]") -> Iterator[None]:
    """Call `see` with the logits (B, V) of the next token after each forward pass, before any setting of `generate`."""
    handle = model.register_forward_hook(lambda _model, _arguments, output: see(output.logits[:, -1]))
    try:
        yield
    finally:
        handle.remove()


def context(location: str) -> int | None:
    """Return the most tokens of a sequence by the model's config; None if it has no limit."""
    from transformers import AutoConfig

    limit: int | None = getattr(
        AutoConfig.from_pretrained(**load_options(location)).get_text_config(), "max_position_embeddings", None
    )
    return limit


def test_dtype(merged: str) -> "torch.dtype":
    """Return the type in which a test job runs a merged model, and the base beside it: its own, fp32 where bf16 is slow.

    Without bf16 in hardware, fp32 computes with the same bf16 weights.
    """
    import torch
    from transformers import AutoConfig

    stored: torch.dtype = AutoConfig.from_pretrained(**load_options(merged)).dtype
    return stored if fast_bf16() else torch.float32


def device() -> str:
    """Return the device of this process: its GPU by torchrun's `LOCAL_RANK`, else the CPU."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def device_with_room(location: str) -> str:
    """Return `cuda` if the GPU has memory for the bf16 model in this folder and for running it, else `cpu`."""
    import torch

    size = sum(path.stat().st_size for path in Path(location).glob("*.safetensors"))
    return "cuda" if torch.cuda.is_available() and size and torch.cuda.mem_get_info()[0] > 1.3 * size else "cpu"


def four_bit() -> dict[str, Any]:
    """Return the keyword arguments with which `load_model` loads weights in 4 bits, as QLoRA does (arXiv 2305.14314)."""
    import torch
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if fast_bf16() else torch.float32,
        )
    }


def fast_bf16() -> bool:
    """Return whether this machine computes faster in bf16 than in fp32: its GPU's word, or a measurement of its CPU."""
    import torch

    from trainer import cpu

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return cpu.fast_bf16()


def weights_dtype() -> "torch.dtype":
    """Return the type of the base weights in training: bf16 on GPUs with bf16, else fp32.

    On a CPU, fp32 weights under bf16 autocast are faster than bf16 weights. On two AVX512-BF16 cores, a step of 64 short
    completions with SmolLM2-135M takes 17 to 19 s, against 22 s in plain fp32 and 22 s with bf16 weights.
    """
    import torch

    return torch.bfloat16 if torch.cuda.is_available() and fast_bf16() else torch.float32
