import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import botocore.session
import moto.ec2
import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft202012Validator  # type: ignore[import-untyped] # as in the rewards
from pydantic import BaseModel

from tunedrop.config import rules
from tunedrop.config.fields import GRPO_DEFAULTS, MANAGED_GRPO, MANAGED_LORA, config_fields
from tunedrop.config.instances import gpu, gpus, has_bf16, has_local_disk
from tunedrop.config.model import RunConfig
from tunedrop.config.parse import load_run_config, parse_run_config
from tunedrop.config.reference import config_defaults, config_schema
from tunedrop.config.rules import check_instances, config_warnings
from tunedrop.config.schedule import (
    check_lengths,
    check_steps,
    fit_batches,
    generation_batch,
    limit_of_tests,
    optimizer_steps,
)
from tunedrop.problems import RejectedError
from tunedrop.rewards import REWARDS
from tunedrop_cli.main import cli


def load(text: str | bytes):
    return load_run_config(text if isinstance(text, bytes) else text.encode(), default_model="base")


def test_an_empty_config_is_the_defaults():
    config = load(b"")
    assert config.model == "base"
    assert config.grpo == GRPO_DEFAULTS
    assert config.lora.peft_kwargs() == {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def test_a_full_config_survives_the_way_to_the_trainer():
    config = load("""
        model: SmolLM2-135M-Instruct
        system_prompt: "It's $(a) \\"test\\"\\nline"
        columns: {prompt: Question, answer: Answer}
        rewards: [{type: exact_match, weight: 2.0}, {type: xml_format, mode: soft, weight: 0.5}]
        lora: {r: 32, lora_alpha: 64, lora_dropout: 0.05, load_in_4bit: true}
        grpo: {learning_rate: 1e-5, num_generations: 4, loss_type: dr_grpo, beta: 0.04}
        compute: {instance_type: ml.g5.xlarge, spot: true, max_runtime: 1h30m, max_cost_usd: 40}
        gate: {min_lift: 0.1, must_not_regress: [math]}
    """)
    assert config.grpo["learning_rate"] == 1e-5
    assert config.compute.max_runtime == 5400
    assert config.compute.instance_type == ["ml.g5.xlarge"]
    assert config.lora.peft_kwargs()["lora_dropout"] == 0.05
    assert parse_run_config(json.loads(config.model_dump_json())) == config


MISTAKES = [
    # config, code, key, words of the message or hint
    ("modle: x", "CONFIG_KEY", "modle", "did you mean 'model'"),
    ("grpo: {lerning_rate: 1}", "CONFIG_KEY", "grpo.lerning_rate", "did you mean 'learning_rate'"),
    ("lora: {lora_alfa: 1}", "CONFIG_KEY", "lora.lora_alfa", "did you mean 'lora_alpha'"),
    ("compute: {spott: true}", "CONFIG_KEY", "compute.spott", "did you mean 'spot'"),
    ("grpo: {learning_rate: fast}", "CONFIG_VALUE", "grpo.learning_rate", "must be float, not str, got 'fast'"),
    ("grpo: {learning_rate: 0}", "CONFIG_VALUE", "grpo.learning_rate", "above 0"),
    ("grpo: {learning_rate: .nan}", "CONFIG_SYNTAX", "grpo.learning_rate", "a finite number"),
    ("grpo: {num_generations: 2.5}", "CONFIG_VALUE", "grpo.num_generations", "must be int or null, not float"),
    ("grpo: {top_p: 1.5}", "CONFIG_VALUE", "grpo.top_p", "at most 1"),
    ("grpo: {adam_beta1: 1.0}", "CONFIG_VALUE", "grpo.adam_beta1", "below 1"),
    ("grpo: {temperature: 0}", "CONFIG_VALUE", "grpo.temperature", "above 0"),
    ("grpo: {bf16: 1}", "CONFIG_VALUE", "grpo.bf16", "must be bool or null, not int"),
    ("grpo: {loss_type: dap}", "CONFIG_VALUE", "grpo.loss_type", "(did you mean 'dapo'?)"),
    ("grpo: {output_dir: /tmp}", "CONFIG_VALUE", "grpo.output_dir", "set by Tunedrop"),
    ("grpo: {reward_weights: [1.0]}", "CONFIG_VALUE", "grpo.reward_weights", "each entry of rewards has a weight"),
    ("grpo: {eval_strategy: steps}", "CONFIG_VALUE", "grpo.eval_strategy", "set by Tunedrop"),
    ("lora: {lora_dropout: 1.0}", "CONFIG_VALUE", "lora.lora_dropout", "below 1"),
    ("grpo: 3", "CONFIG_VALUE", "grpo", "dictionary"),
    ("lora: {r: x}", "CONFIG_VALUE", "lora.r", "valid integer"),
    ("rewards: 3", "CONFIG_VALUE", "rewards", "list"),
    ("grpo: {num_iterations: 99999999999999999999}", "CONFIG_SYNTAX", "grpo.num_iterations", "at most 64 bits"),
    ("grpo: {deepspeed: zero2}", "CONFIG_VALUE", "grpo.deepspeed", "the jobs have no deepspeed"),
    ("grpo: {deepspeed: {zero_optimization: {stage: 2}}}", "CONFIG_VALUE", "grpo.deepspeed", "the jobs have no deepspeed"),
    ("grpo: {use_liger_kernel: true}", "CONFIG_VALUE", "grpo.use_liger_kernel", "no liger-kernel"),
    ("grpo: {optim: galore_adamw}", "CONFIG_VALUE", "grpo.optim", "must be one of adamw_torch, "),
    ("grpo: {accelerator_config: acc.json}", "CONFIG_VALUE", "grpo.accelerator_config", "no file of that name"),
    (
        "grpo: {accelerator_config: {split_batch: true}}",
        "CONFIG_VALUE",
        "grpo.accelerator_config",
        "did you mean 'split_batches'",
    ),
    ("grpo: {lr_scheduler_kwargs: '{broken'}", "CONFIG_VALUE", "grpo.lr_scheduler_kwargs", "must be a mapping"),
    ("grpo: {scale_rewards: 1}", "CONFIG_VALUE", "grpo.scale_rewards", "must be bool or str, not int"),
    ("grpo: {seed: -1}", "CONFIG_VALUE", "grpo.seed", "at least 0"),
    ("lora: {layers_to_transform: [a]}", "CONFIG_VALUE", "lora.layers_to_transform", "must be int, not str"),
    ("lora: {eva_config: {rho: 0.5}}", "CONFIG_VALUE", "lora.eva_config", "'rho' must be at least 1"),
    ("lora: {megatron_config: {a: 1}}", "CONFIG_VALUE", "lora.megatron_config", "no Megatron-LM"),
    ("lora: {init_lora_weights: pissa_niter_x}", "CONFIG_VALUE", "lora.init_lora_weights", "must be one of"),
    ("rewards: exact_match", "CONFIG_VALUE", "rewards", "must be a list of rewards"),
    ("rewards: {type: exact_match}", "CONFIG_VALUE", "rewards", "must be a list of rewards"),
    ("rewards: [exact_match]", "CONFIG_VALUE", "rewards.0", "write {type: exact_match}"),
    ("rewards: [accuracy_reward]", "CONFIG_VALUE", "rewards.0", "write {type: math}"),
    ("rewards: [{type: accuracy}]", "CONFIG_VALUE", "rewards.0", "write {type: math}"),
    ("rewards: [{type: exact}]", "CONFIG_VALUE", "rewards.0", "did you mean 'exact_match'"),
    ("rewards: [{type: regex}]", "CONFIG_VALUE", "rewards.0.pattern", "required"),
    ("rewards: [{type: length}, {type: length}]", "CONFIG_VALUE", None, "two rewards are called 'length'"),
    ("rewards: [{type: length, weight: 0}]", "CONFIG_VALUE", None, "nothing to learn"),
    ("rewards: [{type: length, only_if: x}]", "CONFIG_VALUE", None, "no reward listed above it"),
    ("rewards: [{type: length, clip: [1, 0]}]", "CONFIG_VALUE", "rewards.0", "lower bound 1 must be below"),
    ("compute: {max_runtime: 3 hours}", "CONFIG_VALUE", "compute.max_runtime", "such as 3h"),
    ("compute: {instance_type: g5.xlarge}", "CONFIG_VALUE", "compute.instance_type.0", "pattern"),
    ("model: ../secrets", "CONFIG_VALUE", "model", "pattern"),
    ("max_bad_rows: 1", "CONFIG_VALUE", "max_bad_rows", "less than 1"),
    ("a: [", "CONFIG_SYNTAX", None, "not valid YAML"),
    ("model: a\nmodel: b", "CONFIG_SYNTAX", None, "given twice"),
    ("a: &x [1]\nb: [*x, *x]", "CONFIG_SYNTAX", "a", "aliases are not accepted"),
    ("!!python/object/apply:os.system [ls]", "CONFIG_SYNTAX", None, "python/object"),
    ("[1]", "CONFIG_SYNTAX", None, "must be a mapping"),
    ("[" * 50_000, "CONFIG_SYNTAX", None, "nested too deeply"),
    (b"\xff\xfem", "CONFIG_SYNTAX", None, "not UTF-8"),
    (b"#" * 300_000, "CONFIG_SYNTAX", None, "at most"),
]


@pytest.mark.parametrize(("text", "code", "key", "words"), MISTAKES, ids=lambda value: str(value)[:30])
def test_mistakes_are_named(text, code, key, words):
    with pytest.raises(RejectedError) as caught:
        load(text)
    problem = caught.value.problems[0]
    assert (problem.code, problem.key) == (code, key)
    assert words in f"{problem.message} {problem.hint}"


def test_a_syntax_error_names_its_line():
    with pytest.raises(RejectedError) as caught:
        load("model: a\nrewards:\n  - {type: x\n")
    assert caught.value.problems[0].line is not None


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(RejectedError) as caught:
        load("{modle: x, gates: {}, compute: {spott: 1}, grpo: {betta: 1, temperature: 0, top_p: 2}, lora: {bias: x}}")
    assert {problem.key for problem in caught.value.problems} == {
        *("modle", "gates", "compute.spott", "grpo.betta", "grpo.temperature", "grpo.top_p", "lora.bias")
    }


RULES = [
    # a contradiction, the key to change, words of the reason, and a similar config without the contradiction
    ("grpo: {num_generations: 1}", "grpo.num_generations", "at least 2", "grpo: {num_generations: 2}"),
    ("grpo: {num_generations: null}", "grpo.num_generations", "compares answers within a group", "grpo: {}"),
    ("grpo: {use_vllm: true}", "grpo.use_vllm", "the jobs' image has no vLLM", "grpo: {use_vllm: false}"),
    ("grpo: {fp16: true, bf16: true}", "grpo.fp16", "exclude each other", "grpo: {fp16: true, bf16: false}"),
    (
        "grpo: {generation_batch_size: 16, steps_per_generation: 2}",
        "grpo.generation_batch_size",
        "give one of them",
        "grpo: {generation_batch_size: 16}",
    ),
    (
        "grpo: {auto_find_batch_size: true}",
        "grpo.auto_find_batch_size",
        "whole groups",
        "grpo: {auto_find_batch_size: false}",
    ),
    ("grpo: {sync_ref_model: true, beta: 0.1}", "grpo.sync_ref_model", "no reference model", "grpo: {beta: 0.1}"),
    ("grpo: {lr_scheduler_type: greedy}", "grpo.lr_scheduler_type", "has none", "grpo: {lr_scheduler_type: cosine}"),
    (
        "grpo: {max_completion_length: null}",
        "grpo.max_completion_length",
        "may never end",
        "grpo: {max_completion_length: 1}",
    ),
    ("max_seq_length: 256", "max_seq_length", "no room for a prompt", "max_seq_length: 257"),
    (
        "grpo: {dataloader_prefetch_factor: 2}",
        "grpo.dataloader_prefetch_factor",
        "only workers",
        "grpo: {dataloader_prefetch_factor: 2, dataloader_num_workers: 1}",
    ),
    (
        "grpo: {vllm_importance_sampling_clip_min: 3.0}",
        "grpo.vllm_importance_sampling_clip_min",
        "must be below",
        "grpo: {vllm_importance_sampling_clip_min: 0.5}",
    ),
    (
        "lora: {target_modules: [q_proj, lm_head]}",
        "lora.target_modules",
        "never be trained",
        "lora: {target_modules: [q_proj]}",
    ),
    (
        "lora: {layers_to_transform: [0]}",
        "lora.target_modules",
        "a list of module names",
        "lora: {layers_to_transform: [0], target_modules: [q_proj]}",
    ),
    (
        "grpo: {logging_steps: 1.5}",
        "grpo.logging_steps",
        "a whole number of steps",
        "grpo: {logging_steps: 0.5}",
    ),
    ("grpo: {save_steps: 2.5}", "grpo.save_steps", "a whole number of steps", "grpo: {save_steps: 2.0}"),
    (
        "grpo: {fp16_full_eval: true, bf16_full_eval: true}",
        "grpo.fp16_full_eval",
        "exclude each other",
        "grpo: {bf16_full_eval: true}",
    ),
    (
        "grpo: {accelerator_config: {use_configured_state: true}}",
        "grpo.accelerator_config",
        "a script has made",
        "grpo: {accelerator_config: '{\"split_batches\": false}'}",
    ),
    (
        "grpo: {vllm_importance_sampling_mode: token_truncate, vllm_importance_sampling_clip_max: null}",
        "grpo.vllm_importance_sampling_clip_max",
        "that truncates needs",
        "grpo: {vllm_importance_sampling_mode: token_truncate}",
    ),
    (
        "lora: {target_modules: []}",
        "lora.target_modules",
        "an adapter needs modules",
        "lora: {target_modules: [], target_parameters: [experts.gate_up_proj]}",
    ),
    (
        "lora: {layers_pattern: layers, target_modules: [q_proj]}",
        "lora.layers_pattern",
        "set layers_to_transform too",
        "lora: {layers_pattern: layers, layers_to_transform: 1, target_modules: [q_proj]}",
    ),
    (
        "lora: {init_lora_weights: loftq}",
        "lora.loftq_config",
        "needs loftq_config",
        "lora: {init_lora_weights: loftq, loftq_config: {loftq_bits: 4}}",
    ),
    (
        "lora: {use_bdlora: {target_modules_bd_a: [q_proj], target_modules_bd_b: [q_proj]}}",
        "lora.use_bdlora",
        "no module in common",
        "lora: {use_bdlora: {target_modules_bd_a: [q_proj], target_modules_bd_b: [o_proj]}}",
    ),
    (
        "lora: {layer_replication: [[0, 1000000000]]}",
        "lora.layer_replication",
        "at most 1000 layers",
        "lora: {layer_replication: [[0, 4], [2, 6]]}",
    ),
    ("lora: {lora_bias: true}", "lora.lora_bias", "layers with biases only", "lora: {lora_bias: false}"),
    (
        "{sampling: {policy: teach}, grpo: {shuffle_dataset: false}}",
        "sampling.policy",
        "an order of its own",
        "{sampling: {policy: uniform}, grpo: {shuffle_dataset: false}}",
    ),
    (
        "{sampling: {policy: teach}, grpo: {fsdp: full_shard}}",
        "sampling.policy",
        "share a model's weights",
        "{sampling: {policy: uniform}, grpo: {fsdp: full_shard}}",
    ),
    (
        "{reference: start, grpo: {beta: 0.1, fsdp: full_shard}}",
        "reference",
        "weights that GPUs share",
        "{reference: start, grpo: {fsdp: full_shard}}",
    ),
    (
        "{method: sft, grpo: {fsdp: full_shard}}",
        "grpo.fsdp",
        "does not shard the weights",
        "{method: grpo, grpo: {fsdp: full_shard}}",
    ),
    (
        "{warm_start: {policy: always}, grpo: {fsdp: full_shard}}",
        "grpo.fsdp",
        "without a warm start",
        "{warm_start: {policy: auto}, grpo: {fsdp: full_shard}}",
    ),
]


@pytest.mark.parametrize(("text", "key", "words", "fine"), RULES, ids=[rule[1] for rule in RULES])
def test_contradictions_are_refused_with_the_reason(text, key, words, fine):
    with pytest.raises(RejectedError) as caught:
        load(text)
    (problem,) = caught.value.problems
    assert (problem.code, problem.key) == ("CONFIG_VALUE", key)
    assert words in problem.message
    load(fine)


def test_every_rule_has_a_case():
    assert {key for key, *_ in rules.RULES} <= {key for _, key, *_ in RULES}


FIXES = [
    # config, what the receipt says
    ("grpo: {}", []),
    ("grpo: {num_generations: 4}", []),
    ("grpo: {num_generations: 16}", ["grpo.gradient_accumulation_steps 1 → 2: "]),
    ("grpo: {num_generations: 6}", ["grpo.gradient_accumulation_steps 1 → 3: "]),
    ("grpo: {num_generations: 6, gradient_accumulation_steps: 4}", ["grpo.gradient_accumulation_steps 4 → 6: "]),
    ("grpo: {num_generations: 16, steps_per_generation: 3}", ["grpo.steps_per_generation 3 → 4: "]),
    ("grpo: {generation_batch_size: 12}", ["grpo.generation_batch_size 12 → 16: a multiple of num_generations (8)"]),
    ("grpo: {generation_batch_size: 12, per_device_train_batch_size: 4, num_generations: 3}", []),
    # four GPUs take four times as much at once
    ("{grpo: {num_generations: 16}, compute: {instance_type: ml.g5.12xlarge}}", []),
    (
        "{grpo: {generation_batch_size: 8}, compute: {instance_type: ml.g5.12xlarge}}",
        ["grpo.generation_batch_size 8 → 32: "],
    ),
    (
        "{grpo: {num_generations: 16}, compute: {instance_type: [ml.g5.12xlarge, ml.g5.xlarge]}}",
        ["grpo.gradient_accumulation_steps 1 → 2: "],
    ),
    ("{grpo: {num_generations: 16}, compute: {instance_count: 2}}", []),
    # a reward that ranks a group must see all of it on one GPU
    (
        "{grpo: {num_generations: 16}, compute: {instance_count: 2}, rewards: [{type: judge_group, model: m}]}",
        ["grpo.gradient_accumulation_steps 1 → 2: "],
    ),
    (
        (
            "{grpo: {num_generations: 16, generation_batch_size: 64}, compute: {instance_type: ml.g5.12xlarge}, "
            "rewards: [{type: judge_group, model: m}]}"
        ),
        [],
    ),
    (
        (
            "{grpo: {num_generations: 16, generation_batch_size: 32}, compute: {instance_type: ml.g5.12xlarge}, "
            "rewards: [{type: judge_group, model: m}]}"
        ),
        ["grpo.generation_batch_size 32 → 64: "],
    ),
]


@pytest.mark.parametrize(("text", "fixes"), FIXES)
def test_batches_are_corrected_and_the_corrections_reported(text, fixes):
    config, corrections = fit_batches(load(text))
    assert len(corrections) == len(fixes)
    assert all(fix.startswith(begin) for fix, begin in zip(corrections, fixes, strict=True))
    trained, corrections = fit_batches(parse_run_config(json.loads(config.model_dump_json())))
    assert (trained.grpo, corrections) == (config.grpo, [])  # the trainer has nothing left to fix
    for name in config.compute.instance_type or ["ml.g5.xlarge"]:
        cards = gpus(name)
        assert cards is not None
        assert generation_batch(config, config.compute.instance_count * cards) % config.grpo["num_generations"] == 0
        assert check_instances(config, [name]) == []


# On four GPUs, each generates a half of a group.
HALF_GROUPS = "grpo: {generation_batch_size: 16, per_device_train_batch_size: 4}"
INSTANCES = [
    # config, instance types, the keys that are wrong
    ("lora: {load_in_4bit: true}", ["ml.m5.xlarge"], ["lora.load_in_4bit"]),
    ("lora: {load_in_4bit: true}", ["ml.g5.xlarge", "ml.c7i.large"], ["lora.load_in_4bit"]),
    ("lora: {load_in_4bit: true}", ["ml.g5.xlarge"], []),
    ("lora: {load_in_4bit: true}", [], []),
    ("lora: {load_in_4bit: true}", ["ml.x99.large"], []),  # not known: not refused
    ("grpo: {bf16: true}", ["ml.g4dn.xlarge"], ["grpo.bf16"]),
    ("grpo: {bf16: true}", ["ml.p3.2xlarge"], ["grpo.bf16"]),
    ("grpo: {bf16: true}", ["ml.g6e.4xlarge", "ml.p4d.24xlarge"], []),
    ("grpo: {fp16: true}", ["ml.g4dn.xlarge"], []),
    ("grpo: {bf16_full_eval: true}", ["ml.g4dn.xlarge"], ["grpo.bf16_full_eval"]),
    ("grpo: {tf32: true}", ["ml.g4dn.xlarge", "ml.m5.xlarge"], ["grpo.tf32", "grpo.tf32"]),
    ("grpo: {tf32: true}", ["ml.g5.xlarge"], []),
    ("grpo: {tf32: false}", ["ml.m5.xlarge"], []),
    ("grpo: {generation_batch_size: 8}", ["ml.g5.12xlarge"], ["grpo.generation_batch_size"]),
    ("grpo: {generation_batch_size: 32}", ["ml.g5.12xlarge"], []),
    (f"{HALF_GROUPS}\nrewards: [{{type: judge, model: m}}]", ["ml.g5.12xlarge"], []),
    (f"{HALF_GROUPS}\nrewards: [{{type: judge_group, model: m}}]", ["ml.g5.12xlarge"], ["grpo.generation_batch_size"]),
    (f"{HALF_GROUPS}\nrewards: [{{type: judge_group, model: m}}]", ["ml.g5.xlarge"], []),
]


@pytest.mark.parametrize(("text", "types", "keys"), INSTANCES)
def test_what_an_instance_type_cannot_run_is_named(text, types, keys):
    problems = check_instances(load(text), types)
    assert [problem.key for problem in problems] == keys
    assert all(problem.code == "CONFIG_INSTANCE" and problem.hint for problem in problems)


DEFAULT = "763104351884.dkr.ecr.us-east-1.amazonaws.com/pytorch:2.13-cu133-amzn2023-sagemaker"
OLDER = DEFAULT.replace("cu133", "cu128")
OWN = "111122223333.dkr.ecr.us-east-1.amazonaws.com/tunedrop:1"


@pytest.mark.parametrize(
    ("name", "image", "reason"),
    [
        ("ml.p2.xlarge", DEFAULT, "its GPUs are too old for CUDA 13, which the jobs' image uses"),
        ("ml.p3.2xlarge", DEFAULT, "its GPUs are too old for CUDA 13, which the jobs' image uses"),
        ("ml.p3dn.24xlarge", f"{DEFAULT}@sha256:{64 * 'a'}", "its GPUs are too old for CUDA 13"),
        ("ml.p3.2xlarge", OLDER, None),
        ("ml.p3.2xlarge", OWN, None),  # nothing is known of it; the job says it
        ("ml.g4dn.xlarge", DEFAULT, None),
        ("ml.g7e.2xlarge", DEFAULT, None),
        ("ml.trn1.2xlarge", DEFAULT, "it has AWS's Trainium chips, and the jobs' image needs NVIDIA's GPUs"),
        ("ml.trn1.2xlarge", OWN, None),
        ("ml.p6e-gb200.36xlarge", DEFAULT, "its CPUs are ARM, and the jobs' image needs x86_64"),
        ("ml.p6e-gb200.36xlarge", DEFAULT.replace(":2.13", "-arm64:2.13"), None),
        ("ml.m5.xlarge", DEFAULT, None),
    ],
)
@pytest.mark.parametrize("by", ["config", "stack"])
def test_an_instance_type_that_cannot_run_the_image_is_refused_with_the_reason(name, image, reason, by):
    config = load(f"compute: {{instance_type: {name}}}" if by == "config" else "")
    problems = check_instances(config, ["ml.m5.xlarge", name], image)
    if reason is None:
        assert not [problem for problem in problems if problem.key == "compute.instance_type"]
    else:
        (problem,) = problems
        assert (problem.code, problem.key) == ("CONFIG_INSTANCE", "compute.instance_type")
        assert problem.message.startswith(f"{name} cannot run the job: {reason}")
        assert problem.hint.startswith("choose another, such as ml.g5.xlarge")
        assert problem.hint.endswith("InstanceTypes") == (by == "stack")


def test_every_instance_type_that_sagemaker_trains_on_is_known():
    """By SageMaker's own list, and what EC2's DescribeInstanceTypes says of them, which moto has.

    A type that fails here is new: add its family to instances.py, with its GPU.
    """
    described = json.loads(
        gzip.decompress((Path(moto.ec2.__file__).parent / "resources/instance_types.json.gz").read_bytes())
    )
    model = botocore.session.get_session().get_service_model("sagemaker")
    names = model.shape_for("TrainingInstanceType").enum
    known = [name for name in names if name.removeprefix("ml.") in described]
    # Retired by EC2, and one that is sold as a whole rack.
    assert {name.split(".")[1] for name in set(names) - set(known)} <= {"p2", "p3", "p6e-gb200"}
    for name in known:
        found = described[name.removeprefix("ml.")]
        cards = found.get("GpuInfo", {}).get("Gpus", [])
        assert gpus(name) == sum(each["Count"] for each in cards), name
        assert (gpu(name) is not None) == bool(cards), name
        assert has_local_disk(name) == found["InstanceStorageSupported"], name
        if card := gpu(name):  # "A10G" and "RTX PRO Server 6000"
            assert set(card.name.split()[:1]) <= set(cards[0]["Name"].split()), name
    assert all(gpus(name) is not None for name in names)


@pytest.mark.parametrize(
    ("name", "count", "bf16"),
    [
        ("ml.m5.large", 0, True),
        ("ml.g4dn.12xlarge", 4, False),
        ("ml.g5.16xlarge", 1, True),
        ("ml.p5.48xlarge", 8, True),
        ("ml.p3.16xlarge", 8, False),
        ("ml.trn1.2xlarge", 0, True),
        ("ml.x99.large", None, True),
    ],
)
def test_instance_types(name, count, bf16):
    assert (gpus(name), has_bf16(name)) == (count, bf16)


LENGTHS = [
    ("{}", 2048, None),
    ("{}", 768, None),
    ("{}", 767, "max_prompt_length"),
    ("{}", 200, "grpo.max_completion_length"),
    ("max_seq_length: 1024", 1024, None),
    ("max_seq_length: 1025", 1024, "max_seq_length"),
]


@pytest.mark.parametrize(("text", "context", "key"), LENGTHS)
def test_lengths_beyond_the_models_context_are_named(text, context, key):
    assert [problem.key for problem in check_lengths(load(text), context)] == ([key] if key else [])


STEPS = [
    # config, rows, GPUs, steps
    ("{}", 10, 1, 10),
    ("grpo: {num_generations: 2}", 10, 1, 2),  # four prompts a step, an incomplete one dropped
    ("grpo: {num_generations: 2, num_train_epochs: 3}", 10, 1, 6),
    ("grpo: {num_train_epochs: 0.01}", 10, 1, 1),
    ("grpo: {gradient_accumulation_steps: 4}", 10, 1, 2),
    ("grpo: {steps_per_generation: 4}", 8, 1, 8),
    ("grpo: {num_iterations: 2}", 10, 1, 20),
    ("grpo: {max_steps: 7}", 10, 1, 7),
    ("{}", 10, 4, 2),
    ("grpo: {num_generations: 2}", 3, 1, 0),
    ("{}", 3, 4, 0),
]


@pytest.mark.parametrize(("text", "rows", "processes", "steps"), STEPS)
def test_steps_are_counted_and_too_few_rows_named(text, rows, processes, steps):
    config = load(text)
    assert optimizer_steps(config, rows, processes) == steps
    assert [problem.code for problem in check_steps(config, rows, processes)] == (["CONFIG_STEPS"] if steps == 0 else [])


WARNINGS = [
    ("{}", None),
    ("grpo: {learning_rate: 1.0e-2}", "learning_rate 0.01 is high"),
    ("grpo: {learning_rate: 1e-9}", "learning_rate 1e-09 is low"),
    ("grpo: {temperature: 0.1}", "answers to one prompt will be alike"),
    ("grpo: {temperature: 2.0}", "noise"),
    ("grpo: {num_generations: 2}", "noisy advantage"),
    ("grpo: {beta: 1.0}", "close to its base"),
    ("grpo: {max_completion_length: 8}", "cut off"),
    ("tests: {max_completion_length: 255}", "255 is below grpo.max_completion_length 256: tests will cut more answers"),
    ("tests: {max_completion_length: 256}", None),
    ("max_seq_length: 512", "leaves prompts 256 tokens"),
    ("lora: {r: 512}", "lora.r 512 is large"),
    ("rewards: [{type: exact_match}, {type: xml_format, weight: 2}]", "more for the format than for the answer"),
    ("rewards: [{type: exact_match}, {type: xml_format, weight: 0.5}]", None),
]


@pytest.mark.parametrize(("text", "words"), WARNINGS)
def test_unusual_values_warn(text, words):
    warnings = config_warnings(load(text))
    assert len(warnings) == (words is not None)
    assert words is None or words in warnings[0]


@pytest.mark.parametrize(
    ("text", "longest", "limit"),
    [
        ("", 10, 512),
        ("", 511, 512),
        ("", 512, 513),
        ("grpo: {max_completion_length: 12}", 3, 24),
        ("grpo: {max_completion_length: 12}", 90, 91),
        ("tests: {max_completion_length: 40}", 90, 40),
    ],
)
def test_tests_have_a_limit_of_their_own(text, longest, limit):
    assert limit_of_tests(load(text), longest) == limit


def test_the_defaults_are_a_config_and_name_every_key():
    text = config_defaults()
    config = load(text)
    assert config == load("model: SmolLM2-135M-Instruct")
    for section, managed in (("grpo", MANAGED_GRPO), ("lora", MANAGED_LORA)):
        for name in config_fields()[section]:
            assert (f"  #{name}: " in text or f"  {name}: " in text) == (name not in managed), name
    assert all(f"{{type: {name}" in text for name in REWARDS)


SCHEMA = Draft202012Validator(config_schema())


def test_the_schema_accepts_what_the_model_accepts():
    Draft202012Validator.check_schema(config_schema())
    accepted = [fine for *_, fine in RULES] + [text for text, _ in FIXES + WARNINGS] + [config_defaults()]
    accepted += ["rewards: [{type: length}, {type: regex, pattern: a, clip: [0, 1], only_if: length}]"]
    accepted += ["grpo: {scale_rewards: false}", "grpo: {scale_rewards: batch, fsdp: true}", "grpo: {logging_steps: 5}"]
    accepted += ["lora: {init_lora_weights: pissa_niter_16}", "lora: {init_lora_weights: false}"]
    accepted += ["compute: {instance_type: ml.g5.xlarge, max_runtime: 3h, spot: true}", "lora: {r: 8, use_dora: true}"]
    for text in accepted:
        load(text)
        # An editor reads numbers as YAML 1.2 does.
        given = yaml.safe_load(text.replace("1e-9", "1.0e-9").replace("1e-05", "1.0e-05")) or {}
        assert [error.message for error in SCHEMA.iter_errors(given)] == [], text


@pytest.mark.parametrize(
    "text", [text for text, code, key, _ in MISTAKES if code != "CONFIG_SYNTAX" and key and "nan" not in text]
)
def test_the_schema_marks_what_the_model_refuses(text):
    # An editor knows ranges and patterns, not rules in code, JSON in a text, or the size of a number in a machine.
    assert any(each in text for each in ("clip: [1, 0]", "{broken", "999999999999")) or not SCHEMA.is_valid(
        yaml.safe_load(text)
    )


def test_the_schema_explains_every_key():
    schema = config_schema()
    for fields in (schema["properties"]["grpo"], schema["$defs"]["Lora"]):
        assert all(len(field["description"]) > 3 for field in fields["properties"].values())
    rewards = schema["properties"]["rewards"]["items"]["oneOf"]
    assert {reward["title"] for reward in rewards} == set(REWARDS)
    assert all(reward["description"] for reward in rewards)


def test_managed_fields_exist_in_the_pinned_versions():
    assert set(config_fields()["grpo"]) >= MANAGED_GRPO
    assert set(config_fields()["lora"]) >= MANAGED_LORA


def test_the_command_prints_both():
    printed = {flag: CliRunner().invoke(cli, ["config", *flag]).output for flag in [(), ("--defaults",), ("--schema",)]}
    assert printed[()] == printed["--defaults",] == config_defaults() + "\n"
    assert json.loads(printed["--schema",]) == config_schema()


# --- numbers ---


def numeric_keys(model: type[BaseModel] = RunConfig, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys of all sections whose values are numbers."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from numeric_keys(field.annotation, (*path, name))
        elif any(kind in str(field.annotation) for kind in ("int", "float")):
            yield (*path, name)


@pytest.mark.parametrize("written", ["true", "no", "0x10"])
@pytest.mark.parametrize("path", numeric_keys(), ids=".".join)
def test_a_number_is_not_a_word_and_not_a_number_of_another_base(path, written):
    text = "".join(f"\n{'  ' * depth}{key}: " for depth, key in enumerate(path)) + written
    with pytest.raises(RejectedError) as error:
        load_run_config(text.encode(), default_model="base")
    assert {problem.key for problem in error.value.problems} == {".".join(path)}
