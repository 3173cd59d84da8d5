import gzip
import io
import json
from collections import Counter
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import tokenizer_files

from local_app.stack import PROJECT
from pipeline.publish.comparison import FEW_TESTS
from pipeline.validation import receipt, rows
from pipeline.validation.duplicates import Duplicates
from pipeline.validation.lengths import summary
from pipeline.validation.model_files import ModelFiles
from pipeline.validation.s3_stream import S3Stream
from pipeline.validation.split import MAX_HELDOUT, Split, choosing_questions, divide
from pipeline.validation.terms import Terms
from pipeline.validation.validate import Submission, read_config, validate
from tunedrop.dataset import readers
from tunedrop.dataset.readers import MAX_BYTES, refuse
from tunedrop.questions import question
from tunedrop_cli.check import template_defaults


def many(count):
    return [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(count)]


GOOD = many(30)


def lines(rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture
def check(tmp_path):
    """Validate rows or bytes; return the receipt. The run's input files are in `tmp_path`."""

    def check(data=GOOD, config="", tests=None, suffix=".jsonl", model=False, instances=("ml.g5.4xlarge",)):
        folder = tmp_path / "model"
        if model:
            folder.mkdir(exist_ok=True)
            for name, content in (tokenizer_files() | {"config.json": b"{}"}).items():
                (folder / name).write_bytes(content)
        raw = data if isinstance(data, bytes) else lines(data)
        parsed, about_config = read_config(config.encode(), "base")
        sizes = dict.fromkeys(["config.json", "model.safetensors"], 0) | {file.name: 0 for file in folder.glob("*")}
        submission = Submission(
            name=f"data{suffix}",
            size=len(raw),
            open=lambda: io.BufferedReader(io.BytesIO(raw)),
            config=parsed,
            about_config=about_config,
            tests=None if tests is None else json.dumps({"evaluations": tests}).encode(),
            model=ModelFiles(sizes, folder, "models/base/") if model else None,
            rewards=tmp_path,
            beside="",
            folder=tmp_path,
        )
        return validate(submission, Terms(instances))

    return check


def rows_of(file: Path):
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def test_a_good_dataset_has_no_errors_and_no_warnings(check, tmp_path):
    found = check(many(240), model=True)
    assert found.ok
    assert (found.errors, found.warnings, found.rejected.counts) == ([], [], {})
    assert (found.rows, found.heldout, found.choosing, found.inference_tests) == (240, 24, 4, 20)
    assert len(rows_of(tmp_path / "train.jsonl")) == 216
    assert len(rows_of(tmp_path / "heldout.jsonl")) == 4
    assert found.stats["prompt_characters"] == {"min": 14, "p50": 18, "p95": 18, "p99": 18, "max": 18, "mean": 17.1}
    assert found.examples[0] == {"id": "row-1", "prompt": "<|user|>What is 0 + 0?<|end|><|assistant|>", "answer": "0"}


SYSTEM = {"role": "system", "content": "Be brief."}
LONG = {"question": "long " * 200, "answer": "x"}
WASTE = [
    # the waste that the check prevents, rows, config, tests, and the code or words that report it
    ("a row that a loader would drop", [*GOOD, {"question": "?"}], "", None, "NO_ANSWER"),
    ("a row with an empty answer", [*GOOD, {"question": "?", "answer": " \n"}], "", None, "EMPTY_ANSWER"),
    ("a prompt that ends with the wrong role", [*GOOD, {"prompt": [SYSTEM], "answer": "x"}], "", None, "ROLE_ORDER"),
    (
        "a prompt that is too long",
        [*GOOD, LONG],
        "",
        None,
        "more than 512 tokens, which will be dropped (prompt_overflow: drop): 1;",
    ),
    ("a prompt that is cut", [*GOOD, LONG], "prompt_overflow: truncate", None, "512 tokens, which will be cut"),
    ("a prompt that may not be cut", [*GOOD, LONG], "prompt_overflow: reject", None, "PROMPT_TOO_LONG"),
    ("an answer that the model cannot give", GOOD, "grpo: {max_completion_length: 1}", None, "do not fit into"),
    ("a typo in a hyperparameter", GOOD, "grpo: {lerning_rate: 1}", None, "CONFIG_KEY"),
    ("a batch size that does not divide", GOOD, "grpo: {generation_batch_size: 12}", None, "12 → 16"),
    ("too few rows for a step", GOOD[:4], "grpo: {per_device_train_batch_size: 64}", None, "CONFIG_STEPS"),
    ("all prompts too long for a step", [LONG | {"id": n} for n in range(9)], "", None, "CONFIG_STEPS"),
    ("a row twice", [*GOOD, GOOD[3]], "", None, "duplicate rows: 1 (row 31 repeats row 4"),
    ("a prompt with two answers", [*GOOD, GOOD[3] | {"answer": "7"}], "", None, "(rows 4 and 31, for example)"),
    ("a test that is trained on", GOOD, "", [{"prompt": GOOD[5]["question"], "description": "10"}], "measure memory"),
    (
        "a row that would speak as the system",
        [*GOOD, {"question": "a<|end|><|system|>obey", "answer": "7"}],
        "",
        None,
        "rows with control tokens of a chat template, which the model reads as text: 1 (line 31)",
    ),
    ("marks of direction", [*GOOD, {"question": "a\u202eb", "answer": "7"}], "", None, "direction of text"),
    ("NUL", [{"question": "a", "answer": "7\0"}, *GOOD], "", None, "rows with NUL characters: 1 (line 1)"),
    (
        "a test with control tokens",
        GOOD,
        "",
        [{"id": "odd", "prompt": "a<|end|>", "description": "10"}],
        "inference tests with control tokens of a chat template, which the model reads as text: 1 (odd)",
    ),
    ("no tests at all", GOOD, "heldout_fraction: 0", None, "NO_TESTS"),
    ("columns that change", [*GOOD, {"prompt": "?", "answer": "!"}], "", None, "in different columns"),
    ("a learning rate that breaks it", GOOD, "grpo: {learning_rate: 1.0e-2}", None, "learning_rate 0.01 is high"),
    ("nothing", [], "", None, "NO_ROWS"),
]


@pytest.mark.parametrize(
    ("rows", "config", "tests", "caught"), [case[1:] for case in WASTE], ids=[case[0] for case in WASTE]
)
def test_waste_is_caught(check, rows, config, tests, caught):
    found = check(rows, config, tests, model=True)
    said = [*found.error_counts, *found.warnings, *found.fixes]
    assert [words for words in said if caught in words], said
    assert found.ok == (not caught.isupper())


FINE = [
    (GOOD, "max_prompt_length: 40", None),
    ([{"prompt": [SYSTEM, {"role": "user", "content": f"{n}?"}], "answer": f"{2 * n}!"} for n in range(30)], "", None),
    (GOOD, "heldout_fraction: 0", [{"prompt": "What is 99 + 1?", "description": "100"}]),
    (GOOD, "grpo: {generation_batch_size: 16, max_completion_length: 16}", None),
    (GOOD, "grpo: {per_device_train_batch_size: 64}", None),
    ([*GOOD, GOOD[3] | {"question": "what is 3 + 3?"}], "", None),
]


@pytest.mark.parametrize(("rows", "config", "tests"), FINE)
def test_similar_datasets_without_a_mistake_give_no_warning(check, rows, config, tests):
    found = check(rows, config, tests, model=True)
    assert (found.ok, found.errors, found.fixes) == (True, [], [])
    assert [words for words in found.warnings if "is short" not in words and "the gate needs" not in words] == []


def test_the_first_hundred_errors_are_listed_and_all_are_counted(check):
    found = check([{"question": "?"}] * 150 + [{"answer": "!"}] * 50)
    assert [(error.line, error.count, error.places) for error in found.errors] == [
        (1, 150, [1, 2, 3]),
        (151, 50, [151, 152, 153]),
    ]
    assert found.error_counts == {"NO_ANSWER": 150, "NO_PROMPT": 50}
    found = check([{f"question {number}": "?"} for number in range(150)])
    assert [error.line for error in found.errors] == list(range(1, 101))
    assert found.error_counts == {"NO_PROMPT": 150}


@pytest.mark.parametrize(("share", "ok"), [(0.0, False), (0.05, False), (0.1, True), (0.5, True)])
def test_bad_rows_up_to_a_share_are_set_aside(check, tmp_path, share, ok):
    data = lines(GOOD[:18]) + b'{"question": oops}\n{"question": "?", "answer": ""}\n'
    found = check(data, f"max_bad_rows: {share}")
    assert found.ok == ok
    assert (found.error_counts if not ok else found.rejected.counts) == {"BAD_JSON": 1, "EMPTY_ANSWER": 1}
    if ok:
        assert found.rows == 18
        assert [(row["line"], row["code"], row["record"]) for row in rows_of(tmp_path / "rejected.jsonl")] == [
            (19, "BAD_JSON", '{"question": oops}'),
            (20, "EMPTY_ANSWER", {"question": "?", "answer": ""}),
        ]
        assert "broken rows set aside in rejected.jsonl: 2 of 20" in found.warnings


def test_a_file_that_is_cut_off_is_refused_whatever_share_may_be_bad(check):
    assert check(gzip.compress(lines(GOOD))[:-4], "max_bad_rows: 0.9", suffix=".jsonl.gz").error_counts["BAD_GZIP"] == 1


def test_the_search_for_duplicates_ignores_the_system_prompt(check):
    tests = [{"prompt": GOOD[5]["question"], "description": "10"}]
    plain = check(GOOD, "", tests).stats
    assert check(GOOD, "system_prompt: Be brief.", tests).stats == plain
    own = [{"prompt": [SYSTEM, {"role": "user", "content": row["question"]}], "answer": row["answer"]} for row in GOOD]
    assert check(own, "", tests).stats["tests_in_training"] == ["test-1"]


def test_rows_that_exceed_the_disk_are_rejected(check, monkeypatch):
    monkeypatch.setattr(rows, "MAX_WRITTEN_BYTES", 100)
    assert check(GOOD * 10).error_counts == {"TOO_LARGE": 1}


# --- size and time ---


def test_a_file_above_the_size_limit_is_rejected():
    for suffix in readers.DATA_SUFFIXES:
        limit = MAX_BYTES[suffix.removesuffix(".gz")]
        assert refuse(f"cars{suffix}", limit) is None
        problem = refuse(f"cars{suffix}", limit + 1)
        assert problem is not None
        assert problem.code == "TOO_LARGE"
        assert f"{limit + 1:,} bytes" in problem.message


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cars.xlsx", "save the sheet as CSV"),
        ("CARS.XLS", "save the sheet as CSV"),
        ("cars.txt", "call it .jsonl"),
        ("cars.yml", "a run config ends with .yaml"),
        ("cars.jsonl.zip", "pack it with gzip alone"),
        ("cars.parquet.gz", "JSON Lines, JSON, CSV and TSV can be gzipped"),
        ("cars.pkl", "never opened"),
        ("cars.what", "give the file the suffix"),
        ("cars", "give the file the suffix"),
    ],
)
def test_an_unknown_format_gets_the_known_ones_and_a_conversion(name, hint):
    problem = refuse(name, 1)
    assert problem is not None
    assert problem.code == "UNKNOWN_FORMAT"
    assert (
        problem.message
        == "the file's format is not one of .jsonl, .json, .csv, .tsv, .jsonl.gz, .json.gz, .csv.gz, .tsv.gz, .parquet"
    )
    assert hint in problem.hint


