"""Supervised fine-tuning: its sequences, its loss with packing, and a run with `method: sft`."""

import json
import os
import signal
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer import checkpoints, models, sft_trainer, train
from trainer.bounds import Bounds
from trainer.checkpoints import Record
from trainer.job import JobError
from trainer.run_trainer import StockRunTrainer
from trainer.sft_sequences import IGNORED, TOO_LONG, Sequences, begun_answer, end_of_turn, sequences
from trainer.sft_trainer import build_sft_trainer
from trainer.train import build_trainer
from tunedrop.config.parse import parse_run_config
from tunedrop.rewards import build_rewards

from .conftest import Job
from .test_checkpoints import results, start, train_to_the_end

CONFIG: dict[str, Any] = {
    "model": "tiny",
    "method": "sft",
    "rewards": [{"type": "exact_match"}],
    "lora": {"r": 8, "lora_dropout": 0.05},
    "max_prompt_length": 40,
    "learnability": {"samples": 4},
    "sft": {"learning_rate": 1e-2, "num_train_epochs": 4, "rows_per_step": 16},
    "grpo": {
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 12,
        "bf16": False,
        "activation_checkpointing": False,
    },
}


def row(number: int, answer: str) -> dict[str, Any]:
    return {"id": f"r{number}", "prompt": [{"role": "user", "content": f"say {number}"}], "answer": answer}


def prepare(job: Job, **config: Any) -> Job:
    job.channel("run", "config.json", json.dumps(CONFIG | config))
    rows = [row(number, "abc" if number % 2 else "ab") for number in range(48)]
    job.channel("training", "train.jsonl", "".join(json.dumps(each) + "\n" for each in rows))
    job.channel("training", "heldout.jsonl", "".join(json.dumps(each) + "\n" for each in rows[:4]))
    return job


# ---- sequences ----------------------------------------------------------------------------------------------------------


def made(tiny, rows: list[dict[str, Any]], **config: Any) -> Sequences:
    run = parse_run_config(CONFIG | config)
    tokenizer = models.load_tokenizer(str(tiny))
    return sequences(run, build_rewards(run.rewards), rows, tokenizer, {tokenizer.eos_token_id}, reasoned_only=False)


def test_a_sequence_is_the_prompt_of_a_rollout_and_the_target_with_its_end(tiny):
    tokenizer = models.load_tokenizer(str(tiny))
    (item,) = made(tiny, [row(1, "ab")]).items
    assert tokenizer.decode(item["input_ids"]) == "<|user|>say 1<|end|><|assistant|>ab<|end|>"
    learned = [token for token, label in zip(item["input_ids"], item["labels"], strict=True) if label != IGNORED]
    assert tokenizer.decode(learned) == "ab<|end|>"
    assert [label for label in item["labels"] if label != IGNORED] == learned


def test_what_the_runs_limit_would_cut_is_left_out(tiny):
    found = made(tiny, [row(1, "a" * 11), row(2, "a" * 12)])
    assert [len(each["input_ids"]) for each in found.items] == [8 + 12]
    assert (found.summary["usable"], found.summary["left_out"]) == (1, {TOO_LONG: 1})


def test_a_target_with_a_control_token_is_left_out(tiny):
    assert made(tiny, [row(1, "a<|end|>b")]).summary["left_out"] == {"control tokens in the text": 1}


@pytest.mark.parametrize(
    ("template", "begun", "end"),
    [
        ("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}", "", "<|end|>"),
        ("{% for m in messages %}{{ m.content }}<|user|>\n{% endfor %}", "", "<|user|>"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "", "<|end|>"),  # none of `ends`
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}",
            "<think>",
            "<|end|>",
        ),
        ("{{ messages[0].content }}<think>\n\n</think>\n\n", "", "<|end|>"),
    ],
)
def test_the_chat_template_says_how_a_turn_begins_and_ends(tiny, template, begun, end):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = template
    ends = tokenizer.convert_tokens_to_ids(["<|end|>", "<|user|>"])
    assert begun_answer(tokenizer, {}) == begun
    assert end_of_turn(tokenizer, ends, {}) == tokenizer.convert_tokens_to_ids(end)


