"""What a run will cost, before it is spent: steps, tokens, hours and dollars as ranges, with the assumptions in words.

The model of a GPU has two parts. Writing an answer reads all weights for every token, so it is bound by memory bandwidth
and by what software adds to each step; training on it is bound by arithmetic. How much of a GPU either reaches depends on
more than can be known beforehand: a low and a high end stand for a run that goes well and one that does not.
"""

from collections.abc import Sequence
from math import ceil
from typing import Any, NamedTuple

from tunedrop.config.instances import Gpu, gpu, gpus
from tunedrop.config.model import RunConfig, generated_answers, optimizer_steps, prompt_limit
from tunedrop.problems import Problem

# Around each of the two jobs: starting the container, installing, downloading and merging the model.
OVERHEAD_MINUTES = (3.0, 12.0)
# Share of a GPU's arithmetic that training reaches at best, and at worst by the model's size (billions of parameters).
BEST_UTILISATION = 0.5
WORST_UTILISATION = ((1.0, 0.05), (8.0, 0.15), (float("inf"), 0.25))
# Operations per parameter and token: forward and, through frozen weights, backward; at most also a recomputed forward
# and two more, for a reference and for old log-probabilities.
FLOPS_PER_TOKEN = (4.0, 10.0)
# Share of the memory bandwidth that generation reaches, and seconds that software adds per token: transformers, vLLM.
BANDWIDTH = (0.8, 0.3)
TOKEN_SECONDS = {False: (0.012, 0.06), True: (0.002, 0.015)}
# "Up to 90 %" less than on demand is what AWS says of managed spot training; there is no price list.
SPOT_PRICE = (0.1, 1.0)
CHARACTERS_PER_TOKEN = 4
# How long a training job may run in an account that has not asked for more ("Longest run time for a training job",
# https://docs.aws.amazon.com/general/latest/gr/sagemaker.html).
LONGEST_RUNTIME = 5 * 86400

Range = tuple[float, float]


class Work(NamedTuple):
    """What a run has to do: its training rows, its inference tests, mean tokens of a row, and the model's parameters."""

    rows: int
    tests: int
    prompt_tokens: float
    answer_tokens: float
    parameters: float | None


class Prices(NamedTuple):
    """SageMaker's training prices in USD an hour by instance type, and when and for where they were read."""

    dated: str
    region: str
    on_demand: dict[str, float]


class Terms(NamedTuple):
    """What a deployment has to say about money: prices from its launch plan, spot or not, and its limit for a run."""

    prices: Prices | None = None
    spot: bool = False
    max_run_cost_usd: float | None = None


NO_TERMS = Terms()


def estimate(
    config: RunConfig, work: Work, instance_types: Sequence[str], terms: Terms
) -> tuple[dict[str, Any], list[Problem], list[str]]:
    """Return the receipt's `cost`, why the run is refused for its cost, and what about the cost is worth knowing.

    `instance_types` are the config's, else the deployment's. A run is refused only when even the low end of the cheapest
    of them is above the config's `max_cost_usd` or the deployment's limit.
    """
    spot = terms.spot if config.compute.spot is None else config.compute.spot
    limits = [limit for limit in (config.compute.max_cost_usd, terms.max_run_cost_usd) if limit is not None]
    limit = min(limits, default=None)
    instances = [_on_instance(config, work, name, terms.prices, spot) for name in instance_types]
    completion = int(config.grpo_value("max_completion_length"))
    processes = config.compute.instance_count * (gpus(instance_types[0]) or 1)
    answers = generated_answers(config, work.rows, processes)
    receipt = {
        "steps": optimizer_steps(config, work.rows, processes),
        "answers": answers,
        "prompt_tokens": round(answers * _prompt(config, work)),
        "generated_tokens": [round(answers * tokens) for tokens in _completion(config, work)],
        "instances": instances,
        "limit_usd": limit,
        "prices": {"dated": terms.prices.dated, "region": terms.prices.region} if terms.prices else None,
        "assumptions": _assumptions(config, work, terms.prices, spot, completion),
    }
    problems: list[Problem] = []
    warnings: list[str] = []
    lows = [each["usd"][0] for each in instances if each["usd"]]
    if limit is not None and lows and min(lows) > limit:
        whose = "compute.max_cost_usd" if limit == config.compute.max_cost_usd else "the deployment's limit MaxRunCostUsd"
        message = f"the run is estimated at ${min(lows):.2f} at least, more than {whose} of ${limit:.2f}"
        hint = "fewer rows, epochs, generations or tokens, a smaller model or another instance type; or raise the limit"
        problems.append(Problem("COST_LIMIT", message, hint, key="compute.max_cost_usd"))
    if config.compute.max_cost_usd is not None and not lows:
        warnings.append(f"compute.max_cost_usd cannot be checked: {_unknown(instances, work, terms.prices)}")
    quickest = min((each["training_hours"][0] for each in instances if each["training_hours"]), default=0.0)
    if quickest * 3600 > config.compute.max_runtime:
        warnings.append(
            f"training is estimated at {quickest:.1f} h at least, more than compute.max_runtime of "
            f"{config.compute.max_runtime / 3600:.1f} h, which will end it: raise that, or lower rows, epochs or generations"
        )
    if config.compute.max_runtime > LONGEST_RUNTIME:
        warnings.append(
            f"compute.max_runtime is {config.compute.max_runtime / 3600:.0f} h; SageMaker refuses jobs of more than "
            f"{LONGEST_RUNTIME // 3600} h unless the account's quota 'Longest run time for a training job' was raised"
        )
    return receipt, problems, warnings


