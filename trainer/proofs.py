"""Proofs that what a job has saved is what it has trained, made in a fresh process with plain transformers and PEFT.

    prove(base model, model folder, prompts, load_in_4bit=…)  →  training.json's "proofs"; JobError if one fails

1. `adapter_effect`: the adapter changes what the base model says. One of zeros, or of numbers that are none, does not.
2. `merge_parity`: the merged bf16 model is base + adapter, in its weights (to bf16's last bit) and in its answers.
3. `fresh_process`: the files load in a process that has not made them.

All compare the bf16 base model, also after training on 4-bit weights: the merged model is made from it, never from them.
How far the 4-bit model was from it is measured, too.
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

PROMPTS = 3  # are asked, at most
ANSWER_TOKENS = 16
# Mean difference of the log-probabilities of the answers' tokens, in nats, that is put down to bf16: adding the adapter's
# output and adding its weights round differently. SmolLM2-135M after its demo: 0.02 to 0.03, 0.3 for a single token.
TOLERANCE = 0.1
TIE = 0.5  # between the likeliest token and one that rounding can put before it
BF16_STEP = 2.0**-7  # between neighbouring numbers, relative to them, at most
# What torchrun and accelerate tell their own processes; this one is alone.
OTHER_PROCESSES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")
SHOWN_LINES = 5


def prove(
    base: str, target: Path, prompts: Sequence[list[dict[str, str]]], *, load_in_4bit: bool, template: dict[str, Any]
) -> dict[str, Any]:
    """Return the proofs' numbers for `adapter/` and `merged/` in the folder `target`. Raises JobError if one fails.

    `base`: where the base model is. `template`: the chat template's keyword arguments.
    """
    began = time.monotonic()
    task = {"base": base, "target": str(target.resolve()), "prompts": list(prompts[:PROMPTS]), "template": template}
    measured = fresh_process(task | {"load_in_4bit": load_in_4bit})
    proofs = judge(measured) | {"fresh_process": {"seconds": round(time.monotonic() - began, 1), **measured["versions"]}}
    log.info("proofs %s", json.dumps(proofs))
    return proofs


def fresh_process(task: dict[str, Any]) -> dict[str, Any]:
    """Return what `measure` finds in a new Python process. Raises JobError with its last words if it ends otherwise."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OTHER_PROCESSES)}
    command = [sys.executable, "-m", "trainer.proofs"]
    done = subprocess.run(  # noqa: S603 - our own command
        command, input=json.dumps(task), env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        words = "\n".join(done.stderr.strip().splitlines()[-SHOWN_LINES:])
        raise JobError(f"The saved model does not load in a fresh process: {words or f'exit code {done.returncode}'}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def judge(measured: dict[str, Any]) -> dict[str, Any]:
    """Return the proofs' numbers from those measured. Raises JobError if one fails."""
    effect, parity = measured["adapter_effect"], measured["merge_parity"]
    off, answers = parity["tensors_off"], parity["answers"]
    if not 0 < effect["largest"] < float("inf"):
        raise JobError(
            f"The adapter does not change what the base model says (largest difference of a log-probability: "
            f"{effect['largest']}), so there is nothing to test: training has moved no weight, or to no number. "
            "See alerts.jsonl, and learning_rate."
        )
    if off:
        raise JobError(
            f"The merged model is not base + adapter: {len(off)} tensors differ, the first is {off[0]}. It is not published."
        )
    if not parity["mean"] <= TOLERANCE or parity["agreeing"] < answers:
        raise JobError(
            f"The merged model does not answer like base + adapter: log-probabilities differ by {parity['mean']:.3f} on "
            f"average (at most {TOLERANCE} is rounding) and {parity['agreeing']} of {answers} greedy answers agree. It is "
            "not published."
        )
    return {"adapter_effect": effect, "merge_parity": parity | {"tolerance": TOLERANCE, "tensors_off": len(off)}}


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Load what was saved and compare it with base + adapter, on the greedy answers of the merged model.

    Differences are of log-probabilities. An answer agrees if base + adapter would give each of its tokens, too, or has it
    within TIE of its own choice; it is the `same` if there was no such tie.
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
    device = roomy_device(target / "merged")
    merged = AutoModelForCausalLM.from_pretrained(target / "merged", dtype=torch.bfloat16).to(device)
    answers = [greedy(merged, prompt) for prompt in prompts]
    of_merged = log_probs(merged, prompts, answers)
    merged.to("cpu")
    base = models.load_model(task["base"], dtype=torch.bfloat16)
    both = PeftModel.from_pretrained(base, str(target / "adapter")).to(device)
    of_both = log_probs(both, prompts, answers)
    with both.disable_adapter():
        of_base = log_probs(both, prompts, answers)
    behind = [each.amax(-1) - _own(each, answer) for each, answer in zip(of_both, answers, strict=True)]
    found: dict[str, Any] = {
        "adapter_effect": difference(of_both, of_base, answers)
        | {"largest": max(float((one - other).abs().max()) for one, other in zip(of_both, of_base, strict=True))},
        "merge_parity": difference(of_both, of_merged, answers)
        | {
            "answers": len(answers),
            "agreeing": sum(bool((each <= TIE).all()) for each in behind),
            "same": sum(bool((each == 0).all()) for each in behind),
            "tensors_off": unequal(merged, both.to("cpu").merge_and_unload()),
        },
        "versions": {"transformers": transformers.__version__, "peft": __version__},
    }
    if task["load_in_4bit"]:
        trained = PeftModel.from_pretrained(models.load_model(task["base"], **models.four_bit()), str(target / "adapter"))
        found["merge_parity"]["from_4bit"] = difference(log_probs(trained, prompts, answers), of_both, answers)["mean"]
    return found


def roomy_device(merged: Path) -> str:
    """Return `cuda` where a GPU has room for the model in this folder and for what running it takes, else `cpu`."""
    import torch

    size = sum(path.stat().st_size for path in merged.glob("*.safetensors"))
    return "cuda" if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.3 * size else "cpu"


def greedy(model: "PreTrainedModel", prompt: "Tensor") -> "Tensor":
    """Return the likeliest tokens (C,) after a prompt (1, P), with plain `generate`."""
    everything = model.generate(
        input_ids=prompt.to(model.device),
        do_sample=False,
        max_new_tokens=ANSWER_TOKENS,
        temperature=None,
        top_p=None,
        top_k=None,
    )
    answer: Tensor = everything[0, prompt.shape[1] :].cpu()
    return answer


def log_probs(model: "PreTrainedModel", prompts: "list[Tensor]", answers: "list[Tensor]") -> "list[Tensor]":
    """Return the log-probabilities (C, V) that a model gives at each token of each answer (C,) to its prompt (1, P)."""
    import torch

    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(input_ids=torch.cat([prompt, answer[None]], dim=1).to(model.device)).logits[0]
        found.append(logits[prompt.shape[1] - 1 : -1].float().log_softmax(-1).cpu())
    return found


def difference(these: "list[Tensor]", those: "list[Tensor]", answers: "list[Tensor]") -> dict[str, float]:
    """Return how far the log-probabilities of the answers' tokens are apart, on average and at most."""
    import torch

    pairs = zip(these, those, answers, strict=True)
    apart = torch.cat([(_own(one, answer) - _own(other, answer)).abs() for one, other, answer in pairs])
    return {"mean": round(float(apart.mean()), 6), "largest": round(float(apart.max()), 6)}


def _own(log_probs: "Tensor", answer: "Tensor") -> "Tensor":
    """(C, V), (C,) → (C,): the log-probabilities of the answer's own tokens."""
    return log_probs.gather(-1, answer[:, None])[:, 0]


def unequal(saved: "PreTrainedModel", expected: "PreTrainedModel") -> list[str]:
    """Return the names of weights that differ by more than the last bit of bf16, which another machine may round."""
    pairs = zip(saved.state_dict().items(), expected.state_dict().values(), strict=True)
    return [
        name
        for (name, weights), right in pairs
        if not weights.equal(right) and not weights.isclose(right, rtol=BF16_STEP).all()
    ]


def main() -> None:
    """Measure what stdin asks for; the last line of stdout is the answer."""
    import_all(STAGES["proofs"])
    import torch

    with torch.no_grad():
        found = measure(json.load(sys.stdin))
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
