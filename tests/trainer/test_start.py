"""A run that starts from another run's adapter: its first weights, its reference, its resumption, and bad starts."""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from trainer import checkpoints, models, start, train
from trainer.dataset import load_rows
from trainer.job import JobError
from trainer.run_trainer import SharedPrefixRunTrainer, StockRunTrainer
from tunedrop.rewards import build_rewards

from .conftest import Job

RUN = "cars-0123456789ab"
OTHER = "cars-ba9876543210"
LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
TRAINERS = {"shared prefix": SharedPrefixRunTrainer, "stock": StockRunTrainer}


@pytest.fixture(scope="module")
def first(tmp_path_factory, tiny):
    """A finished run with its adapter."""
    with pytest.MonkeyPatch.context() as patch:
        job = Job(tmp_path_factory.mktemp("first"), patch, tiny)
        prepare(job, learnability={"samples": 0})
        train.train(train.parse_flags([]))
        yield job


def prepare(job: Job, **config) -> None:
    job.config(**{"lora": LORA, "grpo": {"max_steps": 1}} | config)
    job.rows()


@pytest.fixture
def started(job, first):
    """A job with the first run's adapter in its channel `start`, which a test may damage."""
    folder = shutil.copytree(first.model / "adapter", job.root / "input/start")
    job.patch.setenv("SM_CHANNEL_START", str(folder))
    prepare(job, start_from=RUN)
    return job


def build(job: Job, **config):
    """The trainer of the job's run, before its first step."""
    if config:
        prepare(job, **{"start_from": RUN} | config)
    parsed = train.read_config(train.parse_flags([]))
    rows = load_rows(job.root / "input/training/train.jsonl", parsed, None)
    location = models.locate(parsed.model)
    return train.build_trainer(
        parsed,
        location,
        models.load_tokenizer(location),
        rows,
        build_rewards(parsed.rewards),
        {},
        checkpoints.Record(),
        start.read(parsed),
    )


def use(kind: str, job: Job) -> None:
    if kind == "stock":
        job.patch.setattr("trainer.shared_prefix_models.unsupported", lambda *_: "for this test")


def weights(trainer):
    return get_peft_model_state_dict(trainer.model)


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("reference", ["start", "base"])
def test_a_started_run_begins_with_its_starts_weights_and_is_close_to_its_reference(started, first, kind, reference):
    """The first step's KL is of the policy at the start: zero if the start is the reference."""
    use(kind, started)
    grpo = {"max_steps": 3, "beta": 0.1, "bf16": False, "logging_steps": 1}
    trainer = build(started, reference=reference, grpo=grpo, lora=LORA | {"lora_dropout": 0.0})
    assert type(trainer) is TRAINERS[kind]
    expected = load_file(first.model / "adapter/adapter_model.safetensors")
    assert weights(trainer).keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in weights(trainer).items())
    assert any(tensor.any() for name, tensor in expected.items() if "lora_B" in name)
    trainer.train()
    kl = [each["kl"] for each in trainer.state.log_history if "kl" in each]
    assert kl[0] == (pytest.approx(0.0, abs=1e-6) if reference == "start" else pytest.approx(0.5, abs=0.49))
    assert kl[2] > 1e-3  # it has moved on
    assert any(not tensor.equal(expected[name]) for name, tensor in weights(trainer).items())


def test_the_reference_of_a_new_adapter_is_the_base_model(job):
    trainer = build(job, start_from="base", reference="start", grpo={"max_steps": 1, "beta": 0.1})
    assert trainer.ref_model is None


def test_the_reference_has_no_dropout_and_leaves_the_model_as_it_is(started):
    trainer = build(started, reference="start", grpo={"beta": 0.1, "bf16": False}, lora=LORA | {"lora_dropout": 0.9})
    ids = torch.arange(5, 37).view(2, 16)
    own = {name: each.data_ptr() for name, each in trainer.model.named_parameters()}

    def answer(model):
        with torch.no_grad():
            return model(input_ids=ids).logits

    expected = answer(trainer.model.eval())
    for each in trainer.model.train().parameters():
        each.data += 0.1 if each.requires_grad else 0.0
    moved = answer(trainer.model.eval())
    trainer.model.train()
    assert not torch.allclose(expected, moved, atol=1e-2)
    torch.testing.assert_close(answer(trainer.ref_model), expected, atol=1e-4, rtol=1e-4)
    assert trainer.model.training
    torch.testing.assert_close(answer(trainer.model.eval()), moved, atol=1e-4, rtol=1e-4)
    assert {name: each.data_ptr() for name, each in trainer.model.named_parameters()} == own


