"""How a run's steps follow from its config: batches, steps, completions, evaluations, and the lengths of prompts.

`processes` is the number of GPUs of all instances, 1 without a GPU: one training process runs on each GPU.
"""

import math

from tunedrop.config.instances import gpus
from tunedrop.config.model import RunConfig
from tunedrop.problems import Problem

EVALUATIONS = 10  # in a run, including the last one at its end
EVALUATION_SHARE = 0.1  # largest number of evaluated completions per sampled completion
# The learnability gate may use a tenth of the run's completions. A short run needs more: up to GATE_SHORT prompts, and up to
# all completions. After GATE_MOST prompts without a difference, at least 1 % of groups with a gradient are improbable
# (0.99^300 < 5 %). Most runs need no more than the first block.
GATE_SHARE, GATE_SHORT, GATE_MOST = 0.1, 24, 300
FIRST_GATE_PROMPTS = 16


def generation_batch(config: RunConfig, processes: int = 1) -> int:
    """Return how many completions TRL generates at once: whole groups of `num_generations`."""
    steps = config.grpo_value("steps_per_generation") or config.grpo_value("gradient_accumulation_steps")
    size = config.grpo_value("generation_batch_size") or config.grpo_value("per_device_train_batch_size") * processes * steps
    return int(size)


def fit_batches(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Return the config with a generation batch that holds whole groups, and the corrections in words for the receipt.

    The batch fits every number of GPUs that the config's instance types have. `generation_batch_size` is raised to the next
    size that fits. If the config has none, `gradient_accumulation_steps` (or `steps_per_generation`) is raised instead.
    With a reward that ranks the answers of a group, each GPU generates whole groups.
    """
    group, per_gpu = config.grpo_value("num_generations"), config.grpo_value("per_device_train_batch_size")
    counts = {config.compute.instance_count * (gpus(name) or 1) for name in config.compute.instance_type or ["ml.any.one"]}
    value = config.grpo_value("generation_batch_size")
    ranks = any(spec.reward_type.ranks for spec in config.rewards)
    if value is not None:
        whole = group * math.lcm(*counts) if ranks else group
        key, unit = "generation_batch_size", math.lcm(whole, *(per_gpu * count for count in counts))
        reason = f"a multiple of num_generations ({group}) and of {per_gpu} completions per GPU"
    else:
        key = "steps_per_generation" if config.grpo_value("steps_per_generation") else "gradient_accumulation_steps"
        value = config.grpo_value(key)
        unit = math.lcm(*(group // math.gcd(group, per_gpu * count) for count in ({1} if ranks else counts)))
        reason = f"a generation batch must hold whole groups of num_generations ({group}) completions"
    fitted = -(-value // unit) * unit
    if fitted == value:
        return config, []
    return config.model_copy(update={"grpo": config.grpo | {key: fitted}}), [f"grpo.{key} {value} → {fitted}: {reason}"]


def optimizer_steps(config: RunConfig, rows: int, processes: int = 1) -> int:
    """Return the number of optimizer steps over `rows` training rows. TRL drops an incomplete last batch."""
    if config.grpo_value("max_steps") > 0:
        return int(config.grpo_value("max_steps"))
    batch = generation_batch(config, processes)
    batches = rows * config.grpo_value("num_generations") // batch
    per_epoch = batches * batch * config.grpo_value("num_iterations") // _per_step(config, processes)
    return math.ceil(config.grpo_value("num_train_epochs") * max(per_epoch, 1)) if batches else 0


def sft_steps(config: RunConfig, rows: int, processes: int = 1) -> int:
    """Return about how many optimizer steps supervised fine-tuning over `rows` rows takes."""
    per_process = -(-config.sft.rows_per_step // processes) * processes
    return max(1, math.ceil(config.sft.num_train_epochs * rows / per_process))


def generated_answers(config: RunConfig, rows: int, processes: int = 1) -> int:
    """Return how many completions a run over `rows` rows samples. Training uses each `num_iterations` times."""
    completions = optimizer_steps(config, rows, processes) * _per_step(config, processes)
    return int(completions // config.grpo_value("num_iterations"))


def _per_step(config: RunConfig, processes: int) -> int:
    """Return how many completions one optimizer step trains on."""
    per_gpu, accumulated = (config.grpo_value(key) for key in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    return int(per_gpu * processes * accumulated)


def evaluation_steps(max_steps: int, completions_per_step: float, rows: int) -> int:
    """Return the number of steps between two evaluations of `rows` rows.

    It does not depend on measured times: an interrupted run chooses among the same checkpoints as an uninterrupted one.
    """
    return max(math.ceil(max_steps / EVALUATIONS), math.ceil(rows / (EVALUATION_SHARE * completions_per_step)))


def evaluation_interval(config: RunConfig, rows: int, heldout: int, processes: int = 1) -> int:
    """Return the number of steps between two evaluations of `heldout` rows, in a run over `rows` training rows."""
    steps = optimizer_steps(config, rows, processes)
    if not heldout:
        return steps
    return evaluation_steps(steps, _per_step(config, processes) / config.grpo_value("num_iterations"), heldout)


def most_gate_prompts(completions_of_run: int, samples: int) -> int:
    """Return how many prompts the learnability gate may ask, for a run's completions and its samples per prompt."""
    short = min(GATE_SHORT, completions_of_run // samples)
    return max(1, min(GATE_MOST, max(short, int(completions_of_run * GATE_SHARE / samples))))


def gate_prompts(config: RunConfig, rows: int, processes: int = 1) -> int:
    """Return how many prompts the learnability gate will probably ask: its first block, or all that it may with `drop`."""
    samples = config.learnability.samples
    if samples == 0:
        return 0
    most = most_gate_prompts(generated_answers(config, rows, processes), samples)
    return most if config.learnability.policy == "drop" else min(FIRST_GATE_PROMPTS, most)


def check_steps(config: RunConfig, rows: int, processes: int = 1) -> list[Problem]:
    """Return a problem if `rows` training rows are too few for one optimizer step."""
    prompts = generation_batch(config, processes) // config.grpo_value("num_generations")
    if rows >= prompts:
        return []
    message = f"{rows} training rows are too few: one optimizer step takes {prompts} prompts"
    hint = "add rows, or lower per_device_train_batch_size, gradient_accumulation_steps or generation_batch_size"
    return [Problem("CONFIG_STEPS", message, hint, key="grpo.per_device_train_batch_size")]


def prompt_limit(config: RunConfig) -> int:
    """Return how many tokens a prompt may have: `max_prompt_length`, or less if `max_seq_length` leaves less."""
    if config.max_seq_length is None:
        return config.max_prompt_length
    return min(config.max_prompt_length, config.max_seq_length - int(config.grpo_value("max_completion_length")))


def limit_of_tests(config: RunConfig, longest: int) -> int:
    """Return how many tokens an answer to an inference test may have.

    `longest` is the number of tokens of the longest expected answer. The default lets a base model finish that training has
    not taught to be brief: a limit that cuts only its answers would make a lift.
    """
    default = max(2 * int(config.grpo_value("max_completion_length")), longest + 1)  # the end of an answer is a token, too
    return config.tests.max_completion_length or default


def check_lengths(config: RunConfig, context: int) -> list[Problem]:
    """Return a problem if the config's lengths exceed the model's context (`max_position_embeddings`, in tokens)."""
    completion = config.grpo_value("max_completion_length")
    if config.max_seq_length is not None:
        if config.max_seq_length <= context:
            return []
        message = f"max_seq_length {config.max_seq_length} exceeds the model's context of {context} tokens"
        return [Problem("CONFIG_LENGTH", message, f"lower it to {context}", key="max_seq_length")]
    if config.max_prompt_length + completion <= context:
        return []
    message = (
        f"max_prompt_length {config.max_prompt_length} plus grpo.max_completion_length {completion} exceeds the model's "
        f"context of {context} tokens"
    )
    room = context - completion
    hint = f"lower max_prompt_length to {room}" if room > 0 else f"lower max_completion_length below {context}"
    key = "max_prompt_length" if room > 0 else "grpo.max_completion_length"
    return [Problem("CONFIG_LENGTH", message, hint, key=key)]
