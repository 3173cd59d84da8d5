"""Proofs that the saved model is the trained model, made in a fresh process with plain Transformers and PEFT.

    prove(base model, model folder, prompts, load_in_4bit=…)  →  "proofs" of training.json; raises JobError if one fails

1. `adapter_effect`: the adapter changes the base model's output. An adapter of zeros or NaNs fails.
2. `merge_parity`: the merged model equals base + adapter: in its weights, to bf16's last bit, and in its output. `kept` is
   the share of the adapter's effect that the merged model has; rounding must not lose it.
3. `fresh_process`: the files load in a process that did not write them.

`adapter_served` is no proof: it says how much of a small adapter's effect is left where a server adds the adapter's output
to a layer's bf16 output, and rounds the sum. Half of it may be lost where the merged model keeps all of it.

All proofs compare with the bf16 base model, because the merged model is made from it, also after training on 4-bit weights.
They compute in fp32, because the rounding of bf16's activations is larger than a small adapter's effect. After training on
4-bit weights, `merge_parity.from_4bit` says how far the 4-bit model is from base + adapter.
"""

import contextlib
import functools
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer import models
from trainer.job import JobError
from trainer.packages import STAGES, import_all

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

log = logging.getLogger("trainer")

PROMPTS = 8  # of those passed to `prove`
COMPLETION_TOKENS = 16
# What rounding the merged weights may change: the share of the adapter's effect that is kept, the error as a share of the
# effect, and the mean difference of the log-probabilities of the completions' tokens, in nats.
LEAST_KEPT, MOST_KEPT, LARGEST_ERROR, LARGEST_MEAN = 0.95, 1.05, 0.3, 0.1
# Largest relative distances: of neighbouring bf16 values, and of fp32 sums that two machines compute.
BF16_STEP, FP32_STEPS = 2.0**-7, 1e-5
# Variables by which torchrun and accelerate describe a group of processes. The fresh process is alone.
OTHER_PROCESSES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")
SHOWN_LINES = 5
TINY_RATE = 1e-8  # Adam changes a weight by about the learning rate per step, and an adapter's weights are about 0.01
NO_GRADIENT = "Use another reward, partial credit, easier rows, or a model that already answers some rows; see metrics.jsonl"


class RoundedAwayError(JobError):
    """The merged model has the right weights, but their rounding lost a part of the adapter's effect."""