# ---- the loss -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def made_trainers(job, tiny):
    """Make a run's GRPO trainer and its SFT trainer."""

    def make(**config: Any) -> Any:
        run = parse_run_config(CONFIG | {"lora": {"r": 8}} | config)
        rewards, tokenizer = build_rewards(run.rewards), models.load_tokenizer(str(tiny))
        rows = [row(number, "a" * (1 + number % 9)) for number in range(20)]
        trainer = build_trainer(run, str(tiny), tokenizer, rows, rewards, {}, Record())
        learned = sequences(run, rewards, rows, tokenizer, trainer.eos_token_ids, reasoned_only=False)
        sft = build_sft_trainer(
            trainer, run, learned, learned, run={}, record=Record(), folder=job.root / "sft", decays=True
        )
        return trainer, sft, learned

    return make


def alone(tiny, learned: Sequences) -> tuple[float, float]:
    """Return the summed loss of all targets and their number of tokens, from plain Transformers, one sequence at a time."""
    model, loss, tokens = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval(), 0.0, 0
    for each in learned.items:
        ids, labels = torch.tensor([each["input_ids"]]), torch.tensor([each["labels"]])
        count = int((labels[:, 1:] != IGNORED).sum())
        with torch.no_grad():
            loss += float(model(input_ids=ids, labels=labels).loss) * count
        tokens += count
    return loss, tokens


@pytest.mark.parametrize("stock", [False, True])
def test_a_packed_sequence_has_the_loss_that_it_has_alone(made_trainers, monkeypatch, tiny, stock):
    if stock:
        monkeypatch.setattr("trainer.shared_prefix_models.unsupported", lambda *_: "the test says so")
    trainer, sft, learned = made_trainers()
    assert isinstance(trainer, StockRunTrainer) == stock
    loss, tokens = alone(tiny, learned)
    assert sft.heldout_loss() == pytest.approx(loss / tokens, rel=1e-5)
    total, packed = 0.0, 0
    for batch in sft.get_train_dataloader():
        count = int((batch["labels"] != IGNORED).sum())
        with torch.no_grad():
            total += float(sft.compute_loss(sft.model, dict(batch))) * count
        packed = max(packed, int((batch["labels"] == tokenizer_end(trainer)).sum()))
        tokens -= count
    assert tokens == 0
    assert total == pytest.approx(loss, rel=1e-5)
    assert (packed > 1) == (not stock)  # several sequences in a row, or each alone


def tokenizer_end(trainer: Any) -> int:
    return int(trainer.processing_class.eos_token_id)


def test_the_model_is_as_before_when_the_trainer_ends(made_trainers):
    trainer, sft, _ = made_trainers()
    base = trainer.model.get_base_model()
    stock = sft._stock[1]
    assert base.forward is not stock  # TRL's head
    weights = {name: each.clone() for name, each in trainer.model.named_parameters()}
    sft.free_memory()
    assert not hasattr(sft, "model")
    assert base.forward is stock
    assert all(each.equal(weights[name]) for name, each in trainer.model.named_parameters())
    assert all(each.dtype == torch.float32 for each in trainer.model.parameters() if each.requires_grad)


def test_on_4_bit_weights_the_adapter_stays_fp32_and_learns(job, tmp_path_factory):
    import tiny_model

    wide = tiny_model.make_tiny_model(tmp_path_factory.mktemp("wide"), hidden_size=64)
    job.patch.setenv("SM_CHANNEL_MODELS", str(wide))
    learning = {"learning_rate": 1e-2, "num_train_epochs": 2, "rows_per_step": 16}
    prepare(job, lora={"r": 4, "load_in_4bit": True}, learnability={"samples": 0}, sft=learning)
    kinds: list[torch.dtype] = []
    make = sft_trainer.RunSftTrainer.train

    def noted(trainer: Any, **more: Any) -> Any:
        kinds.extend(each.dtype for each in trainer.model.parameters() if each.requires_grad)
        return make(trainer, **more)

    job.patch.setattr(sft_trainer.RunSftTrainer, "train", noted)
    train.train(train.parse_flags([]))
    assert set(kinds) == {torch.float32}
    points = job.metrics()
    assert points[-1]["loss"] < points[0]["loss"]
    assert "from_4bit" in job.training()["proofs"]["merge_parity"]


