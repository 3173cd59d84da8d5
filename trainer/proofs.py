"""Proofs that the saved model is the trained model, made in a fresh process with plain Transformers and PEFT.

    prove(base model, model folder, prompts, load_in_4bit=…)  →  "proofs" of training.json; raises JobError if one fails

1. `adapter_effect`: the adapter changes the base model's output. An adapter of zeros or NaNs fails.
2. `merge_parity`: the merged bf16 model equals base + adapter, in its weights (to bf16's last bit) and in its output.
3. `fresh_process`: the files load in a process that did not write them.

All proofs compare with the bf16 base model, because the merged model is made from it, also after training on 4-bit weights.
After such a training, `merge_parity.from_4bit` says how far the 4-bit model is from base + adapter.
"""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.job import JobError
from trainer.packages import STAGES, import_all

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

log = logging.getLogger("trainer")

PROMPTS = 3  # of those passed to `prove`
COMPLETION_TOKENS = 16
# Largest mean difference of the completions' log-probabilities, in nats, that bf16 can explain: adding the adapter's output
# and adding its weights round differently. SmolLM2-135M after the demo has 0.02 to 0.03, and 0.3 for a single token.
TOLERANCE = 0.1
TIE = 0.5  # nats between the likeliest token and a token that rounding can make the likeliest
BF16_STEP = 2.0**-7  # largest relative distance of neighbouring numbers
# Variables by which torchrun and accelerate describe a group of processes. The fresh process is alone.
OTHER_PROCESSES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")
SHOWN_LINES = 5


def prove(
    base: str, target: Path, prompts: Sequence[list[dict[str, str]]], *, load_in_4bit: bool, template: dict[str, Any]
) -> dict[str, Any]:
    """Return the numbers of the proofs for `adapter/` and `merged/` in the folder `target`. Raises JobError if one fails.

    `base`: the base model's folder or hub id. `template`: the chat template's keyword arguments.
    """
    began = time.monotonic()
    task = {"base": base, "target": str(target.resolve()), "prompts": list(prompts[:PROMPTS]), "template": template}
    measured = fresh_process(task | {"load_in_4bit": load_in_4bit})
    proofs = check(measured) | {"fresh_process": {"seconds": round(time.monotonic() - began, 1), **measured["versions"]}}
    log.info("proofs %s", json.dumps(proofs))
    return proofs