def prove(
    base: str,
    target: Path,
    prompts: Sequence[list[dict[str, str]]],
    *,
    load_in_4bit: bool,
    template: dict[str, Any],
    history: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Return the numbers of the proofs for `adapter/` and `merged/` in the folder `target`. Raises JobError if one fails.

    `base`: the base model's folder or hub id. `template`: the chat template's keyword arguments. `history`: the points of
    metrics.jsonl up to the saved adapter.
    """
    began = time.monotonic()
    task = {"base": base, "target": str(target.resolve()), "prompts": list(prompts[:PROMPTS]), "template": template}
    measured = fresh_process(task | {"load_in_4bit": load_in_4bit})
    proofs = check(measured, history) | {
        "fresh_process": {"seconds": round(time.monotonic() - began, 1), **measured["versions"]}
    }
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


def check(measured: dict[str, Any], history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the numbers of the proofs from `measure`'s result. Raises JobError if one fails."""
    effect, parity = measured["adapter_effect"], measured["merge_parity"]
    off = parity["tensors_off"]
    if effect["largest"] == 0:
        raise JobError(f"The adapter does not change the base model's output: {why_unchanged(history)}.")
    if not effect["largest"] < float("inf"):
        raise JobError(
            "The adapter makes the base model's output NaN or infinite: lower learning_rate or max_grad_norm, and see "
            "alerts.jsonl."
        )
    if off:
        raise JobError(
            f"The merged model is not base + adapter: {len(off)} tensors differ, the first is {off[0]}. The model is not "
            "published."
        )
    kept, error, mean = parity["kept"], parity["error"], parity["mean"]
    if not (LEAST_KEPT <= kept <= MOST_KEPT and error <= LARGEST_ERROR and mean <= LARGEST_MEAN):
        raise RoundedAwayError(
            f"The merged model in {parity['dtype']} has {kept:.2f} of the adapter's effect, with an error of {error:.2f} of "
            f"it (required: {LEAST_KEPT} to {MOST_KEPT}, error at most {LARGEST_ERROR}); log-probabilities differ by "
            f"{mean:.3f} nats on average (at most {LARGEST_MEAN}). The adapter changes them by {effect['mean']:.2g} nats: "
            "if that is next to nothing, raise learning_rate or train for more steps."
        )
    return {
        "adapter_effect": effect,
        "merge_parity": parity | {"tensors_off": len(off)},
        "adapter_served": measured["adapter_served"],
    }


def why_unchanged(history: Sequence[dict[str, Any]]) -> str:
    """Return why a training changed no weight, as far as its points of metrics.jsonl show it."""

    def values(name: str) -> list[float]:
        return [point[name] for point in history if point.get(name) is not None]

    rewards, best, flat, rates = (
        values(each) for each in ("reward", "reward_best", "frac_reward_zero_std", "learning_rate")
    )
    if not history:
        return "no step was trained up to its checkpoint"
    if flat and min(flat) == 1:
        if {*rewards, *best} == {rewards[0]}:
            given = f"every answer scored {rewards[0]:.4g}"
        else:
            given = "the answers of each group got one and the same reward"
        return f"{given}, so that no group had a gradient. {NO_GRADIENT}"
    if max(rates, default=0.0) < TINY_RATE:
        return f"learning_rate was at most {max(rates, default=0.0):.2g}: raise it, or take fewer warmup_steps"
    return "the metrics show no cause. See alerts.jsonl, and check learning_rate, beta and max_grad_norm"


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Load the saved model and compare it with base + adapter, on the greedy completions of the merged model.

    Only one model at a time is on the GPU.
    """
    import torch
    import transformers
    from peft import PeftModel, __version__
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trainer.dataset import chat_ids

    target = Path(task["target"])
    tokenizer = AutoTokenizer.from_pretrained(target / "merged", padding_side="left")
    ids = [chat_ids(prompt, tokenizer, task["template"]) for prompt in task["prompts"]]
    inputs = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    device = models.device_with_room(str(target / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(target / "merged", dtype="auto", device_map=device)
    sequences = Sequences.greedy(merged, inputs)
    of_merged = log_probs(merged, sequences)
    merged.to("cpu")
    base = models.load_model(task["base"], dtype=torch.bfloat16, device_map=device)
    both = PeftModel.from_pretrained(base, str(target / "adapter"))
    of_both = log_probs(both, sequences)
    rounded = log_probs(both, sequences, rounds=True)
    with both.disable_adapter():
        of_base = log_probs(both, sequences)
        rounded -= log_probs(both, sequences, rounds=True)
    result: dict[str, Any] = {
        "adapter_effect": {
            "mean": mean_difference(of_both, of_base, sequences),
            "largest": _rounded((of_both - of_base).abs().max()),
        },
        "merge_parity": {"dtype": str(merged.dtype).removeprefix("torch.")}
        | fidelity(of_base, of_both, of_merged)
        | {"mean": mean_difference(of_both, of_merged, sequences)}
        | {"tensors_off": unequal(merged, both)},
        "adapter_served": fidelity(of_base, of_both, of_base + rounded),
        "versions": {"transformers": transformers.__version__, "peft": __version__},
    }
    if task["load_in_4bit"]:
        del merged, base, both
        trained = PeftModel.from_pretrained(models.load_model(task["base"], **models.four_bit()), str(target / "adapter"))
        result["merge_parity"]["from_4bit"] = fidelity(of_base, of_both, log_probs(trained, sequences))["error"]
    return result


class Sequences(NamedTuple):
    """Prompts (B, P), padded on the left, and completions: `ids` and attention `mask` (B, P + C), `ended` (B, C)."""

    ids: "Tensor"
    mask: "Tensor"
    ended: "Tensor"

    @classmethod
    def greedy(cls, model: "PreTrainedModel", inputs: "dict[str, Tensor]") -> "Sequences":
        """Return the prompts with the model's greedy completions, by plain `generate`."""
        import torch

        ids = model.generate(
            **{name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")},
            do_sample=False,
            max_new_tokens=COMPLETION_TOKENS,
            temperature=None,
            top_p=None,
            top_k=None,
        ).cpu()
        completions = ids[:, inputs["input_ids"].shape[1] :]
        ends = torch.isin(completions, torch.tensor(model.generation_config.eos_token_id)).int()
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(completions)], dim=1)
        return cls(ids, mask, ends.cumsum(1) > ends)

    def scored(self) -> "Tensor":
        """Return the tokens (N,) of all completions, up to their ends."""
        return self.ids[:, -self.ended.shape[1] :][~self.ended]


