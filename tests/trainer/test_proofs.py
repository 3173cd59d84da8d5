"""The proofs at the end of a training job: their numbers for a good model, and damaged models that fail."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer import models, proofs, results, train
from trainer.job import JobError
from tunedrop.config.model import RunConfig

from .conftest import Job

FRESH = proofs.fresh_process  # the fixture `job` replaces it
HEALTHY = [{"reward": 0.2, "reward_best": 1.0, "frac_reward_zero_std": 0.5, "learning_rate": 1e-5}]
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
    return proofs.prove(str(tiny), target, PROMPTS, load_in_4bit=False, template={}, history=HEALTHY)


def test_a_run_ends_with_its_proofs(trained):
    result = trained.training()["proofs"]
    assert result["adapter_effect"]["mean"] > 0.1
    parity = result["merge_parity"]
    assert (parity["dtype"], parity["tensors_off"]) == ("bfloat16", 0)
    assert parity["kept"] == pytest.approx(1.0, abs=0.05)
    assert 0 < parity["error"] < 0.1
    assert "from_4bit" not in parity
    assert result["adapter_served"].keys() == {"kept", "error"}
    assert result["fresh_process"]["transformers"]


def test_a_fresh_process_finds_the_same(trained, tiny):
    here = prove(tiny, trained.model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proofs, "fresh_process", FRESH)
        patch.setenv("WORLD_SIZE", "2")  # a rank's own variables are none of its business
        patch.setenv("RANK", "1")
        there = prove(tiny, trained.model)
    assert there["adapter_effect"] == pytest.approx(here["adapter_effect"], rel=1e-2, abs=1e-3)
    assert there["merge_parity"].pop("dtype") == here["merge_parity"].pop("dtype")
    assert there["merge_parity"] == pytest.approx(here["merge_parity"], rel=1e-2, abs=1e-3)
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
        ("the adapter is zeros", "does not change the base model's output: the metrics show no cause"),
        ("the adapter is no numbers", "makes the base model's output NaN or infinite: lower learning_rate"),
        ("the adapter counts twice", "14 tensors differ"),
    ],
)
def test_a_broken_model_is_caught(trained, tiny, tmp_path, how, message):
    with pytest.raises(JobError, match=message):
        prove(tiny, damaged(trained, tmp_path, how))


@pytest.mark.parametrize(
    ("points", "cause"),
    [
        ([], "no step was trained"),
        ([{"reward": 0.0, "reward_best": 0.0, "frac_reward_zero_std": 1.0}] * 3, "every answer scored 0, so that no group"),
        ([{"reward": 1.0, "reward_best": 1.0, "frac_reward_zero_std": 1.0}] * 3, "every answer scored 1, so that no group"),
        ([{"reward": 0.5, "reward_best": 1.0, "frac_reward_zero_std": 1.0}], "each group got one and the same reward"),
        ([{"reward": 0.0, "reward_best": 0.0, "frac_reward_zero_std": 1.0}, HEALTHY[0]], "the metrics show no cause"),
        ([HEALTHY[0] | {"learning_rate": 1e-12}] * 2, "learning_rate was at most 1e-12: raise it"),
        ([HEALTHY[0] | {"learning_rate": 0.0}], "learning_rate was at most 0: raise it, or take fewer warmup_steps"),
    ],
)
def test_an_adapter_without_effect_is_explained_by_the_metrics(points, cause):
    measured = {"adapter_effect": {"mean": 0.0, "largest": 0.0}, "merge_parity": {"tensors_off": []}}
    with pytest.raises(JobError, match=cause):
        proofs.check(measured, points)


def test_files_that_do_not_load_fail_with_the_last_words_of_the_process(trained, tiny, tmp_path):
    target = damaged(trained, tmp_path, "a file is cut")
    with pytest.raises(JobError, match=r"does not load in a fresh process: [\s\S]*SafetensorError"):
        FRESH({"base": str(tiny), "target": str(target), "prompts": PROMPTS, "template": {}, "load_in_4bit": False})


@pytest.mark.parametrize(
    ("parity", "message"),
    [
        ({"kept": 0.94, "error": 0.1, "mean": 0.01}, r"has 0.94 of the adapter's effect, with an error of 0.10"),
        ({"kept": 1.06, "error": 0.1, "mean": 0.01}, "has 1.06 of the adapter's effect"),
        ({"kept": 1.0, "error": 0.31, "mean": 0.01}, "with an error of 0.31"),
        ({"kept": 1.0, "error": 0.1, "mean": 0.11}, "log-probabilities differ by 0.110 nats on average"),
        ({"kept": float("nan"), "error": 0.1, "mean": 0.01}, "nan"),
        ({"kept": 0.96, "error": 0.29, "mean": 0.09}, None),
    ],
)
def test_output_that_differs_fails_although_the_weights_agree(parity, message):
    measured = {
        "adapter_effect": {"mean": 0.5, "largest": 2.0},
        "merge_parity": {"dtype": "bfloat16", "tensors_off": []} | parity,
        "adapter_served": {"kept": 1.0, "error": 0.0},
    }
    if message is None:
        proofs.check(measured, HEALTHY)
    else:
        with pytest.raises(proofs.RoundedAwayError, match=message):
            proofs.check(measured, HEALTHY)


def test_a_config_that_changes_the_output_fails_although_the_weights_agree(trained, tiny, tmp_path):
    target = shutil.copytree(trained.model, tmp_path / "model")
    config = json.loads((target / "merged/config.json").read_text())
    config["hidden_act"] = "relu"  # 0.96 of the adapter's effect, with an error of 0.18
    (target / "merged/config.json").write_text(json.dumps(config))
    with pytest.raises(proofs.RoundedAwayError):
        prove(tiny, target)


def with_small_adapter(trained: Job, folder: Path, scale: float) -> Job:
    """A copy of the run with an adapter that changes less, as with a smaller learning rate."""
    shutil.copytree(trained.model, folder / "output/model")
    adapter = folder / "output/model/adapter/adapter_model.safetensors"
    lora = {name: each * (scale if "lora_B" in name else 1) for name, each in load_file(adapter).items()}
    save_file(lora, adapter, metadata={"format": "pt"})
    trained.patch.chdir(folder)
    return trained


@pytest.mark.parametrize(("scale", "least", "most"), [(1.0, 0.9, 1.1), (0.003, -0.5, 0.8)])
def test_what_bf16_leaves_of_an_adapter_beside_the_weights(trained, tiny, tmp_path, monkeypatch, scale, least, most):
    monkeypatch.setattr(models, "fast_bf16", lambda: True)  # slow or not, the rounding is the same
    with_small_adapter(trained, tmp_path, scale)
    results.save_merged(str(tiny), torch.float32)
    shown = prove(tiny, tmp_path / "output/model")
    assert shown["merge_parity"]["kept"] == pytest.approx(1, abs=0.01)
    assert least <= shown["adapter_served"]["kept"] <= most


def test_a_small_adapter_is_rounded_away_to_the_nearest_and_kept_by_the_chosen_way(trained, tiny, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with_small_adapter(trained, tmp_path, 0.01)
    target = tmp_path / "output/model"
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    PeftModel.from_pretrained(base, target / "adapter").merge_and_unload().save_pretrained(target / "merged")
    with pytest.raises(proofs.RoundedAwayError) as caught:
        prove(tiny, target)
    assert float(str(caught.value).split(" has ")[1].split()[0]) < 0.95

    results.save_merged(str(tiny), torch.bfloat16)
    config = RunConfig(model="tiny")
    parity = results.prove(config, str(tiny), PROMPTS, HEALTHY)["merge_parity"]
    assert 0.95 <= parity["kept"] <= 1.05
    assert parity["error"] <= 0.3
    assert parity["tensors_off"] == 0
    # This model is tiny: too few weights share the rounding's error for bf16.
    assert parity["dtype"] == "float32"
    assert {str(each.dtype) for each in load_file(target / "merged/model.safetensors").values()} == {"torch.float32"}


def test_the_proofs_compute_in_fp32_and_leave_the_model_as_it_was(tiny):
    from transformers import AutoModelForCausalLM

    ids = torch.arange(5, 40)[None]
    narrow = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    before = {name: each.clone() for name, each in narrow.state_dict().items()}
    with torch.no_grad():
        rounded = narrow(input_ids=ids).logits
        with proofs.in_fp32(narrow):
            found = narrow(input_ids=ids).logits
        again = narrow(input_ids=ids).logits
        expected = narrow.float()(input_ids=ids).logits
    torch.testing.assert_close(found, expected)
    assert again.equal(rounded)
    assert not rounded.float().isclose(expected, rtol=1e-3).all()
    assert all(before[name].equal(each.bfloat16()) for name, each in narrow.state_dict().items())


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


def test_a_training_that_a_tiny_learning_rate_left_as_it_was_says_so(job):
    job.config(lora={"r": 4}, learnability={"samples": 0}, grpo={"max_steps": 1, "learning_rate": 1e-30})
    job.rows()
    with pytest.raises(JobError, match="does not change the base model's output: learning_rate was at most 1e-30"):
        train.train(train.parse_flags([]))
