"""A run's page in a tracker: what it begins with, and the figures and files that it gets."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from trainer import folders
from tunedrop.config.model import RunConfig
from tunedrop.object_keys import line_of
from tunedrop.rollouts import FOLDER

FILES = ("run_config.json", "metrics.jsonl", "alerts.jsonl", "training.json")  # beside the rollouts
Point = dict[str, Any]  # a line of metrics.jsonl
Status = Literal["FINISHED", "KILLED", "FAILED"]  # MLflow's names


class Facts(NamedTuple):
    """What a tracker's page of the run begins with.

    `key` identifies the page: a process that goes on with the run finds it by this. Empty in a shell, whose pages are new.
    """

    key: str
    project: str
    tags: dict[str, str]
    config: dict[str, Any]


class Page(Protocol):
    """A run in a tracker. All methods may raise any error of the tracker's library."""

    about: dict[str, str | None]  # for training.json: `url`, and what else identifies it
    steps: dict[str, int]  # the last step that it has, by prefix of its figures

    def write(self, figures: Mapping[str, float], step: int) -> None:
        """Take the figures of a step."""

    def flush(self) -> None:
        """Send the figures that were taken."""

    def close(self, status: Status, folder: Path | None) -> None:
        """Send the files of a folder, if there is one, and end the run."""


def figures(point: Point, prefix: str) -> dict[str, float]:
    """Return the finite numbers of a point by name: those of metrics.jsonl, and `rewards/<name>`."""
    named = {name: value for name, value in point.items() if name not in {"step", "max_steps"}}
    named |= {f"rewards/{name}": value for name, value in point["rewards"].items()}
    return {
        prefix + name: float(value)
        for name, value in named.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def facts(config: RunConfig, run_id: str) -> Facts:
    """Return what a page of this run begins with. The project is named as the job's stack, by its job prefix."""
    folder = folders.channel("training")
    names = folder / "run.json" if folder else None
    run: dict[str, str] = json.loads(names.read_bytes()) if names and names.is_file() else {}
    job = os.environ.get("TRAINING_JOB_NAME", "")
    tags = {"run_id": run_id, "job": job, "dataset": run.get("dataset", "")}
    tags["line"] = config.line or (line_of(run["dataset"]) if run else "")
    project = job.rpartition(f"-train-{run_id}-")[0] if run_id else ""
    return Facts(
        key=run_id or job,
        project=project or "tunedrop",
        tags={f"tunedrop.{name}": value for name, value in tags.items() if value},
        config=config.model_dump(mode="json"),
    )


def files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the files of a run that a tracker gets, each with its folder there."""
    for path in sorted([*(folder / name for name in FILES), *(folder / FOLDER).glob("*")]):
        if path.is_file():
            yield path, "" if path.parent == folder else FOLDER
