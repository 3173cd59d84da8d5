"""Datasets as people drop them: what the model sees of their columns, and the reward that the answers can earn."""

import json
import random
import re
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.validation.receipt import Receipt
from tunedrop.config.parse import parse_run_config
from tunedrop.dataset.rows import CANONICAL, read_rows
from tunedrop.problems import Problem
from tunedrop.rewards import NO_PERMISSIONS, RewardPermissions, build_rewards
from tunedrop.rewards.default import choose_rewards
from tunedrop_cli.check import check_file

CONFIG = parse_run_config({"model": "m"})
SAMPLES = Path(__file__).parents[1] / "samples"


def read(folder: Path, name: str, data: str, **config: Any) -> list[Any]:
    (folder / name).write_text(data)
    return list(read_rows(folder / name, parse_run_config({"model": "m"} | config)))


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def chat(*texts: str) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text} for role, text in zip(("system", "user", "assistant", "user"), texts, strict=False)
    ]


OPTIONS = "Which?\n\nA. red\nB. green\nC. blue"
COLOURS = ["red", "green", "blue"]
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
TOOLS = '[{"type":"function","function":{"name":"f","parameters":{"type":"object"}}}]'
# A record, the prompt that the model sees, and the answer.
RECORDS: list[tuple[dict[str, Any], list[dict[str, str]], str]] = [
    # multiple choice
    ({"question": "Which?", "choices": COLOURS, "answer": 2}, user(OPTIONS), "C"),
    ({"question": "Which?", "choices": COLOURS, "answer": "b"}, user(OPTIONS), "B"),
    ({"question": "Which?", "options": COLOURS, "answer": "green"}, user(OPTIONS), "B"),
    ({"question": "Which?", "options": COLOURS, "answer": "C. blue"}, user(OPTIONS), "C"),
    ({"question": "Which?", "options": dict(zip("ABC", COLOURS, strict=True)), "answer": "B"}, user(OPTIONS), "B"),
    ({"question": "Which?", "choices": {"text": COLOURS, "label": ["1", "2", "3"]}, "answerKey": "3"}, user(OPTIONS), "C"),
    ({"question": "Which?", "choices": [{"label": f"({n})", "text": COLOURS[n]} for n in range(3)], "answer": "(0)"},
     user(OPTIONS), "A"),
    ({"question": "Which?", "choices": json.dumps(COLOURS), "answer": "1"}, user(OPTIONS), "B"),
    ({"question": "Which?", "opa": "red", "opb": "green", "opc": "blue", "cop": 1}, user(OPTIONS), "B"),
    ({"question": "Which?", "option_a": "red", "option_b": "green", "option_c": "blue", "answer": "C"}, user(OPTIONS), "C"),
    ({"sentence": "Which?", "option1": "red", "option2": "green", "option3": "blue", "answer": "3"}, user(OPTIONS), "C"),
    ({"prompt": "Which?", "A": "red", "B": "green", "C": "blue", "answer": "A"}, user(OPTIONS), "A"),
    ({"question": OPTIONS, "choices": COLOURS, "answer": 0}, user(OPTIONS), "A"),  # listed already
    ({"messages": user("Which?"), "options": COLOURS, "answer": "B"}, user(OPTIONS), "B"),
    # context, instruction, system, history
    ({"passage": "Ice is cold.", "question": "Is it?", "answer": True}, user("Ice is cold.\n\nIs it?"), "true"),
    ({"context": ["Ice.", "Snow."], "question": "What?", "answer": "a"}, user("Ice.\n\nSnow.\n\nWhat?"), "a"),
    ({"instruction": "Sum up.", "text": "Ice is cold.", "output": "a"}, user("Sum up.\n\nIce is cold."), "a"),
    ({"instruction": "Count.", "input": "o", "output": "1"}, user("Count.\n\no"), "1"),
    ({"instruction": "Be brief.", "question": "Why?", "answer": "a"}, user("Be brief.\n\nWhy?"), "a"),
    ({"context": "Ice is cold on most days.", "prompt": "Ice is cold on most days. Is it?", "answer": "a"},
     user("Ice is cold on most days. Is it?"), "a"),
    ({"system": "s", "prompt": "q", "answer": "a"}, chat("s", "q"), "a"),
    ({"system": [{"text": "s"}], "messages": [*user("q"), {"role": "assistant", "content": "a"}]}, chat("s", "q"), "a"),
    ({"instruction": "q", "output": "a", "history": [["h", "i"]]}, chat("", "h", "i", "q")[1:], "a"),
    ({"instruction": "q", "output": "a", "history": []}, user("q"), "a"),
    # conversations
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, user("q"), "a"),
    ({"conversation": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
     chat("s", "q"), "a"),
    ({"contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]},
     user("q"), "a"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "value": "q"}]}], "answer": "a"}, user("q"), "a"),
    ({"prompt": json.dumps(user("q")), "answer": "a"}, user("q"), "a"),
    ({"prompt": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "answer": "a"},
     chat("s", "q"), "a"),
    ({"prompt": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>", "answer": "a"}, user("q"), "a"),
    ({"prompt": "<bos><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n", "answer": "a"}, user("q"), "a"),
    ({"prompt": "What is <|im_start|>?", "answer": "a"}, user("What is <|im_start|>?"), "a"),
    # answers
    ({"prompt": "q", "reference_answer": {"final_answer": "a"}}, user("q"), "a"),
    ({"prompt": "q", "answer": {"value": "a", "aliases": ["b"]}}, user("q"), "a"),
    ({"prompt": "q", "answers": {"text": ["a", "b"], "answer_start": [1, 2]}}, user("q"), "a"),
    ({"prompt": "q", "answer": ["a"]}, user("q"), "a"),
    ({"prompt": "q", "output": ["a", "b"]}, user("q"), '["a","b"]'),
    ({"prompt": "q", "answer": {"answer": "a", "unit": "m"}}, user("q"), '{"answer":"a","unit":"m"}'),
    ({"text": "q", "label": 1, "label_text": "a"}, user("q"), "a"),
    ({"prompt": "q", "completion": "a", "label": True}, user("q"), "a"),
    # tools
    ({"messages": user("q"), "tools": [FUNCTION], "answer": "a"},
     [{"role": "user", "content": "q", "tools": TOOLS}], "a"),
    ({"messages": [*user("q"), {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]}]},
     user("q"), '[{"name":"f","arguments":{"x":1}}]'),
]  # fmt: skip


