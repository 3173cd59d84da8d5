"""Rules between a config's values: contradictions, instance types that cannot run the config, and unusual values."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tunedrop.config.instances import gpus, has_bf16, why_not
from tunedrop.config.model import RunConfig
from tunedrop.config.schedule import generation_batch
from tunedrop.problems import Problem
from tunedrop.rewards import check_names

# The deepest models have some 130 layers.
MAX_LAYERS = 1000


def _targets(config: RunConfig) -> list[str]:
    return [config.lora.target_modules] if isinstance(config.lora.target_modules, str) else config.lora.target_modules


def _lora(config: RunConfig, key: str) -> Any:
    return config.lora.peft_kwargs().get(key)


def _clip_max(config: RunConfig) -> float | None:
    """Return vllm_importance_sampling_clip_max, which TRL replaces by its older name's value if a config has that."""
    cap: float | None = config.grpo_value("vllm_importance_sampling_cap")
    return config.grpo_value("vllm_importance_sampling_clip_max") if cap is None else cap


def _replicates(pairs: list[Any]) -> bool:
    """Return whether `layer_replication` has pairs of a first layer and an end, and not too many layers."""
    return (
        all(
            isinstance(pair, list)
            and len(pair) == 2
            and all(type(layer) is int for layer in pair)
            and 0 <= pair[0] < pair[1]
            for pair in pairs
        )
        and sum(end - begin for begin, end in pairs) <= MAX_LAYERS
    )


def _part_of_a_step(steps: float) -> bool:
    return steps > 1 and steps != int(steps)


def _mapping(value: dict[str, Any] | str | None) -> dict[str, Any]:
    """Return a field's mapping; a text holds it as JSON."""
    return json.loads(value) if isinstance(value, str) else value or {}


