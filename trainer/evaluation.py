"""The evaluation of a training on held-out rows, between its steps."""

import logging
import time
from statistics import fmean

from trainer.general_probe import Probe
from trainer.rollouts import Rollouts
from trainer.run_trainer import RunTrainer
from trainer.sampling import sample_completions
from trainer.sft_trainer import Learner
from tunedrop.dataset.rows import Row
from tunedrop.rewards import Reward

log = logging.getLogger("trainer")


def evaluate(
    trainer: RunTrainer,
    learner: Learner,
    rewards: list[Reward],
    rows: list[Row],
    probe: Probe,
    rollouts: Rollouts,
) -> dict[str, float]:
    """Return the mean reward of greedy completions to held-out rows, with `sft` also the loss of their targets.

    Without rows there is neither. The learner's metrics get them, with the figures of the probe. `rollouts` keeps the
    completions.
    """
    if not rows:
        return {}
    began = time.monotonic()
    completions = [completion for (completion,) in sample_completions(trainer, rewards, rows, 1, greedy=True)]
    rollouts.keep_panel(rows, completions)
    reward = fmean(completion.score for completion in completions)
    loss = None if learner is trainer else learner.heldout_loss()
    measures = {"heldout_reward": reward} | ({} if loss is None else {"heldout_loss": loss})
    for name, value in (measures | probe.ask()).items():
        learner.add_metric(name, value)
    log.info("evaluated rows=%d heldout_reward=%.4f in %.1f s", len(rows), reward, time.monotonic() - began)
    return measures
