"""The training job on a tiny model, in this process."""

import json
import os
import re
import shutil
import tarfile
import weakref
from typing import Any

import pytest
import torch

from trainer import models, results, train
from trainer.job import JobError
from trainer.run_trainer import SharedPrefixRunTrainer
from tunedrop.rewards import RewardSpec

NASTY = 'It\'s "quoted", $(touch executed) `touch executed`\nand a second line; \\ é'


class Letter:
    """A reward that is trivially learnable (lower-case letters), and remembers what it was given."""

    __name__, weight, gate, spec = "letter", 2.0, None, RewardSpec(type="contains", text="?")

    def __init__(self):
        self.prompts, self.columns = [], []

    def __call__(self, prompts, completions, **columns):
        self.prompts += prompts
        self.columns.append(columns)
        return [sum(letter.islower() for letter in completion[0]["content"]) / 6 for completion in completions]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny):
    """One training run that several tests look at: the job, its reward, what it logged."""
    from .conftest import Job

    with pytest.MonkeyPatch.context() as patch:
        job, letter = Job(tmp_path_factory.mktemp("trained"), patch, tiny), Letter()
        job.config(system_prompt=NASTY, grpo={"max_steps": 12}, lora={"r": 4})
        job.rows(extra={"mixed": [1, "x"]})
        patch.setattr(train, "build_rewards", lambda *_: [letter])
        lines = []
        patch.setattr("trainer.progress.log.info", lambda text, *args: lines.append(text % args if args else text))
        train.train(train.parse_flags(["--run-id", "run-1"]))
        yield job, letter, lines


def test_a_learnable_reward_rises(trained):
    job, _, _ = trained
    steps = job.metrics()
    assert [step["step"] for step in steps] == list(range(1, 13))
    assert steps[-1]["reward"] > 2 * steps[0]["reward"]
    assert steps[0]["reward"] == pytest.approx(2 * steps[0]["rewards"]["letter"])  # the weight counts once
    summary = json.loads((job.model / "training.json").read_text())
    assert summary["steps"] == 12
    assert summary["reward_last"] > summary["reward_first"]
    assert summary["run_id"] == "run-1"