# What TRL, Transformers and PEFT refuse only once a GPU runs: the key to change, the condition, and the reason.
RULES: list[tuple[str, Callable[[RunConfig], Any], str]] = [
    (
        "grpo.num_generations",
        lambda config: config.grpo_value("num_generations") is None,
        "must be a number of at least 2: an advantage compares answers within a group",
    ),
    (
        "grpo.use_vllm",
        lambda config: config.grpo_value("use_vllm"),
        "the jobs' image has no vLLM: leave use_vllm out, and the trainer samples, with one prefill per group",
    ),
    (
        "grpo.fp16",
        lambda config: config.grpo_value("fp16") and config.grpo_value("bf16"),
        "fp16 and bf16 exclude each other: turn one of them off",
    ),
    (
        "grpo.generation_batch_size",
        lambda config: config.grpo_value("generation_batch_size") and config.grpo_value("steps_per_generation"),
        "generation_batch_size and steps_per_generation set the same size: give one of them",
    ),
    (
        "grpo.auto_find_batch_size",
        lambda config: config.grpo_value("auto_find_batch_size"),
        "GRPO needs whole groups in a batch, and an automatic batch size breaks them: lower per_device_train_batch_size",
    ),
    (
        "grpo.sync_ref_model",
        lambda config: config.grpo_value("sync_ref_model"),
        "a LoRA run has no reference model to synchronise: its reference is the base model without the adapter",
    ),
    (
        "grpo.lr_scheduler_type",
        lambda config: config.grpo_value("lr_scheduler_type") in {"reduce_lr_on_plateau", "greedy"},
        "this scheduler needs evaluations during training, and a run has none: use linear, cosine or constant",
    ),
    (
        "grpo.max_completion_length",
        lambda config: config.grpo_value("max_completion_length") is None,
        "must be a number of tokens: without a limit an answer may never end",
    ),
    (
        "max_seq_length",
        lambda config: config.max_seq_length and config.max_seq_length <= (config.grpo_value("max_completion_length") or 0),
        "leaves no room for a prompt beside grpo.max_completion_length: raise max_seq_length or lower max_completion_length",
    ),
    (
        "grpo.dataloader_prefetch_factor",
        lambda config: config.grpo_value("dataloader_prefetch_factor") and not config.grpo_value("dataloader_num_workers"),
        "only workers prefetch: set dataloader_num_workers too",
    ),
    (
        "grpo.logging_steps",
        lambda config: _part_of_a_step(config.grpo_value("logging_steps")),
        "must be a whole number of steps, or below 1 (a share of the run's steps)",
    ),
    (
        "grpo.save_steps",
        lambda config: _part_of_a_step(config.grpo_value("save_steps")),
        "must be a whole number of steps, or below 1 (a share of the run's steps)",
    ),
    (
        "grpo.fp16_full_eval",
        lambda config: config.grpo_value("fp16_full_eval") and config.grpo_value("bf16_full_eval"),
        "fp16_full_eval and bf16_full_eval exclude each other: turn one of them off",
    ),
    (
        "grpo.accelerator_config",
        lambda config: _mapping(config.grpo_value("accelerator_config")).get("use_configured_state"),
        "use_configured_state needs a state that a script has made before: leave it out",
    ),
    (
        "grpo.vllm_importance_sampling_clip_max",
        lambda config: (
            config.grpo_value("vllm_importance_sampling_correction")
            and config.grpo_value("vllm_importance_sampling_mode").endswith("_truncate")
            and config.grpo_value("vllm_importance_sampling_clip_min") is None
            and _clip_max(config) is None
        ),
        "a vllm_importance_sampling_mode that truncates needs vllm_importance_sampling_clip_min or …_clip_max",
    ),
    (
        "grpo.vllm_importance_sampling_clip_min",
        lambda config: (
            (low := config.grpo_value("vllm_importance_sampling_clip_min")) is not None
            and (high := _clip_max(config)) is not None
            and low >= high
        ),
        "must be below vllm_importance_sampling_clip_max",
    ),
    (
        "sampling.policy",
        lambda config: config.sampling.policy == "teach" and config.grpo_value("shuffle_dataset") is False,
        "teach takes the prompts in an order of its own: leave grpo.shuffle_dataset out, or use uniform",
    ),
    (
        "sampling.policy",
        lambda config: config.sampling.policy == "teach" and config.grpo_value("fsdp"),
        "GPUs that share a model's weights must sample the same number of groups, and teach refills any number: use uniform",
    ),
    (
        "grpo.fsdp",
        lambda config: config.grpo_value("fsdp") and (config.method == "sft" or config.warm_start.policy == "always"),
        "supervised fine-tuning does not shard the weights: leave grpo.fsdp out, or use method: grpo without a warm start",
    ),
    (
        "reference",
        lambda config: config.reference == "start" and config.grpo_value("beta") and config.grpo_value("fsdp"),
        "the start's copy of the weights does not fit weights that GPUs share: use base, or leave grpo.fsdp out",
    ),
    (
        "lora.target_modules",
        lambda config: any(name.endswith("lm_head") for name in _targets(config)),
        "an adapter on lm_head would never be trained: TRL computes log-probabilities from lm_head's own weights",
    ),
    (
        "lora.target_modules",
        lambda config: (
            isinstance(config.lora.target_modules, str)
            and (_lora(config, "layers_to_transform") is not None or _lora(config, "layers_pattern") is not None)
        ),
        "must be a list of module names if layers_to_transform or layers_pattern selects layers",
    ),
    (
        "lora.target_modules",
        lambda config: not config.lora.target_modules and not _lora(config, "target_parameters"),
        "an adapter needs modules: name some, or write all-linear",
    ),
    (
        "lora.layers_pattern",
        lambda config: _lora(config, "layers_pattern") and _lora(config, "layers_to_transform") is None,
        "says where the layers are that layers_to_transform selects: set layers_to_transform too",
    ),
    (
        "lora.loftq_config",
        lambda config: _lora(config, "init_lora_weights") == "loftq" and not _lora(config, "loftq_config"),
        "init_lora_weights: loftq needs loftq_config, such as {loftq_bits: 4}",
    ),
    (
        "lora.use_bdlora",
        lambda config: (
            not set(_mapping(_lora(config, "use_bdlora")).get("target_modules_bd_a") or []).isdisjoint(
                _mapping(_lora(config, "use_bdlora")).get("target_modules_bd_b") or []
            )
        ),
        "target_modules_bd_a and target_modules_bd_b must have no module in common",
    ),
    (
        "lora.layer_replication",
        lambda config: not _replicates(_lora(config, "layer_replication") or []),
        f"must be pairs of layers such as [[0, 16], [8, 24]], first below last, of at most {MAX_LAYERS} layers together",
    ),
    (
        "lora.lora_bias",
        lambda config: _lora(config, "lora_bias"),
        "PEFT merges these biases into layers with biases only, and most models have layers without: turn lora_bias off",
    ),
]


def check_rules(config: RunConfig) -> list[Problem]:
    """Return the contradictions between a config's values."""
    try:
        check_names(config.rewards)
    except ValueError as error:
        return [Problem("CONFIG_VALUE", str(error)[:600])]
    if config.rewards and not any(spec.weight > 0 for spec in config.rewards):
        return [Problem("CONFIG_VALUE", "no reward has a weight above 0: there is nothing to learn")]
    return [Problem("CONFIG_VALUE", f"{key}: {reason}", key=key) for key, broken, reason in RULES if broken(config)]


