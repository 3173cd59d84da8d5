"""An estimate of a run's steps, tokens, hours and dollars before any money is spent: ranges, and the assumptions in words.

The model of a GPU has two parts. Generation reads all weights for every token: memory bandwidth bounds it, and software adds
time to every step. Training is bound by arithmetic. A Lambda cannot know the share of a GPU that a run reaches: the low end
of a range is a run that goes well, the high end a run that goes badly.
"""

from collections.abc import Sequence
from math import ceil
from typing import Any, NamedTuple

from pipeline.validation.section import Section
from pipeline.validation.terms import Prices, Terms
from tunedrop.config.instances import Gpu, gpu, gpus
from tunedrop.config.model import ResolvedConfig, RunConfig
from tunedrop.config.schedule import (
    evaluation_interval,
    gate_prompts,
    generated_answers,
    generation_batch,
    limit_of_tests,
    optimizer_steps,
    prompt_limit,
    sft_steps,
)
from tunedrop.problems import Problem
from tunedrop.rewards import RewardSpec

# Minutes around each of the two jobs: start of the container, installation, download and merge of the model.
OVERHEAD_MINUTES = (3.0, 12.0)
# The share of a GPU's arithmetic that training reaches: at best, and at worst by the model's size in billions of parameters.
BEST_UTILISATION = 0.5
WORST_UTILISATION = ((1.0, 0.05), (8.0, 0.15), (float("inf"), 0.25))
# Operations per parameter and token: at least a forward pass and a backward pass through frozen weights; at most also a
# recomputed forward pass and two more, for a reference and for old log-probabilities.
FLOPS_PER_TOKEN = (4.0, 10.0)
# The share of the memory bandwidth that generation reaches; seconds that software adds per token.
BANDWIDTH = (0.8, 0.3)
TOKEN_SECONDS = (0.012, 0.06)
# AWS names savings of "up to 90 %" for managed spot training, and publishes no price list.
SPOT_PRICE = (0.1, 1.0)
# The default quota "Longest run time for a training job" (https://docs.aws.amazon.com/general/latest/gr/sagemaker.html).
LONGEST_RUNTIME = 5 * 86400
# The batch of prompts that the test job answers at once.
TEST_BATCH = 32
# Tokens of a judge's instructions and rubric.
INSTRUCTION_TOKENS = 250

Range = tuple[float, float]


class Work(NamedTuple):
    """A run's work: training rows, rows that choose the checkpoint, inference tests, and the model's parameters.

    `prompt_tokens` and `answer_tokens` are the means of a row.
    """

    rows: int
    choosing: int
    tests: int
    prompt_tokens: float
    answer_tokens: float
    parameters: float | None


def estimate(config: ResolvedConfig, work: Work, terms: Terms) -> Section:
    """Return the section about the cost; its receipt is the receipt's `cost`.

    A run is rejected only if even the low end on its cheapest instance type exceeds `compute.max_cost_usd`, the lower of the
    user's limit and the stack's.
    """
    compute = config.compute
    instances = [_on_instance(config, work, name, terms.prices) for name in compute.instance_type]
    processes = compute.instance_count * (gpus(compute.instance_type[0]) or 1)
    sft = config.method == "sft"
    answers = 0 if sft else generated_answers(config, work.rows, processes)
    receipt = {
        "steps": (sft_steps if sft else optimizer_steps)(config, work.rows, processes),
        "answers": answers,
        "parameters": work.parameters,
        "prompt_tokens": round(answers * _prompt(config, work)),
        "generated_tokens": [round(answers * tokens) for tokens in _completion(config, work)],
        "instances": instances,
        "services": {
            spec.label: _requests(config, work, spec, processes) for spec in config.rewards if spec.reward_type.waits
        },
        "limit_usd": compute.max_cost_usd,
        "serving": serving(config, terms),
        "prices": {"dated": terms.prices.dated, "region": terms.prices.region} if terms.prices else None,
        "assumptions": _assumptions(config, work, terms.prices),
    }
    problems, warnings = _check_cost(config, work, instances, terms)
    return Section(receipt, problems, warnings + _check_time(config, instances))