def log_probs(model: "PreTrainedModel | PeftModel", sequences: Sequences, rounds: bool = False) -> "Tensor":
    """Return a model's log-probabilities (N, V) where it predicts `sequences.scored()`.

    Computes in fp32, or in bf16 as servers do, if it `rounds` and the machine is fast in bf16.
    """
    length = sequences.ended.shape[1]
    with contextlib.nullcontext() if rounds and models.fast_bf16() else in_fp32(model):
        logits = model(
            input_ids=sequences.ids.to(model.device),
            attention_mask=sequences.mask.to(model.device),
            position_ids=(sequences.mask.cumsum(1) - 1).clamp(min=0).to(model.device),
            logits_to_keep=length + 1,
        ).logits
    chosen: Tensor = logits[:, -length - 1 : -1].float().cpu()[~sequences.ended].log_softmax(-1)
    return chosen


@contextmanager
def in_fp32(model: "torch.nn.Module") -> Iterator[None]:
    """Compute in fp32 for the block. Large weights become fp32 one layer at a time; 4-bit layers stay as they are."""
    import torch
    from torch.nn import functional

    def linear(layer: torch.nn.Linear, x: "Tensor") -> "Tensor":
        return functional.linear(x.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())

    def embedding(layer: torch.nn.Embedding, ids: "Tensor") -> "Tensor":
        return functional.embedding(ids, layer.weight).float()

    kinds = {torch.nn.Linear: linear, torch.nn.Embedding: embedding}
    layers = [module for module in model.modules() if type(module) in kinds]
    large = {id(layer.weight) for layer in layers}
    small = [each for each in model.parameters() if each.is_floating_point() and id(each) not in large]
    for layer in layers:
        layer.forward = functools.partial(kinds[type(layer)], layer)
    try:
        with models.converted(small, torch.float32):
            yield
    finally:
        for layer in layers:
            del layer.forward


def fidelity(base: "Tensor", both: "Tensor", other: "Tensor") -> dict[str, float]:
    """Return how much of the change from `base` to `both` a third model has, from log-probabilities (N, V) of the three.

    The changes are vectors with the Fisher inner product of `both`, ⟨u, v⟩ = Σ p u v: half of ⟨u, u⟩ is the
    Kullback-Leibler divergence of a small change (Amari, Natural gradient works efficiently in learning, 1998). `kept` is
    the projection of the third model's change on the whole change, `error` the length of their difference; both are shares.
    """
    p, whole, found = both.exp(), both - base, other - base
    length = (p * whole * whole).sum()
    return {
        "kept": _rounded((p * whole * found).sum() / length),
        "error": _rounded(((p * (found - whole) ** 2).sum() / length).sqrt()),
    }


def mean_difference(one: "Tensor", other: "Tensor", sequences: Sequences) -> float:
    """Return the mean difference of two models' log-probabilities (N, V) of the completions' tokens, in nats."""
    return _rounded((one - other).gather(-1, sequences.scored()[:, None]).abs().mean())


def _rounded(value: "Tensor") -> float:
    return float(f"{float(value):.4g}")


def unequal(saved: "PreTrainedModel", expected: "PeftModel") -> list[str]:
    """Return the names of the saved weights that are not those of base + adapter, by more than the type's last bit.

    Merges the adapter of `expected`.
    """
    import torch

    from trainer.merging import exact_sums

    tolerance = BF16_STEP if saved.dtype == torch.bfloat16 else FP32_STEPS
    found = dict(saved.named_parameters())
    names = {id(weight): name for name, weight in expected.named_parameters()}
    off, merged = [], set()

    def compare(name: str, right: "Tensor") -> None:
        if not found[name].float().isclose(right.cpu().float(), rtol=tolerance).all():
            off.append(name)

    for weight, exact in exact_sums(expected):
        name = names[id(weight)].removeprefix("base_model.model.").replace(".base_layer", "")
        compare(name, exact)
        weight.data = exact.to(torch.bfloat16)
        merged.add(name)
    for name, weight in expected.unload().named_parameters():
        if name not in merged:
            compare(name, weight)
    return off


def main() -> None:
    """Run `measure` on the task in stdin and write the result as the last line of stdout."""
    import_all(STAGES["proofs"])
    import torch

    with torch.no_grad():
        result = measure(json.load(sys.stdin))
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