def test_too_little_memory_is_said_before_the_first_step(made_trainers, monkeypatch):
    _, sft, _ = made_trainers()

    def fail(_tokens: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    from trainer.memory_probe import SequenceProbe

    monkeypatch.setattr(sft, "probe", fail)
    sft.add_callback(SequenceProbe(sft, 52))
    with pytest.raises(JobError, match=r"supervised fine-tuning: one sequence of 52 tokens, .* Lower max_prompt_length or"):
        sft.train()


def test_the_probe_leaves_no_trace(made_trainers):
    _, sft, _ = made_trainers()
    state = torch.get_rng_state()
    sft.probe(40)
    assert all(each.grad is not None for each in sft.model.parameters() if each.requires_grad)
    assert torch.get_rng_state().equal(state)


# ---- a run --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny) -> Job:
    with pytest.MonkeyPatch.context() as patch:
        job = prepare(Job(tmp_path_factory.mktemp("sft"), patch, tiny))
        train.train(train.parse_flags([]))
        return job


def test_a_run_of_supervised_fine_tuning_ends_with_a_model_that_answers(uninterrupted):
    training = json.loads((uninterrupted.model / "training.json").read_text())
    assert (training["method"], training["ended"], training["rows"]) == ("sft", "complete", 48)
    assert training["targets"] == {"rows": 48, "usable": 48, "with_reasoning": 0, "left_out": {}}
    assert training["warm_start"] is None
    points = uninterrupted.metrics()
    assert [point["step"] for point in points] == list(range(1, training["max_steps"] + 1))
    assert {point["phase"] for point in points} == {"sft"}
    assert sum("heldout_loss" in point for point in points) == len(training["evaluations"])
    assert points[-1]["loss"] < points[0]["loss"] / 3
    assert points[-1]["learning_rate"] < points[0]["learning_rate"]
    assert list(training["shares"]) == ["before", "after sft"]
    assert training["shares"]["before"]["dead"] == 1
    assert training["shares"]["after sft"]["dead"] < 0.5
    assert all({"step", "heldout_reward", "heldout_loss"} == each.keys() for each in training["evaluations"])
    assert training["checkpoint"]["heldout_reward"] == max(each["heldout_reward"] for each in training["evaluations"])
    assert training["proofs"]["merge_parity"]["tensors_off"] == 0


def test_interrupted_by_a_kill_and_by_sigterm_it_ends_as_if_nothing_had_happened(job, uninterrupted, monkeypatch):
    prepare(job)
    for step, number in ((4, signal.SIGKILL), (7, signal.SIGTERM)):

        def interrupt(
            _self: Any, _args: Any, state: Any, _control: Any, step: int = step, number: int = number, **_: Any
        ) -> None:
            if state.global_step == step - 1:
                os.kill(os.getpid(), number)

        with monkeypatch.context() as patch:
            patch.setattr(Bounds, "on_substep_end", interrupt)
            patch.setattr(Bounds, "on_pre_optimizer_step", interrupt)
            process = start()
            process.join()
        assert process.exitcode == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    assert job.training()["ended"] is None
    train_to_the_end()
    assert results(job) == results(uninterrupted)


def test_a_run_without_a_text_to_learn_says_why(job):
    prepare(job, rewards=[{"type": "exact_match"}, {"type": "think_format"}])
    with pytest.raises(JobError, match=r"method is sft, but no row has a text to learn.*'no reasoning': 48"):
        train.train(train.parse_flags([]))


def test_the_model_is_gone_before_the_base_is_loaded_again(job, monkeypatch):
    import weakref

    from trainer import results as saving

    prepare(job, learnability={"samples": 0}, sft={"num_train_epochs": 1, "rows_per_step": 48})
    weights: list[weakref.ref[Any]] = []
    alive = []
    free, save = sft_trainer.RunSftTrainer.free_memory, saving.save

    def noted(trainer: Any) -> None:
        weights.extend(weakref.ref(each) for each in trainer.model.parameters())
        free(trainer)

    def counted(*args: Any) -> None:
        alive.append(sum(each() is not None for each in weights))
        save(*args)

    monkeypatch.setattr(sft_trainer.RunSftTrainer, "free_memory", noted)
    monkeypatch.setattr(saving, "save", counted)
    train.train(train.parse_flags([]))
    assert len(weights) > 20
    assert alive == [0]


def test_a_checkpoint_of_grpo_is_none_of_sft(uninterrupted):
    saved = checkpoints.whole(uninterrupted.root / "output/checkpoints")[0]
    config = saved.run["config"] | {"method": "grpo"}
    with pytest.raises(JobError, match="method is 'grpo' now and 'sft' in the checkpoint"):
        checkpoints.newest(uninterrupted.root / "output/checkpoints", saved.run | {"config": config})
