"""The preflight: bad rewards are refused or warned about, and good rewards pass without warnings."""

import json
import random
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from answering_server import ranking
from hypothesis import given, settings
from hypothesis import strategies as st

import tunedrop_cli.sample
from pipeline.validation.candidates import WRONG
from pipeline.validation.preflight import FEW_ROWS, check_rewards
from tunedrop.config.parse import load_run_config, parse_run_config
from tunedrop.dataset.rows import read_rows
from tunedrop.inference_tests import InferenceTest, parse_tests
from tunedrop.rewards import RewardPermissions, build_rewards

SAMPLE = Path(tunedrop_cli.sample.__file__).parent
CITIES = {"Italy": "Rome", "France": "Paris", "Spain": "Madrid", "Japan": "Tokyo", "Peru": "Lima", "Kenya": "Nairobi"}


def row(number, question, answer, **columns):
    return {"id": f"r{number}", "prompt": [{"role": "user", "content": question}], "answer": answer} | columns


def capitals(**columns):
    return [row(n, f"Which is the capital of {of}?", city, **columns) for n, (of, city) in enumerate(CITIES.items())]


def with_system(rows, text):
    return [each | {"prompt": [{"role": "system", "content": text}, *each["prompt"]]} for each in rows]


SUMS = [row(n, f"How much is {n} plus {n + 11}?", str(2 * n + 11)) for n in range(12, 20)]
SOLVED = [
    row(n, f"Solve x + {n} = 10.", f"We subtract {n}. #### {10 - n}", Reasoning=f"Take {n} from 10.") for n in range(2, 9)
]
PICKS = [
    row(n, f"Which is right?\nA) {n}\nB) {n + 1}\nC) {n + 2}\nD) {n + 3}", letter) for n, letter in enumerate("ABCDABCDBACD")
]
CALLS = [
    row(n, f"Weather in {city}?", json.dumps({"name": "weather", "arguments": {"city": city}}))
    for n, city in enumerate(CITIES.values())
]
PROGRAMS = [
    row(n, f"Write add{n}.", f"def add{n}(a): return a + {n}", tests=[f"assert add{n}(1) == {n + 1}"]) for n in range(6)
]
ESSAYS = [
    row(n, f"Write about {word}.", f"The {word} is a thing of beauty, and people have long cared for every {word} they met.")
    for n, word in enumerate("river mountain garden forest desert island".split())
]
XML_PROMPT = "Think in <reasoning></reasoning>, then answer in <answer></answer>."


PROGRAMS_ALLOWED = RewardPermissions(allow_code=True)


def tried(rows, rewards, permissions=PROGRAMS_ALLOWED, tests=(), **config):
    parsed = parse_run_config({"model": "m", "rewards": rewards} | config)
    built = build_rewards(parsed.rewards, permissions)
    return check_rewards(built, rows, parsed, tests, trained_rows=len(rows))


def reward(kind, **given):
    return {"type": kind} | given


ANYTHING = {
    "type": "string_check",
    "name": "c",
    "operation": "ne",
    "input": "{{sample.output_text}}",
    "reference": "",
}
GOOD = {
    "exact match": (capitals(), [reward("exact_match")]),
    "numbers": (SUMS, [reward("numeric")]),
    "mathematics": (SUMS, [reward("math")]),
    "multiple choice, its options in the prompt": (PICKS, [reward("multiple_choice")]),
    "tool calls": (CALLS, [reward("tool_call")]),
    "programs": (PROGRAMS, [reward("code_tests")]),
    "a grader of form": (
        capitals(),
        [reward("openai_grader", grader=ANYTHING), reward("length", maximum=5)],
    ),
    "similarity": (ESSAYS, [reward("similarity"), reward("rouge", weight=0.5)]),
    "relevance": (ESSAYS, [reward("relevance")]),
    "an answer with its way, of which the number counts": (SOLVED, [reward("numeric")]),
    "xml, strict, with a column Reasoning": (
        [each | {"answer": each["answer"][-1]} for each in SOLVED],
        [reward("xml_format", weight=0.5), reward("exact_match", weight=2.0)],
    ),
    "xml that the system message asks for, and a regex for it": (
        with_system(capitals(), XML_PROMPT),
        [reward("regex", pattern="<answer>", weight=0.1), reward("exact_match")],
    ),
    "thinking, gated": (
        capitals(),
        [reward("think_format", weight=0.2), reward("exact_match", only_if="think_format")],
    ),
    "boxed": (
        with_system(SUMS, r"Put the answer in \boxed{}."),
        [reward("math"), reward("regex", pattern="boxed", weight=0.1)],
    ),
    "lengths": (ESSAYS, [reward("length", minimum=5, maximum=40)]),
    "a penalty beside the answer": (capitals(), [reward("exact_match"), reward("overlong_penalty", maximum=200)]),
    "form alone": (capitals(), [reward("xml_format"), reward("repetition_penalty")]),
    "an answer of the schema": (
        [each | {"answer": json.dumps({"city": each["answer"]})} for each in capitals()],
        [reward("json_schema", schema={"type": "object", "required": ["city"]})],
    ),
    "keywords of a column": (
        [each | {"terms": [each["answer"]]} for each in capitals()],
        [reward("keywords", column="terms")],
    ),
}


