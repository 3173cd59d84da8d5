"""Checkpoints that are whole or not there, and which of them a run goes on from or ends with.

A checkpoint holds the adapter, optimizer, scheduler, random numbers, the position in the data, the rollout that is in use
and the metrics so far. It is written to `saving/`, synced to the disk, sealed with a manifest of hashes and renamed to
`checkpoint-<step>`. SageMaker copies the folder to S3 file by file and in any order, so that the rename proves nothing
after a restart: the manifest does. What it does not vouch for is torn, and removed.
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
# Sections of a run config that change nothing about what is trained.
BESIDE_TRAINING = {"compute", "gate", "notify", "preflight"}
SHOWN_DIFFERENCES = 3


@dataclass
class Record:
    """What a run knows beyond its trainer's state; every checkpoint's manifest has it as it was then.

    `seconds`: how long the run's processes have lived so far; `costs`: what its parts take (`trainer.bounds.Costs`).
    `ended`: why the training was over with this checkpoint (`complete`, `max_runtime`, `max_cost_usd` or an alert), None
    if it goes on. `heldout_reward` is the checkpoint's, None if it was not evaluated; `evaluations` are all so far.
    `dropped`: ids of rows that the learnability gate took out.
    """

    seconds: float = 0.0
    costs: dict[str, float] = field(default_factory=dict)
    ended: str | None = None
    heldout_reward: float | None = None
    evaluations: list[dict[str, float]] = field(default_factory=list)
    learnability: dict[str, Any] | None = None
    dropped: list[str] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)


class Checkpoint(NamedTuple):
    """A whole checkpoint. `run` is what identifies the run that wrote it (see `identity`)."""

    path: Path
    step: int
    run: dict[str, Any]
    record: Record


def identity(config: RunConfig, rows: Sequence[Row]) -> dict[str, Any]:
    """Return what makes a run the one that a checkpoint belongs to: the config that trains, and a digest of the rows."""
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
    return {"config": config.model_dump(mode="json", exclude=BESIDE_TRAINING), "rows": digest}


def whole(folder: Path, *, verify: bool = True) -> list[Checkpoint]:
    """Return the whole checkpoints in a folder, the newest first; without `verify` their hashes are believed."""
    found = [_read(path, verify) for path in folder.glob("checkpoint-*")]
    return sorted((each for each in found if each), key=lambda each: -each.step)


def newest(folder: Path, run: dict[str, Any]) -> Checkpoint | None:
    """Return the newest whole checkpoint, None if there is none. Raises JobError if it is another run's."""
    checkpoints = whole(folder)
    if not checkpoints:
        return None
    differences = list(_differences(checkpoints[0].run, run))
    if differences:
        more = f" and {len(differences) - SHOWN_DIFFERENCES} more" if len(differences) > SHOWN_DIFFERENCES else ""
        raise JobError(
            f"{checkpoints[0].path} is a checkpoint of another run: {'; '.join(differences[:SHOWN_DIFFERENCES])}{more}. "
            f"Empty {folder} to start anew, or start the run that it belongs to."
        )
    return checkpoints[0]


def best(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """Return the checkpoint with the highest held-out reward, the later of equals; without any reward the newest."""
    evaluated = [each for each in checkpoints if each.record.heldout_reward is not None]
    return max(evaluated or checkpoints, key=lambda each: (each.record.heldout_reward or 0.0, each.step))


def clean(folder: Path, keep: int | None = None, *, verify: bool = True) -> None:
    """Remove what is torn, and all but the `keep` newest checkpoints and the best one (None: keep them all)."""
    checkpoints = whole(folder, verify=verify)
    kept = {each.path for each in checkpoints[:keep]} | ({best(checkpoints).path} if checkpoints else set())
    for path in [*folder.glob("checkpoint-*"), *folder.glob(SAVING)]:
        if path not in kept:
            torn = path.name == SAVING or path not in {each.path for each in checkpoints}
            if torn:
                log.info("removing %s: it was not written to its end", path)
            shutil.rmtree(path, ignore_errors=True)


def _differences(there: Any, here: Any, key: str = "") -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for name in sorted({*there, *here}):
            yield from _differences(there.get(name), here.get(name), f"{key}.{name}" if key else name)
    elif there != here:
        name = key.removeprefix("config.")
        yield "it was made from other rows" if key == "rows" else f"{name} is {here!r} here and {there!r} there"


def _read(path: Path, verify: bool) -> Checkpoint | None:
    """Return the checkpoint in a folder if it has a manifest and, to `verify`, every file of it with its hash."""
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
    """Have the disk hold a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hashes(folder: Path) -> dict[str, str]:
    """Sync every file of a folder to the disk and return its hash by its name."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in names:
        _sync(folder / name)
    return {name: _digest(folder / name) for name in names}


def publish(folder: Path, target: Path, manifest: dict[str, Any]) -> None:
    """Seal a folder with its manifest, the last file written, and rename it."""
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _sync(folder / MANIFEST)
    _sync(folder)
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)
    folder.parent.rmdir()
    _sync(target.parent)