@pytest.mark.parametrize(("record", "prompt", "answer"), RECORDS)
def test_a_record_becomes_the_prompt_that_the_model_sees(tmp_path, record, prompt, answer):
    (row,) = read(tmp_path, "t.jsonl", json.dumps(record))
    assert (row["prompt"], row["answer"]) == (prompt, answer)
    again = read(tmp_path, "again.jsonl", json.dumps(row), columns=CANONICAL.model_dump())
    assert again == [row]


# A record, and the code and words of the problem with it.
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"question": "q", "answer": "a", "image": "x.png"}, "MEDIA", "'image'"),
    ({"question": "<image>What is this?", "answer": "a"}, "MEDIA", "<image>"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "answer": "a"}, "MEDIA", "image"),
    ({"prompt": "q", "completion": "a", "label": False}, "MARKED_WRONG", "'label'"),
    ({"prompt": "q", "response": "a", "is_correct": "False"}, "MARKED_WRONG", "'is_correct'"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "PREFERENCES", "'chosen'"),
    ({"prompt": "q", "reward_model": {"style": "rule"}}, "NO_ANSWER", "no ground_truth"),
    ({"prompt": "[{'role': 'user', 'content': 'q'}]", "answer": "a"}, "BAD_MESSAGES", "Python's notation"),
    ({"prompt": "<s>[INST] q [/INST]", "answer": "a"}, "CHAT_TEMPLATE", "[INST]"),
    ({"prompt": "<|user|>\nq", "answer": "a"}, "CHAT_TEMPLATE", "<|user|>"),
    ({"question": "Which?", "choices": COLOURS, "answer": "pink"}, "BAD_OPTION", "'pink'"),
    ({"question": "Which?", "choices": COLOURS, "answer": 7}, "BAD_OPTION", "'7'"),
    ({"question": "Which?", "choices": {"a": []}, "answer": 1}, "BAD_OPTIONS", "'choices'"),
    ({"question": "q", "context": {"title": ["t"]}, "answer": "a"}, "UNSEEN_COLUMN", "'context'"),
    ({"prompt": "q", "problem": "another", "answer": "a"}, "UNSEEN_COLUMN", "'problem'"),
    ({"premise": "p", "hypothesis": "h", "label": 1}, "NO_PROMPT", "premise, hypothesis"),
    ({"prompt": "q", "tools": "no JSON", "answer": "a"}, "BAD_TOOLS", "tools"),
    ({"prompt": "q", "history": "h", "answer": "a"}, "BAD_MESSAGES", "'history'"),
    ({"prompt": "q", "system": 3, "answer": "a"}, "BAD_MESSAGES", "system prompt"),
]