@pytest.mark.parametrize(("rows", "rewards"), GOOD.values(), ids=GOOD)
def test_good_rewards_pass_without_warnings(rows, rewards):
    found = tried(rows, rewards)
    assert found.problems == []
    assert found.warnings == []
    answers = {each["kind"]: each["mean"] for each in found.receipt["answers"]}
    assert answers["gold"] > answers["empty"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["counting", "additions"])
def test_the_samples_pass_without_warnings(name, seed):
    config = load_run_config((SAMPLE / f"{name}.yaml").read_bytes(), default_model="m")
    rows: list[Any] = list(read_rows(SAMPLE / f"{name}.jsonl", config))
    tests = parse_tests((SAMPLE / f"{name}.tests.json").read_bytes(), config)
    if seed:
        random.Random(seed).shuffle(rows)
    found = check_rewards(build_rewards(config.rewards), rows, config, tests, trained_rows=len(rows))
    assert (found.problems, found.warnings, found.receipt["rows"]) == ([], [], 32)


BAD = {
    # rows, rewards, code of the problem, words of it
    "answers that are no numbers": (
        capitals(),
        [reward("numeric")],
        "REWARD_CONSTANT",
        "every answer scores 0, right or wrong",
    ),
    "a bar that nothing reaches": (
        capitals(),
        [reward("similarity", clip=[-2, -1])],
        "REWARD_CONSTANT",
        "every answer scores -1, right or wrong",
    ),
    "an echo of the prompt": (
        [row(n, f"Say '{city}'.", city) for n, city in enumerate(CITIES.values())],
        [reward("contains")],
        "REWARD_PAYS_WRONG",
        "a copy of the prompt scores 1",
    ),
    "whatever is long": (
        [row(n, f"Letter {n}?", letter) for n, letter in enumerate("aeiou")],
        [reward("contains")],
        "REWARD_PAYS_WRONG",
        "a long meaningless text scores 1",
    ),
    "the form more than the answer": (
        capitals(),
        [reward("xml_format"), reward("exact_match", weight=0.01), reward("length", maximum=3, weight=4.0)],
        "REWARD_PAYS_WRONG",
        "on average the dataset's answers score 1.01, and an empty answer scores 4",
    ),
    "a mistyped column": (
        [each | {"terms": ["x"]} for each in capitals()],
        [reward("keywords", column="term"), reward("exact_match")],
        "REWARD_FAILS",
        "'r0' asking 'Which is the capital of Italy.* no column 'term'",
    ),
    "one answer for all": (
        [row(n, f"Is {n} fine?", "no") for n in range(9)],
        [reward("math")],
        "REWARD_CONSTANT",
        "right or wrong",
    ),
    "a schema for an answer": (capitals(), [reward("tool_call")], "REWARD_FAILS", "needs a row whose answer is a tool call"),
}


@pytest.mark.parametrize(("rows", "rewards", "code", "words"), BAD.values(), ids=BAD)
def test_rewards_that_prefer_wrong_answers_are_refused_with_the_reason(rows, rewards, code, words):
    found = tried(rows, rewards)
    assert code in {problem.code for problem in found.problems}
    assert all(problem.hint for problem in found.problems)
    assert re.search(words, "\n".join(problem.message for problem in found.problems))
    lenient = tried(rows, rewards, preflight={"on_failure": "warn"})
    assert lenient.problems == []
    assert len(lenient.warnings) == len(found.warnings) + len(found.problems)


