"""What a test job gets beside the tuned model: the line's champion, its suite, and the answers that models gave earlier."""

import hashlib
from typing import TYPE_CHECKING, NamedTuple

from pipeline.aws import Aws
from pipeline.runs.states import Run
from tunedrop import object_keys

if TYPE_CHECKING:
    from tunedrop.config.model import ResolvedConfig


class OpponentGoneError(Exception):
    """The champion's model or the line's suite is no longer in the artifact bucket."""


class Opponents(NamedTuple):
    """The channels of a test job by name, as keys of the artifact bucket, and the hyperparameters that name the champion."""

    channels: dict[str, str]
    hyperparameters: dict[str, str]


def answers_prefix(line: str, identity: str, plan: str) -> str:
    """Return the folder of the answers that a model gave under a launch plan, for tests of a line.

    `identity` names the model: the base model's digest, or the training job of a tuned model.
    """
    digest = hashlib.sha256(f"{identity}\0{plan}".encode()).hexdigest()[:32]
    return object_keys.line_key(line, f"answers/{digest}/")


def suite_prefix(line: str, digest: str) -> str:
    """Return the folder of a line's suite in the artifact bucket."""
    return object_keys.line_key(line, f"suite/{digest}/")


def opponents(run: Run, config: "ResolvedConfig", bucket: str, aws: Aws) -> Opponents:
    """Return what a run's test job gets to compare the tuned model with. Raises OpponentGoneError.

    SageMaker refuses a channel without objects: a channel is named only if its folder has some.
    """
    line = aws.lines.get(run.line)
    # A model that is tested again, against another champion, has answered its own tests and most of the suite.
    models = {"answers_base": run.base, "answers_tuned": str(run.train_job)}
    channels = {name: answers_prefix(run.line, identity, run.plan) for name, identity in models.items()}
    hyperparameters = {"line-version": str(line.version)}
    champion = aws.runs.get(line.champion) if line.champion else None
    if champion is not None:
        assert champion.artifacts is not None  # it was published
        model = object_keys.folder_key(champion.artifacts, bucket)
        if not _has_objects(f"{model}merged/config.json", bucket, aws):
            raise OpponentGoneError(
                f"The champion of the line '{run.line}', {champion.run_id}, has no model any more: "
                f"s3://{bucket}/{model}merged/ lacks config.json. Restore it, or reject the champion's model package: "
                f"tunedrop reject {champion.run_id}. Then drop the dataset again."
            )
        channels |= {"champion": model, "answers_champion": answers_prefix(run.line, str(champion.train_job), run.plan)}
        hyperparameters["champion"] = champion.run_id
        if line.suite and config.suite.max:
            channels["suite"] = suite_prefix(run.line, line.suite)
            if not _has_objects(f"{channels['suite']}suite.json", bucket, aws):
                raise OpponentGoneError(
                    f"The suite of the line '{run.line}' is gone: s3://{bucket}/{channels['suite']} lacks suite.json. "
                    "Restore it, or set suite.max to 0, which tests without the suite. Then drop the dataset again."
                )
            channels["training"] = object_keys.run_key(run.run_id, "input/train.jsonl")
    there = {name: key for name, key in channels.items() if _has_objects(key, bucket, aws)}
    return Opponents(there, hyperparameters)


def _has_objects(prefix: str, bucket: str, aws: Aws) -> bool:
    return bool(aws.s3.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1).get("KeyCount"))
