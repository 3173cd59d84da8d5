"""The proofs at the end of a training job: their numbers for a good model, and damaged models that fail."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer import proofs, results, train
from trainer.job import JobError

from .conftest import Job

FRESH = proofs.fresh_process  # the fixture `job` replaces it
PROMPTS = [[{"role": "user", "content": f"say {i}"}] for i in range(5)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny):
    """A short run, and where its base model is."""
    with pytest.MonkeyPatch.context() as patch:
        job = Job(tmp_path_factory.mktemp("proved"), patch, tiny)
        job.config(lora={"r": 4}, learnability={"samples": 0})
        job.rows()
        train.train(train.parse_flags([]))
        yield job


def prove(tiny: Path, target: Path) -> dict[str, Any]:
    return proofs.prove(str(tiny), target, PROMPTS, load_in_4bit=False, template={})


def test_a_run_ends_with_its_proofs(trained):
    result = trained.training()["proofs"]
    assert result["adapter_effect"]["mean"] > 0.1
    parity = result["merge_parity"]
    assert (parity["agreeing"], parity["answers"], parity["tensors_off"]) == (3, 3, 0)
    assert 0 < parity["mean"] < parity["tolerance"]
    assert "from_4bit" not in parity
    assert result["fresh_process"]["transformers"]


def test_a_fresh_process_finds_the_same(trained, tiny):
    here = prove(tiny, trained.model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proofs, "fresh_process", FRESH)
        patch.setenv("WORLD_SIZE", "2")  # a rank's own variables are none of its business
        patch.setenv("RANK", "1")
        there = prove(tiny, trained.model)
    for name in ("adapter_effect", "merge_parity"):
        assert there[name] == pytest.approx(here[name], rel=1e-2, abs=1e-3)
    assert there["fresh_process"]["seconds"] > here["fresh_process"]["seconds"]


def damaged(trained: Job, folder: Path, how: str) -> Path:
    """A copy of what the run saved, damaged."""
    target = shutil.copytree(trained.model, folder / "model")
    merged, adapter = target / "merged/model.safetensors", target / "adapter/adapter_model.safetensors"
    weights, lora = load_file(merged), load_file(adapter)
    some = next(name for name in weights if name.endswith("layers.1.mlp.down_proj.weight"))
    match how:
        case "one tensor is another layer's":
            weights[some] = weights[some.replace("layers.1", "layers.0")].clone()
        case "a single number is wrong":
            weights[some][3, 5] += 0.01
        case "a number is none":
            weights[some][3, 5] = torch.nan
        case "the adapter is zeros":
            lora = {name: torch.zeros_like(each) for name, each in lora.items()}
        case "the adapter is no numbers":
            lora = {name: torch.full_like(each, torch.nan) for name, each in lora.items()}
        case "the adapter counts twice":
            config = json.loads((target / "adapter/adapter_config.json").read_text())
            (target / "adapter/adapter_config.json").write_text(
                json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]})
            )
        case "a file is cut":
            merged.write_bytes(merged.read_bytes()[:-9])
            return target
        case "the tokenizer is missing":
            (target / "merged/tokenizer.json").unlink()
            (target / "merged/tokenizer_config.json").unlink()
    save_file(weights, merged, metadata={"format": "pt"})
    save_file(lora, adapter, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("one tensor is another layer's", "1 tensors differ, the first is model.layers.1.mlp.down_proj"),
        ("a single number is wrong", "is not base .* adapter: 1 tensors differ"),
        ("a number is none", "is not base .* adapter: 1 tensors differ"),
        ("the adapter is zeros", r"does not change the base model's output \(largest difference .*: 0.0\)"),
        ("the adapter is no numbers", r"does not change the base model's output .*nan"),
        ("the adapter counts twice", "14 tensors differ"),
    ],
)
def test_a_broken_model_is_caught(trained, tiny, tmp_path, how, message):
    with pytest.raises(JobError, match=message):
        prove(tiny, damaged(trained, tmp_path, how))


def test_files_that_do_not_load_fail_with_the_last_words_of_the_process(trained, tiny, tmp_path):
    target = damaged(trained, tmp_path, "a file is cut")
    with pytest.raises(JobError, match=r"does not load in a fresh process: [\s\S]*SafetensorError"):
        FRESH({"base": str(tiny), "target": str(target), "prompts": PROMPTS, "template": {}, "load_in_4bit": False})


@pytest.mark.parametrize(
    ("parity", "message"),
    [
        ({"mean": 0.3, "agreeing": 3}, r"differ by 0.300 on average \(rounding explains at most 0.1\), and 3 of 3"),
        ({"mean": 0.01, "agreeing": 2}, "2 of 3 greedy completions agree"),
        ({"mean": float("nan"), "agreeing": 3}, "nan"),
        ({"mean": 0.01, "agreeing": 3}, None),
    ],
)
def test_answers_that_differ_fail_although_the_weights_agree(parity, message):
    measured = {
        "adapter_effect": {"mean": 0.5, "largest": 2.0},
        "merge_parity": {"answers": 3, "tensors_off": []} | parity,
        "versions": {},
    }
    if message is None:
        proofs.check(measured)
    else:
        with pytest.raises(JobError, match=message):
            proofs.check(measured)


def test_a_corrupted_merge_fails_the_run(job, monkeypatch):
    job.config(lora={"r": 4}, learnability={"samples": 0}, grpo={"max_steps": 1})
    job.rows()
    save = results.save

    def save_and_corrupt(*args):
        save(*args)
        merged = job.model / "merged/model.safetensors"
        save_file({name: each.roll(1, 0) for name, each in load_file(merged).items()}, merged, metadata={"format": "pt"})

    monkeypatch.setattr(results, "save", save_and_corrupt)
    with pytest.raises(SystemExit, match=r"The job failed: The merged model is not base \+ adapter"):
        train.main([])
    assert job.failure().startswith("The merged model is not base + adapter")
    assert not (job.model / "training.json").exists()