@pytest.mark.parametrize(("record", "code", "words"), REFUSED)
def test_a_record_that_cannot_be_told_is_refused(tmp_path, record, code, words):
    (problem,) = read(tmp_path, "t.jsonl", json.dumps(record))
    assert (problem.code, words in problem.message) == (code, True)


COLUMNS = [
    ({"answer": "reference_answer.value"}, {"messages": user("q"), "reference_answer": {"value": 8}}, user("q"), "8"),
    ({"prompt": "extra.items.0.question"}, {"extra": {"items": [{"question": "q"}]}, "answer": "a"}, user("q"), "a"),
    ({"prompt": "{passage}\n\nSo: {question}"}, {"passage": "p", "question": "q", "answer": "a"}, user("p\n\nSo: q"), "a"),
    ({"prompt": "{premise}: {hypothesis}?"}, {"premise": "p", "hypothesis": "h", "label": 1}, user("p: h?"), "1"),
    ({"prompt": "Pick one.\n{choices}\n{question}"}, {"question": "q", "choices": ["x", "y"], "answer": 1},
     user("Pick one.\nA. x\nB. y\nq"), "B"),
    ({"ignore": ["choices"]}, {"question": "q", "choices": ["x", "y"], "answer": 1}, user("q"), "1"),
    ({"answer": "chosen"}, {"prompt": "q", "chosen": "a", "rejected": "b"}, user("q"), "a"),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "record", "prompt", "answer"), COLUMNS)
def test_the_config_decides(tmp_path, columns, record, prompt, answer):
    (row,) = read(tmp_path, "t.jsonl", json.dumps(record), columns=columns)
    assert (row["prompt"], row["answer"]) == (prompt, answer)


@pytest.mark.parametrize(("path", "words"), [("a.b", "'a.b'"), ("{question} {x.y}", "'x.y'")])
def test_a_path_that_leads_nowhere_is_named(tmp_path, path, words):
    (problem,) = read(tmp_path, "t.jsonl", '{"question": "q", "answer": "a"}', columns={"prompt": path})
    assert (problem.code, words in problem.message) == ("NO_PROMPT", True)


def test_numbers_of_options_begin_at_one_where_the_last_option_shows_it(tmp_path):
    rows = [{"question": "Which?", "choices": COLOURS, "answer": number} for number in (1, 3, 2)]
    assert [row["answer"] for row in read(tmp_path, "t.jsonl", "\n".join(map(json.dumps, rows)))] == ["A", "C", "B"]


TABLES = [
    ("t.csv", "question;answer\nq, 1;a\n"),
    ("t.csv", "sep=;\nquestion;answer\nq, 1;a\n"),
    ("t.tsv", "question\tanswer\nq, 1\ta\n"),
    ("t.csv", "question|answer\nq, 1|a\n"),
    ("t.csv", 'question,answer\n"q, 1",a\n'),
    ("t.csv", '\ufeff,question,answer,\n0,"q, 1",a,\n'),
    ("t.json", '{"data": [{"question": "q, 1", "answer": "a"}]}'),
    ("t.json", '{"features": [], "rows": [{"row_idx": 0, "row": {"question": "q, 1", "answer": "a"}}]}'),
    ("t.json", '{"train": [{"question": "q, 1", "answer": "a"}], "test": [{"question": "x", "answer": "y"}]}'),
    ("t.json", '{"question": ["q, 1", "q2"], "answer": ["a", "b"]}'),
    ("t.json", '{"question": {"0": "q, 1", "1": "q2"}, "answer": {"0": "a", "1": "b"}}'),
    ("t.json", '{"0": {"question": "q, 1", "answer": "a"}, "1": {"question": "q2", "answer": "b"}}'),
    ("t.json", '{"columns": ["question", "answer"], "index": [0], "data": [["q, 1", "a"]]}'),
    ("t.json", '{"schema": {"fields": []}, "data": [{"index": 0, "question": "q, 1", "answer": "a"}]}'),
]


