"""The estimate of a run's cost, and the rejection of a run that costs too much."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.validation import cost
from pipeline.validation.cost import Work
from pipeline.validation.model_files import ModelFiles, parameters_of
from pipeline.validation.terms import Prices, Terms, resolve
from tunedrop.config.instances import _GPUS, gpu
from tunedrop.config.parse import parse_run_config

PRICES = Prices("2026-11-24", "eu-central-1", {"ml.g5.xlarge": 2.0, "ml.g5.12xlarge": 10.0, "ml.c5.xlarge": 0.3})
WORK = Work(rows=2000, choosing=64, tests=100, prompt_tokens=150.0, answer_tokens=60.0, parameters=0.6e9)
G5 = ["ml.g5.xlarge"]


def config(**given):
    return parse_run_config({"model": "m"} | given)


def stack(prices=None, spot=False, max_run_cost_usd=None):
    """The terms of a stack."""
    return Terms([], spot, max_run_cost_usd, prices=prices)


def estimate(config, work, instance_types, terms):
    """The section about the cost of a config on a stack with these instance types."""
    terms = terms._replace(instance_types=instance_types)
    return cost.estimate(resolve(config, terms), work, terms)


def low_high(receipt, key="usd", at=0):
    low, high = receipt["instances"][at][key]
    assert 0 < low <= high
    return low, high


def test_a_known_run_in_full():
    receipt, problems, warnings = estimate(config(), WORK, G5, stack(PRICES))
    # One epoch of 2000 rows, 8 answers each; a step trains on 8 answers.
    assert (receipt["steps"], receipt["answers"]) == (2000, 16000)
    assert receipt["prompt_tokens"] == 16000 * 150
    assert receipt["generated_tokens"] == [16000 * 60, 16000 * 256]
    assert receipt["prices"] == {"dated": "2026-11-24", "region": "eu-central-1"}
    (instance,) = receipt["instances"]
    assert (instance["instance_type"], instance["gpu"], instance["usd_per_hour"]) == ("ml.g5.xlarge", "A10G", 2.0)
    assert instance["usd"] == pytest.approx([2 * hours for hours in instance["hours"]], abs=0.01)
    # 2000 generations of 60 to 256 tokens, at 14 and 67 ms; 3.4 and 6.5 million tokens at 4 to 10 operations for each
    # parameter, at 35 and 3.5 TFLOPS; 3 to 12 minutes besides.
    assert instance["training_hours"][0] == pytest.approx(
        (2000 * 60 * 0.0145 + 3.36e6 * 0.6e9 * 4 / 35e12 + 180) / 3600, abs=0.02
    )
    assert instance["training_hours"][1] == 6.0  # max_runtime
    assert any("5% to 50%" in each for each in receipt["assumptions"])
    assert (problems, warnings) == ([], [])
    json.dumps(receipt, allow_nan=False)


@pytest.mark.parametrize(
    "more",
    [
        {"work": WORK._replace(rows=4000)},
        {"work": WORK._replace(parameters=7e9)},
        {"work": WORK._replace(answer_tokens=120.0)},
        {"grpo": {"num_train_epochs": 2}},
        {"grpo": {"num_generations": 16}},
        {"grpo": {"num_iterations": 4}},
    ],
)
def test_more_work_costs_more(more):
    usual, _, _ = estimate(config(), WORK, G5, stack(PRICES))
    receipt, _, _ = estimate(config(grpo=more.get("grpo", {})), more.get("work", WORK), G5, stack(PRICES))
    assert low_high(receipt)[0] > low_high(usual)[0]


def test_four_gpus_are_faster_and_cost_more():
    grpo = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    slow, _, _ = estimate(config(grpo=grpo), WORK, [*G5, "ml.g5.12xlarge"], stack(PRICES))
    assert low_high(slow, "hours", 1)[0] < low_high(slow, "hours")[0]
    assert low_high(slow, "usd", 1)[0] > low_high(slow, "hours", 1)[0] * 9.9


def test_every_instance_of_the_training_job_is_paid_and_one_of_the_test_job():
    one, _, _ = estimate(config(), WORK, G5, stack(PRICES))
    two, _, _ = estimate(config(compute={"instance_count": 2}), WORK, G5, stack(PRICES))
    (instance,) = two["instances"]
    testing = instance["hours"][0] - instance["training_hours"][0]
    assert instance["usd"][0] == pytest.approx(2 * (2 * instance["training_hours"][0] + testing), abs=0.01)
    assert instance["training_hours"][0] < one["instances"][0]["training_hours"][0]


def test_spot_is_a_wide_range_and_the_config_decides():
    full = low_high(estimate(config(), WORK, G5, stack(PRICES))[0])
    for spot in (stack(PRICES, spot=True), stack(PRICES)):
        given = {} if spot.spot else {"compute": {"spot": True}}
        receipt, _, _ = estimate(config(**given), WORK, G5, spot)
        assert low_high(receipt) == (pytest.approx(full[0] / 10, abs=0.01), full[1])
        assert any("tenth of the on-demand price" in each for each in receipt["assumptions"])
    receipt, _, _ = estimate(config(compute={"spot": False}), WORK, G5, stack(PRICES, spot=True))
    assert low_high(receipt) == full


@given(
    st.integers(1, 10**6),
    st.integers(1, 10**4),
    st.floats(0, 1e5),
    st.floats(0, 1e5),
    st.floats(1e6, 1e12),
    st.sampled_from(["ml.g5.xlarge", "ml.g5.12xlarge"]),
    st.booleans(),
)
@settings(deadline=None)
def test_the_low_end_is_never_above_the_high_one(rows, tests, prompt, answer, parameters, instance, spot):
    work = Work(rows, rows // 10, tests, prompt, answer, parameters)
    receipt, problems, _ = estimate(config(), work, [instance], stack(PRICES, spot))
    for key in ("hours", "training_hours", "usd"):
        low_high(receipt, key)
    assert receipt["generated_tokens"][0] <= receipt["generated_tokens"][1]
    assert problems == []


def test_a_config_is_resolved_with_the_stacks_values_and_keeps_its_own():
    terms = Terms(G5, spot=True, max_run_cost_usd=50)
    compute = resolve(config(), terms).compute
    assert (compute.instance_type, compute.spot, compute.max_cost_usd) == (G5, True, 50)
    own = {"instance_type": ["ml.g6.xlarge"], "spot": False, "max_cost_usd": 9}
    resolved = resolve(config(compute=own), terms)
    assert own.items() <= resolved.compute.model_dump().items()
    assert resolve(config(compute={"max_cost_usd": 60}), terms).compute.max_cost_usd == 50
    assert resolve(resolved, Terms(["ml.p5.48xlarge"])) == resolved
    # The trainer reads the same values from input/config.json.
    assert parse_run_config(json.loads(resolved.model_dump_json())).model_dump() == resolved.model_dump()


LIMITS = [
    # compute.max_cost_usd, the stack's limit, words of the message
    (0.5, None, "more than compute.max_cost_usd of $0.50"),
    (None, 0.5, "more than the stack's limit MaxRunCostUsd of $0.50"),
    (100, 0.5, "the stack's limit"),
    (0.5, 100, "compute.max_cost_usd"),
    (100, None, ""),
    (100, 100, ""),
    (None, None, ""),
]


@pytest.mark.parametrize(("own", "deployments", "words"), LIMITS)
def test_only_what_cannot_fit_is_refused(own, deployments, words):
    compute = {} if own is None else {"max_cost_usd": own}
    receipt, problems, warnings = estimate(config(compute=compute), WORK, G5, stack(PRICES, max_run_cost_usd=deployments))
    assert [problem.code for problem in problems] == ["COST_LIMIT"] * bool(words)
    assert all(words in problem.message for problem in problems)
    assert warnings == []
    assert receipt["limit_usd"] == min((limit for limit in (own, deployments) if limit), default=None)


def test_the_cheapest_of_several_instance_types_decides():
    dear, cheap = "ml.g5.12xlarge", "ml.g5.xlarge"
    low = low_high(estimate(config(), WORK, [cheap], stack(PRICES))[0])[0]
    compute = config(compute={"max_cost_usd": low * 1.1})
    assert [problem.code for problem in estimate(compute, WORK, [dear], stack(PRICES))[1]] == ["COST_LIMIT"]
    assert estimate(compute, WORK, [dear, cheap], stack(PRICES))[1] == []


UNKNOWN = [
    (WORK._replace(parameters=None), G5, stack(PRICES), "the model's size is unknown"),
    (WORK, G5, stack(), "no prices are known"),
    (WORK, ["ml.g6.xlarge"], stack(PRICES), "are unknown for ml.g6.xlarge"),
    (WORK, ["ml.c5.xlarge"], stack(PRICES), "are unknown for ml.c5.xlarge"),
]


@pytest.mark.parametrize(("work", "types", "terms", "words"), UNKNOWN)
def test_unknown_prices_or_sizes_warn_and_do_not_reject(work, types, terms, words):
    receipt, problems, warnings = estimate(config(compute={"max_cost_usd": 0.01}), work, types, terms)
    assert receipt["instances"][0]["usd"] is None
    assert problems == []
    assert words in warnings[0]
    assert estimate(config(), work, types, terms)[1:] == ([], [])


def test_a_run_that_cannot_end_in_time_warns():
    _, problems, warnings = estimate(config(compute={"max_runtime": "10m"}), WORK, G5, stack())
    assert problems == []
    assert "more than compute.max_runtime of 0.2 h, which will end it" in warnings[0]


@pytest.mark.parametrize(("hours", "said"), [(120, False), (121, True)])
def test_more_than_an_accounts_longest_runtime_is_said(hours, said):
    _, problems, warnings = estimate(config(compute={"max_runtime": f"{hours}h"}), WORK, G5, stack())
    assert problems == []
    assert any("SageMaker refuses jobs of more than 120 h unless" in warning for warning in warnings) == said


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("SmolLM2-135M-Instruct", 135e6),
        ("Qwen/Qwen3-0.6B", 0.6e9),
        ("Qwen2.5-7B-Instruct-1M", 7e9),
        ("meta-llama/Llama-3.2-1b", 1e9),
        ("mine", None),
    ],
)
def test_the_size_in_a_models_name(model, expected):
    assert parameters_of(model, None) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"torch_dtype": "bfloat16"}, 135e6), ({"dtype": "float32"}, 67.5e6), ({}, 135e6), ({"dtype": "auto"}, 135e6)],
)
def test_the_size_from_the_weights_and_their_type(tmp_path, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ModelFiles({"config.json": 1, "a.safetensors": 200_000_000, "b.safetensors": 70_000_000}, tmp_path, "")
    assert parameters_of("mine-2B", model) == expected
    assert parameters_of("mine-2B", model._replace(sizes={"config.json": 1})) == 2e9  # no weights there
    (tmp_path / "config.json").write_text("[")  # which is a problem of its own
    assert parameters_of("mine-2B", model) == 135e6


def test_every_gpu_family_has_its_figures():
    known = {family: gpu(f"ml.{family}.24xlarge") for family in _GPUS}
    assert {family for family, found in known.items() if found is None} == {"p2"}  # SageMaker retired it


def test_the_receipt_says_what_serving_costs_busy_and_idle():
    terms = stack(PRICES._replace(hosting={"ml.g5.xlarge": 1.75}))._replace(endpoint_instance_type="ml.g5.xlarge")

    def serving(terms=terms, **serve):
        return estimate(config(serve=serve), WORK, G5, terms)[0]["serving"]

    busy = {"instance_type": "ml.g5.xlarge", "busy_usd_per_hour": 1.75, "idle_usd_per_hour": 0.0}
    assert serving() == busy
    assert serving(instance_type="ml.g6.xlarge") == busy | {"instance_type": "ml.g6.xlarge", "busy_usd_per_hour": None}
    assert serving(terms._replace(prices=None)) == busy | {"busy_usd_per_hour": None}
    assert serving(enabled=False) is serving(target="bedrock") is None
    assert serving(terms._replace(endpoint_instance_type="")) is None


SERVICES = [
    # One epoch of 2000 rows, 8 answers each; ten evaluations of 64 rows; 16 prompts of the gate, 8 answers each.
    ({"type": "judge", "model": "m"}, {}, {"learnability": 128, "training": 16000, "evaluations": 640, "tests": 200}),
    ({"type": "judge_group", "model": "m"}, {}, {"learnability": 16, "training": 2000, "evaluations": 640, "tests": 200}),
    (
        {"type": "http", "url": "https://x", "batch_size": 64},
        {},
        {"learnability": 2, "training": 250, "evaluations": 10, "tests": 200},
    ),
    (
        {"type": "judge_group", "model": "m"},
        {"learnability": {"samples": 0}, "grpo": {"num_iterations": 2, "max_steps": 100}},
        {"learnability": 0, "training": 50, "evaluations": 64, "tests": 200},
    ),
    (
        {"type": "judge_group", "model": "m"},
        {"learnability": {"policy": "drop"}},
        {"learnability": 200, "training": 2000, "evaluations": 640, "tests": 200},
    ),
]


@pytest.mark.parametrize(("reward", "given_config", "requests"), SERVICES)
def test_the_requests_to_a_rewards_service_are_counted(reward, given_config, requests):
    receipt, _, _ = estimate(config(rewards=[{"type": "exact_match"}, reward], **given_config), WORK, G5, stack(PRICES))
    assert list(receipt["services"]) == [reward["type"]]
    service = receipt["services"][reward["type"]]
    assert (service["by_part"], service["requests"]) == (requests, sum(requests.values()))
    assert 0 < service["tokens"][0] < service["tokens"][1]


def test_a_judge_that_ranks_reads_a_question_once_for_all_its_answers():
    alone, together = (
        estimate(config(rewards=[{"type": kind, "model": "m"}]), WORK, G5, stack())[0]["services"][kind]["tokens"]
        for kind in ("judge", "judge_group")
    )
    assert together[0] < alone[0] / 2
