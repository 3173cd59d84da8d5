"""`tunedrop init`: the config that a dataset proposes is valid, and asks where the file leaves something open."""

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from tunedrop_cli.check import check_file
from tunedrop_cli.init import learning_rate, propose
from tunedrop_cli.main import cli

SAMPLES = Path(__file__).parents[1] / "samples"


@pytest.mark.parametrize(
    "name", ["multiple_choice_labels.jsonl", "worked_answers.jsonl", "tool_calls.jsonl", "sharegpt.json"]
)
def test_what_it_writes_is_valid_and_explains_itself(tmp_path, name):
    target = tmp_path / "cars.yaml"
    said = CliRunner().invoke(cli, ["init", str(SAMPLES / name), "--yes", "--output", str(target)])
    tests = tmp_path / "cars.tests.json"
    assert (said.exit_code, said.output.splitlines()[-1]) == (0, f"wrote {target} and {tests}")
    receipt = check_file(SAMPLES / name, target, tests, None)
    assert (receipt.ok, "chosen" in receipt.rewards) == (True, False)
    assert (receipt.inference_tests, receipt.left_out, receipt.stats["tests_in_training"]) == (5, 5, [])
    text = target.read_text()
    assert all(
        f"\n# {words}" in text for words in ("What the model sees", "Because the", "In tokens; fits the longest prompt")
    )
    again = CliRunner().invoke(cli, ["init", str(SAMPLES / name), "--output", str(target)])
    assert (again.exit_code, "exists" in again.output) == (2, True)


def test_the_first_tests_judge_and_their_questions_are_not_trained_on(tmp_path):
    rows = [{"question": f"What is {n // 2}{' ' * (n % 2)}?", "answers": [f"a{n}", "b"], "topic": "t"} for n in range(120)]
    data = tmp_path / "t.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = CliRunner().invoke(cli, ["init", str(data), "--yes"])
    assert said.exit_code == 0
    cases = json.loads((tmp_path / "t.tests.json").read_text())["evaluations"]
    assert len({case["prompt"].replace(" ", "") for case in cases}) == len(cases) == 24
    assert all(set(case["columns"]) == {"accepted_answers"} for case in cases)
    config, tests = tmp_path / "t.yaml", tmp_path / "t.tests.json"
    receipt = check_file(data, config, tests, None)
    assert (receipt.rows, receipt.left_out, receipt.inference_tests) == (72, 48, 24)
    assert not any("inference tests" in warning for warning in receipt.warnings)
    # Without the key of the config, the same tests measure memory.
    assert len(check_file(data, None, tests, None).stats["tests_in_training"]) == 24


def test_tests_of_the_users_own_stay(tmp_path):
    data, tests = tmp_path / "t.jsonl", tmp_path / "t.tests.json"
    data.write_text("".join(json.dumps({"question": f"What is {n}?", "answer": f"a{n}"}) + "\n" for n in range(30)))
    own = '{"evaluations": [{"prompt": "What is it?", "description": "a"}]}'
    tests.write_text(own)
    said = CliRunner().invoke(cli, ["init", str(data), "--yes"])
    assert (said.exit_code, f"for the tests in {tests}" in said.output) == (0, True)
    assert (tests.read_text(), "leave_out_rows" in (tmp_path / "t.yaml").read_text()) == (own, False)


RATES = [(1, 135e6, 7e-4), (10, 135e6, 7e-4), (70, 135e6, 1e-4), (10, 3e9, 1e-4), (500, 3e9, 1e-5), (9000, None, 1e-5)]


@pytest.mark.parametrize(("steps", "parameters", "rate"), RATES)
def test_few_steps_and_small_models_get_a_high_learning_rate(steps, parameters, rate):
    assert learning_rate(steps, parameters) == rate


FORMS = [
    ("multiple_choice_labels.jsonl", "letter of the right option"),
    ("worked_answers.jsonl", "#### answer"),
    ("pandas_columns.json", "a few words"),
]


@pytest.mark.parametrize(("name", "words"), FORMS)
def test_the_system_prompt_says_the_form_of_an_answer(tmp_path, name, words):
    assert words in propose(SAMPLES / name, None, tmp_path, lambda _: True).config["system_prompt"]


def test_a_dataset_with_its_own_system_messages_gets_none(tmp_path):
    assert "system_prompt" not in propose(SAMPLES / "bedrock_conversation.jsonl", None, tmp_path, lambda _: True).config


OPEN = [
    (
        {"chapter": "word " * 60},
        "Show the column 'chapter'",
        {"columns": {"prompt": "{chapter}\n\n{question}", "answer": "answer"}},
    ),
    ({"question": None, "premise": "p", "hypothesis": "h"}, "Make the prompt of these columns", {}),
    ({"answer": None, "chosen": "a", "rejected": "b"}, "Are the chosen answers right", {"columns": {"answer": "chosen"}}),
    ({"is_correct": False}, "with wrong answers aside", {}),
]


@pytest.mark.parametrize(("change", "question", "expected"), OPEN)
def test_it_asks_where_the_file_leaves_something_open(tmp_path, change, question, expected):
    rows = [{"question": f"What is {n}?", "answer": f"a{n}"} for n in range(30)]
    rows = [row | change | ({"is_correct": n > 3} if "is_correct" in change else {}) for n, row in enumerate(rows)]
    rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
    for n, row in enumerate(rows):
        row |= {name: f"{value} {n}" for name, value in row.items() if name in change and isinstance(value, str)}
    data = tmp_path / "t.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked: list[str] = []
    proposal = propose(data, None, tmp_path, lambda decision: not asked.append(decision.question))  # type: ignore[func-returns-value]
    assert question in asked[0]
    assert proposal.receipt.ok
    assert all(proposal.config[key].items() >= value.items() for key, value in expected.items())
    refused = propose(data, None, tmp_path, lambda _: False)
    assert (refused.receipt.ok, refused.config) == (False, {})


def test_a_rejected_dataset_is_explained_and_nothing_is_written(tmp_path):
    data = tmp_path / "t.jsonl"
    data.write_text("not json")
    said = CliRunner().invoke(cli, ["init", str(data), "--yes"])
    assert (said.exit_code, "NOT_AN_OBJECT" in said.output) == (1, True)
    assert list(tmp_path.glob("*.yaml")) == []


def test_answers_on_a_terminal_are_taken(tmp_path):
    data = tmp_path / "t.jsonl"
    rows = [{"question": f"What is {n}?", "chapter": f"{n} " + "word " * 60, "answer": f"a{n}"} for n in range(30)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = CliRunner().invoke(cli, ["init", str(data)], input="n\ny\n")
    assert said.exit_code == 0
    assert yaml.safe_load((tmp_path / "t.yaml").read_text())["columns"]["ignore"] == ["chapter"]
