"""Whole checkpoints: how they are sealed and verified, and the choice of the newest and of the best one.

A checkpoint holds the adapter, the optimizer, the scheduler, the random numbers, the position in the data, the rollout in
use and the metrics so far. trainer/run_trainer.py writes it to `saving/`. It is synced to the disk, sealed with a manifest
of hashes and renamed to `checkpoint-<step>`. SageMaker copies the folder to S3 file by file, in any order: after a restart
only the manifest proves that a checkpoint is whole. Every other checkpoint is torn, and is removed.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from trainer.job import JobError
from tunedrop.config.model import RunConfig
from tunedrop.dataset.rows import Row

log = logging.getLogger("trainer")

MANIFEST = "manifest.json"
SAVING = "saving"
# Sections of a run config that do not influence the trained weights.
BESIDE_TRAINING = {"compute", "gate", "line", "notify", "preflight", "rollouts", "suite", "tests"}
SHOWN_DIFFERENCES = 3


@dataclass
class Record:
    """The facts of a run that are not in its trainer's state. The manifest of each checkpoint has a copy.

    `seconds`: the time that the run's processes have taken. `costs`: the times of its parts (`trainer.bounds.Costs`).
    `ended`: why the training ended with this checkpoint (`complete`, `max_runtime`, `max_cost_usd` or an alert's code), None
    if it did not end. `heldout_reward`: of this checkpoint, None if it was not evaluated. `evaluations`: all so far.
    `probe`: for each general question, whether the model answered it right before the first step, None without evaluations.
    `learnability`: the gate's numbers before the training, `learnability_after` those after one that asks again. `dropped`:
    ids of the rows that the gate dropped. `sampling`: the state of `trainer.curriculum`, None without one. `warm_start`:
    what `trainer.warm_start` did, None without one.
    """

    seconds: float = 0.0
    costs: dict[str, float] = field(default_factory=dict)
    ended: str | None = None
    heldout_reward: float | None = None
    evaluations: list[dict[str, float]] = field(default_factory=list)
    probe: list[bool] | None = None
    learnability: dict[str, Any] | None = None
    learnability_after: dict[str, Any] | None = None
    warm_start: dict[str, Any] | None = None
    dropped: list[str] = field(default_factory=list)
    sampling: dict[str, Any] | None = None
    alerts: list[dict[str, Any]] = field(default_factory=list)


class Checkpoint(NamedTuple):
    """A whole checkpoint. `run` identifies the run that wrote it (see `identity`)."""

    path: Path
    step: int
    run: dict[str, Any]
    record: Record


def identity(config: RunConfig, rows: Sequence[Row], start: str | None = None) -> dict[str, Any]:
    """Return the identity of a run: what of the config influences the weights, and the digests of rows and start.

    `start` is the digest of the adapter that the run starts from, None for a new adapter.
    """
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
    return {"config": config.model_dump(mode="json", exclude=BESIDE_TRAINING), "rows": digest, "start": start}


def whole(folder: Path, *, verify: bool = True) -> list[Checkpoint]:
    """Return the whole checkpoints in a folder, the newest first. Without `verify` the files' hashes are not checked."""
    read = (_read(path, verify) for path in folder.glob("checkpoint-*"))
    return sorted((checkpoint for checkpoint in read if checkpoint), key=lambda checkpoint: -checkpoint.step)


def newest(folder: Path, run: dict[str, Any]) -> Checkpoint | None:
    """Return the newest whole checkpoint of the run, or None. Raises JobError if another run wrote it."""
    checkpoints = whole(folder)
    if not checkpoints:
        return None
    differences = list(_differences(checkpoints[0].run, run))
    if differences:
        more = f" and {len(differences) - SHOWN_DIFFERENCES} more" if len(differences) > SHOWN_DIFFERENCES else ""
        raise JobError(
            f"{checkpoints[0].path} is a checkpoint of another run: {'; '.join(differences[:SHOWN_DIFFERENCES])}{more}. "
            f"Empty {folder} to start from step 0, or use the config, the rows and the start of the checkpoint's run."
        )
    return checkpoints[0]


def best(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """Return the checkpoint with the highest held-out reward, the newer one of a tie; without evaluations the newest."""
    evaluated = [each for each in checkpoints if each.record.heldout_reward is not None]
    return max(evaluated or checkpoints, key=lambda each: (each.record.heldout_reward or 0.0, each.step))


def clean(folder: Path, keep: int | None = None, *, verify: bool = True) -> None:
    """Remove torn checkpoints, and all others except the `keep` newest and the best one (None: keep all whole ones)."""
    checkpoints = whole(folder, verify=verify)
    kept = {each.path for each in checkpoints[:keep]} | ({best(checkpoints).path} if checkpoints else set())
    for path in [*folder.glob("checkpoint-*"), *folder.glob(SAVING)]:
        if path not in kept:
            torn = path.name == SAVING or path not in {each.path for each in checkpoints}
            if torn:
                log.info("removing %s: its write did not finish", path)
            shutil.rmtree(path, ignore_errors=True)


def _differences(saved: Any, current: Any, key: str = "") -> Iterator[str]:
    if isinstance(saved, dict) and isinstance(current, dict):
        for name in sorted({*saved, *current}):
            yield from _differences(saved.get(name), current.get(name), f"{key}.{name}" if key else name)
    elif saved != current:
        name = key.removeprefix("config.")
        other = {"rows": "it has other rows", "start": "it started from another adapter"}
        yield other.get(key, f"{name} is {current!r} now and {saved!r} in the checkpoint")


def _read(path: Path, verify: bool) -> Checkpoint | None:
    """Return the checkpoint in a folder, or None if it has no manifest or, with `verify`, a file has another hash."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if verify and any(_digest(path / name) != digest for name, digest in manifest["files"].items()):
            return None
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return Checkpoint(path, manifest["step"], manifest["run"], Record(**manifest["record"]))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Sync a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hashes(folder: Path) -> dict[str, str]:
    """Sync every file of a folder to the disk, and return the files' SHA-256 hashes by name."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in names:
        _sync(folder / name)
    return {name: _digest(folder / name) for name in names}


def publish(folder: Path, target: Path, manifest: dict[str, Any]) -> None:
    """Seal a folder with its manifest, which is the last file written, and rename it to `target`."""
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _sync(folder / MANIFEST)
    _sync(folder)
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)
    folder.parent.rmdir()
    _sync(target.parent)
