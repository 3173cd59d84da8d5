"""Asks a model in training the general questions of `probe.json` (`trainer.probe_part`).

A training with held-out rows asks its model before the first step and at each evaluation.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from trainer.engines import Completion, Decoding
from trainer.probe_part import PROBE_TOKENS, probe_part
from trainer.sampling import sample_completions
from trainer.scoring import scored
from tunedrop.config.model import RunConfig
from tunedrop.config.schedule import EVALUATION_SHARE, EVALUATIONS
from tunedrop.dataset.rows import Row

if TYPE_CHECKING:
    from trainer.run_trainer import RunTrainer


class Probe:
    """The questions for the model in training. `record.probe` keeps which ones it answers right before the first step.

    `interval`: steps between two evaluations. The answers take at most EVALUATION_SHARE of the tokens that the training
    samples: a training with small steps asks at every second or later evaluation. One that could not ask twice does not ask,
    nor does one without held-out rows, which has no evaluations.
    """

    def __init__(self, trainer: "RunTrainer", config: RunConfig, heldout: Sequence[Row], interval: int):
        self._trainer, arguments = trainer, trainer.args
        self._part = probe_part(config, Decoding.of(config, 0))
        completions = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        sampled = interval * completions * arguments.max_completion_length
        evaluations = math.ceil(len(self._part.tests) * PROBE_TOKENS / (EVALUATION_SHARE * sampled))
        self._every = evaluations * interval
        self._asks = bool(heldout) and evaluations <= EVALUATIONS // 2
        if self._asks and trainer.record.probe is None:
            trainer.record.probe = self._right()

    def ask(self, step: int) -> dict[str, float]:
        """Ask at this step. Return the share of right answers, and how many are lost and gained since the first time.

        Return nothing at a step between two times.
        """
        if not self._asks or step % self._every:
            return {}
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
