"""Keeps the answers of a training: the parts of `rollouts/` (`tunedrop.rollouts`), one for each logging step and evaluation.

    rollouts = Rollouts(folder, config.rollouts.max_mb, trainer, rows)     a callback of the trainer
    rollouts.keep_panel(heldout, completions)                              in an evaluation

The folder is beside the checkpoints, which SageMaker copies to S3 while the job runs: the answers can be read then, and they
survive an interruption. A resumed run removes the parts after its checkpoint and writes them again.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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


@dataclass
class Rollout:
    """A rollout: G completions for each of its rows in succession, of all ranks in their order.

    `rewards` are by function, NaN where it gave no score. `sampler_log_probs` are the means of each completion's tokens,
    None if the sampler does not compute them. `trainer_log_probs` (B,) are those of the loss, of this rank's completions
    alone, and NaN until the loss has computed them.
    """

    rows: list[int]
    texts: list[str]
    tokens: list[int]
    cut: list[bool]
    rewards: dict[str, list[float]]
    advantages: list[float]
    sampler_log_probs: list[float] | None
    trainer_log_probs: Tensor

    def note_log_probs(self, places: Tensor, log_probs: Tensor, mask: Tensor) -> None:
        """Keep the mean log-probabilities of this rank's completions at `places` (b,), unless they are known already.

        `log_probs` and `mask` (b, C) are by token. A rollout that is used again would have those of changed weights.
        """
        means = (log_probs.detach() * mask).sum(1) / mask.sum(1).clamp(min=1)
        known = self.trainer_log_probs[places]
        self.trainer_log_probs[places] = torch.where(known.isnan(), means.float(), known)

    def groups(self, step: int, rows: Sequence[Row], weights: Sequence[float], size: int) -> list[Group]:
        """Return the rollout as groups of `size` answers. Every rank must call it.

        `rows` are those of the training, `weights` those of the rewards.
        """
        trained: list[float] = gather_object(self.trainer_log_probs.tolist())
        sampled = self.sampler_log_probs or [math.nan] * len(self.texts)
        answers = []
        for at, text in enumerate(self.texts):
            scores = {name: _finite(values[at]) for name, values in self.rewards.items()}
            paid = [weight * score for weight, score in zip(weights, scores.values(), strict=True) if score is not None]
            answers.append(
                Answer(
                    text=text,
                    score=_finite(sum(paid)) if paid else None,
                    rewards=scores,
                    tokens=self.tokens[at],
                    cut=self.cut[at],
                    advantage=_finite(self.advantages[at]),
                    sampler_log_prob=_finite(sampled[at]),
                    trainer_log_prob=_finite(trained[at]),
                )
            )
        return [
            Group(step=step, answers=answers[start : start + size], **_asked(rows[self.rows[start]]))
            for start in range(0, len(answers), size)
        ]


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
                **_asked(row),
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


def _asked(row: Row) -> dict[str, Any]:
    """Return the fields of a group that come from its row."""
    answer = row.get("answer")
    reference = answer if answer is None or isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
    return {"prompt_id": str(row["id"]), "prompt": row["prompt"], "reference": reference}


def _finite(value: float) -> float | None:
    """Return a number with the digits that matter, None for one that is not finite."""
    return round(value, 6) if math.isfinite(value) else None