def test_a_constant_or_abstaining_reward_is_a_warning_beside_a_good_reward():
    found = tried(capitals(), [reward("exact_match"), reward("math"), reward("regex", pattern="^")])
    assert found.problems == []
    assert [warning.split(":")[0] for warning in found.warnings] == [
        "reward 'math' abstained on every answer",
        "reward 'regex' gave 1 to every answer, right or wrong, and teaches nothing",
    ]


def test_ties_in_most_rows_are_a_warning():
    rows = [row(n, f"Say {city}." if n else "Hm?", city) for n, city in enumerate(CITIES.values())]
    found = tried(rows, [reward("contains")])
    assert found.problems == []
    (warning,) = found.warnings
    assert warning.startswith("in 5 of 6 rows, a copy of the prompt scores at least as high as the row's answer")


def test_an_answer_that_holds_unit_tests_is_not_expected_to_win():
    rows = [row(n, f"Write add{n}.", f"assert add{n}(1) == {n + 1}") for n in range(6)]
    found = tried(rows, [reward("code_tests")])
    assert found.problems == []
    assert [warning[:43] for warning in found.warnings] == ["reward 'code_tests' gave 0 to every answer,"]


def test_a_reward_that_every_answer_earns_is_refused():
    found = tried(capitals(), [reward("length", maximum=10_000), reward("regex", pattern="ipsum", weight=0.1)])
    assert [problem.code for problem in found.problems] == ["REWARD_CONSTANT"]
    assert "all score 1 on average" in found.problems[0].message


def test_a_reward_that_only_the_datasets_words_earn_is_named():
    rows = [row(n, f"{n} + 1?", f"{n} and 1 make\n#### {n + 1}") for n in range(8)]
    found = tried(rows, [reward("contains")])
    assert found.problems == []
    assert any("(final answer alone) score 0.00 ('1')" in warning for warning in found.warnings)
    assert not any("word for word" in warning for warning in tried(rows, [reward("numeric")]).warnings)


def test_rewards_for_form_alone_are_never_refused():
    found = tried(capitals(), [reward("regex", pattern="^never$"), reward("length", minimum=1, maximum=10_000)])
    assert found.problems == []
    assert ["regex" in warning for warning in found.warnings] == [True]


def test_a_row_may_have_columns_named_as_trls_lists():
    assert tried(capitals(prompts="a", completions="b"), [reward("exact_match")]).problems == []


def test_with_0_rows_the_preflight_does_nothing():
    assert tried(capitals(), [reward("numeric")], preflight={"rows": 0}) == ({}, [], [])


def test_the_receipt_shows_the_best_wrong_answer_and_each_reward():
    rows = [row(n, f"Is it {city}?", city) for n, city in enumerate(CITIES.values())]
    found = tried(rows, [reward("contains"), reward("overlong_penalty", maximum=3, buffer=2, weight=0.5)])
    best = found.receipt["best_wrong"]
    assert (best["kind"], best["text"], best["score"], best["gold_score"]) == ("echo", "Is it Rome?", 0.5, 1.0)
    assert (best["row"], best["gold"]) == ("r0", "Rome")
    contains = found.receipt["by_reward"]["contains"]
    assert contains["mean"] == dict.fromkeys(["gold", "final", "sentence", "spaced", "echo"], 1.0) | dict.fromkeys(
        ["empty", "other_row", "long"], 0.0
    )
    assert (contains["lowest"], contains["highest"], contains["abstained"]) == (0.0, 1.0, 0.0)
    assert 0 <= contains["p50_ms"] <= contains["p95_ms"]
    json.dumps(found.receipt, allow_nan=False)


def test_the_preflight_scores_inference_tests():
    rows = [each | {"terms": [each["answer"]]} for each in capitals()]
    rewards = [reward("keywords", column="terms")]
    ask = [{"role": "user", "content": "Which?"}]
    good = InferenceTest(id="t1", prompt=ask, reference="Rome", columns={"terms": ["Rome"]})
    assert tried(rows, rewards, tests=[good]).problems == []
    (problem,) = tried(rows, rewards, tests=[good, InferenceTest(id="t2", prompt=ask, reference="Rome")]).problems
    assert "inference test 't2'" in problem.message
    assert "no column 'terms'" in problem.message


