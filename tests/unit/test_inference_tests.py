import json

import pytest

from tunedrop import inference_tests
from tunedrop.config.parse import parse_run_config
from tunedrop.inference_tests import dump_tests, parse_tests, with_reasoning
from tunedrop.problems import RejectedError

CONFIG = parse_run_config({"model": "m", "system_prompt": "Be brief."})
GOOD = {"id": "ok", "prompt": "x", "description": "y"}
FULL = {
    "id": 1,
    "prompt": "a",
    "description": "b",
    "tags": ["x"],
    "weight": 2,
    "must_pass": True,
    "samples": 4,
    "checks": [{"type": "contains", "text": "b", "at_least": 0.5}, {"type": "latency", "maximum": 2.5}],
    "columns": {"k": [1]},
}


def parse(*cases):
    return parse_tests(json.dumps({"evaluations": cases}).encode(), CONFIG)


def test_the_plain_format():
    (test,) = parse({"id": "a", "prompt": "2+2?", "description": "4"})
    assert test.reference == "4"
    assert test.prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]


def test_parsing_reads_the_tests_that_were_dumped():
    tests = parse(FULL, {"messages": [{"role": "user", "content": "c"}], "reference_answer": "d"})
    assert [test.id for test in tests] == ["1", "test-2"]
    assert [test.timed for test in tests] == [True, False]
    assert parse_tests(dump_tests(tests), CONFIG) == tests


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({}, "42"),
        ({"Reasoning": "6 * 7"}, "6 * 7\n42"),
        ({"chain_of-Thought": "6 * 7", "level": "hard"}, "6 * 7\n42"),
        ({"reasoning": None}, "42"),
        ({"seasoning": "salt"}, "42"),
    ],
)
def test_an_expected_answer_comes_after_its_reasoning(columns, text):
    assert with_reasoning("42", columns) == text


YAML = """
evaluations:
  - id: 1
    prompt: a
    description: b
    tags: [x]
    weight: 2
    must_pass: true
    samples: 4
    checks:
      - {type: contains, text: b, at_least: 0.5}
      - {type: latency, maximum: 2.5}
    columns: {k: [1]}
  - {id: two, prompt: "1+1?", description: 2}
"""
CSV = """id,prompt,description,tags,weight,must_pass,samples,checks,k
1,a,b,x,2,true,4,"[{""type"": ""contains"", ""text"": ""b"", ""at_least"": 0.5}, {""type"": ""latency"", ""maximum"": 2.5}]",
two,1+1?,2,,,,,,
"""


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"evaluations": [FULL, {"id": "two", "prompt": "1+1?", "description": "2"}]}, indent=2),
        json.dumps([FULL, {"id": "two", "prompt": "1+1?", "description": "2"}]),
        "\n".join(map(json.dumps, [FULL, {"id": "two", "prompt": "1+1?", "description": 2}])),
        YAML,
        CSV,
        CSV.replace("\n", "\r\n"),
        "\ufeff" + CSV,
    ],
    ids=["json", "list", "jsonl", "yaml", "csv", "crlf", "bom"],
)
def test_all_formats_give_the_same_tests(text):
    first, second = parse_tests(text.encode(), CONFIG)
    wanted = parse(FULL, {"id": "two", "prompt": "1+1?", "description": "2"})
    assert [first.columns, second] in ([{"k": [1]}, wanted[1]], [{}, wanted[1]])
    assert (first.id, first.tags, first.weight, first.must_pass, first.samples) == ("1", ["x"], 2.0, True, 4)
    assert first.checks == wanted[0].checks


