"""Supervised fine-tuning as a part of a run: the rows that it learns, and its trainer.

    whole_run(run)                           →  the trainer of a run with `method: sft`
    make(run, learned, record, folder, …)    →  the same for a warm start, with checkpoints of its own

The model is that of the run's GRPO trainer, which samples for the evaluations and for the learnability gate.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from trainer import folders
from trainer.bounds import Limit
from trainer.checkpoints import Record
from trainer.dataset import Dataset
from trainer.job import JobError
from trainer.memory_probe import SequenceProbe
from trainer.run_trainer import RunTrainer
from trainer.sft_sequences import Sequences, sequences
from trainer.sft_trainer import RunSftTrainer, build_sft_trainer
from trainer.trackers import Trackers
from tunedrop.config.model import RunConfig
from tunedrop.config.schedule import EVALUATIONS
from tunedrop.dataset.rows import Row
from tunedrop.rewards import Reward


class Run(NamedTuple):
    """What the phases of a run share. `finish_seconds`: the time for the merge and the proofs after the last step."""

    config: RunConfig
    trainer: RunTrainer
    rewards: list[Reward]
    data: Dataset
    heldout: list[Row]
    limit: Limit
    finish_seconds: float
    announce: Callable[[dict[str, Any]], None]
    trackers: Trackers


def learned_sequences(run: Run, rows: list[Row]) -> Sequences:
    """Return the sequences of rows to learn. A warm start with `policy: auto` takes those with reasoning only."""
    reasoned_only = run.config.method == "grpo" and run.config.warm_start.policy == "auto"
    trainer = run.trainer
    return sequences(
        run.config, run.rewards, rows, trainer.processing_class, trainer.eos_token_ids, reasoned_only=reasoned_only
    )


def make(run: Run, learned: Sequences, record: Record, folder: Path, *, decays: bool) -> RunSftTrainer:
    """Make the trainer of these sequences, which probes the memory before its first step. See `build_sft_trainer`."""
    trainer, config = run.trainer, run.config
    heldout = learned_sequences(run, run.heldout)
    sft = build_sft_trainer(trainer, config, learned, heldout, run=trainer.run, record=record, folder=folder, decays=decays)
    sft.add_callback(SequenceProbe(sft, sft.args.max_length))
    return sft


def whole_run(run: Run) -> RunSftTrainer:
    """Make the trainer of a run with `method: sft`. Raises JobError if no row has a target."""
    learned = learned_sequences(run, run.data.rows)
    if not learned.items:
        raise JobError(f"method is sft, but no row has a text to learn. Rows by reason: {learned.summary['left_out']}.")
    return make(run, learned, run.trainer.record, folders.checkpoint_dir(), decays=True)


def evaluation_steps(sft: RunSftTrainer) -> int:
    """Return the number of steps between two evaluations."""
    epochs: float = sft.args.num_train_epochs
    per_step: int = sft.args.gradient_accumulation_steps * sft.args.world_size
    return max(1, math.ceil(epochs * math.ceil(len(sft.train_dataset) / per_step) / EVALUATIONS))