SOME = [
    reward("exact_match"),
    reward("numeric", weight=-1.0),
    reward("contains", clip=[0.2, 0.4]),
    reward("xml_format", mode="partial"),
    reward("length", only_if="xml_format"),
    reward("similarity"),
    reward("relevance"),
    reward("tool_call"),
    reward("json_schema"),
]


@given(
    st.lists(st.tuples(st.text(), st.text()), max_size=6),
    st.lists(st.sampled_from(SOME), unique_by=str, min_size=1),
    st.text(),
)
@settings(max_examples=60, deadline=None)
def test_any_rows_give_the_same_well_formed_section_twice(texts, some, system):
    rows = [row(n, question, answer) for n, (question, answer) in enumerate(texts)]
    rewards = [each for each in SOME if each in some]  # gates before what they gate
    if not any(each.get("weight", 1.0) > 0 for each in rewards):
        return
    if reward("length", only_if="xml_format") in rewards and reward("xml_format", mode="partial") not in rewards:
        return
    first, again = (tried(with_system(rows, system), rewards) for _ in range(2))
    for found in (first, again):
        json.dumps(found.receipt, allow_nan=False)
        assert all(problem.code.startswith("REWARD_") and problem.hint for problem in found.problems)
        for each in found.receipt.get("by_reward", {}).values():
            assert each.pop("p50_ms") <= each.pop("p95_ms")
            each.pop("run_seconds")
    assert first == again


# ---- external rewards ---------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path) -> Callable[..., dict[str, Any]]:
    """Make a `python` reward of an expression over `text`, `answer`, `at` and `size` (position and size of a batch)."""

    def make(expression: str, **given: object) -> dict[str, Any]:
        (tmp_path / "mine.py").write_text(
            "import itertools, time\ncalls = itertools.count()\n"
            "def reward(prompts, completions, answer, **columns):\n"
            "    texts = [completion[-1]['content'] for completion in completions]\n"
            "    next(calls)\n"
            f"    return [{expression} for at, (text, answer) in enumerate(zip(texts, answer))]\n"
        )
        return reward("python", file="mine.py", **given)

    return make


@pytest.fixture
def allowed(tmp_path):
    return RewardPermissions(python_folder=tmp_path)


UNSTABLE = [
    ("next(calls) + float(text == answer)", "scores the same answer differently in each call"),
    ("float(text == answer) + at / 100", "scores an answer by the other answers in the batch"),
    ("float(text == answer) - (text < texts[0])", "scores an answer by the other answers in the batch"),
]


@pytest.mark.parametrize(("expression", "words"), UNSTABLE)
def test_unstable_rewards_are_refused(file, allowed, expression, words):
    found = tried(capitals(), [file(expression)], allowed)
    assert [problem.code for problem in found.problems] == ["REWARD_UNSTABLE"]
    assert words in found.problems[0].message


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("float('nan')", "returned nan"),
        ("1 / len(text)", "ZeroDivisionError"),
        ("[1]", r"returned \[1\]"),
        ("exit(0)", "SystemExit: 0"),
    ],
)
def test_invalid_scores_are_refused_with_the_row(file, allowed, expression, words):
    (problem,) = tried(capitals(), [file(expression)], allowed).problems
    assert problem.code == "REWARD_FAILS"
    assert re.search(words, problem.message)
    assert "the row 'r0' asking" in problem.message


def test_scores_outside_the_range_warn_without_clip(file, allowed):
    found = tried(capitals(), [file("100.0 * (text == answer)")], allowed)
    assert (found.problems, [warning[:47] for warning in found.warnings]) == (
        [],
        ["reward 'python' gave scores from 0 to 100, outs"],
    )
    assert tried(capitals(), [file("100.0 * (text == answer)", clip=[0, 1])], allowed)[1:] == ([], [])


def test_an_external_reward_may_measure_style_but_must_not_be_constant(file, allowed):
    style = tried(capitals(), [file("float(0 < len(text) < 20)")], allowed)
    assert style.problems == []
    assert "another row's answer scores 1" in style.warnings[0]
    assert [problem.code for problem in tried(capitals(), [file("0.5")], allowed).problems] == ["REWARD_CONSTANT"]


def test_a_missing_package_is_a_warning_because_the_job_may_have_it(tmp_path, allowed):
    (tmp_path / "mine.py").write_text("import no_such_package\ndef reward(**_): ...\n")
    found = tried(capitals(), [reward("python", file="mine.py")], allowed)
    assert found.problems == []
    assert "were not checked before the job" in found.warnings[0]
    assert "no_such_package" in found.warnings[0]