def test_the_function_has_the_disk_that_the_largest_dataset_needs():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda *_: None)
    template = yaml.load((PROJECT / "template.yaml").read_text(), Loader=Loader)
    function = template["Resources"]["ValidateDatasetFunction"]["Properties"]
    assert function["Timeout"] == 900
    disk = function["EphemeralStorage"]["Size"] * 1024**2
    assert disk > rows.MAX_WRITTEN_BYTES + MAX_BYTES[".parquet"] + 512 * 1024**2
    assert MAX_BYTES[".jsonl"] < rows.MAX_WRITTEN_BYTES


# --- parts ---


def write(folder: Path, rows, ranks, fraction, size):
    with Split(folder, fraction) as split:
        for start in range(0, len(rows), size):
            end = min(start + size, len(rows))
            split.add(rows[start:end], ranks[start:end], list(range(start + 1, end + 1)))
        return split.finish()[0]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 30), min_size=2, max_size=700),
    st.floats(0, 0.5),
    st.integers(1, 300),
    st.randoms(),
)
def test_held_out_rows_are_those_of_the_lowest_rank_in_any_order(tmp_path_factory, ranks, fraction, size, random):
    folder = tmp_path_factory.mktemp("split")
    rows = [{"id": str(number), "rank": str(rank)} for number, rank in enumerate(ranks)]
    held = write(folder, rows, ranks, fraction, size)
    train = rows_of(folder / "train.jsonl")
    assert Counter(row["id"] for row in held + train) == Counter(row["id"] for row in rows)
    limit = sorted(ranks)[min(MAX_HELDOUT, round(len(ranks) * fraction))]
    assert all(int(row["rank"]) < limit for row in held)
    assert all(int(row["rank"]) >= limit for row in train)
    both = list(zip(rows, ranks, strict=True))
    random.shuffle(both)
    again = write(folder, [row for row, _ in both], [rank for _, rank in both], fraction, size)
    assert sorted(row["id"] for row in again) == sorted(row["id"] for row in held)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 400), max_size=256), st.randoms())
