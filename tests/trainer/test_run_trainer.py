"""The contract with TRL: each private name that run_trainer uses exists in the pinned versions and does what we rely on.

All tests look at one step of stock TRL, whose hooks are recorded, and at its resumption. If an upgrade of TRL breaks a test,
adapt trainer/run_trainer.py.
"""

import ast
import inspect
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer
from trl import GRPOTrainer

from trainer import run_trainer

from .test_shared_prefix import GENERATIONS, PROMPTS, build

SOURCES = sorted(Path(run_trainer.__file__).parent.glob("*.py"))
# What TRL calls, and our overrides' parameters.
HOOKS = {
    "_prepare_inputs": ["generation_batch"],
    "_generate_and_score_completions": ["inputs"],
    "_generate_single_turn": ["prompt_ids", "images", "multimodal_fields", "num_generations"],
    "_get_per_token_logps_and_entropies": [
        "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy",
    ],
    "_compute_loss": ["model", "inputs"],
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
    "_get_train_sampler": ["dataset"],
    "_get_output_dir": ["trial"],
    "_save_checkpoint": ["model", "trial"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "create_model_card": ["model_name"],
    "_tokenize_prompts": ["prompts"],
}  # fmt: skip
METHODS = {"_log_metric"}  # that we call
ATTRIBUTES = {"_tokenizer", "_step", "_buffered_inputs", "_metrics", "_logs", "_entropy_bonus_enabled"}
# The modules that make a run's trainers, and what each uses.
CHECKPOINTS = {"_get_output_dir", "_save_checkpoint"}
MODULES = {
    "run_trainer": set(HOOKS) | METHODS | ATTRIBUTES,
    "whole_checkpoints": CHECKPOINTS,
    "sft_trainer": {"_metrics"},
}
OF_MODELS = {"_is_stateful", "_supports_attention_backend", "_attn_implementation"}  # trainer/shared_prefix_models.py


@pytest.fixture(scope="module")
def step(tiny, tmp_path_factory):
    """A step of stock TRL, of two micro-batches, with its checkpoint, and the calls of the hooks as (arguments, result)."""
    calls: dict[str, list[Any]] = defaultdict(list)

    class Recorded(GRPOTrainer):  # type: ignore[misc] # TRL is untyped here
        def _calculate_rewards(self, *args):
            self._log_metric("by_log_metric", 3.0)
            self._metrics["train"]["by_metrics"].append(4.0)
            return super()._calculate_rewards(*args)

        def _get_output_dir(self, trial):
            return super()._get_output_dir(trial) + "/elsewhere"

    def recorder(name):
        def hook(self, *args, **kwargs):
            result = getattr(super(cls, self), name)(*args, **kwargs)
            calls[name].append((inspect.signature(getattr(GRPOTrainer, name)).bind(self, *args, **kwargs).arguments, result))
            return result

        return hook

    cls = type("Recorder", (Recorded,), {name: recorder(name) for name in HOOKS})
    output = tmp_path_factory.mktemp("contract")
    trainer, _ = build(cls, tiny, output, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.train(resume_from_checkpoint=str(output / "elsewhere/checkpoint-1"))
    return SimpleNamespace(trainer=trainer, calls=calls, output=output, tiny=tiny)


@pytest.mark.parametrize("name", HOOKS)
def test_trl_calls_the_hook_with_our_parameters(step, name):
    assert step.calls[name]
    for cls in (run_trainer.SharedPrefixGRPOTrainer, run_trainer.StockRunTrainer, GRPOTrainer):
        takes = list(inspect.signature(getattr(cls, name)).parameters)[1:]
        assert takes[: len(HOOKS[name])] == HOOKS[name] or {"args", "_", "trial", "dataset"} & set(takes), cls
    for arguments, _ in step.calls[name]:
        assert {each for each, value in arguments.items() if value is not None} <= {"self", "kwargs", *HOOKS[name]} | {
            "compute_aux_loss", "has_tool_images", "dataset_name", "tags",
        }  # fmt: skip


def test_prepare_inputs_buffers_a_rollout_and_step_counts_micro_batches(step):
    trainer, steps = step.trainer, step.trainer.args.steps_per_generation
    assert len(step.calls["_prepare_inputs"]) == trainer._step == steps == 2
    assert len(step.calls["_generate_and_score_completions"]) == 1
    assert [batch is trainer._buffered_inputs[at] for at, (_, batch) in enumerate(step.calls["_prepare_inputs"])] == [
        True
    ] * 2


def test_a_rollout_is_a_batch_of_tensors_by_completion(step):
    ((_, batch),) = step.calls["_generate_and_score_completions"]
    rows = len(PROMPTS) * GENERATIONS
    assert {"prompt_ids", "completion_ids", "advantages"} <= set(batch)
    assert {len(each) for each in batch.values() if isinstance(each, torch.Tensor) and each.ndim} == {rows}
    groups = batch["prompt_ids"].unique_consecutive(dim=0, return_inverse=True)[1]
    assert groups.tolist() == [row // GENERATIONS for row in range(rows)]


def test_generation_returns_token_ids_and_calls_the_models_generate(step, monkeypatch):
    (arguments, (ids, log_probs)) = step.calls["_generate_single_turn"][0]
    assert len(ids) == len(arguments["prompt_ids"]) == len(PROMPTS) * GENERATIONS
    assert all(isinstance(token, int) for token in ids[0])
    assert log_probs is None
    base = step.trainer.accelerator.unwrap_model(step.trainer.model).get_base_model()
    monkeypatch.setattr(base, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step.trainer._generate_single_turn([[5, 6]], None, {}, 1)


def test_log_probs_are_a_triple_by_completion_token(step):
    arguments, (log_probs, entropies, _) = step.calls["_get_per_token_logps_and_entropies"][-1]
    assert log_probs.shape == entropies.shape == (len(arguments["input_ids"]), arguments["logits_to_keep"])


def test_the_loss_takes_its_log_probs_from_the_hook_and_its_advantages_from_the_inputs(step, monkeypatch):
    inputs = step.calls["_compute_loss"][0][0]["inputs"]
    shape = inputs["completion_ids"].shape
    zeros = (torch.zeros(shape, requires_grad=True), torch.zeros(shape), None)
    monkeypatch.setattr(step.trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: zeros)
    none, one, two = (
        step.trainer._compute_loss(step.trainer.model, inputs | {"advantages": torch.full((shape[0],), advantage)}).item()
        for advantage in (0.0, 1.0, 2.0)
    )
    assert two == pytest.approx(2 * one)
    assert one < none == 0.0


def test_rewards_are_a_tensor_by_completion_and_function(step):
    ((_, rewards),) = step.calls["_calculate_rewards"]
    assert rewards.shape == (len(PROMPTS) * GENERATIONS, len(step.trainer.reward_funcs))


def test_the_sampler_shuffles_with_a_generator_that_can_be_seeded(step):
    sampler = GRPOTrainer._get_train_sampler(step.trainer)
    sampler.shuffle, sampler.generator = True, torch.Generator()
    orders = []
    for seed in (1, 1, 2):
        sampler.generator.manual_seed(seed)
        orders.append(list(sampler))
    assert orders[0] == orders[1] != orders[2]
    trainer, _ = build(GRPOTrainer, step.tiny, step.output, shuffle_dataset=True)
    assert trainer._get_train_sampler().shuffle
    assert isinstance(trainer._get_train_sampler().generator, torch.Generator)


def test_a_checkpoint_goes_to_the_output_folder_and_resuming_loads_it(step):
    assert (step.output / "elsewhere/checkpoint-1/adapter_model.safetensors").is_file()
    assert (step.output / "elsewhere/checkpoint-1/trainer_state.json").is_file()
    ((arguments, _),) = step.calls["_load_optimizer_and_scheduler"]
    assert arguments["checkpoint"] == str(step.output / "elsewhere/checkpoint-1")


def test_metrics_are_logged_as_means_under_their_own_names(step):
    entry = step.trainer.state.log_history[0]
    assert (entry["by_log_metric"], entry["by_metrics"]) == (3.0, 4.0)
    assert not step.trainer._metrics["train"].get("by_metrics")


def test_the_logs_have_the_texts_and_rewards_of_the_latest_rollout(step):
    logs = step.trainer._logs
    assert len(logs["prompt"]) == len(logs["completion"]) == len(logs["rewards"]["reward"]) == len(PROMPTS) * GENERATIONS
    assert logs["completion"][0][-1]["role"] == "assistant"


def test_prompts_are_tokenized_with_the_chat_template(step):
    messages = [{"role": "user", "content": PROMPTS[0]}]
    expected = step.trainer.processing_class.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert step.trainer._tokenize_prompts([messages])[0] == [expected]
    assert step.trainer._tokenizer is step.trainer.processing_class


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_an_entropy_bonus_is_known_before_the_loss(tiny, tmp_path, coefficient):
    assert build(GRPOTrainer, tiny, tmp_path, entropy_coef=coefficient)[0]._entropy_bonus_enabled == bool(coefficient)


def test_models_say_how_they_attend(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert (model._is_stateful, model._supports_attention_backend, model.config._attn_implementation) == (
        False,
        True,
        "sdpa",
    )
    assert PreTrainedModel._supports_attention_backend is False


# ---- nobody else ------------------------------------------------------------------------------------------------------

DOCUMENTED = {"_replace", "_asdict", "_fields", "_exit"}  # of named tuples, and of os


def private(path: Path) -> set[str]:
    """The private names that a module uses and does not define itself."""
    tree = ast.parse(path.read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("_")}
    used |= {
        str(node.args[1].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"getattr", "setattr", "hasattr"}
        if isinstance(node.args[1], ast.Constant) and str(node.args[1].value).startswith("_")
    }
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    defined |= {
        ast.unparse(target).removeprefix("self.")
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for each in node.targets
        for target in (each.elts if isinstance(each, ast.Tuple) else [each])
    }
    defined |= {ast.unparse(node.target).removeprefix("self.") for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)}
    return {name for name in used - defined - DOCUMENTED if not name.startswith("__")}


def of_trl(trainer: GRPOTrainer) -> set[str]:
    """All private names of TRL's trainer and what it is made of."""
    return {name for name in {*dir(trainer), *vars(trainer)} if name.startswith("_") and not name.startswith("__")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_other_module_uses_a_private_name(path):
    allowed = MODULES | {
        "shared_prefix_models": OF_MODELS,
        "fused_lora": {"_foreach_copy_", "_foreach_mul"},  # torch's optimizers use them as well
    }
    assert private(path) <= allowed.get(path.stem, set())
    defined = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    assert path.stem in MODULES or not defined & (set(HOOKS) | METHODS)  # nor overrides a hook


def test_the_contract_is_complete_and_our_own_names_are_none_of_trls(tiny, tmp_path):
    """Every private name of TRL in these modules is in a table above; the others are ours, and TRL does not have them."""
    trainer, _ = build(GRPOTrainer, tiny, tmp_path)
    nodes = [node for path in SOURCES if path.stem in MODULES for node in ast.walk(ast.parse(path.read_text()))]
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute) and node.attr.startswith("_")}
    used |= {node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("_")}
    used = {name for name in used if not name.startswith("__")}
    contract = {name for name in HOOKS if name.startswith("_")} | METHODS | ATTRIBUTES
    assert contract <= used
    assert used & of_trl(trainer) == contract
    assert issubclass(GRPOTrainer, Trainer)