@pytest.mark.parametrize(("name", "data"), TABLES)
def test_tables_and_wrappers_are_read(tmp_path, name, data):
    first, *_ = read(tmp_path, name, data)
    assert (first["prompt"], first["answer"]) == (user("q, 1"), "a")


NOT_JSON = [
    ("{'question': 'q', 'answer': 'a'}", "single quotes"),
    ('{"question": "q", "answer": NaN}', "NaN"),
    ('{"question": "q", "answer": None}', "Python's"),
    ('{"question": "q", "answer": "a",}', "a comma comes before"),
    ('{"question": "q", // why\n"answer": "a"}', "no comments"),
    ('{"question": "a\tb", "answer": "a"}', "a tab"),
    ('{question: "q", "answer": "a"}', "no quotes"),
]


@pytest.mark.parametrize(("data", "words"), NOT_JSON)
def test_a_mistake_in_json_is_named(tmp_path, data, words):
    (problem,) = read(tmp_path, "t.json", f"[{data}]")
    assert (problem.code, words in problem.message) == ("BAD_JSON", True)


def test_a_table_without_a_header_is_named(tmp_path):
    (problem,) = read(tmp_path, "t.csv", "How many legs has a cat?,4\nHow many has a bird?,2\n")
    assert (problem.code, problem.line) == ("NO_HEADER", 1)
    assert "'How many legs has a cat?', '4'" in problem.message


# --- nothing is dropped without a word ---


def checked(folder: Path, rows: list[dict[str, Any]], config: str = "") -> Receipt:
    data, config_file = folder / "t.jsonl", folder / "t.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config_file.write_text(config)
    return check_file(data, config_file, None, None)


NAMES = st.sampled_from(
    (
        "question context passage choices options A B C system history title url text body input instruction problem prompt "
        "image explanation topic messages label tools"
    ).split()
)
VALUES = st.sampled_from(["", "x", "long " * 60, None, 3, ["x", "y"], {"a": "x", "b": "y"}, user("q"), True])


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_every_column_is_seen_or_named(tmp_path_factory, columns):
    """A property of random tables: a valid receipt names every column."""
    rows = [columns | {"question": f"What is {n}?", "answer": f"{'abcde'[n % 5]}{n}"} for n in range(20)]
    receipt = checked(tmp_path_factory.mktemp("t"), rows)
    named = {name for part in receipt.columns.values() for name in part.split(", ")}
    if receipt.ok:
        assert set(rows[0]) <= named | {*receipt.reward_columns, *receipt.unused_columns}
    else:
        assert receipt.errors


def test_a_long_text_that_nobody_sees_asks_for_a_decision(tmp_path):
    rows = [
        {"question": f"Who is it, {n}?", "chapter": f"{n} " + "word " * 60, "url": "u" * 300, "answer": "a b"}
        for n in range(20)
    ]
    assert [(error.code, error.key) for error in checked(tmp_path, rows).errors] == [("UNSEEN_COLUMN", "chapter")]
    assert checked(tmp_path, rows, "columns: {ignore: [chapter]}").ok
    assert checked(tmp_path, rows, 'columns: {prompt: "{chapter} {question}"}').ok


def test_columns_that_rewards_read_are_theirs(tmp_path):
    rows = [{"question": f"q {n}", "solution": str(n), "terms": [str(n)], "topic": "t"} for n in range(20)]
    receipt = checked(tmp_path, rows, "rewards: [{type: keywords, column: terms}, {type: exact_match}]")
    assert (receipt.reward_columns, receipt.unused_columns) == (["terms"], ["topic"])
    grader = '{type: string_check, name: c, operation: eq, input: "{{sample.output_text}}", reference: "{{item.solution}}"}'
    receipt = checked(tmp_path, rows, f"rewards: [{{type: openai_grader, grader: {grader}}}]")
    assert (receipt.ok, receipt.unused_columns) == (True, ["terms", "topic"])


