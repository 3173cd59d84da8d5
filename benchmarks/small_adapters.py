"""Measures how much of an adapter's effect is left, merged and beside the weights, when the adapter is small.

    .venv/bin/python -m benchmarks.small_adapters FOLDER/output/model

The argument is the folder that a training job of SmolLM2-135M-Instruct wrote; `make demo` leaves one. The adapter is scaled,
as smaller learning rates or fewer steps make it. The log-probabilities of completions are compared with those of base +
adapter in fp32: of the merged model (stochastic rounding to bf16, computed in fp32), and of base + adapter in bf16, as
servers compute it. On a machine that is slow in bf16, the last one is fp32 as well.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer

from benchmarks.time_to_reward import ROOT, SAMPLE
from trainer import merging, models, proofs
from trainer.dataset import chat_ids

MODEL = str(ROOT / ".tunedrop/models/SmolLM2-135M-Instruct")
SCALES = (1.0, 0.3, 0.1, 0.03)
QUESTIONS = 16


def scaled(adapter: Path, scale: float) -> PeftModel:
    """Return the bf16 base model with the scaled adapter beside it."""
    both = PeftModel.from_pretrained(models.load_model(MODEL, dtype=torch.bfloat16), adapter)
    for layer in both.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling = {name: value * scale for name, value in layer.scaling.items()}
    return both


def main() -> None:
    """Print a line for each scale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    adapter = parser.parse_args().folder / "adapter"
    tokenizer = models.load_tokenizer(MODEL)
    rows = [json.loads(line) for line in (SAMPLE / "counting.jsonl").read_text().splitlines()[:QUESTIONS]]
    ids = [chat_ids([{"role": "user", "content": row["question"]}], tokenizer, {}) for row in rows]
    inputs = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    base = models.load_model(MODEL, dtype=torch.bfloat16)
    with torch.inference_mode():
        sequences = proofs.Sequences.greedy(base, inputs)
        of_base = proofs.log_probs(base, sequences)
        in_bf16 = proofs.log_probs(base, sequences, rounds=True)
        for scale in SCALES:
            both = scaled(adapter, scale)
            of_both = proofs.log_probs(both, sequences)
            beside = proofs.log_probs(both, sequences, rounds=True) - in_bf16 + of_base
            merged = proofs.log_probs(merging.merge(both, torch.bfloat16), sequences)
            shown = {name: proofs.fidelity(of_base, of_both, of) for name, of in (("merged", merged), ("beside", beside))}
            print(
                f"adapter x {scale:<5}",
                *(f"{name}: kept {each['kept']:.2f}, error {each['error']:.2f}" for name, each in shown.items()),
            )


if __name__ == "__main__":
    main()