def test_a_started_run_is_saved_as_any_other_and_resumes_from_its_own_checkpoint_only(started, first):
    """The gate asks the started policy, the saved adapter has no copy of the reference, and a checkpoint wins."""
    digest = hashlib.sha256((first.model / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()
    seen = []
    sample = SharedPrefixRunTrainer.complete

    def asked(trainer, *args):
        seen.append({name: tensor.clone() for name, tensor in weights(trainer).items()})
        return sample(trainer, *args)

    started.patch.setattr(SharedPrefixRunTrainer, "complete", asked)
    grpo = {"max_steps": 2, "beta": 0.1, "save_steps": 1}
    prepare(started, start_from=RUN, reference="start", grpo=grpo, learnability={"samples": 2, "policy": "go_on"})
    train.train(train.parse_flags([]))
    expected = load_file(first.model / "adapter/adapter_model.safetensors")
    assert seen
    assert all(tensor.equal(expected[name]) for name, tensor in seen[0].items())
    assert started.training()["start"] == {"run_id": RUN, "adapter_sha256": digest}
    assert first.training()["start"] is None
    saved = load_file(started.model / "adapter/adapter_model.safetensors")
    assert saved.keys() == expected.keys()
    assert [path.name for path in (started.model / "adapter").iterdir() if path.is_dir()] == []
    assert list((started.root / "output/checkpoints").rglob("ref")) == []
    assert started.training()["proofs"]["adapter_effect"]["mean"] > 0

    # Killed after its last step, the run ends with the checkpoint's adapter, not with the start's.
    (started.model / "training.json").unlink()
    train.train(train.parse_flags([]))
    again = load_file(started.model / "adapter/adapter_model.safetensors")
    assert all(tensor.equal(saved[name]) for name, tensor in again.items())

    other = started.root / "input/start/adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in expected.items()}, other)
    with pytest.raises(JobError, match="another run: it started from another adapter"):
        train.train(train.parse_flags([]))
    prepare(started, start_from=OTHER, reference="start", grpo=grpo, learnability={"samples": 2, "policy": "go_on"})
    with pytest.raises(JobError, match=f"start_from is '{OTHER}' now and '{RUN}' in the checkpoint"):
        train.train(train.parse_flags([]))


SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def content(name: str, raw: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(raw)


def settings(**values: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / SETTINGS
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def rewrite(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return rewrite


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-7])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no settings": (lambda folder: (folder / SETTINGS).unlink(), f"{SETTINGS}, of the run .*cannot be read"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS}, of the run .*cannot be read"),
    "not JSON": (content(SETTINGS, b"{"), f"{SETTINGS}, .* is not JSON"),
    "not text": (content(SETTINGS, b"\xff"), f"{SETTINGS}, .* is not JSON"),
    "a list": (content(SETTINGS, b"[]"), f"{SETTINGS}, .* is not a JSON object"),
    "a pickle": (lambda folder: torch.save({NAME: torch.zeros(1)}, folder / WEIGHTS), "no whole file of safetensors"),
    "cut": (cut, "no whole file of safetensors"),
    "a long header": (content(WEIGHTS, struct.pack("<Q", 1 << 60) + b"{}"), "no whole file of safetensors"),
    "empty": (content(WEIGHTS, b""), "no whole file of safetensors"),
    "NaN": (tensors(lambda each: each[NAME].fill_(torch.nan)), f"not finite in the tensor {NAME}"),
    "infinity": (tensors(lambda each: each[NAME][0].fill_(torch.inf)), f"not finite in the tensor {NAME}"),
    "a tensor less": (tensors(lambda each: each.pop(NAME)), f"lacks the tensor {NAME}"),
    "a tensor more": (tensors(lambda each: each.update(more=torch.zeros(1))), "has the tensor more, which"),
    "a shape": (
        tensors(lambda each: each.update({NAME: torch.zeros(4, 47)})),
        rf"{NAME} of shape \[4, 47\], and this run's is \[4, 48\]",
    ),
    "a model": (settings(base_model_name_or_path="huge"), "tuned the model 'huge'.* is 'tiny'. Set model"),
    "a revision": (settings(revision="abc"), "tuned the revision 'abc'.* is None. Set model"),
    "a kind": (settings(peft_type="LOHA"), "has peft_type 'LOHA'"),
}
OTHER_SHAPES: dict[str, tuple[object, str]] = {
    "r": (8, "has r 4 .*lora.r is 8. Set lora.r as in"),
    "lora_alpha": (8, "has lora_alpha 32 .*lora.lora_alpha is 8. Set lora.lora_alpha as in"),
    "target_modules": (
        "all-linear",
        r"\['down_proj', 'q_proj'\] .*lora.target_modules is 'all-linear'. Set lora.target_modules",
    ),
    "use_dora": (True, "has use_dora False .*lora.use_dora is True"),
    "use_rslora": (True, "has use_rslora False .*lora.use_rslora is True"),
    "rank_pattern": ({"q_proj": 2}, r"has rank_pattern \{\} .*lora.rank_pattern is \{'q_proj': 2\}"),
    "modules_to_save": (["lm_head"], r"has modules_to_save None .*lora.modules_to_save is \['lm_head'\]"),
}


def refused(job: Job, message: str, **lora: object) -> None:
    with pytest.raises(JobError, match=message) as error:
        build(job, lora=LORA | lora)
    assert RUN in str(error.value)
    assert "start_from to base" in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_start_is_named_with_its_file(started, name):
    damage, message = BROKEN[name]
    damage(started.root / "input/start")
    refused(started, message)


@pytest.mark.parametrize("key", OTHER_SHAPES)
def test_a_start_of_another_shape_is_named_with_the_key_to_change(started, key):
    value, message = OTHER_SHAPES[key]
    refused(started, message, **{key: value})


def test_a_start_without_its_channel_is_named(job):
    with pytest.raises(JobError, match=f"start_from is '{RUN}', but the job has no channel 'start'"):
        build(job, start_from=RUN)


@pytest.mark.parametrize(
    "lora", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"lora_dropout": 0.3}], ids=lambda each: next(iter(each))
)
def test_every_kind_of_adapter_goes_on_from_its_own(job, tmp_path, lora):
    """Dropout may differ between the runs: it does not change what an adapter is."""
    trainer = build(job, start_from="base", lora=LORA | lora)
    for each in trainer.model.parameters():
        each.data += 0.01 if each.requires_grad else 0.0
    folder = tmp_path / "adapter"
    trainer.model.peft_config["default"].base_model_name_or_path = "tiny"
    trainer.model.save_pretrained(folder)
    job.patch.setenv("SM_CHANNEL_START", str(folder))
    expected = {name: each.clone() for name, each in weights(trainer).items()}
    again = build(job, lora={name: value for name, value in (LORA | lora).items() if name != "lora_dropout"})
    assert all(each.equal(expected[name]) for name, each in weights(again).items())