def test_labels_that_prompts_do_not_name_are_named(tmp_path):
    rows = [{"text": f"card {n}", "label": n % 2, "label_text": ["lost", "stolen"][n % 2]} for n in range(20)]
    assert any("(lost, stolen)" in warning for warning in checked(tmp_path, rows).warnings)
    config = 'system_prompt: "Answer with one of: lost, stolen"'
    assert not any("lost, stolen" in warning for warning in checked(tmp_path, rows, config).warnings)


# --- the default reward ---

JUDGE = RewardPermissions(judge_model="m")
LONG = "The river rises in the mountains and reaches the sea after many days of travel."
CHOICES = [
    ([("What is 2 + 2?", "4"), ("And 10 / 4?", "2.5")], "numeric", {}, NO_PERMISSIONS),
    ([("What is 0 + 5?", "5"), ("What is 0 + 6?", "6")], "exact_match", {}, NO_PERMISSIONS),
    ([("How much?", "$1,200"), ("And now?", "15 %")], "numeric", {}, NO_PERMISSIONS),
    ([("How many?", "2 and 2 make 4.\n#### 4")], "numeric", {}, NO_PERMISSIONS),
    ([("How many?", "<think>2 * 2</think><answer>4</answer>")], "numeric", {}, NO_PERMISSIONS),
    ([("Solve.", r"\frac{1}{2}"), ("Solve.", r"x = \sqrt{2}")], "math", {}, NO_PERMISSIONS),
    ([("Solve.", r"Half of it is \boxed{\frac{1}{2}}."), ("Solve.", "3")], "math", {}, NO_PERMISSIONS),
    ([(OPTIONS, "B")], "multiple_choice", {"choices": "ABC"}, NO_PERMISSIONS),
    ([("Extract.", '{"name": "Ann"}')], "json_match", {}, NO_PERMISSIONS),
    ([("Where?", "Paris"), ("Who?", "Ann Lee")], "exact_match", {}, NO_PERMISSIONS),
    ([("Is it?", "true"), ("Is that?", "false")], "exact_match", {}, NO_PERMISSIONS),
    ([("Tell me.", LONG)], "similarity", {}, NO_PERMISSIONS),
    ([("Tell me.", LONG)], "judge", {"model": "m"}, JUDGE),
]


@pytest.mark.parametrize(("pairs", "reward", "parameters", "permissions"), CHOICES)
def test_the_default_reward_fits_the_answers(pairs, reward, parameters, permissions):
    rows = [{"prompt": user(question), "answer": answer} for question, answer in pairs]
    (spec,) = choose_rewards(rows, permissions).rewards
    assert spec.type == reward
    assert parameters.items() <= spec.parameters.items()


@pytest.mark.parametrize(
    ("answer", "permissions", "reward"),
    [
        ("def f(): return 1", RewardPermissions(allow_code=True), "code_tests"),
        ("def f(): return 1", JUDGE, "judge"),
        ("def f(): return 1", NO_PERMISSIONS, "similarity"),
        ("1", NO_PERMISSIONS, "numeric"),
    ],
)
def test_programs_are_tested_or_the_receipt_says_what_that_needs(answer, permissions, reward):
    row = {"prompt": user("Write it."), "answer": answer, "unit_test": ["assert f() == 1"]}
    (spec,), _, warnings = choose_rewards([row], permissions)
    assert spec.type == reward
    assert (spec.parameters.get("column"), bool(warnings)) == (
        "unit_test" if reward == "code_tests" else None,
        reward == "similarity",
    )
    assert all("by the column 'unit_test', if the stack allows it (AllowCodeRewards)" in warning for warning in warnings)


PURE = [choice for choice in CHOICES if choice[1] != "judge"]


@pytest.mark.parametrize(("pairs", "reward", "parameters", "permissions"), PURE)
def test_random_answers_do_not_earn_the_default_reward(pairs, reward, parameters, permissions):
    rows = [{"prompt": user(question), "answer": answer} for question, answer in pairs]
    (built,) = build_rewards(choose_rewards(rows, permissions).rewards)
    draw = random.Random(0)
    texts = ["".join(draw.choices(string.printable, k=draw.randint(1, 40))) for _ in range(60)]
    for row in rows:
        scores = built([row["prompt"]] * 61, [row["answer"], *texts], answer=[row["answer"]] * 61)
        assert scores[0] == 1.0
        assert sum(score or 0.0 for score in scores[1:]) / 60 < 0.3


