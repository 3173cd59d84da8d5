import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runs.states import inputs_digest, run_ids
from tunedrop.object_keys import JobName, component_name, dataset_of, endpoint_name, is_dataset, slug

PREFIXES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,14}[a-z0-9])?", fullmatch=True)


@given(st.text(), PREFIXES, st.sampled_from(["train", "test"]), st.integers(1, 9999))
def test_every_dataset_has_a_job_name_that_sagemaker_takes(dataset, prefix, kind, attempt):
    ids = run_ids(dataset, inputs_digest(dataset, [b"data"]))
    assert len(set(ids)) == 5
    for run_id in ids:
        job = JobName(prefix, kind, run_id, attempt)
        assert re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", str(job))
        assert JobName.parse(str(job), prefix) == job


MODEL_TYPE = ("base", "0123", "ml.g5.xlarge")


@pytest.mark.parametrize(
    ("line", "other"),
    [
        ("cars-next", f"{component_name('tunedrop', 'cars')}-next"),  # the candidate of the line `cars`
        (component_name("tunedrop", "größe").removeprefix("tunedrop-"), component_name("tunedrop", "größe")),
        (endpoint_name("tunedrop", *MODEL_TYPE).removeprefix("tunedrop-"), endpoint_name("tunedrop", *MODEL_TYPE)),
    ],
)
def test_a_lines_component_has_no_other_components_name(line, other):
    assert component_name("tunedrop", line) != other
    assert component_name("tunedrop", "cars") == "tunedrop-cars"


@given(st.text(), PREFIXES)
def test_every_line_has_names_that_sagemaker_takes(line, prefix):
    for name in (component_name(prefix, line) + "-next", component_name(prefix, line) + "-0123456789ab"):
        assert re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", name)


@pytest.mark.parametrize(
    "name", ["other-train-cars-0123456789ab-1", "tunedrop-train-cars-1", "tunedrop-cars-0123456789ab-1", ""]
)
def test_foreign_jobs_are_told_apart(name):
    with pytest.raises(ValueError, match="not a job of the stack"):
        JobName.parse(name, "tunedrop")


@pytest.mark.parametrize(
    ("key", "dataset", "expected"),
    [
        ("training_data/cars.jsonl", "cars", "cars"),
        ("training_data/a b/c+d 100%.csv", "a b/c+d 100%", "a-b-c-d-100"),
        ("training_data/größe.json", "größe", "gr-e"),
        ("training_data/日本.json", "日本", "dataset"),
        ("training_data/" + "x" * 90 + ".json", "x" * 90, "x" * 22),
    ],
)
def test_datasets_and_slugs(key, dataset, expected):
    assert dataset_of(key) == dataset
    assert slug(dataset) == expected


def test_digests_depend_on_every_part_and_on_where_a_part_ends():
    digests = {
        inputs_digest("cars", ["a", "b"]),
        inputs_digest("cars", ["ab", ""]),
        inputs_digest("cars", ["", "ab"]),
        inputs_digest("cars", ["a", "c"]),
        inputs_digest("vans", ["a", "b"]),
    }
    assert len(digests) == 5
    assert inputs_digest("cars", ["a", b"b"]) == inputs_digest("cars", ["a", "b"])


@pytest.mark.parametrize(
    ("key", "dataset"),
    [
        ("training_data/cars.jsonl", True),
        ("training_data/2026/cars.csv.gz", True),
        ("training_data/cars.xlsx", True),  # it gets a receipt that says why not
        ("training_data/cars", True),
        ("training_data/.jsonl", False),
        ("training_data/cars.yaml", False),
        ("training_data/rewards.py", False),
        ("training_data/", False),
        ("training_data/2026/", False),
        ("training_data/2026/_SUCCESS", False),
        ("training_data/.DS_Store", False),
        ("inference_test/cars.json", False),
        ("old/training_data/cars.json", False),
    ],
)
def test_what_is_a_dataset(key, dataset):
    assert is_dataset(key) == dataset