def fresh_process(task: dict[str, Any]) -> dict[str, Any]:
    """Return the result of `measure` in a new Python process. Raises JobError with the end of its log if it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OTHER_PROCESSES)}
    command = [sys.executable, "-m", "trainer.proofs"]
    done = subprocess.run(  # noqa: S603 - our own command
        command, input=json.dumps(task), env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        end = "\n".join(done.stderr.strip().splitlines()[-SHOWN_LINES:])
        raise JobError(f"The saved model does not load in a fresh process: {end or f'exit code {done.returncode}'}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def check(measured: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of the proofs from `measure`'s result. Raises JobError if one fails."""
    effect, parity = measured["adapter_effect"], measured["merge_parity"]
    off, completions = parity["tensors_off"], parity["answers"]
    if not 0 < effect["largest"] < float("inf"):
        raise JobError(
            f"The adapter does not change the base model's output (largest difference of a log-probability: "
            f"{effect['largest']}): the training changed no weight, or made weights NaN. See alerts.jsonl, and check "
            "learning_rate."
        )
    if off:
        raise JobError(
            f"The merged model is not base + adapter: {len(off)} tensors differ, the first is {off[0]}. The model is not "
            "published."
        )
    if not parity["mean"] <= TOLERANCE or parity["agreeing"] < completions:
        raise JobError(
            f"The merged model's output differs from base + adapter: log-probabilities differ by {parity['mean']:.3f} on "
            f"average (rounding explains at most {TOLERANCE}), and {parity['agreeing']} of {completions} greedy completions "
            "agree. The model is not published."
        )
    return {"adapter_effect": effect, "merge_parity": parity | {"tolerance": TOLERANCE, "tensors_off": len(off)}}


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Load the saved model and compare it with base + adapter, on the greedy completions of the merged model.

    Differences are of log-probabilities. A completion agrees if each of its tokens is base + adapter's likeliest token or
    within TIE of it. A completion is the `same` if each token is the likeliest.
    """
    import torch
    import transformers
    from peft import PeftModel, __version__
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trainer import models

    target = Path(task["target"])
    tokenizer = AutoTokenizer.from_pretrained(target / "merged")
    prompts = [
        tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt", **task["template"]
        )["input_ids"]
        for prompt in task["prompts"]
    ]
    device = fitting_device(target / "merged")
    merged = AutoModelForCausalLM.from_pretrained(target / "merged", dtype=torch.bfloat16).to(device)
    completions = [greedy(merged, prompt) for prompt in prompts]
    of_merged = log_probs(merged, prompts, completions)
    merged.to("cpu")
    base = models.load_model(task["base"], dtype=torch.bfloat16)
    both = PeftModel.from_pretrained(base, str(target / "adapter")).to(device)
    of_both = log_probs(both, prompts, completions)
    with both.disable_adapter():
        of_base = log_probs(both, prompts, completions)
    behind = [each.amax(-1) - _own(each, completion) for each, completion in zip(of_both, completions, strict=True)]
    result: dict[str, Any] = {
        "adapter_effect": difference(of_both, of_base, completions)
        | {"largest": max(float((one - other).abs().max()) for one, other in zip(of_both, of_base, strict=True))},
        "merge_parity": difference(of_both, of_merged, completions)
        | {
            "answers": len(completions),
            "agreeing": sum(bool((each <= TIE).all()) for each in behind),
            "same": sum(bool((each == 0).all()) for each in behind),
            "tensors_off": unequal(merged, both.to("cpu").merge_and_unload()),
        },
        "versions": {"transformers": transformers.__version__, "peft": __version__},
    }
    if task["load_in_4bit"]:
        trained = PeftModel.from_pretrained(models.load_model(task["base"], **models.four_bit()), str(target / "adapter"))
        result["merge_parity"]["from_4bit"] = difference(log_probs(trained, prompts, completions), of_both, completions)[
            "mean"
        ]
    return result


def fitting_device(merged: Path) -> str:
    """Return `cuda` if the GPU has memory for the model in this folder and for running it, else `cpu`."""
    import torch

    size = sum(path.stat().st_size for path in merged.glob("*.safetensors"))
    return "cuda" if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.3 * size else "cpu"


def greedy(model: "PreTrainedModel", prompt: "Tensor") -> "Tensor":
    """Return the greedy completion (C,) of a prompt (1, P), by plain `generate`."""
    sequence = model.generate(
        input_ids=prompt.to(model.device),
        do_sample=False,
        max_new_tokens=COMPLETION_TOKENS,
        temperature=None,
        top_p=None,
        top_k=None,
    )
    completion: Tensor = sequence[0, prompt.shape[1] :].cpu()
    return completion


def log_probs(model: "PreTrainedModel", prompts: "list[Tensor]", completions: "list[Tensor]") -> "list[Tensor]":
    """Return a model's log-probabilities (C, V) at each token of each completion (C,) of a prompt (1, P)."""
    import torch

    result = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = model(input_ids=torch.cat([prompt, completion[None]], dim=1).to(model.device)).logits[0]
        result.append(logits[prompt.shape[1] - 1 : -1].float().log_softmax(-1).cpu())
    return result


def difference(first: "list[Tensor]", second: "list[Tensor]", completions: "list[Tensor]") -> dict[str, float]:
    """Return the mean and the largest difference of two models' log-probabilities of the completions' tokens, in nats."""
    import torch

    pairs = zip(first, second, completions, strict=True)
    differences = torch.cat([(_own(one, tokens) - _own(other, tokens)).abs() for one, other, tokens in pairs])
    return {"mean": round(float(differences.mean()), 6), "largest": round(float(differences.max()), 6)}


def _own(log_probs: "Tensor", completion: "Tensor") -> "Tensor":
    """(C, V), (C,) → (C,): the log-probabilities of the completion's own tokens."""
    return log_probs.gather(-1, completion[:, None])[:, 0]


def unequal(saved: "PreTrainedModel", expected: "PreTrainedModel") -> list[str]:
    """Return the names of weights that differ by more than bf16's last bit, in which two machines may differ."""
    pairs = zip(saved.state_dict().items(), expected.state_dict().values(), strict=True)
    return [
        name
        for (name, weights), right in pairs
        if not weights.equal(right) and not weights.isclose(right, rtol=BF16_STEP).all()
    ]


def main() -> None:
    """Run `measure` on the task in stdin and write the result as the last line of stdout."""
    import_all(STAGES["proofs"])
    import torch

    with torch.no_grad():
        result = measure(json.load(sys.stdin))
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