class Grader:
    """A local stand-in for a judge's model: it finds the reference in the answer, as the request shows both to it."""

    def converse(self, messages, **_):
        request = messages[0]["content"][0]["text"]
        reference, answer = (
            re.findall(rf"<{part} \S+>\n(.*?)\n</{part} ", request, re.DOTALL)[-1].lower()
            for part in ("reference", "answer")
        )
        right = " ".join(reference.split()) in " ".join(answer.split())
        return {"output": {"message": {"content": [{"text": f"<score>{10 * right}</score>"}]}}}


ADD = "def add(n):\n    return n + {}"
PROGRAMS = [
    {"prompt": user(f"Write add, with {n}."), "answer": ADD.format(n), "tests": [f"assert add(1) == {n + 1}"]}
    for n in (3, 4)
]
TEXTS = [
    {"prompt": user("Tell me of the river."), "answer": LONG},
    {"prompt": user("And the hill?"), "answer": f"Hills. {LONG[:60]}"},
]
SERVED = [
    (PROGRAMS, "code_tests", ["So:\n```python\n{}\n```", "<think>We add.</think>\n{}", "\n{}\n\n", "import math\n{}"]),
    (TEXTS, "judge", ["{}", "I thought about it. {}", "\n {}\n\n"]),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "name", "paraphrases"), SERVED, ids=[name for _, name, _ in SERVED])
def test_gold_and_paraphrases_earn_programs_and_judges_and_wrong_answers_do_not(rows, name, paraphrases):
    grader = Grader()
    permissions = RewardPermissions(lambda _: grader, judge_model="m" if name == "judge" else "", allow_code=True)
    (spec,) = choose_rewards(rows, permissions).rewards
    assert spec.type == name
    (built,) = build_rewards([spec], permissions)
    for row, other in zip(rows, reversed(rows), strict=True):
        right = [row["answer"], *(words.format(row["answer"]) for words in paraphrases)]
        draw = random.Random(0)
        noise = ["".join(draw.choices(string.printable, k=20)) for _ in range(3)]
        wrong = ["", other["answer"], row["prompt"][0]["content"], "lorem ipsum " * 200, "…", *noise]
        texts = right + wrong
        columns = {key: [value] * len(texts) for key, value in row.items() if key != "prompt"}
        assert built([row["prompt"]] * len(texts), texts, **columns) == [1.0] * len(right) + [0.0] * len(wrong)


def test_a_tool_call_is_asked_for_where_the_rows_have_tools():
    prompt = [{"role": "user", "content": "q", "tools": "[]"}]
    call = '[{"name": "f", "arguments": {}}]'
    assert choose_rewards([{"prompt": prompt, "answer": call}], NO_PERMISSIONS).rewards[0].type == "tool_call"
    assert choose_rewards([{"prompt": user("q"), "answer": call}], NO_PERMISSIONS).rewards[0].type == "json_match"


def test_what_similarity_cannot_teach_is_said():
    (warning,) = choose_rewards([{"prompt": user("q"), "answer": LONG}], NO_PERMISSIONS).warnings
    assert "not whether an answer is right" in warning


@pytest.mark.parametrize("name", sorted(path.name for path in SAMPLES.glob("*") if path.name not in {"broken.jsonl"}))
def test_the_samples_are_valid_without_a_config(name):
    receipt = check_file(SAMPLES / name, None, None, None)
    assert (receipt.ok, receipt.errors) == (True, [])
    assert receipt.rewards["chosen"]
    means = {each["kind"]: each["mean"] for each in receipt.rewards["answers"]}
    assert means["gold"] == means["spaced"] == means["final"] == 1.0
    assert max(means[kind] for kind in ("empty", "other_row", "echo", "long") if kind in means) < 1.0


def test_problems_are_found_once_for_all_rows(tmp_path):
    receipt = checked(tmp_path, [{"question": f"q{n}", "answer": "a", "images": ["x"]} for n in range(30)])
    (error,) = receipt.errors
    assert isinstance(error, Problem)
    assert (error.count, error.places, receipt.error_counts) == (30, [1, 2, 3], {"MEDIA": 30})