def test_adapter_weights_move_and_base_weights_do_not(trained, tiny):
    from safetensors.torch import load_file

    job, _, _ = trained
    adapter = load_file(job.model / "adapter/adapter_model.safetensors")
    config = json.loads((job.model / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    lora_b = [weights for name, weights in adapter.items() if "lora_B" in name]
    assert lora_b
    assert all(weights.abs().max() > 0 for weights in lora_b)  # PEFT starts B at zero
    assert {name.split(".")[-2] for name in adapter} == {"lora_A", "lora_B"}
    base, merged = load_file(tiny / "model.safetensors"), load_file(job.model / "merged/model.safetensors")
    untouched = [name for name in base if "proj" not in name]
    assert untouched
    for name in untouched:
        assert merged[name].equal(base[name].bfloat16())


def test_the_archive_has_the_adapter_and_its_bytes_depend_on_nothing_else(trained, tmp_path):
    job, _, _ = trained
    saved, names = job.model / "adapter.tar.gz", ["adapter_config.json", "adapter_model.safetensors"]
    with tarfile.open(saved) as tar:
        assert tar.getnames() == names
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}
        for name in names:
            member = tar.extractfile(name)
            assert member is not None
            assert member.read() == (job.model / "adapter" / name).read_bytes()
    copy = shutil.copytree(job.model / "adapter", tmp_path / "adapter", copy_function=shutil.copyfile)
    for file in copy.iterdir():
        os.utime(file, (1e9, 1e9))
        file.chmod(0o600)
    results.archive(copy, tmp_path / "another.tar.gz")
    assert (tmp_path / "another.tar.gz").read_bytes() == saved.read_bytes()


def test_merged_model_answers_like_base_with_adapter(trained, tiny):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job, _, _ = trained
    merged = AutoModelForCausalLM.from_pretrained(job.model / "merged")
    assert merged.dtype == torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    both = PeftModel.from_pretrained(base, job.model / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(job.model / "merged")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say 3"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        theirs, ours = both(ids).logits.log_softmax(-1), merged.float()(ids).logits.log_softmax(-1)
        with both.disable_adapter():
            plain = both(ids).logits.log_softmax(-1)
    assert (theirs - plain).abs().max() > 1  # the adapter says something
    assert (theirs - ours).abs().mean() < 0.03 * (theirs - plain).abs().mean()  # bf16 has 8 bits of mantissa
    assert merged.generation_config.eos_token_id == tokenizer.eos_token_id


def test_prompts_arrive_unchanged_and_execute_nothing(trained):
    job, letter, _ = trained
    assert {prompt[0]["content"] for prompt in letter.prompts} == {NASTY}
    assert json.loads((job.model / "run_config.json").read_text())["system_prompt"] == NASTY
    assert not list(job.root.rglob("executed"))


def test_rewards_see_the_rows_own_columns(trained):
    _, letter, _ = trained
    columns = letter.columns[0]
    assert columns["extra"][0] == {"mixed": [1, "x"]}
    questions = [prompt[-1]["content"] for prompt in letter.prompts[:16]]
    assert [f"say {answer}" for answer in columns["answer"]] == questions


def test_log_lines_are_what_the_metric_definitions_read(trained):
    from release.plan import METRIC_NAMES, metric_definitions

    _, _, lines = trained
    line = next(line for line in lines if line.startswith("step=3 "))
    found = {name: re.findall(regex, line) for name, regex in metric_definitions().items()}
    assert {name for name, values in found.items() if len(values) == 1} >= {"reward", "loss", "step_seconds"}
    assert all(len(values) <= 1 for values in found.values())
    assert re.search(r" max_steps=12 .* eta_seconds=\d", line)
    assert len(METRIC_NAMES) <= 40


def test_a_reward_that_raises_fails_the_job_with_its_traceback(job, monkeypatch):
    class Broken:
        __name__, weight, gate, spec = "broken", 1.0, None, RewardSpec(type="contains", text="?")

        def __call__(self, prompts, completions, **columns):
            return [1 / 0 for _ in completions]

    job.config()
    job.rows()
    monkeypatch.setattr(train, "build_rewards", lambda *_: [Broken()])
    with pytest.raises(ZeroDivisionError):
        train.main([])
    assert job.failure().startswith("ZeroDivisionError: division by zero\n")
    assert "return [1 / 0 for _ in completions]" in job.failure()
    assert len(job.failure()) <= 1024
    assert not (job.model / "merged").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "No model 'tiny' in the models channel: expected config.json"),
        (["config.json"], "No weights for model 'tiny'"),
        (["config.json", "pytorch_model.bin"], "No weights for model 'tiny'"),
    ],
)
def test_missing_model_files_are_named(job, tmp_path, files, message):
    models = tmp_path / "models"
    models.mkdir()
    for name in files:
        (models / name).write_text("{}")
    job.patch.setenv("SM_CHANNEL_MODELS", str(models))
    job.config()
    job.rows()
    with pytest.raises(SystemExit, match=message):
        train.main([])
    assert job.failure().startswith(message)
    assert "Traceback" not in job.failure()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model-name", "a/b"], {"model": "a/b"}),
        (["--max-seq-length", "2048"], {"max_seq_length": 2048}),
        (["--max-prompt-length", "99"], {"max_prompt_length": 99}),
        (["--lora-rank", "32"], {"lora.r": 32}),
        (["--load-in-4bit", "False"], {"lora.load_in_4bit": False}),
        (["--load-in-4bit", "true"], {"lora.load_in_4bit": True}),
        (["--load-in-4bit"], {"lora.load_in_4bit": True}),
        (["--learning-rate", "5e-3"], {"grpo.learning_rate": 0.005}),
        (["--num-train-epochs", "3"], {"grpo.num_train_epochs": 3.0}),
        (["--per-device-train-batch-size", "4"], {"grpo.per_device_train_batch_size": 4}),
        (["--gradient-accumulation-steps", "2"], {"grpo.gradient_accumulation_steps": 2}),
        (["--num-generations", "4"], {"grpo.num_generations": 4}),
        (["--max-completion-length", "64"], {"grpo.max_completion_length": 64}),
        (["--temperature", "0.7"], {"grpo.temperature": 0.7}),
        (["--beta", "0.04"], {"grpo.beta": 0.04}),
        (["--logging-steps", "5"], {"grpo.logging_steps": 5.0}),
        ([], {"model": "tiny", "grpo.max_steps": 3}),
    ],
)
def test_flags_win_over_the_config_channel(job, flags, expected):
    job.config(lora={"load_in_4bit": True} if "FALSE" not in flags else {})
    config = train.read_config(train.parse_flags(flags)).model_dump()
    for key, value in expected.items():
        found = config
        for part in key.split("."):
            found = found[part]
        assert found == value, key


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning-rat", "1"], "unrecognized arguments: --learning-rat 1 .valid hyperparameters"),
        (["--lora-rank", "many"], "argument --lora-rank: invalid int value: 'many'"),
        (["--load-in-4bit", "maybe"], "'maybe' is neither true nor false"),
    ],
)
def test_bad_flags_are_named(flags, message):
    with pytest.raises(JobError, match=message):
        train.parse_flags(flags)


def test_a_contradiction_in_the_config_is_the_users_error(job):
    job.config(grpo={"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": None})
    job.rows()
    with pytest.raises(SystemExit, match="needs vllm_importance_sampling_clip_min or"):
        train.main([])


def test_too_few_rows_for_a_step_is_said(job):
    job.config()
    job.rows(count=1)
    with pytest.raises(JobError, match="1 rows are too few for one step, which takes 2 prompts"):
        train.train(train.parse_flags([]))


def test_the_training_model_is_gone_before_the_base_is_loaded_again(job, monkeypatch):
    """Of an 8B model each copy is 16 GB."""
    alive = []
    weights: list[weakref.ref[Any]] = []
    save, free = results.save, SharedPrefixRunTrainer.free_memory

    def noted(trainer):
        weights.extend(weakref.ref(each) for each in trainer.model.parameters())
        free(trainer)

    def counted(*args):
        alive.append(sum(each() is not None for each in weights))
        save(*args)

    monkeypatch.setattr(SharedPrefixRunTrainer, "free_memory", noted)
    monkeypatch.setattr(results, "save", counted)
    job.config(learnability={"samples": 0}, grpo={"max_steps": 1})
    job.rows()
    train.train(train.parse_flags([]))
    assert len(weights) > 20
    assert alive == [0]


@pytest.mark.parametrize(("gpus", "rank", "device"), [(0, None, "cpu"), (8, None, "cuda:0"), (8, "3", "cuda:3")])
def test_a_process_has_one_device(monkeypatch, gpus, rank, device):
    """A model on several GPUs could not sample: the rows of a batch share a cache."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert models.device() == device
