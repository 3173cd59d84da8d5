"""The keys of objects in both buckets, and the names of datasets, runs and jobs. Users rely on these names."""

import hashlib
import re
from typing import NamedTuple

TRAINING_DATA = "training_data/"
INFERENCE_TESTS = "inference_test/"
BESIDE = (".yaml", ".py")  # suffixes of run configs and `python` rewards
TEST_SUFFIXES = (".json", ".jsonl", ".yaml", ".csv")
LAUNCH_PLANS = "launch_plans/"
CURRENT_PLAN = LAUNCH_PLANS + "current.json"
INDEX = "runs/index.html"
SLUG_LENGTH = 22  # <prefix ≤ 16>-train-<slug>-<12 hex>-<attempt ≤ 9999> fits SageMaker's 63 characters


def dataset_of(key: str) -> str:
    """`training_data/cars.jsonl.gz` → `cars`; folders below `training_data/` are part of the name."""
    path = key.removeprefix(TRAINING_DATA).removesuffix(".gz")
    folder, slash, name = path.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)


def line_of(dataset: str) -> str:
    """Return a dataset's line unless its config names one: the first folder below `training_data/`, else its name."""
    return next((part for part in dataset.split("/") if part), dataset)


def line_key(line: str, name: str = "") -> str:
    """Return the key of a line's object in the artifact bucket; without `name`, the line's folder.

    A line's name may have any characters, and more than fit into a key: the folder has its slug and a hash.
    """
    return f"lines/{slug(line)}-{hashlib.sha256(line.encode()).hexdigest()[:12]}/{name}"


def is_dataset(key: str) -> bool:
    """Return whether an object under `training_data/` is a dataset.

    These objects are not: run configs, files of `python` rewards, folders (S3's console creates empty objects for them), and
    hidden files, whose names begin with `.` or `_` (`.DS_Store`, Spark's `_SUCCESS`).
    """
    name = key.rpartition("/")[2]
    return key.startswith(TRAINING_DATA) and bool(name) and not name.startswith((".", "_")) and not name.endswith(BESIDE)


def config_key(dataset: str) -> str:
    """Return the key of a dataset's run config."""
    return f"{TRAINING_DATA}{dataset}.yaml"


def tests_keys(dataset: str) -> list[str]:
    """Return the possible keys of a dataset's inference tests, in order of precedence."""
    return [f"{INFERENCE_TESTS}{name}{suffix}" for name in (dataset, "evaluations") for suffix in TEST_SUFFIXES]


def model_prefix(model: str) -> str:
    """Return the folder of a base model's files in the data bucket."""
    return f"models/{model}/"


def run_key(run_id: str, name: str = "") -> str:
    """Return the key of a run's object in the artifact bucket; without `name`, the run's folder."""
    return f"runs/{run_id}/{name}"


def folder_key(uri: str, bucket: str) -> str:
    """Return the key of a folder of a bucket from its S3 URI, with one slash at its end."""
    return uri.removeprefix(f"s3://{bucket}/").rstrip("/") + "/"


def slug(dataset: str) -> str:
    """Return the readable part of a run id: the dataset's name, reduced to the characters of SageMaker's job names."""
    return re.sub(r"[^a-zA-Z0-9]+", "-", dataset).strip("-")[:SLUG_LENGTH].strip("-") or "dataset"


def component_name(prefix: str, line: str) -> str:
    """Return the name under which a line answers: its inference component, `<prefix>-<line>`.

    A line's name may have other characters than a component's, or more of them: its slug and a hash stand for it then. So
    they do for a line whose name ends as another component's, a candidate's (`-next`) or one with a hash: two lines must not
    share a component. Names have at most 63 characters, and `-next` follows this one (CreateInferenceComponent).
    """
    short = slug(line)
    if short == line and not re.search(r"-(next|[0-9a-f]{8})$", line):
        return f"{prefix}-{line}"
    return f"{prefix}-{short}-{hashlib.sha256(line.encode()).hexdigest()[:8]}"


def endpoint_name(prefix: str, model: str, base: str, instance_type: str) -> str:
    """Return the name of the endpoint, and of its base component, that serves the lines of a base model.

    `base` identifies the base model's files: another revision of a model is another endpoint.
    """
    digest = hashlib.sha256("\n".join([model, base, instance_type]).encode()).hexdigest()[:8]
    return f"{prefix}-{slug(model.rpartition('/')[2])}-{digest}"


class JobName(NamedTuple):
    """`<prefix>-<train|test>-<run_id>-<attempt>`.

    SageMaker refuses a second job of the same name in an account and region, so an attempt cannot start a job twice.
    """

    prefix: str
    kind: str
    run_id: str
    attempt: int

    def __str__(self) -> str:
        return f"{self.prefix}-{self.kind}-{self.run_id}-{self.attempt}"

    @classmethod
    def parse(cls, name: str, prefix: str) -> "JobName":
        """Parse a job name. Raises ValueError if the name is not that of a job of the stack with this prefix."""
        match = re.fullmatch(rf"{re.escape(prefix)}-(train|test)-(.+-[0-9a-f]{{12}})-(\d+)", name)
        if match is None:
            raise ValueError(f"'{name}' is not a job of the stack with the prefix '{prefix}'")
        return cls(prefix, match[1], match[2], int(match[3]))