def test_one_line_of_json_lines_and_other_csv_columns():
    assert [test.id for test in parse_tests(json.dumps(GOOD).encode(), CONFIG)] == ["ok"]
    (test,) = parse_tests(b"prompt;description;schema\nwhat?;yes, no;{}\n", CONFIG)
    assert (test.reference, test.columns) == ("yes, no", {"schema": "{}"})


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        ({"description": None}, None, "the answer in 'description' is null"),
        ({"prompt": None}, None, "the prompt in 'prompt' is null"),
        ({"wieght": 1}, "wieght", "did you mean 'weight'?"),
        ({"prompt": 3}, None, "the prompt in 'prompt' is int"),
        ({"choices": ["x", "z"]}, None, "'y' is none of the options A to B"),
        ({"weight": 0}, "weight", "Expected `float` > 0.0"),
        ({"samples": 0}, "samples", "Expected `int` >= 1"),
        ({"samples": 1000}, "samples", "Expected `int` <= 64"),
        ({"must_pass": "yes"}, "must_pass", "Expected `bool`, got `str`"),
        ({"tags": "math"}, "tags", "Expected `array`"),
        ({"prompt": [{"role": "x", "content": "y"}]}, None, "the role 'x' is not one of"),
        ({"checks": [{"type": "contians"}]}, "checks", "did you mean 'contains'?"),
        ({"checks": [{"type": "contains", "txt": "a"}]}, "checks", "no parameter 'txt'"),
        ({"checks": [{"type": "contains", "at_least": "high"}]}, "checks", "at_least: Input should be a valid number"),
        ({"checks": [{"type": "latency"}]}, "checks", "maximum: Field required"),
        ({"checks": [{"type": "latency", "maximum": -1}]}, "checks", "maximum: Input should be greater than 0"),
        ({"checks": [{"type": "contains"}, {"type": "contains"}]}, "checks", "two rewards are called 'contains'"),
        ({"checks": [{"type": "judge", "model": "m"}]}, "checks", "reward 'judge'"),
    ],
)
def test_a_problem_names_the_broken_test_and_its_key(change, key, words):
    with pytest.raises(RejectedError) as caught:
        parse(GOOD, GOOD | {"id": "bad"} | change, GOOD | {"id": "fine"})
    (problem,) = caught.value.problems
    assert (problem.code, problem.row, problem.key) == ("BAD_TEST", 2, key)
    assert problem.message.startswith("inference test 2 ('bad'): " + (f"'{key}': " if key else ""))
    assert words in problem.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read: Input data was truncated"),
        ('{"tests": []}', "no list 'evaluations'"),
        ('{"evaluations": {}}', "no list 'evaluations'"),
        ('{"prompt": "a", "description": "b"}\n{oops}', "cannot be read"),
        ("evaluations: [a", "cannot be read"),
        ("evaluations: [&a {prompt: x}, *a]", "anchors and aliases are not accepted"),
        ("prompt,description\na,b,c,d\n", "more fields than the header"),
        ('prompt,checks\na,"[oops"\n', "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("", "no list 'evaluations'"),
    ],
)
def test_an_unreadable_file_is_refused_with_the_reason(text, words):
    with pytest.raises(RejectedError) as caught:
        parse_tests(text.encode(), CONFIG)
    assert caught.value.problems[0].code == "TESTS_SYNTAX"
    assert words in str(caught.value)


def test_not_utf8_duplicate_ids_and_no_tests():
    with pytest.raises(RejectedError, match="cannot be read: 'utf-8'"):
        parse_tests("prompt,description\nä,b".encode("latin-1"), CONFIG)
    with pytest.raises(RejectedError, match=r"test 2 \('ok'\): 'id': an earlier test has the id 'ok'"):
        parse(GOOD, GOOD)
    with pytest.raises(RejectedError, match="no evaluations"):
        parse()


ASKED = [{"role": "user", "content": "2+2?"}]
AS_IN_DATASETS = {
    "question.jsonl": '{"question": "2+2?", "answer": "4"}\n{"question": "2+2?", "answer": 4}',
    "chat.jsonl": json.dumps({"messages": [*ASKED, {"role": "assistant", "content": "4"}]}),
    "sharegpt.json": json.dumps([{"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}]),
    "nova.jsonl": json.dumps({"messages": ASKED, "reference_answer": {"final_answer": "4"}}),
    "header.csv": "question,expected_answer\n2+2?,4\n",
    "semicolons.csv": "Frage-Nr;Question;Answer\n7;2+2?;4\n",
    "list.yaml": "- {question: '2+2?', answer: 4}",
}


@pytest.mark.parametrize("name", AS_IN_DATASETS)
def test_prompts_and_answers_are_those_of_a_datasets_rows(name):
    config = parse_run_config({"model": "m"})
    tests = parse_tests(AS_IN_DATASETS[name].encode(), config)
    assert {(test.prompt[0]["content"], test.reference) for test in tests} == {("2+2?", "4")}


def test_options_are_shown_and_the_answer_is_a_letter():
    (test,) = parse({"question": "Which?", "choices": ["x", "y"], "answer": 1})
    assert (test.prompt[-1]["content"], test.reference) == ("Which?\n\nA. x\nB. y", "B")
    assert parse_tests(dump_tests([test]), CONFIG) == [test]


def test_the_datasets_columns_are_those_of_tests_that_have_them():
    config = parse_run_config({"model": "m", "columns": {"prompt": "{a} plus {b}?", "answer": "sum"}})
    tests = parse_tests(b'[{"a": 1, "b": 2, "sum": 3}]', config)
    assert (tests[0].prompt[0]["content"], tests[0].reference) == ("1 plus 2?", "3")
    tests = parse_tests(json.dumps([GOOD]).encode(), config)
    assert (tests[0].prompt[0]["content"], tests[0].reference) == ("x", "y")


def test_held_out_rows_are_tests_with_their_columns():
    row = {"id": "r1", "prompt": [{"role": "user", "content": "a"}], "answer": "b", "schema": {"x": 1}}
    (test,) = inference_tests.tests_from_rows([row])
    assert (test.id, test.reference, test.columns) == ("r1", "b", {"schema": {"x": 1}})
