import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunedrop.problems import Problem
from tunedrop.records import read_rows
from tunedrop.run_config import parse_run_config

CONFIG = parse_run_config({"model": "m"})


def read(tmp_path: Path, name: str, data: str | bytes, config=CONFIG):
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return list(read_rows(path, config))


def user(text: str):
    return [{"role": "user", "content": text}]


PAIR = [("q1", "a1"), ("q2", "a2")]
SHAPES = {
    "lines.jsonl": '{"question": "q1", "answer": "a1"}\n\n{"question": "q2", "answer": "a2"}',
    "crlf.jsonl": '{"question": "q1", "answer": "a1"}\r\n{"question": "q2", "answer": "a2"}\r\n',
    "bom.jsonl": '\ufeff{"question": "q1", "answer": "a1"}\n{"question": "q2", "answer": "a2"}\n',
    "array.json": '[{"Question": "q1", "Answer": "a1"},\n {"Question": "q2", "Answer": "a2"}]',
    "pretty.json": json.dumps({"Prompt": "q1", "Answer": "a1"}, indent=2)
    + "\n"
    + json.dumps({"Prompt": "q2", "Answer": "a2"}, indent=2),
    "pretty.jsonl": json.dumps({"QUESTION": "q1", "ANSWER": "a1"}, indent=4)
    + json.dumps({"QUESTION": "q2", "ANSWER": "a2"}, indent=4),
    "one_line.jsonl": '{"question": "q1", "answer": "a1"} {"question": "q2", "answer": "a2"}',
    "curly.json": "{“Question”: “q1”, “Answer”: “a1”}\n{“Question”: “q2”, “Answer”: “a2”}",
    "table.csv": "Question,Answer\nq1,a1\nq2,a2\n",
    "instructions.jsonl": '{"instruction": "q1", "input": "", "output": "a1"}\n{"instruction": "q2", "output": "a2"}',
    "trl.jsonl": "\n".join(json.dumps({"prompt": user(q), "answer": a}) for q, a in PAIR),
    "rlvr.jsonl": "\n".join(
        json.dumps({"data_source": "d", "prompt": user(q), "reward_model": {"style": "rule", "ground_truth": a}})
        for q, a in PAIR
    ),
    "nova.jsonl": "\n".join(json.dumps({"messages": user(q), "reference_answer": a}) for q, a in PAIR),
    "chat.jsonl": "\n".join(json.dumps({"messages": [*user(q), {"role": "assistant", "content": a}]}) for q, a in PAIR),
    "parts.jsonl": "\n".join(
        json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": q}]}], "reference_answer": a})
        for q, a in PAIR
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_gives_the_same_rows(tmp_path, name):
    rows = read(tmp_path, name, SHAPES[name])
    assert [(row["prompt"], row["answer"]) for row in rows] == [(user(q), a) for q, a in PAIR]
    assert [row["id"] for row in rows] == ["row-1", "row-2"]


def test_parquet(tmp_path):
    pq.write_table(pa.table({"question": ["q1", "q2"], "answer": ["a1", "a2"], "n": [1, 2]}), tmp_path / "t.parquet")
    rows = list(read_rows(tmp_path / "t.parquet", CONFIG))
    assert [(row["prompt"], row["answer"], row["n"]) for row in rows] == [(user("q1"), "a1", 1), (user("q2"), "a2", 2)]


def test_the_shape_with_index_and_reasoning(tmp_path):
    """Several pretty-printed objects one after another, curly quotes inside the texts."""
    records = [
        {"Index": n, "Question": f"What is “{n}”?", "Answer": f"It’s “{n}”", "Reasoning": "a {b} [c"} for n in (1, 2, 3)
    ]
    data = "\n".join(json.dumps(record, indent=2, ensure_ascii=False) for record in records)
    rows = read(tmp_path, "faq.json", data)
    assert [row["prompt"][0]["content"] for row in rows] == [record["Question"] for record in records]
    assert [row["answer"] for row in rows] == [record["Answer"] for record in records]
    assert [row["Reasoning"] for row in rows] == ["a {b} [c"] * 3


def test_named_columns_win_over_guesses(tmp_path):
    config = parse_run_config({"model": "m", "columns": {"prompt": "text", "answer": "label"}})
    (row,) = read(tmp_path, "t.csv", "question,text,answer,label\na,b,c,d\n", config)
    assert (row["prompt"], row["answer"]) == (user("b"), "d")


def test_system_prompt_comes_first_once(tmp_path):
    config = parse_run_config({"model": "m", "system_prompt": "It's $(a) test"})
    (row,) = read(tmp_path, "t.jsonl", '{"question": "q", "answer": "a"}', config)
    assert row["prompt"] == [{"role": "system", "content": "It's $(a) test"}, *user("q")]
    (again,) = read(tmp_path, "again.jsonl", json.dumps(row), config)
    assert again == row


def test_answers_that_are_not_texts_become_json(tmp_path):
    rows = read(tmp_path, "t.jsonl", '{"question": "q", "answer": 4}\n{"question": "q", "answer": {"a": [1]}}')
    assert [row["answer"] for row in rows] == ["4", '{"a":[1]}']


BROKEN = [
    # file, its bytes, expected (code, line) of each problem, number of good rows
    ("t.jsonl", '{"question":"q","answer":"a"}\n{"question":"q","answer":"b"}\n{"question": oops}\n', [("BAD_JSON", 3)], 2),
    (
        "t.jsonl",
        '{"question":"q","answer":"a"}\n{"question":"q", "answ\n{"question":"q","answer":"b"}\n',
        [("BAD_JSON", 2)],
        2,
    ),
    ("t.jsonl", '{"question":"q","answer":"a"}\n{"question":"q", ', [("BAD_JSON", 2)], 1),
    ("t.jsonl", '{"question":"q"}\n{"question":"q","answer":"a"}', [("NO_ANSWER", 1)], 1),
    ("t.jsonl", '{"question":"q","answer":null}', [("NO_ANSWER", 1)], 0),
    ("t.jsonl", '{"question":"q","answer":" "}', [("EMPTY_ANSWER", 1)], 0),
    ("t.jsonl", '{"answer":"a","x":1}', [("NO_PROMPT", 1)], 0),
    ("t.jsonl", '{"question":" ","answer":"a"}', [("EMPTY_PROMPT", 1)], 0),
    ("t.jsonl", '{"prompt":[{"role":"robot","content":"q"}],"answer":"a"}', [("BAD_MESSAGES", 1)], 0),
    ("t.jsonl", '{"prompt":[{"role":"assistant","content":"q"}],"answer":"a"}', [("BAD_MESSAGES", 1)], 0),
    ("t.jsonl", "[1, 2]", [("NOT_AN_OBJECT", 1), ("NOT_AN_OBJECT", 1)], 0),
    ("t.jsonl", b'{"question":"\xff","answer":"a"}', [("ENCODING", 1)], 0),
    ("t.jsonl", '{"question":"q","answer":"a"}'.encode("utf-16"), [("ENCODING", 1)], 0),
    ("t.jsonl", "{" * 100_000, [("BAD_JSON", 1)], 0),
    ("t.json", '[\n{"question":"q","answer":"a"},\n{"question":}]', [("BAD_JSON", 3)], 0),
    ("t.csv", "question,answer\na,b\nc\n", [("BAD_CSV", 3)], 1),
    ("t.csv", b"question,answer\na,b\nc,\xff\n", [("ENCODING", 3)], 1),
    ("t.csv", 'question,answer\na,"b', [("BAD_CSV", 2)], 0),
    ("t.parquet", b"PAR1 this is no parquet file PAR1", [("BAD_PARQUET", None)], 0),
    ("t.parquet", b"PAR1", [("BAD_PARQUET", None)], 0),
    ("t.txt", "hello", [("UNKNOWN_FORMAT", None)], 0),
    ("t.jsonl", "", [], 0),
    ("t.csv", "", [], 0),
    ("t.json", "[]", [], 0),
]


@pytest.mark.parametrize(("name", "data", "problems", "good"), BROKEN, ids=lambda value: str(value)[:24])
def test_broken_records_are_located_and_the_rest_is_read(tmp_path, name, data, problems, good):
    items = read(tmp_path, name, data)
    assert [(item.code, item.line) for item in items if isinstance(item, Problem)] == problems
    assert sum(isinstance(item, dict) for item in items) == good


TEXTS = st.text(min_size=1).filter(str.strip)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5), st.sampled_from(["lines", "pretty", "array", "csv"]))
def test_any_text_survives_every_format(tmp_path_factory, pairs, kind):
    records = [{"question": question, "answer": answer} for question, answer in pairs]
    if kind == "csv":
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, ["question", "answer"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(records)
        name, data = "t.csv", out.getvalue()
    else:
        separator = "\n" if kind != "array" else None
        dumped = [json.dumps(record, indent=2 if kind == "pretty" else None) for record in records]
        name, data = "t.json", separator.join(dumped) if separator else json.dumps(records)
    items = read(tmp_path_factory.mktemp("t"), name, data)
    assert [(item["prompt"][0]["content"], item["answer"]) for item in items] == pairs
