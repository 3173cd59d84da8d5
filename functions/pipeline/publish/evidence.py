"""All that a tested run's jobs left behind, from which its verdict and its results follow."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import msgspec

from pipeline.aws import Aws
from pipeline.jobs.plan import load_plan
from pipeline.publish.gate import Evaluation, evaluate
from pipeline.publish.shown_rollouts import read_groups
from pipeline.runs.states import Run
from tunedrop import object_keys
from tunedrop.config.model import RunConfig
from tunedrop.inference_tests import Outcome
from tunedrop.rollouts import FOLDER, Group, Index


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The files of a tested run, and its jobs as SageMaker describes them.

    `trained` is the key of the training job's model folder, without a slash at its end, and `tested` that of the test job's.
    """

    trained: str
    tested: str
    config: RunConfig
    inference: dict[str, Any]
    training: dict[str, Any]
    metrics: list[dict[str, Any]]
    alerts: list[dict[str, Any]]
    rollouts: tuple[Index, list[Group]] | None
    receipt: dict[str, Any]
    plan: dict[str, Any]
    jobs: dict[str, dict[str, Any]]
    _evaluations: dict[int, Evaluation] = field(default_factory=dict)

    @cached_property
    def tests(self) -> list[Outcome]:
        """The outcomes of the run's inference tests."""
        return msgspec.convert(self.inference["tests"], list[Outcome])

    @cached_property
    def suite(self) -> list[Outcome]:
        """The outcomes of the line's suite."""
        return msgspec.convert(self.inference.get("suite", []), list[Outcome])

    @property
    def probe(self) -> list[Outcome]:
        """The outcomes of the general questions."""
        return msgspec.convert(self.inference.get("probe", []), list[Outcome])

    @property
    def line_version(self) -> int:
        """The version of the line whose champion took part in the tests.

        The job's own request has it: a function that created the job and died would not have recorded it.
        """
        return int(self.jobs["test"]["HyperParameters"]["line-version"])

    @property
    def champion(self) -> str | None:
        """The champion that took part in the tests."""
        champion: str | None = self.jobs["test"]["HyperParameters"].get("champion")
        return champion

    def evaluation(self, tries: int) -> Evaluation:
        """Return the comparison and the verdict, after so many tries on the same tests. It may take a minute, once."""
        if tries not in self._evaluations:
            self._evaluations[tries] = evaluate(self.tests, self.config, suite=self.suite, tries=tries, probe=self.probe)
        return self._evaluations[tries]


def read_evidence(run: Run, bucket: str, aws: Aws) -> Evidence:
    """Read the files of a tested run. Raises FileNotFoundError without one that every run has."""
    assert run.artifacts is not None
    trained = object_keys.folder_key(run.artifacts, bucket).removesuffix("/")
    tested = object_keys.run_key(run.run_id, f"inference/{run.test_job}/output/model")
    alerts = _lines(aws.read(bucket, f"{trained}/alerts.jsonl") or b"")
    return Evidence(
        trained=trained,
        tested=tested,
        config=RunConfig.model_validate_json(read(aws, bucket, object_keys.run_key(run.run_id, "input/config.json"))),
        inference=msgspec.json.decode(read(aws, bucket, f"{tested}/inference.json")),
        training=msgspec.json.decode(read(aws, bucket, f"{trained}/training.json")),
        metrics=_lines(read(aws, bucket, f"{trained}/metrics.jsonl")),
        alerts=alerts,
        rollouts=read_groups(lambda name: aws.read(bucket, f"{trained}/{FOLDER}/{name}"), alerts),
        receipt=msgspec.json.decode(read(aws, bucket, object_keys.run_key(run.run_id, "validation.json"))),
        plan=load_plan(aws, bucket, run.plan),
        jobs={
            kind: aws.sagemaker.describe_training_job(TrainingJobName=job)
            for kind, job in (("train", run.train_job), ("test", run.test_job))
        },
    )


def read(aws: Aws, bucket: str, key: str) -> bytes:
    """Return an object's bytes. Raises FileNotFoundError without the object."""
    raw = aws.read(bucket, key)
    if raw is None:
        raise FileNotFoundError(f"s3://{bucket}/{key}")
    return raw


def _lines(raw: bytes) -> list[Any]:
    return [msgspec.json.decode(line) for line in raw.splitlines()]
