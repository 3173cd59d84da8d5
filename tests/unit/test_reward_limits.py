"""No completion and no answer makes a reward fail, or takes long: the table that every reward must pass."""

import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reward_cases import CASES

from tunedrop.rewards import NO_PERMISSIONS, REWARDS, Reward, RewardError, RewardSpec, Sample
from tunedrop.rewards.default import choose_rewards

# CPU seconds of a completion, where the faults that this table has found took minutes. A deadline counts, and is a failure.
SECONDS = 2.0
SIZE = 200_000
OWN = sorted(name for name, type_ in REWARDS.items() if not type_.external and not type_.per_batch)
# What models and rows have that repeats, opens without end, nests, or is a number that no code expects.
PIECES = [
    *(
        "<answer>",
        "</answer>",
        "<think>",
        "</think>",
        "<tool_call>",
        "<reasoning>",
        "\\boxed{",
        "{",
        "}",
        "[",
        "(",
        '"',
        "“",
    ),
    *(
        "```\n",
        "```json\n",
        " ",
        "\n",
        "\t \n",
        "a",
        "a ",
        "A",
        "A) ",
        "answer ",
        "answer is ",
        "option: ",
        "*",
        "9",
        "9,",
        "9^",
        "9^{",
    ),
    *(
        "[1",
        "[1,",
        "[1 ,",
        "[1], ",
        "#### ",
        "$",
        "\\frac{",
        "{}, ",
        '{"a":',
        "-",
        "!",
        ".",
        "'a' ",
        '"a b c" ',
        "é",
        "\ud800",
        "\0",
    ),
]
TEXTS = {
    "repeated": lambda piece, size: piece * (size // len(piece)),
    "spaced": lambda piece, size: f"{piece} " * (size // (len(piece) + 1)),
    "after spaces": lambda piece, size: " " * (size // 2) + piece * (size // 2 // len(piece)),
    "in a list": lambda piece, size: (
        "[" + ", ".join(['"' + piece.replace('"', "") + '"'] * (size // (len(piece) + 4))) + "]"
    ),
}
WHOLE = {
    "a number of 5,000 digits": "9" * 5000,
    "a citation of 5,000 digits": f"as in [{'9' * 5000}]",
    "a tower": "\\boxed{9^{9^{9^9}}}",
    "a plain tower": "9**9**9**9",
    "a factorial": "99999!",
    "factorials": "9!!!!",
    "a large power": "$9^{999999999}$",
    "nested JSON": "[" * 900 + "]" * 900,
    "deep JSON": '{"a":' * 900 + "1" + "}" * 900,
    "list of objects": "[" + "{}," * 60_000 + "{}]",
    "infinite": '{"name": Infinity}',
    "1e999": '{"name": 1e999, "age": 1e999}',
    "calls": '<tool_call>{"name": "weather", "arguments": {}}</tool_call>' * 3000,
}


def reward_of(name: str) -> Reward:
    return Reward(RewardSpec.model_validate({"type": name, **CASES[name][0][0]}))


def check(reward: Reward, completion: str, answer: str) -> None:
    """A completion never fails a reward. An answer may: it is the dataset's mistake, and validation finds it."""
    started = time.process_time()
    (score,) = reward.score_samples([Sample(completion, answer, "What is it?")])
    with suppress(RewardError):
        reward.score_samples([Sample(completion, completion, completion)])
    assert time.process_time() - started < SECONDS
    assert reward.expired == 0
    assert score is None or -1 <= score <= 1


@pytest.mark.parametrize("name", OWN)
def test_whole_completions(name):
    reward = reward_of(name)
    for completion in WHOLE.values():
        check(reward, completion, CASES[name][0][2])


@pytest.mark.parametrize("name", OWN)
def test_repeated_pieces(name):
    reward = reward_of(name)
    for piece in PIECES:
        check(reward, TEXTS["repeated"](piece, 50_000), CASES[name][0][2])


@pytest.mark.soak
@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("text", TEXTS)
def test_all_pieces(name, text):
    reward = reward_of(name)
    for piece in PIECES:
        check(reward, TEXTS[text](piece, SIZE), CASES[name][0][2])


@pytest.mark.soak
@pytest.mark.parametrize("name", OWN)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mixed_pieces(name, data):
    pieces = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join)
    repeated = st.tuples(pieces, st.sampled_from([1, 3, 5_000]), pieces).map(lambda part: part[0] * part[1] + part[2])
    check(reward_of(name), data.draw(repeated), CASES[name][0][2])


@pytest.mark.parametrize(
    "formula", ["1 / c", "log(c)", "sqrt(c - 1)", "(c - 1) ^ 0.5", "9 ^ 9 ^ (9 + c)", "exp(9999 + c)", "floor(1, c)"]
)
def test_a_formula_without_a_value_abstains(formula):
    check = {"type": "string_check", "input": "{{sample.output_text}}", "reference": "a", "operation": "eq"}
    grader = {"type": "multi", "graders": {"c": check}, "calculate_output": formula}
    reward = Reward(RewardSpec.model_validate({"type": "openai_grader", "grader": grader}))
    assert reward.score_samples([Sample("b", "")]) == [None]


def test_the_default_reward_is_chosen_in_time():
    for text in [*(TEXTS["repeated"](piece, SIZE) for piece in PIECES), *WHOLE.values()]:
        started = time.process_time()
        choose_rewards([{"prompt": [{"role": "user", "content": text}], "answer": text}] * 3, NO_PERMISSIONS)
        assert time.process_time() - started < SECONDS, text[:20]


def test_a_pattern_that_backtracks_without_end_abstains(monkeypatch):
    monkeypatch.setattr("tunedrop.rewards.reward.SECONDS", 0.2)
    reward = Reward(RewardSpec.model_validate({"type": "regex", "pattern": "(a+)+$"}))
    samples = [Sample("a" * 40 + "b", ""), Sample("a", "")]
    assert reward.score_samples(samples) == [None, 1.0]
    assert reward.expired == 1
