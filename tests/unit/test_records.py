import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunedrop.config.parse import parse_run_config
from tunedrop.dataset import batches, readers
from tunedrop.dataset.messages import TURN_MARKS
from tunedrop.dataset.readers import DATA_SUFFIXES, suffix_of
from tunedrop.dataset.rows import read_rows
from tunedrop.problems import Problem

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
    "completion.jsonl": "\n".join(
        json.dumps({"prompt": user(q), "completion": [{"role": "assistant", "content": a}]}) for q, a in PAIR
    ),
    "names.jsonl": "\n".join(
        json.dumps({"prompt": [{"role": "user", "content": q, "name": "Ann"}], "answer": a}) for q, a in PAIR
    ),
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


@pytest.mark.parametrize("name", SHAPES)
def test_every_text_format_may_be_gzipped(tmp_path, name):
    rows = read(tmp_path, f"{name}.gz", gzip.compress(SHAPES[name].encode()))
    assert [(row["prompt"], row["answer"]) for row in rows] == [(user(q), a) for q, a in PAIR]


def test_suffixes():
    assert {suffix_of(f"a.b{suffix.upper()}") for suffix in DATA_SUFFIXES} == set(DATA_SUFFIXES)
    assert suffix_of("a.txt") == suffix_of("a.gz") == suffix_of("a.parquet.gz") == ""


def test_what_openai_calls_the_developer_is_the_system(tmp_path):
    messages = [{"role": "developer", "content": "s"}, *user("q"), {"role": "assistant", "content": "a"}]
    (row,) = read(tmp_path, "t.jsonl", json.dumps({"messages": messages}))
    assert row["prompt"] == [{"role": "system", "content": "s"}, *user("q")]


def test_parquet(tmp_path):
    pq.write_table(pa.table({"question": ["q1", "q2"], "answer": ["a1", "a2"], "n": [1, 2]}), tmp_path / "t.parquet")
    rows: list[Any] = list(read_rows(tmp_path / "t.parquet", CONFIG))
    assert [(row["prompt"], row["answer"], row["n"]) for row in rows] == [
        (user("q1"), "a1", 1),
        (user("q2"), "a2", 2),
    ]


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
    ("t.jsonl", '{"prompt":[{"role":"assistant","content":"q"}],"answer":"a"}', [("ROLE_ORDER", 1)], 0),
    ("t.jsonl", "[1, 2]", [("NOT_AN_OBJECT", 1), ("NOT_AN_OBJECT", 1)], 0),
    ("t.jsonl", b'{"question":"\xff","answer":"a"}', [("ENCODING", 1)], 0),
    ("t.jsonl", '{"question":"q","answer":"a"}'.encode("utf-16"), [("ENCODING", 1)], 0),
    ("t.jsonl", "{" * 100_000, [("BAD_JSON", 1)], 0),
    ("t.json", '[\n{"question":"q","answer":"a"},\n{"question":}]', [("BAD_JSON", 3)], 1),
    ("t.json", '[\n{"question":"q","answer":"a"},\n{"question":"q","answer":"b"}', [("BAD_JSON", 3)], 2),
    ("t.json", '[{"question":"q","answer":"a"}, 3, "x", {"question":"q","answer":"b"}]', [("NOT_AN_OBJECT", 1)] * 2, 2),
    ("t.jsonl", 'question,answer\n{"question":"q","answer":"a"}', [("NOT_AN_OBJECT", 1)], 1),
    ("t.jsonl", '{"question":"q","answer":"a"\n\n\n{"question":"q","answer":"b"}', [("BAD_JSON", 1)], 1),
    ("t.json", '{\n "question": "q,\n "answer": "a"\n}\n{"question":"q","answer":"b"}', [("BAD_JSON", 1)], 1),
    ("t.jsonl", '{"question":"q","answer":"a"}\n{"question":"\\ud800","answer":"a"}', [("BAD_JSON", 2)], 1),
    ("t.jsonl", '{"prompt":[],"answer":"a"}', [("EMPTY_PROMPT", 1)], 0),
    ("t.jsonl", '{"prompt":[{"role":"user","content":" "}],"answer":"a"}', [("EMPTY_PROMPT", 1)], 0),
    ("t.jsonl", '{"prompt":[{"role":"user"}],"answer":"a"}', [("BAD_MESSAGES", 1)], 0),
    ("t.jsonl", '{"prompt":[{"role":["user"],"content":"q"}],"answer":"a"}', [("BAD_MESSAGES", 1)], 0),
    ("t.jsonl", '{"prompt":[{"role":"user","content":null}],"answer":"a"}', [("BAD_MESSAGES", 1)], 0),
    ("t.jsonl", '{"prompt":[{"role":"user","content":[{"image":"b"}]}],"answer":"a"}', [("MEDIA", 1)], 0),
    (
        "t.jsonl",
        '{"messages":[{"role":"user","content":"q"},{"role":"system","content":"s"},{"role":"assistant","content":"a"}]}',
        [("ROLE_ORDER", 1)],
        0,
    ),
    ("t.jsonl", '{"messages":[{"role":"assistant","content":"a"}]}', [("ROLE_ORDER", 1)], 0),
    ("t.jsonl", '{"messages":[{"role":"user","content":"q"}]}', [("NO_ANSWER", 1)], 0),
    ("t.jsonl", '{"prompt":3,"answer":"a"}', [("NO_PROMPT", 1)], 0),
    ("t.jsonl.gz", gzip.compress(b'{"question":"q","answer":"a"}\n' * 999, mtime=0)[:-9], [("BAD_GZIP", None)], 0),
    ("t.jsonl.gz", b"no gzip", [("BAD_GZIP", None)], 0),
    ("t.csv", "question,question\na,b\n", [("BAD_CSV", 1)], 0),
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


