"""Configs of other frameworks: validation names where each key belongs, and `tunedrop config --from` translates a file."""

import json

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from tunedrop.config import synonyms
from tunedrop.config.fields import MANAGED_GRPO, MANAGED_LORA, config_fields
from tunedrop.config.model import RunConfig
from tunedrop.config.parse import load_run_config
from tunedrop.problems import RejectedError
from tunedrop.rewards import RewardSpec
from tunedrop.rewards import synonyms as reward_synonyms
from tunedrop_cli.main import cli
from tunedrop_cli.translate import PARTS, translate, written

PLACES = [
    # a config as people paste it, the key that is not known, words of its hint
    ("grpo: {max_prompt_length: 512}", "grpo.max_prompt_length", "write max_prompt_length: 512 at the top of the config"),
    ("grpo: {max_seq_length: 512}", "grpo.max_seq_length", "write max_seq_length: 512 at the top"),
    ("grpo: {warmup_ratio: 0.1}", "grpo.warmup_ratio", "write grpo: {warmup_steps: 0.1}"),
    ("grpo: {reward_funcs: [accuracy, format]}", "grpo.reward_funcs", 'write rewards: [{type: math}, {type: xml'),
    ("grpo: {lora_r: 8}", "grpo.lora_r", "write lora: {r: 8}"),
    ("grpo: {lr: 1e-5}", "grpo.lr", "write grpo: {learning_rate: 1e-05}"),
    ("lora: {lora_rank: 8}", "lora.lora_rank", "write lora: {r: 8}"),
    ("lora: {rank: 8}", "lora.rank", "write lora: {r: 8}"),
    ("lora: {alpha: 8}", "lora.alpha", "write lora: {lora_alpha: 8}"),
    ("lora: {dropout: 0.1}", "lora.dropout", "write lora: {lora_dropout: 0.1}"),
    ("lora: {learning_rate: 0.1}", "lora.learning_rate", "write grpo: {learning_rate: 0.1}"),
    ("learning_rate: 1e-5", "learning_rate", "here it is grpo.learning_rate: write grpo: {learning_rate: 1e-05}"),
    ("lora_alpha: 8", "lora_alpha", "write lora: {lora_alpha: 8}"),
    ("lora_target_modules: [q_proj]", "lora_target_modules", 'write lora: {target_modules: ["q_proj"]}'),
    ("model_name_or_path: org/m", "model_name_or_path", 'write model: "org/m" at the top'),
    ("base_model: org/m", "base_model", 'write model: "org/m" at the top'),
    ("load_in_4bit: true", "load_in_4bit", "write lora: {load_in_4bit: true}"),
    ("micro_batch_size: 2", "micro_batch_size", "write grpo: {per_device_train_batch_size: 2}"),
    ("num_epochs: 2", "num_epochs", "write grpo: {num_train_epochs: 2}"),
    ("instance_type: ml.g5.xlarge", "instance_type", 'write compute: {instance_type: "ml.g5.xlarge"}'),
    ("grpo: {instance_count: 2}", "grpo.instance_count", "write compute: {instance_count: 2}"),
    ("epoch: 2", "epoch", "write grpo: {num_train_epochs: 2}"),
    ("random_state: 2", "random_state", "write grpo: {seed: 2}"),
    ("dataset_name: org/d", "dataset_name", "leave it out: the dataset is the file that you drop"),
    ("vllm_mode: colocate", "vllm_mode", "leave it out: the jobs' image has no vLLM"),
    ("output_dir: out", "output_dir", "leave it out: Tunedrop decides where"),
    ("actor_rollout_ref: {model: {path: a}}", "actor_rollout_ref", "`tunedrop config --from FILE` translates"),
    ("trl: {num_generations: 4}", "trl", "`tunedrop config --from FILE` translates"),
    ("data: {train_batch_size: 4}", "data", "`tunedrop config --from FILE` translates"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "key", "words"), PLACES, ids=[text for text, *_ in PLACES])
def test_a_key_of_another_framework_is_shown_its_place(text, key, words):
    with pytest.raises(RejectedError) as caught:
        load_run_config(text.encode(), default_model="base")
    (problem,) = caught.value.problems
    assert (problem.code, problem.key) == ("CONFIG_KEY", key)
    assert words in problem.hint


def own_keys() -> set[str]:
    keys = {f"{section}.{name}" for section in ("grpo", "lora") for name in config_fields()[section]} | {"lora.load_in_4bit"}
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            keys |= {f"{name}.{key}" for key in section.model_fields}
    return keys | set(RunConfig.model_fields)


def test_every_place_is_a_key_of_a_run_config():
    free = own_keys() - {f"grpo.{key}" for key in MANAGED_GRPO} - {f"lora.{key}" for key in MANAGED_LORA}
    assert set(synonyms._listed().values()) <= free