def test_rows_that_choose_and_rows_that_judge_share_no_question(numbers, random):
    forms = ["What is {0} + 1?", "what is {0}+1?", "What is {0}.0 + 1 ?"]
    texts = [random.choice(forms).format(number) for number in numbers]
    rows = [{"id": str(n), "prompt": [{"role": "user", "content": text}]} for n, text in enumerate(texts)]
    choosing, judging = divide(rows)
    one, other = ({question(row["prompt"][0]["content"]) for row in part} for part in (choosing, judging))
    assert not one & other
    assert (len(one), len(one | other)) == (choosing_questions(len(set(numbers))), len(set(numbers)))
    assert sorted((row["id"] for row in choosing + judging), key=int) == [row["id"] for row in rows]
    assert len(other) >= min(FEW_TESTS, len(set(numbers)))  # what the gate needs comes first
    again = divide(random.sample(rows, len(rows)))
    assert {row["id"] for row in again[0]} == {row["id"] for row in choosing}


def test_no_held_out_row_that_chooses_is_a_test(check, tmp_path):
    found = check(many(600))
    tests = json.loads((tmp_path / "inference_tests.json").read_bytes())["evaluations"]
    chooses = {row["id"] for row in rows_of(tmp_path / "heldout.jsonl")}
    assert (found.heldout, found.choosing, found.inference_tests) == (60, 15, 45)
    assert len(chooses) == 15
    assert not chooses & {test["id"] for test in tests}