# A text with the mark of a chat template is refused, or read as a conversation.
TEXTS = st.text(min_size=1).filter(lambda text: text.strip() and not TURN_MARKS.search(text))


@settings(deadline=None)
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


# --- reading in pieces ---

MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "developer"]), "content": TEXTS | st.just("")},
        optional={"name": st.just("n")},
    ),
    max_size=4,
)
RECORDS = st.one_of(
    st.fixed_dictionaries({"question": TEXTS, "answer": TEXTS | st.integers() | st.none()}),
    st.fixed_dictionaries({"messages": MESSAGES}, optional={"id": st.integers() | st.none(), "topic": TEXTS}),
    st.fixed_dictionaries({"prompt": MESSAGES | TEXTS, "reward_model": st.fixed_dictionaries({"ground_truth": TEXTS})}),
    st.fixed_dictionaries({"instruction": TEXTS, "input": TEXTS | st.just(""), "output": TEXTS}),
)


@settings(deadline=None)
@given(st.lists(RECORDS, min_size=1, max_size=6), st.booleans())
def test_a_batch_without_anything_wrong_is_read_as_row_by_row(tmp_path_factory, records, system):
    """A row that is wrong sends its whole batch through the code that looks at each row."""
    config = parse_run_config({"model": "m", "system_prompt": "s"} if system else {"model": "m"})
    folder, lines = tmp_path_factory.mktemp("t"), [json.dumps(record) for record in records]
    quick = read(folder, "a.jsonl", "\n".join(lines), config)
    slow = read(folder, "b.jsonl", "\n".join([*lines, "[]"]), config)
    assert [item for item in slow if item not in quick] == [slow[-1]]
    assert [item for item in quick if item not in slow] == []