def test_a_slow_reward_warns_with_the_minutes_it_adds(file, allowed):
    rows = [each | {"id": f"r{n}"} for n, each in zip(range(FEW_ROWS), capitals(), strict=False)]
    parsed = parse_run_config({"model": "m", "rewards": [file("time.sleep(0.004) or float(text == answer)")]})
    built = build_rewards(parsed.rewards, allowed)
    (warning,) = check_rewards(built, rows, parsed, [], trained_rows=100_000).warnings
    assert "minutes to the run while the GPU waits" in warning
    assert check_rewards(built, rows, parsed, [], trained_rows=100).warnings == []


class Client:
    """A boto3 client whose model grades by the reference answer. It counts the calls."""

    def __init__(self):
        self.asked = []
        self.number = count()

    def converse(self, **request):
        text = request["messages"][0]["content"][0]["text"]
        self.asked.append(text)
        right = any(f"\n{city}\n</answer " in text and f"\n{city}\n</reference " in text for city in CITIES.values())
        # As a model does, it does not say quite the same each time.
        grade = 9 * right + 0.1 * (next(self.number) % 2)
        return {"output": {"message": {"content": [{"text": f"<score>{grade:.1f}</score>"}]}}}


def test_a_judge_grades_few_candidates_and_each_once():
    client = Client()
    rows = [row(n, f"Capital {n}?", list(CITIES.values())[n % 6]) for n in range(200)]
    judge = reward("judge", model="m", weight=2.0)
    gated = reward("contains", only_if={"reward": "judge", "at_least": 0.5}, name="gated")
    permissions = RewardPermissions(lambda _: client, judge_model="m")
    found = tried(rows, [judge, gated], permissions, tests=[])
    assert (found.problems, found.warnings) == ([], [])
    assert len(client.asked) == FEW_ROWS * (1 + len(WRONG) - 1)  # no form is asked for
    assert found.receipt["rows"] == FEW_ROWS


RANKED = reward("judge_group", model="m")


class RankingClient(Client):
    """A boto3 client whose model ranks by `grade`, which may differ from call to call."""

    def __init__(self, grade):
        super().__init__()
        self._grade = grade

    def converse(self, **request):
        text = request["messages"][0]["content"][0]["text"]
        self.asked.append(text)
        calls = len(self.asked)
        ranked = json.dumps({"ranking": ranking(text, lambda answer: self._grade(answer, calls))})
        return {"output": {"message": {"content": [{"text": ranked}]}}}


def ranked_by(grade):
    client = RankingClient(grade)
    return tried(capitals(), [RANKED], RewardPermissions(lambda _: client, judge_model="m")), client


def test_a_judge_that_ranks_is_asked_twice_about_a_row_and_its_ranks_are_compared():
    found, client = ranked_by(lambda answer, _: (answer in CITIES.values(), len(answer)))
    assert (found.problems, len(client.asked)) == ([], 2 * FEW_ROWS)
    assert found.receipt["by_reward"]["judge_group"]["consistency"] == 1.0
    # Another row's city is a city too: which of the two is right, this judge does not know.
    assert [warning[:60] for warning in found.warnings if "another row" not in warning] == []


@pytest.mark.parametrize(
    ("grade", "low", "high"),
    [
        (lambda answer, calls: hash((answer, calls)), -0.7, 0.69),
        (lambda answer, calls: len(answer) * (1 if calls <= FEW_ROWS else -1), -1.0, -1.0),
        (lambda answer, calls: len(answer) * (calls <= FEW_ROWS), 0.0, 0.0),
    ],
)
def test_a_judge_that_ranks_otherwise_each_time_is_named(grade, low, high):
    found, _ = ranked_by(grade)
    assert low <= found.receipt["by_reward"]["judge_group"]["consistency"] <= high
    assert any("ranks the same answers differently each time" in warning for warning in found.warnings)


def test_a_judge_without_a_ranking_is_named_before_the_job():
    client = Client()  # it grades, and never ranks
    found = tried(capitals(), [RANKED], RewardPermissions(lambda _: client, judge_model="m"))
    assert [problem.code for problem in found.problems] == ["REWARD_CONSTANT"]
    assert "reward 'judge_group' abstained on every answer: its service gave no reply that it can use" in found.warnings
    assert "consistency" not in found.receipt["by_reward"]["judge_group"]
