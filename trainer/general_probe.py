"""Asks a model in training the general questions of `probe.json` (`trainer.probe_part`).

A training with held-out rows asks its model before the first step and at each evaluation.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from trainer.engines import Completion, Decoding
from trainer.probe_part import probe_part
from trainer.sampling import sample_completions
from trainer.scoring import scored
from tunedrop.config.model import RunConfig
from tunedrop.dataset.rows import Row

if TYPE_CHECKING:
    from trainer.run_trainer import RunTrainer


class Probe:
    """The questions for the model in training. `record.probe` keeps which ones it answers right before the first step.

    Without held-out rows the training has no evaluations, and no question is asked.
    """

    def __init__(self, trainer: "RunTrainer", config: RunConfig, heldout: Sequence[Row]):
        self._trainer = trainer
        self._part = probe_part(config, Decoding.of(config, 0))
        if heldout and trainer.record.probe is None:
            trainer.record.probe = self._right()

    def ask(self) -> dict[str, float]:
        """Ask the questions. Return the share of right ones, and how many are lost and gained since the first time."""
        before, right = self._trainer.record.probe or [], self._right()
        pairs = list(zip(before, right, strict=True))
        return {
            "probe_score": fmean(right),
            "probe_lost": float(sum(was and not now for was, now in pairs)),
            "probe_gained": float(sum(now and not was for was, now in pairs)),
        }

    def _right(self) -> list[bool]:
        """Return for each question whether the model answers it right."""
        part = self._part
        rows: list[Row] = [{"id": test.id, "prompt": test.prompt, "answer": test.reference} for test in part.tests]
        answers = sample_completions(self._trainer, part.rewards, rows, 1, greedy=True, limit=part.decoding.limit)
        results = [
            scored(test, [Completion(answer.text, 0, 0.0, answer.cut, {})], part)
            for test, (answer,) in zip(part.tests, answers, strict=True)
        ]
        return [bool(result.passed) for result in results]