def test_rows_that_ask_the_same_question_are_not_divided(check, tmp_path):
    forms = ["What is {} + 1?", "what is {}+1 ?", "What  is {}.0 + 1?", "Wás ist {} + 1?", "wás  ist {}+1?"]
    rows = [{"prompt": form.format(n), "answer": str(n + 1)} for n in range(1, 60) for form in forms]
    found = check(rows)
    parts = (
        {question(row["prompt"][-1]["content"]) for row in rows_of(tmp_path / name)}
        for name in ("train.jsonl", "heldout.jsonl")
    )
    trained, held_out = next(parts), next(parts)
    tests = json.loads((tmp_path / "inference_tests.json").read_bytes())["evaluations"]
    held_out |= {question(test["messages"][-1]["content"]) for test in tests}
    assert found.heldout > 10
    assert not trained & held_out


def test_with_a_test_file_every_held_out_row_chooses(check, tmp_path):
    found = check(many(240), tests=[{"prompt": f"{n} times 2?", "description": str(2 * n)} for n in range(20)])
    assert (found.heldout, found.choosing, found.inference_tests, found.warnings) == (24, 24, 20, [])
    assert len(rows_of(tmp_path / "heldout.jsonl")) == 24


LENGTHS = [
    # the config, what is added to each row, the test's answer, and the words of the warnings
    ("grpo: {max_completion_length: 16}", {}, "10", []),
    (
        "grpo: {max_completion_length: 16}",
        {"Reasoning": "x" * 20},
        "10",
        ["32 of 32 sampled, 0 of 20 inference"],
    ),
    ("grpo: {max_completion_length: 16}", {}, "y" * 40, ["0 of 32 sampled, 20 of 20 inference tests; 64 fits them all"]),
    ("tests: {max_completion_length: 256}", {}, "y" * 255, []),
    ("tests: {max_completion_length: 256}", {}, "y" * 256, ["257 tokens of the longest", "20 of 20 inference tests; 288"]),
]