def _requests(config: ResolvedConfig, work: Work, spec: RewardSpec, processes: int) -> dict[str, Any]:
    """Return the requests that a reward sends to its service in the run's jobs, and the tokens that they hold, as a range.

    Some requests fall away, because equal answers are scored once, and some are sent again.
    """
    kind, parameters = spec.reward_type, spec.parameters
    group, samples = config.grpo_value("num_generations"), config.learnability.samples

    def parts(answers: float, of_row: int) -> int:
        return ceil(answers / kind.per_request(parameters, of_row))

    answers = generated_answers(config, work.rows, processes)
    interval = evaluation_interval(config, work.rows, work.choosing, processes)
    evaluations = ceil(optimizer_steps(config, work.rows, processes) / interval) if work.choosing and interval else 0
    requests = {
        "learnability": parts(gate_prompts(config, work.rows, processes) * samples, max(1, samples)),
        "training": parts(answers, group),
        "evaluations": evaluations * parts(work.choosing, 1),
        "tests": 2 * work.tests,  # base and tuned model
    }
    total = sum(requests.values())
    # A judge also reads the row's own answer.
    texts = kind.per_request(parameters, group)
    tokens = [
        round(total * (INSTRUCTION_TOKENS + _prompt(config, work) + work.answer_tokens + texts * each))
        for each in _completion(config, work)
    ]
    return {"requests": total, "by_part": requests, "tokens": tokens}


def serving(config: RunConfig, terms: Terms) -> dict[str, Any] | None:
    """Return what it costs to serve the model once it is approved; None if the stack does not serve the line on an endpoint.

    An endpoint without requests has no instance, and costs nothing. Bedrock's price depends on the units that it finds for
    the imported model.
    """
    if not (terms.endpoint_instance_type and config.serve.enabled) or config.serve.target == "bedrock":
        return None
    name = config.serve.instance_type or terms.endpoint_instance_type
    price = terms.prices.hosting.get(name) if terms.prices else None
    return {"instance_type": name, "busy_usd_per_hour": price, "idle_usd_per_hour": 0.0}


def _check_cost(
    config: ResolvedConfig, work: Work, instances: Sequence[dict[str, Any]], terms: Terms
) -> tuple[list[Problem], list[str]]:
    limit = config.compute.max_cost_usd
    if limit is None:
        return [], []
    whose = "the stack's limit MaxRunCostUsd" if limit == terms.max_run_cost_usd else "compute.max_cost_usd"
    lows = [each["usd"][0] for each in instances if each["usd"]]
    if not lows:
        return [], [f"{whose} cannot be checked: {_unknown(instances, work, terms.prices)}"]
    if min(lows) <= limit:
        return [], []
    message = f"the run will cost at least ${min(lows):.2f} by estimate, more than {whose} of ${limit:.2f}"
    hint = "fewer rows, epochs, generations or tokens, a smaller model or another instance type; or raise the limit"
    return [Problem("COST_LIMIT", message, hint, key="compute.max_cost_usd")], []


def _check_time(config: ResolvedConfig, instances: Sequence[dict[str, Any]]) -> list[str]:
    limit, warnings = config.compute.max_runtime, []
    quickest = min((each["training_hours"][0] for each in instances if each["training_hours"]), default=0.0)
    if quickest * 3600 > limit:
        warnings.append(
            f"training will take at least {quickest:.1f} h by estimate, more than compute.max_runtime of "
            f"{limit / 3600:.1f} h, which will end it: raise max_runtime, or lower rows, epochs or generations"
        )
    if limit > LONGEST_RUNTIME:
        warnings.append(
            f"compute.max_runtime is {limit / 3600:.0f} h; SageMaker refuses jobs of more than {LONGEST_RUNTIME // 3600} h "
            "unless you raise the account's quota 'Longest run time for a training job'"
        )
    return warnings


def _prompt(config: ResolvedConfig, work: Work) -> float:
    return min(work.prompt_tokens, prompt_limit(config))


def _completion(config: ResolvedConfig, work: Work) -> Range:
    """Return the mean tokens of a completion: at least those of the dataset's answers, at most the config's limit."""
    most = float(config.grpo_value("max_completion_length"))
    return min(max(work.answer_tokens, 1.0), most), most


def _on_instance(config: ResolvedConfig, work: Work, name: str, prices: Prices | None) -> dict[str, Any]:
    card, count = gpu(name), config.compute.instance_count
    price = prices.on_demand.get(name) if prices else None
    hours = training = usd = None
    if card and work.parameters:
        low, high = _training_hours(config, work, card, count * (gpus(name) or 1))
        training = (low, max(low, min(high, config.compute.max_runtime / 3600)))
        testing = _testing_hours(config, work, card)
        hours = tuple(train + test for train, test in zip(training, testing, strict=True))
        if price is not None:
            factors = SPOT_PRICE if config.compute.spot else (1.0, 1.0)
            usd = tuple(
                price * factor * (count * train + test)
                for factor, train, test in zip(factors, training, testing, strict=True)
            )
    return {
        "instance_type": name,
        "gpu": card.name if card else None,
        "hours": _rounded(hours),
        "training_hours": _rounded(training),
        "usd_per_hour": price,
        "usd": _rounded(usd),
    }