def check_instances(config: RunConfig, instance_types: Sequence[str], image: str = "") -> list[Problem]:
    """Return what these instance types cannot run.

    `instance_types` are the config's, or the stack's if the config names none. `image` is the jobs' container image, empty
    if unknown. No instance types (jobs on this machine): no problem.
    """
    problems = []
    for name in instance_types:
        if reason := why_not(name, image):
            hint = "choose another, such as ml.g5.xlarge"
            if config.compute.instance_type is None:
                hint += ": it is one of the stack's InstanceTypes"
            problems.append(_instance_problem("compute.instance_type", f"{name} cannot run the job: {reason}", hint))
        else:
            problems += _check_gpus(config, name)
    return problems


def _check_gpus(config: RunConfig, name: str) -> Iterator[Problem]:
    """Yield what the GPUs of an instance type cannot do for this config."""
    count = gpus(name)
    if config.lora.load_in_4bit and count == 0:
        hint = "choose an instance type with a GPU, such as ml.g5.xlarge, or turn it off"
        yield _instance_problem("lora.load_in_4bit", f"lora.load_in_4bit needs a GPU and {name} has none", hint)
    for key, number in (("bf16", "bf16"), ("bf16_full_eval", "bf16"), ("tf32", "TF32")):
        # CPUs compute in bf16. TF32 is a format of the GPUs that compute in bf16.
        if config.grpo_value(key) and (not has_bf16(name) or (key == "tf32" and count == 0)):
            hint = (
                "leave it out, or choose ml.g5 or newer" if key == "tf32" else "set fp16 instead, or choose ml.g5 or newer"
            )
            yield _instance_problem(f"grpo.{key}", f"{name} does not compute in {number}", hint)
    processes = config.compute.instance_count * (count or 1)
    batch, group = generation_batch(config, processes), config.grpo_value("num_generations")
    once = config.grpo_value("per_device_train_batch_size") * processes
    if batch % group or batch % once:
        message = (
            f"a generation batch of {batch} is not a multiple of num_generations ({group}) and of the {once} completions "
            f"that the {processes} GPUs of {name} take at once"
        )
        hint = f"set generation_batch_size to a multiple of {math.lcm(group, once)}"
        yield _instance_problem("grpo.generation_batch_size", message, hint)
    elif batch // processes % group and any(spec.reward_type.ranks for spec in config.rewards):
        message = (
            f"each of the {processes} GPUs of {name} generates {batch // processes} completions at a time, which are no "
            f"whole groups of num_generations ({group}), and a reward ranks the completions of a group"
        )
        hint = f"set generation_batch_size to a multiple of {math.lcm(group * processes, once)}"
        yield _instance_problem("grpo.generation_batch_size", message, hint)


def _instance_problem(key: str, message: str, hint: str) -> Problem:
    return Problem("CONFIG_INSTANCE", message, hint, key=key)


def config_warnings(config: RunConfig) -> list[str]:
    """Return a warning for each value that TRL accepts and that is probably a mistake."""
    return [warning for unusual, warning in _warnings(config) if unusual]


def _warnings(config: RunConfig) -> Iterator[tuple[bool, str]]:
    rate, temperature = config.grpo_value("learning_rate"), config.grpo_value("temperature")
    group, beta, completion = (config.grpo_value(key) for key in ("num_generations", "beta", "max_completion_length"))
    yield (
        rate > 7e-4,
        f"grpo.learning_rate {rate:g} is high, and GRPO may diverge: 1e-5 to 1e-4 is common, 7e-4 for few steps",
    )
    yield rate < 1e-7, f"grpo.learning_rate {rate:g} is low: below 1e-7 an adapter hardly changes; 1e-5 to 1e-4 is common"
    yield (
        temperature < 0.3,
        f"grpo.temperature {temperature:g} is low: answers to one prompt will be alike and teach nothing",
    )
    yield temperature > 1.5, f"grpo.temperature {temperature:g} is high: most answers will be noise"
    yield group < 4, f"grpo.num_generations {group} is small: a small group gives a noisy advantage"
    yield beta > 0.5, f"grpo.beta {beta:g} is high: the tuned model will stay close to its base"
    limit = config.tests.max_completion_length
    yield (
        limit is not None and limit < completion,
        f"tests.max_completion_length {limit} is below grpo.max_completion_length {completion}: tests will cut more answers",
    )
    yield completion < 16, f"grpo.max_completion_length {completion} is short: answers will be cut off"
    room = (config.max_seq_length or math.inf) - completion
    yield config.max_prompt_length > room, f"max_seq_length leaves prompts {room} tokens, fewer than max_prompt_length"
    yield config.lora.r > 256, f"lora.r {config.lora.r} is large: it costs memory and seldom helps above 64"
    form = sum(spec.weight for spec in config.rewards if spec.reward_type.measures == "form")
    other = sum(spec.weight for spec in config.rewards if spec.reward_type.measures != "form")
    yield form > other, "the rewards pay more for the format than for the answer"