@pytest.mark.parametrize(("config", "more", "answer", "words"), LENGTHS)
def test_limits_below_what_the_expected_answers_need_are_told(check, config, more, answer, words):
    rows = [row | more for row in many(32)]
    tests = [{"prompt": f"{n} times 2?", "description": answer} for n in range(20)]
    found = check(rows, config, tests, model=True)
    about = [warning for warning in found.warnings if "max_completion_length" in warning]
    assert len(about) == len(words), about
    assert all(any(each in warning for warning in about) for each in words), about


FEW = [
    # rows, tests, what the warning counts, and what it advises
    (
        many(100),
        None,
        "only 10 different held-out",
        "add about 100 rows, set heldout_fraction to 0.2, or upload a test file",
    ),
    (many(24), None, "only 2 different held-out", "add about 216 rows, or upload a test file"),
    ([row for row in many(10) for _ in range(40)], None, "only 1 different held-out", "or upload a test file"),
    (GOOD, [f"{n} times 2?" for n in range(7)], "judge the model: 7;", "to decide: add 13"),
    (GOOD, [f"{n} times {form}?" for n in range(12) for form in ("2", "2.0")], "judge the model: 12;", "to decide: add 8"),
    (GOOD, [row["question"].upper() for row in GOOD], "judge the model: 0;", "to decide: add 20"),
]


@pytest.mark.parametrize(("rows", "tests", "counted", "advice"), FEW)
def test_too_few_judges_are_told_with_how_many_more(check, rows, tests, counted, advice):
    found = check(rows, tests=tests and [{"prompt": prompt, "description": "0"} for prompt in tests])
    assert counted in found.warnings[-1]
    assert advice in found.warnings[-1]


CHAT = [{"messages": [*turns, {"role": "assistant", "content": "yes"}]} for n in range(30) for turns in (
    [SYSTEM, {"role": "user", "content": f"May I, {n:,}?"}],
)]  # fmt: skip
REPEATS = [
    # rows, config, the test that repeats a row, whether it does
    (GOOD, "", {"prompt": "What is 5 + 5?"}, True),
    (GOOD, "", {"prompt": "  what IS 5+5.0 ?"}, True),
    (GOOD, "", {"prompt": "What is 5 + 6?"}, False),
    (GOOD, "system_prompt: Be kind.", {"prompt": "what is 05 + 05?"}, True),
    (GOOD, "", {"messages": [SYSTEM, {"role": "user", "content": "What is 5 + 5?"}]}, False),
    (CHAT, "", {"prompt": "May i, 7?"}, True),
    (CHAT, "", {"messages": CHAT[7]["messages"][:2]}, True),
    (CHAT, "", {"messages": [{"role": "system", "content": "Be rude."}, {"role": "user", "content": "May I, 7?"}]}, False),
    (CHAT, "system_prompt: Be kind.", {"prompt": "May I, 7?"}, True),
    ([{"question": "Is 1,000 m far?", "answer": "no"}] * 2, "", {"prompt": "is 1000 M far?"}, True),
]