def test_every_flat_field_of_trl_and_peft_has_a_place_or_a_reason():
    for section in ("grpo", "lora"):
        for name in config_fields()[section]:
            place = synonyms.place_of(name)
            assert place, name
            assert place.key is None or place.key.endswith(name) or name in synonyms._listed(), name


def test_every_reward_from_elsewhere_is_one_that_a_config_takes():
    for entry in reward_synonyms._REWARDS.values():
        assert yaml.safe_load(reward_synonyms.written(entry)) == entry
        RewardSpec.model_validate(entry)


TRL = """
model_name_or_path: org/small-instruct
torch_dtype: bfloat16
dataset_name: org/sums
system_prompt: "Reason first: then answer."
learning_rate: 1.0e-06
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr_rate: 0.1}
warmup_ratio: 0.1
max_prompt_length: 640
max_completion_length: 768
num_generations: 4
per_device_train_batch_size: 4
gradient_checkpointing_kwargs: {use_reentrant: false}
scale_rewards: false
max_steps: -1
reward_funcs: [accuracy, format, tag_count]
reward_weights: [1.0, 0.5, 0.25]
lora_r: 24
lora_target_modules: [q_proj, o_proj]
use_vllm: true
report_to: [wandb]
deepspeed: zero3.json
my_own_switch: 3
"""
AXOLOTL = """
base_model: org/small
rl: grpo
adapter: qlora
load_in_4bit: true
trl:
  use_vllm: true
  beta: 0.02
  num_generations: 6
  max_completion_length: 300
  reward_funcs: [my_rewards.score]
  reward_weights: [1.0]
datasets:
  - {path: org/sums, type: my_rewards.transform}
lora_r: 12
lora_alpha: 24
lora_target_linear: true
sequence_len: 1200
micro_batch_size: 6
num_epochs: 2
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-5
val_set_size: 0.07
bf16: auto
special_tokens: {pad_token: x}
"""
VERL = """
data: {train_files: a.parquet, train_batch_size: 16, max_prompt_length: 300, max_response_length: 700, truncation: left}
actor_rollout_ref:
  model: {path: org/small, lora_rank: 48, lora_alpha: 96, target_modules: all-linear, use_shm: true}
  actor:
    optim: {lr: 4e-6, lr_warmup_steps: -1, lr_warmup_steps_ratio: 0.03}
    ppo_mini_batch_size: 8
    ppo_micro_batch_size_per_gpu: 5
    use_kl_loss: true
    kl_loss_coef: 0.002
    kl_loss_type: low_var_kl
    clip_ratio_high: 0.28
  rollout: {name: vllm, n: 5, temperature: 0.9, top_k: -1, tensor_model_parallel_size: 2}
algorithm: {adv_estimator: grpo}
trainer: {total_epochs: 3, nnodes: 2, save_freq: -1, logger: [console], total_training_steps: '${steps}'}
custom_reward_function: {path: r.py, name: score}
"""
SWIFT = """
rlhf_type: grpo
model: org/small
train_type: lora
lora_rank: 6
target_modules: [all-linear]
reward_funcs: accuracy repetition
max_length: 900
max_completion_length: 500
num_generations: 4
system: prompt.txt
split_dataset_ratio: 0.02
dataset: ['org/sums#500']
eval_steps: 50
quant_bits: 4
"""
SAGEMAKER = json.dumps(
    {
        "TrainingJobName": "sums-1",
        "HyperParameters": {
            "model_id": '"org/small"',
            "epoch": "3",
            "learning-rate": "3e-5",
            "lora_r": "20",
            "target_modules": "q_proj,v_proj",
            "per_device_train_batch_size": "4",
            "max_input_length": "400",
            "load_in_4bit": "True",
            "instruction_tuned": "False",
            "validation_split_ratio": "0.2",
            "sagemaker_program": "train.py",
        },
    }
)
# A framework's example, the keys of the run config that it must give, and the names that it must leave out.
EXAMPLES = {
    "TRL": (
        TRL,
        {
            "model": "org/small-instruct",
            "system_prompt": "Reason first: then answer.",
            "max_prompt_length": 640,
            "grpo": {
                "learning_rate": 1e-6, "lr_scheduler_type": "cosine_with_min_lr", "warmup_steps": 0.1,
                "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "max_completion_length": 768,
                "num_generations": 4, "per_device_train_batch_size": 4,
                "scale_rewards": False,
            },
            "rewards": [
                {"type": "math", "weight": 1.0},
                {"type": "xml_format", "tags": ["think", "answer"], "weight": 0.5},
                {"type": "xml_format", "tags": ["think", "answer"], "mode": "partial", "name": "tag_count", "weight": 0.25},
            ],
            "lora": {"r": 24, "target_modules": ["q_proj", "o_proj"]},
        },
        "torch_dtype dataset_name gradient_checkpointing_kwargs max_steps use_vllm report_to deepspeed my_own_switch",
    ),
    "Axolotl": (
        AXOLOTL,
        {
            "model": "org/small",
            "max_seq_length": 1200,
            "heldout_fraction": 0.07,
            "grpo": {
                "beta": 0.02, "num_generations": 6, "max_completion_length": 300, "per_device_train_batch_size": 6,
                "num_train_epochs": 2, "optim": "adamw_8bit", "lr_scheduler_type": "cosine", "learning_rate": 2e-5,
            },
            "lora": {"load_in_4bit": True, "r": 12, "lora_alpha": 24, "target_modules": "all-linear"},
        },
        "rl adapter trl.use_vllm trl.reward_funcs trl.reward_weights datasets bf16 special_tokens",
    ),
    "verl": (
        VERL,
        {
            "model": "org/small",
            "max_prompt_length": 300,
            "prompt_overflow": "truncate",
            "compute": {"instance_count": 2},
            "grpo": {
                "generation_batch_size": 80, "max_completion_length": 700, "learning_rate": 4e-6, "warmup_steps": 0.03,
                "gradient_accumulation_steps": 8, "per_device_train_batch_size": 5, "beta": 0.002, "epsilon_high": 0.28,
                "num_generations": 5, "temperature": 0.9, "top_k": 0, "num_train_epochs": 3,
            },
            "lora": {"r": 48, "lora_alpha": 96, "target_modules": "all-linear"},
        },
        """data.train_files actor_rollout_ref.model.use_shm actor_rollout_ref.actor.optim.lr_warmup_steps
        actor_rollout_ref.actor.kl_loss_type actor_rollout_ref.rollout.name trainer.save_freq trainer.logger
        actor_rollout_ref.rollout.tensor_model_parallel_size algorithm.adv_estimator trainer.total_training_steps
        custom_reward_function""",
    ),
    "ms-swift": (
        SWIFT,
        {
            "model": "org/small",
            "max_prompt_length": 900,
            "heldout_fraction": 0.02,
            "rewards": [{"type": "math"}, {"type": "repetition_penalty"}],
            "grpo": {"max_completion_length": 500, "num_generations": 4},
            "lora": {"r": 6, "target_modules": "all-linear", "load_in_4bit": True},
        },
        "rlhf_type train_type system dataset eval_steps",
    ),
    "SageMaker": (
        SAGEMAKER,
        {
            "model": "org/small",
            "max_prompt_length": 400,
            "heldout_fraction": 0.2,
            "grpo": {"num_train_epochs": 3, "learning_rate": 3e-5, "per_device_train_batch_size": 4},
            "lora": {"r": 20, "target_modules": ["q_proj", "v_proj"], "load_in_4bit": True},
        },
        "TrainingJobName instruction_tuned sagemaker_program",
    ),
}  # fmt: skip