def _rounded(values: Sequence[float] | None) -> list[float] | None:
    return None if values is None else [round(value, 3) for value in values]


def _token_seconds(parameters: float, card: Gpu, at_once: float) -> Range:
    """Return the seconds of one step of generation, which gives one token to each of `at_once` answers."""
    low, high = (
        max(
            2 * parameters / (card.bandwidth * 1e9 * share),
            2 * parameters * at_once / (card.tflops * 1e12 * BEST_UTILISATION),
        )
        for share in BANDWIDTH
    )
    return low + TOKEN_SECONDS[0], high + TOKEN_SECONDS[1]


def _worst_utilisation(parameters: float) -> float:
    return next(share for size, share in WORST_UTILISATION if parameters / 1e9 <= size)


def _training_hours(config: ResolvedConfig, work: Work, card: Gpu, processes: int) -> Range:
    assert work.parameters is not None
    sft = config.method == "sft"
    answers = 0 if sft else generated_answers(config, work.rows, processes)
    learned = work.rows * config.sft.num_train_epochs if sft else answers * config.grpo_value("num_iterations")
    batch = generation_batch(config, processes)
    batches = ceil(answers / batch)
    step = _token_seconds(work.parameters, card, batch / processes)
    ends = []
    for end, utilisation in ((0, BEST_UTILISATION), (1, _worst_utilisation(work.parameters))):
        completion = _completion(config, work)[end]
        tokens = learned * (_prompt(config, work) + completion) / processes
        generating = batches * completion * step[end]
        training = tokens * work.parameters * FLOPS_PER_TOKEN[end] / (card.tflops * 1e12 * utilisation)
        ends.append((generating + training) / 3600 + OVERHEAD_MINUTES[end] / 60)
    return ends[0], ends[1]


def _testing_hours(config: ResolvedConfig, work: Work, card: Gpu) -> Range:
    """Return the hours of the test job: base and tuned model answer every test, in batches, on one GPU."""
    assert work.parameters is not None
    step = _token_seconds(work.parameters, card, TEST_BATCH)
    ends = []
    for end in (0, 1):
        completion = (_completion(config, work)[0], limit_of_tests(config, 0))[end]
        tokens = 2 * ceil(work.tests / TEST_BATCH) * completion
        ends.append(tokens * step[end] / 3600 + OVERHEAD_MINUTES[end] / 60)
    return ends[0], ends[1]


def _unknown(instances: Sequence[dict[str, Any]], work: Work, prices: Prices | None) -> str:
    names = ", ".join(each["instance_type"] for each in instances)
    if not work.parameters:
        return "the model's size is unknown"
    if prices is None:
        return "no prices are known (`python -m release` reads them from AWS)"
    return f"the price or the GPU's figures are unknown for {names}"


def _assumptions(config: ResolvedConfig, work: Work, prices: Prices | None) -> list[str]:
    low, most = _completion(config, work)
    worst = _worst_utilisation(work.parameters or 0)
    size = f"{work.parameters / 1e9:.3g} billion parameters" if work.parameters else "model size unknown: no hours"
    return [
        size,
        f"answers of {low:.0f} tokens (the dataset's mean) to {most:.0f} tokens (max_completion_length)",
        f"answers to tests of at most {limit_of_tests(config, 0)} tokens",
        f"training reaches {worst:.0%} to {BEST_UTILISATION:.0%} of the GPU's 16-bit arithmetic",
        f"generation reads the weights at {BANDWIDTH[1]:.0%} to {BANDWIDTH[0]:.0%} of the memory's bandwidth",
        f"software adds {TOKEN_SECONDS[0] * 1000:.0f} to {TOKEN_SECONDS[1] * 1000:.0f} ms to each token",
        f"each of the two jobs takes {OVERHEAD_MINUTES[0]:.0f} to {OVERHEAD_MINUTES[1]:.0f} minutes to start and end",
        f"training ends after max_runtime ({config.compute.max_runtime / 3600:.1f} h) at the latest",
        *([_without_warm_start(config)] if config.method == "grpo" and config.warm_start.policy != "never" else []),
        *(["spot costs between a tenth of the on-demand price and the whole of it"] if config.compute.spot else []),
        f"prices of {prices.dated} in {prices.region}" if prices else "no price known",
        "without storage, requests, and the price of services that rewards call (cost.services counts these requests)",
    ]


def _without_warm_start(config: ResolvedConfig) -> str:
    return f"without a warm start, which takes at most {config.warm_start.max_share:.0%} of max_runtime"