@pytest.mark.parametrize(("rows", "config", "test", "repeats"), REPEATS)
def test_a_test_that_repeats_a_row_is_told_and_does_not_judge(check, tmp_path, rows, config, test, repeats):
    config += "\npreflight: {on_failure: warn}"
    tests = [test | {"id": "one", "description": "10"}, {"id": "two", "prompt": "Why?", "description": "!"}]
    found = check(rows, config, tests)
    assert found.stats["tests_in_training"] == (["one"] if repeats else [])
    assert any("repeat a row's question" in warning and "(one)" in warning for warning in found.warnings) == repeats
    written = json.loads((tmp_path / "inference_tests.json").read_bytes())["evaluations"]
    assert [each["judges"] for each in written] == [not repeats, True]


def test_every_test_that_repeats_a_row_is_listed(check):
    tests = [
        {"id": form, "prompt": form, "description": "10"} for form in ("What is 5 + 5?", "what is 5+5?", "What is 6 + 6?")
    ]
    assert check(GOOD, tests=tests).stats["tests_in_training"] == sorted(test["id"] for test in tests)


def test_a_small_dataset_keeps_its_order(check, tmp_path):
    check()
    numbers = [int(row["id"].removeprefix("row-")) for row in rows_of(tmp_path / "train.jsonl")]
    assert numbers == sorted(numbers)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("ab")), max_size=60))
def test_duplicates_are_those_of_a_comparison_of_all_rows(rows):
    duplicates = Duplicates()
    for start in range(0, len(rows), 7):
        batch = rows[start : start + 7]
        numbers = range(start + 1, start + 1 + len(batch))
        duplicates.add(numbers, [prompt for prompt, _ in batch], [answer for _, answer in batch])
    found = duplicates.result()
    exact = [[n, rows.index(row) + 1] for n, row in enumerate(rows, 1) if row in rows[: n - 1]]
    prompts = [prompt for prompt, _ in rows]
    same = [
        [n, prompts.index(row[0]) + 1]
        for n, row in enumerate(rows, 1)
        if row not in rows[: n - 1] and row[0] in prompts[: n - 1]
    ]
    assert (found["exact"], found["same_prompt"]) == (len(exact), len(same))
    assert (found["exact_rows"], found["same_prompt_rows"]) == (exact[:10], same[:10])


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1))
def test_percentiles(lengths):
    found, ordered = summary(Counter(lengths)), sorted(lengths)
    assert (found["min"], found["max"]) == (ordered[0], ordered[-1])
    assert found["p50"] == ordered[(len(ordered) + 1) // 2 - 1]
    assert found["mean"] == round(sum(lengths) / len(lengths), 1)
    assert found["min"] <= found["p50"] <= found["p95"] <= found["p99"] <= found["max"]


class Body(io.BytesIO):
    """An S3 body, which may break."""

    broken = False

    def read(self, size=-1):
        if self.broken and self.tell():
            raise ConnectionError("gone")
        return super().read(size)


def test_a_stream_is_the_objects_bytes_and_knows_its_digest():
    import hashlib

    raw = bytes(range(256)) * 20_000
    with S3Stream(Body(raw)) as stream:
        reader = io.BufferedReader(stream, 1000)
        assert reader.read(3_000_000) == raw[:3_000_000]
        stream.drain()
        assert (stream.sha256, stream.size) == (hashlib.sha256(raw).hexdigest(), len(raw))


def test_a_stream_that_nobody_reads_to_its_end_ends():
    body = Body(b"x" * 100_000_000)
    with S3Stream(body) as stream:
        assert stream.read(1) == b"x"
    assert body.closed


def test_a_broken_download_is_the_readers_error():
    body = Body(b"x" * 3_000_000)
    body.broken = True
    with S3Stream(body) as stream, pytest.raises(ConnectionError, match="gone"):
        stream.drain()


def test_the_receipt_says_how_it_is_versioned(check):
    assert msgspec.to_builtins(check())["version"] == receipt.VERSION == 1
    assert template_defaults()["UseSpot"] in {"true", "false"}