@settings(max_examples=60, deadline=None)
@given(st.lists(RECORDS, max_size=5), st.sampled_from(["lines", "pretty", "array", "pretty array"]), st.integers(9, 200))
def test_where_a_block_ends_changes_nothing(tmp_path_factory, records, kind, size):
    folder, indent = tmp_path_factory.mktemp("t"), 1 if "pretty" in kind else None
    dumped = [json.dumps(record, ensure_ascii=False, indent=indent) for record in records]
    data = json.dumps(records, indent=indent) if "array" in kind else "\n".join(dumped)
    whole = read(folder, "t.json", data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "BLOCK_BYTES", size)
        assert sorted(map(str, read(folder, "t.json", data))) == sorted(map(str, whole))


@settings(deadline=None)
@given(st.binary(max_size=300) | st.text(alphabet='{}[]",:\\\n ab“', max_size=200).map(str.encode), st.integers(9, 50))
def test_any_bytes_are_rows_or_problems(tmp_path_factory, data, size):
    folder = tmp_path_factory.mktemp("t")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "BLOCK_BYTES", size)
        for suffix in (".jsonl", ".csv", ".jsonl.gz"):
            items = read(folder, f"t{suffix}", data)
            assert all(isinstance(item, Problem | dict) for item in items)


@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
def test_a_row_that_never_ends_ends_the_reading(tmp_path, monkeypatch, name):
    monkeypatch.setattr(batches, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(batches, "BLOCK_BYTES", 100)
    start = "[" if name == "t.json" else ""
    *_, problem = read(
        tmp_path, name, start + '{"question":"q","answer":"a"}\n{"question":"' + "q" * 5000 + '","answer":"a"}'
    )
    assert (problem.code, problem.line, problem.row) == ("ROW_TOO_LARGE", 2, 2)


def test_what_unpacks_to_more_than_is_allowed_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setitem(readers.MAX_BYTES, ".jsonl", 100_000)
    *_, problem = read(tmp_path, "t.jsonl.gz", gzip.compress(b"\n" * 10_000_000))
    assert problem.code == "TOO_LARGE"


def test_lines_and_rows_are_those_of_the_file(tmp_path):
    good, bad = '{"question":"q","answer":"a"}', '{"question":"q"}'
    items = read(tmp_path, "t.jsonl", f"{good}\n\n{bad}\r\n\n\n{good} {bad}\n{bad}")
    assert [(item.line, item.row) for item in items if isinstance(item, Problem)] == [(3, 2), (6, 4), (7, 5)]
    items = read(tmp_path, "t.json", f"\n [ {good},\n\n {bad}\n,{bad}, {good}]")
    assert [(item.line, item.row) for item in items if isinstance(item, Problem)] == [(4, 2), (5, 3)]
    items = read(tmp_path, "t.csv", 'question,answer\n"a\nb",c\n\nd\ne,f\ng,\n')
    assert [(item.line, item.row) for item in items if isinstance(item, Problem)] == [(5, 2), (7, 4)]


def test_a_named_column_that_is_not_there_is_named(tmp_path):
    config = parse_run_config({"model": "m", "columns": {"prompt": "Question"}})
    (problem,) = read(tmp_path, "t.jsonl", '{"question":"q","answer":"a"}', config)
    assert problem.code == "NO_PROMPT"
    assert "'Question'" in problem.message
    assert problem.hint == "did you mean 'question'?"


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])
def test_a_file_has_so_many_rows_at_most(tmp_path, monkeypatch, name):
    path = tmp_path / name
    table = pa.table({"question": [str(n) for n in range(9000)], "answer": ["a"] * 9000})
    if name.endswith("parquet"):
        pq.write_table(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    monkeypatch.setattr(readers, "MAX_ROWS", 9000)
    assert len(list(read_rows(path, CONFIG))) == 9000
    monkeypatch.setattr(readers, "MAX_ROWS", 100)
    *rows, problem = read_rows(path, CONFIG)
    assert 100 < len(rows) < 4500  # to the end of a batch
    assert isinstance(problem, Problem)
    assert problem.code == "TOO_LARGE"
    assert "more than 100 rows" in problem.message
