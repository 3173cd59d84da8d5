"""`tunedrop init`: the config that a dataset proposes is valid, and asks where the file leaves something open."""

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from tunedrop_cli.check import check_file
from tunedrop_cli.init import learning_rate, propose
from tunedrop_cli.main import cli
from tunedrop_cli.rubric import rubric_draft

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


REPLIES = [
    {
        "question": f"My order {n} has not arrived. Where is the parcel with the {thing}?",
        "answer": f"Thank you for writing about order {n}.\n\n- The parcel with the {thing} left our store.\n"
        f"- It arrives in {n % 5 + 1} days.\n\nIs there anything else?",
    }
    for n, thing in enumerate(["lamp", "chair", "table", "mirror", "carpet"] * 12)
]


def test_free_texts_get_a_draft_of_a_rubric(tmp_path, monkeypatch):
    data = tmp_path / "t.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in REPLIES))
    assert CliRunner().invoke(cli, ["init", str(data), "--yes"]).exit_code == 0
    text = (tmp_path / "t.yaml").read_text()
    assert yaml.safe_load(text)["rewards"][0]["type"] == "similarity"
    begin = text.index("# rewards:")
    commented = text[begin : text.index("\n\n", begin)]
    (proposed,) = yaml.safe_load(commented.replace("# ", "", 1).replace("\n# ", "\n"))["rewards"]
    assert proposed["rubric"].splitlines() == [
        "- Answers the question correctly and completely, and invents nothing.",
        "- Has 26 words.",
        "- Has a list of points.",
        "- Gives figures.",
        "- Ends with a question.",
        "- Begins with “Thank you for”.",
        "- Ends with “there anything else?”.",
    ]
    # What is proposed is valid once a model is put in.
    config = tmp_path / "judged.yaml"
    spec = proposed | {"model": "m", "url": "https://judge.example.com/v1"}
    config.write_text(yaml.safe_dump({"rewards": [spec], "preflight": {"rows": 0}}))
    monkeypatch.setenv("REWARD_HTTP_HOSTS", "judge.example.com")
    receipt = check_file(data, config, tmp_path / "t.tests.json", None)
    assert (receipt.errors, receipt.cost["services"]["judge_group"]["requests"] > 0) == ([], True)


DRAFTS = [
    (["one two three four"] * 8, ["Has 4 words.", "Is a single paragraph.", "Begins with", "Ends with"]),
    (
        [f"1. Take {n} things\n2. Put them there and go" for n in "abcdefghi"],
        ["Has 10 words.", "Has numbered steps.", "Gives figures.", "Ends with “there and go”."],
    ),
    ([f"{n} " * (n + 3) for n in range(20)], ["Has 5 to 20 words.", "Gives figures.", "Is a single paragraph."]),
    (["the river runs to the sea"] * 7, []),
]


@pytest.mark.parametrize(("answers", "points"), DRAFTS)
def test_a_draft_has_what_most_answers_have(answers, points):
    found = rubric_draft([("Why?", answer) for answer in answers])[1:]
    assert all(any(each.startswith(point) for each in found) for point in points)
    assert len(found) <= len(points) + 1 if points else found == []


def test_answers_that_the_questions_hold_are_to_add_nothing():
    rows = [
        (f"The castle {n} was built near the river and burned. Summarise.", f"castle {n} burned near river")
        for n in "abcdefgh"
    ]
    assert rubric_draft(rows)[-1] == "Uses what the question says, and adds no facts of its own."


def test_short_answers_get_no_rubric(tmp_path):
    assert propose(SAMPLES / "worked_answers.jsonl", None, tmp_path, lambda _: True).rubric == []