def _prompt(config: RunConfig, work: Work) -> float:
    return min(work.prompt_tokens, prompt_limit(config))


def _completion(config: RunConfig, work: Work) -> Range:
    """Return the mean tokens of a completion: at least what the dataset's answers have, at most what is allowed."""
    most = float(config.grpo_value("max_completion_length"))
    return min(max(work.answer_tokens, 1.0), most), most


def _on_instance(config: RunConfig, work: Work, name: str, prices: Prices | None, spot: bool) -> dict[str, Any]:
    found, count = gpu(name), config.compute.instance_count
    price = prices.on_demand.get(name) if prices else None
    hours = training = usd = None
    if found and work.parameters:
        processes = count * (gpus(name) or 1)
        longest = config.compute.max_runtime / 3600
        low, high = _training_hours(config, work, found, processes)
        training = (low, max(low, min(high, longest)))
        testing = _testing_hours(config, work, found)
        hours = tuple(one + other for one, other in zip(training, testing, strict=True))
        if price is not None:
            factors = SPOT_PRICE if spot else (1.0, 1.0)
            usd = tuple(
                price * factor * (count * one + other) for factor, one, other in zip(factors, training, testing, strict=True)
            )
    return {
        "instance_type": name,
        "gpu": found.name if found else None,
        "hours": _rounded(hours),
        "training_hours": _rounded(training),
        "usd_per_hour": price,
        "usd": _rounded(usd),
    }


def _rounded(values: Sequence[float] | None) -> list[float] | None:
    return None if values is None else [round(value, 3) for value in values]


def _token_seconds(config: RunConfig, parameters: float, on: Gpu, at_once: float) -> Range:
    """Return how long one step of generation takes, which gives a token to each of `at_once` answers."""
    added = TOKEN_SECONDS[bool(config.grpo_value("use_vllm"))]
    low, high = (
        max(2 * parameters / (on.bandwidth * 1e9 * share), 2 * parameters * at_once / (on.tflops * 1e12 * BEST_UTILISATION))
        for share in BANDWIDTH
    )
    return low + added[0], high + added[1]


def _training_hours(config: RunConfig, work: Work, on: Gpu, processes: int) -> Range:
    assert work.parameters is not None
    answers = generated_answers(config, work.rows, processes)
    batch = config.generation_batch(processes)
    batches = ceil(answers / batch)
    worst = next(share for size, share in WORST_UTILISATION if work.parameters / 1e9 <= size)
    step = _token_seconds(config, work.parameters, on, batch / processes)
    ends = []
    for end, utilisation in ((0, BEST_UTILISATION), (1, worst)):
        completion = _completion(config, work)[end]
        tokens = answers * config.grpo_value("num_iterations") * (_prompt(config, work) + completion) / processes
        generating = batches * completion * step[end]
        training = tokens * work.parameters * FLOPS_PER_TOKEN[end] / (on.tflops * 1e12 * utilisation)
        ends.append((generating + training) / 3600 + OVERHEAD_MINUTES[end] / 60)
    return ends[0], ends[1]


def _testing_hours(config: RunConfig, work: Work, on: Gpu) -> Range:
    """Return the hours of the test job: base and tuned model answer every test, in batches, on one GPU."""
    assert work.parameters is not None
    at_once = 32
    step = _token_seconds(config, work.parameters, on, at_once)
    ends = []
    for end in (0, 1):
        tokens = 2 * ceil(work.tests / at_once) * _completion(config, work)[end]
        ends.append(tokens * step[end] / 3600 + OVERHEAD_MINUTES[end] / 60)
    return ends[0], ends[1]


def _unknown(instances: Sequence[dict[str, Any]], work: Work, prices: Prices | None) -> str:
    names = ", ".join(each["instance_type"] for each in instances)
    if not work.parameters:
        return "the size of the model is not known"
    if prices is None:
        return "no prices are known (python -m release reads them from AWS)"
    return f"no price, or no figures of a GPU, are known for {names}"


def _assumptions(config: RunConfig, work: Work, prices: Prices | None, spot: bool, completion: int) -> list[str]:
    low, _ = _completion(config, work)
    worst = next((share for size, share in WORST_UTILISATION if (work.parameters or 0) / 1e9 <= size), 0.0)
    added = TOKEN_SECONDS[bool(config.grpo_value("use_vllm"))]
    size = (
        f"{work.parameters / 1e9:.3g} billion parameters"
        if work.parameters
        else "the size of the model is not known: no hours"
    )
    return [
        size,
        f"answers of {low:.0f} tokens (as the dataset's) to {completion} (max_completion_length)",
        f"training reaches {worst:.0%} to {BEST_UTILISATION:.0%} of the GPU's 16-bit arithmetic",
        f"generation reads the weights at {BANDWIDTH[1]:.0%} to {BANDWIDTH[0]:.0%} of the memory's bandwidth",
        f"software adds {added[0] * 1000:.0f} to {added[1] * 1000:.0f} ms to each token",
        f"each of the two jobs takes {OVERHEAD_MINUTES[0]:.0f} to {OVERHEAD_MINUTES[1]:.0f} minutes besides",
        f"training ends after max_runtime ({config.compute.max_runtime / 3600:.1f} h) at the latest",
        *(["spot costs a tenth of the on-demand price at best, and the same at worst"] if spot else []),
        f"prices of {prices.dated} in {prices.region}" if prices else "no price known",
        "without storage, requests and what rewards call",
    ]
