"""Keeps the answers of a training: the parts of `rollouts/` (`tunedrop.rollouts`), one for each logging step and evaluation.

    rollouts = Rollouts(folder, config.rollouts.max_mb, trainer, rows)     a callback of the trainer
    rollouts.keep_panel(heldout, completions)                              in an evaluation

The folder is beside the checkpoints, which SageMaker copies to S3 while the job runs: the answers can be read then, and they
survive an interruption. A resumed run removes the parts after its checkpoint and writes them again.
"""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.latest_rollout import asked
from tunedrop import rollouts
from tunedrop.dataset.rows import Row
from tunedrop.rollouts import Answer, Group, Index, Kind, Part, spread

if TYPE_CHECKING:
    from trainer.run_trainer import RunTrainer
    from trainer.sampling import ScoredCompletion

log = logging.getLogger("trainer")

PANEL_SHARE = 0.2  # of the limit; the steps have the rest
PART_CHARACTERS = 4_000_000  # of a part's answers: a longer part would take more than 1 % of its step
BYTES_PER_CHARACTER = 0.25  # of compressed text, until a part has shown it
SPARE = 1.5  # a first guess at the groups that fit may be so much too large
BESIDE_TEXT = 200  # characters of an answer's numbers

Choose = Callable[[Sequence[Group], int], Sequence[Group]]


class Rollouts(TrainerCallback):  # type: ignore[misc] # transformers is untyped here
    """Writes the parts of a run into `folder`, whose files never exceed `max_mb` megabytes together.

    A step keeps its groups if they fit into the share of the limit that the steps until now may use; else as many of them as
    fit, evenly spread. A step that raises an alert may use all that is left, and first keeps the groups that the alert
    names (`rollouts` of the alert, `[{"step", "prompt_id"}]`). The panel keeps the first rows of each evaluation that fit.
    """

    def __init__(self, folder: Path, max_mb: float, trainer: "RunTrainer", rows: Sequence[Row]):
        self._folder, self._max_mb, self._trainer, self._rows = folder, max_mb, trainer, rows
        self._bytes_per_character = BYTES_PER_CHARACTER
        self._parts: dict[str, Part] = {}

    def on_train_begin(self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Remove the parts after the checkpoint that the run resumes from; a new run begins with an empty folder."""
        if not state.is_world_process_zero:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._folder.iterdir()):
            part = rollouts.part_of(path.name, path.stat().st_size)
            if part and part.step <= state.global_step:
                self._parts[part.name] = part
            else:
                path.unlink()
        self._write_index()

    def on_log(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        """Write the groups of the latest rollout, if it is of the logging step."""
        trainer, step = self._trainer, state.global_step
        if "reward" not in logs or trainer.rollout is None:
            return
        groups = trainer.rollout.groups(step, self._rows, trainer.reward_weights.tolist(), trainer.num_generations)
        alerts = [alert for alert in trainer.record.alerts if alert["step"] == step]
        if not alerts:
            self._write("step", groups, state, spread)
            return
        named = {link["prompt_id"] for alert in alerts for link in alert.get("rollouts", []) if link["step"] == step}
        self._write("step", sorted(groups, key=lambda group: group.prompt_id not in named), state, _first, everything=True)

    def keep_panel(self, rows: Sequence[Row], completions: Sequence["ScoredCompletion"]) -> None:
        """Write the answers of an evaluation, one for each of its rows."""
        state = self._trainer.state
        groups = [
            Group(
                step=state.global_step,
                panel=True,
                answers=[Answer(text=each.text, score=each.score, rewards=each.rewards, tokens=each.tokens, cut=each.cut)],
                **asked(row),
            )
            for row, each in zip(rows, completions, strict=True)
        ]
        self._write("panel", groups, state, _first)

    def _write(
        self, kind: Kind, groups: Sequence[Group], state: TrainerState, choose: Choose, *, everything: bool = False
    ) -> None:
        """Write a part with the groups that fit. With `everything`, all that the kind may ever use is room."""
        if not state.is_world_process_zero:
            return
        name, share = rollouts.part_name(kind, state.global_step), PANEL_SHARE if kind == "panel" else 1 - PANEL_SHARE
        others = sum(part.bytes for part in self._parts.values() if part.kind == kind and part.name != name)
        until_now = 1.0 if everything else min(1.0, state.global_step / state.max_steps)
        raw = self._fitted(groups, int(share * until_now * self._max_mb * 1e6) - others, choose)
        if raw:
            (self._folder / name).write_bytes(raw)
            self._parts[name] = Part(name=name, step=state.global_step, kind=kind, bytes=len(raw))
            self._write_index()

    def _fitted(self, groups: Sequence[Group], room: int, choose: Choose) -> bytes:
        """Return a part of as many groups as fit into `room` bytes, empty if none does."""
        characters = sum(len(answer.text) + BESIDE_TEXT for group in groups for answer in group.answers)
        allowed = min(PART_CHARACTERS, SPARE * max(room, 0) / self._bytes_per_character)
        groups = choose(groups, math.ceil(len(groups) * min(1.0, allowed / max(characters, 1))))
        while groups:
            raw = rollouts.encode(groups)
            if len(raw) <= room:
                written = sum(len(answer.text) + BESIDE_TEXT for group in groups for answer in group.answers)
                self._bytes_per_character = len(raw) / written
                return raw
            groups = choose(groups, min(len(groups) - 1, max(room, 0) * len(groups) // len(raw)))
        return b""

    def _write_index(self) -> None:
        """Write the index whole or not at all: a reader may copy it at any moment."""
        parts = sorted(self._parts.values(), key=lambda part: (part.step, part.kind))
        new = self._folder / f"{rollouts.INDEX}.new"
        new.write_bytes(msgspec.json.format(msgspec.json.encode(Index(max_mb=self._max_mb, parts=parts))))
        new.rename(self._folder / rollouts.INDEX)


def _first(groups: Sequence[Group], most: int) -> Sequence[Group]:
    return groups[:most]
