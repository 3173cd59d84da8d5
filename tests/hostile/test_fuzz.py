"""Anything may come in: what parses it says what is wrong, and raises nothing else. `make fuzz` searches for longer."""

import json
from collections.abc import Callable

import pytest
from aws_lambda_powertools.utilities.parser import ValidationError, parse
from aws_lambda_powertools.utilities.parser.models import S3EventNotificationEventBridgeModel
from hostile import CSV, GOOD, good_parquet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.notify.events import JobStateChange
from tunedrop import object_keys
from tunedrop.config.model import RunConfig
from tunedrop.config.parse import load_run_config
from tunedrop.dataset.readers import DATA_SUFFIXES
from tunedrop.dataset.rows import read_rows
from tunedrop.inference_tests import parse_tests
from tunedrop.object_keys import JobName
from tunedrop.problems import Problem, RejectedError

fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SEEDS = {".parquet": good_parquet(), ".csv": CSV, ".jsonl": GOOD, ".json": b"[" + GOOD.replace(b"\n", b",")[:-1] + b"]"}
PIECES = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b"\\",
    b",",
    b":",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"NaN",
]
PIECES += [
    b"1e9999",
    b"\\ud800",
    b"null",
    b"9" * 400,
    b"PAR1",
    b'"question"',
    b'"answer"',
    b"''",
    b"\xe2\x80\x9c",
    b"\x80\x04",
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def damaged(draw: st.DrawFn, seed: bytes) -> bytes:
    """A good file with pieces cut out of it and hostile ones put in."""
    body = seed
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(body)))
        cut = draw(st.integers(0, 40) | st.just(len(body)))
        piece = draw(st.sampled_from(PIECES) | st.binary(max_size=12)) * draw(st.sampled_from([1, 1, 2, 3000]))
        body = body[:at] + piece + body[at + cut :]
    return body


def read(tmp_path, suffix: str, body: bytes) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_bytes(body)
    for item in read_rows(path, RunConfig(model="base")):
        if not isinstance(item, Problem):
            assert isinstance(item["answer"], str)
            assert item["prompt"][-1]["role"] == "user"
            json.dumps(item).encode()  # a row can be written
        else:
            assert item.code
            assert item.message


@pytest.mark.parametrize("suffix", SEEDS)
@fuzz
@given(data=st.data())
def test_datasets(tmp_path, suffix, data):
    read(tmp_path, suffix, data.draw(damaged(SEEDS[suffix])))


# What `make fuzz` found.
FOUND = {
    "parts as a completion": (
        ".jsonl",
        b'{"prompt": "2+2?", "completion": [{"role": "assistant", "content": [{"text": "4"}]}]}\n',
    ),
    "a part of a strange type": (
        ".jsonl",
        b'{"messages": [{"role": "user", "content": [{"type": 5, "text": "2+2?"}]}], "answer": "4"}\n',
    ),
    "aliases that are no list": (".jsonl", b'{"question": "2+2?", "answer": {"value": "4", "aliases": 4}}\n'),
    "a number with a separator of groups": (".csv", b"question,A,B,answer\n2+2?,4,5,1\x1d\n"),
}


@pytest.mark.parametrize("name", FOUND)
def test_files_that_were_found(tmp_path, name):
    read(tmp_path, *FOUND[name])


@pytest.mark.soak
@settings(fuzz, max_examples=3_000)  # each is read by a process of its own
@given(data=st.data())
def test_parquet_for_long(tmp_path, data):
    read(tmp_path, ".parquet", data.draw(damaged(SEEDS[".parquet"])))


@pytest.mark.parametrize("suffix", DATA_SUFFIXES)
@fuzz
@given(body=st.binary(max_size=300))
def test_any_bytes_as_a_dataset(tmp_path, suffix, body):
    read(tmp_path, suffix, body)


@fuzz
@given(rows=st.lists(json_values, max_size=5))
def test_any_json_as_a_dataset(tmp_path, rows):
    read(tmp_path, ".json", json.dumps(rows).encode())
    read(tmp_path, ".jsonl", "\n".join(map(json.dumps, rows)).encode())


def refusals(parse: Callable[[], object]) -> list[Problem]:
    """The problems that a parser raises: at least one, or it takes what it is given."""
    try:
        parse()
    except RejectedError as error:
        return error.problems or [Problem("NO_PROBLEM", "")]
    return []


yaml_texts = st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode(errors="surrogatepass"))
KEYS = [*RunConfig.model_fields, "unknown", "grpo.learning_rate"]


@fuzz
@given(
    raw=yaml_texts | st.dictionaries(st.sampled_from(KEYS), json_values, max_size=4).map(lambda d: json.dumps(d).encode())
)
def test_any_config(raw):
    problems = refusals(lambda: load_run_config(raw, default_model="base"))
    assert all(problem.message for problem in problems)


tests_shapes = json_values | st.dictionaries(st.just("evaluations"), json_values | st.lists(json_values, max_size=3))


@fuzz
@given(raw=st.binary(max_size=200) | tests_shapes.map(lambda value: json.dumps(value).encode()))
def test_any_inference_tests(raw):
    assert all(problem.message for problem in refusals(lambda: parse_tests(raw, RunConfig(model="base"))))


@fuzz
@given(event=json_values, detail=json_values)
def test_any_event_is_taken_or_refused(event, detail):
    """A malformed event is an error of the invocation (and ends in the dead-letter queue), never something halfway."""
    envelope = {"version": "0", "id": "1", "account": "1", "region": "r", "resources": [], "time": "2026-01-01T00:00:00Z"}
    envelope |= {"source": "aws.s3", "detail-type": "Object Created", "detail": detail}
    for given_event in (event, envelope):
        for model in (S3EventNotificationEventBridgeModel, JobStateChange):
            try:
                parse(given_event, model=model)
            except (ValidationError, TypeError, ValueError):
                continue


@fuzz
@given(key=st.text(max_size=100), prefix=st.sampled_from(["", "training_data/", "training_data/../", "training_data//"]))
def test_any_key(key, prefix):
    dataset = object_keys.dataset_of(f"{prefix}{key}")
    run_id = f"{object_keys.slug(dataset)}-0123456789ab"
    name = JobName("p" * 16, "train", run_id, 99)
    assert len(str(name)) <= 63
    assert JobName.parse(str(name), "p" * 16) == name
    assert "/" not in run_id
    assert ".." not in run_id


@fuzz
@given(name=st.text(max_size=80))
def test_any_job_name(name):
    try:
        assert str(JobName.parse(name, "tunedrop")) == name
    except ValueError:
        return