@pytest.mark.parametrize("framework", EXAMPLES)
def test_a_frameworks_example_becomes_a_run_config(framework, tmp_path):
    text, config, left_out = EXAMPLES[framework]
    (tmp_path / "theirs").write_text(text)
    done = CliRunner().invoke(cli, ["config", "--from", str(tmp_path / "theirs")])
    assert done.exit_code == 0
    assert yaml.safe_load(done.stdout) == config
    load_run_config(done.stdout.encode(), default_model="base")
    said = dict(line.removeprefix("left out: ").split(": ", 1) for line in done.stderr.splitlines())
    assert said.keys() == set(left_out.split())
    assert all(said.values())


VALUES = st.sampled_from(
    [True, False, None, -1, 0, 1, 8, 0.05, 1.5, 1e9, "", "8", "1e-5", "True", "auto", "org/model", "/local/model", "${a.b}"]
) | st.sampled_from([[], ["accuracy"], "accuracy format", ["format", "format"], "q_proj,v_proj", {}, {"a": 1}, "all-linear"])


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(sorted({*synonyms._places(), "reward_weights", "trl.beta", "unknown", "data.x", "fsdp"})),
        VALUES,
        max_size=8,
    )
)
def test_a_translation_passes_validation_and_forgets_no_key(source):
    translation = translate(json.dumps(source).encode())
    config = load_run_config(written(translation, "theirs").encode(), default_model="base")
    kept = sum(len(value) if key in synonyms._SECTIONS else 1 for key, value in translation.config.items())
    parts = sum(name in source and name not in translation.left_out for name in PARTS)
    assert kept + parts + len(translation.left_out) == len(source)
    assert config.model


@pytest.mark.parametrize("text", ["- a\n- b", "a: [", "just words"])
def test_a_file_that_is_no_config_is_refused(text, tmp_path):
    (tmp_path / "theirs").write_text(text)
    done = CliRunner().invoke(cli, ["config", "--from", str(tmp_path / "theirs")])
    assert done.exit_code == 2
    assert "the config" in done.output
