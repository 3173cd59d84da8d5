"""The evaluation of a training on held-out rows, between its steps."""

import logging
import time
from statistics import fmean

from trainer.general_probe import Probe
from trainer.rollouts import Rollouts
from trainer.sampling import sample_completions
from trainer.sft import Run, evaluation_steps
from trainer.sft_trainer import Learner
from tunedrop.config.schedule import evaluation_interval

log = logging.getLogger("trainer")


def interval(run: Run, learner: Learner) -> int:
    """Return the number of steps between two evaluations."""
    if learner is not run.trainer:
        return evaluation_steps(learner)
    return evaluation_interval(run.config, run.trainer.rows, len(run.heldout), run.trainer.accelerator.num_processes)


def evaluate(run: Run, learner: Learner, probe: Probe, rollouts: Rollouts) -> dict[str, float]:
    """Return the mean reward of greedy completions to held-out rows, with `sft` also the loss of their targets.

    Without rows there is neither. The learner's metrics get them, with the figures of the probe. `rollouts` keeps the
    completions.
    """
    rows = run.heldout
    if not rows:
        return {}
    began = time.monotonic()
    completions = [completion for (completion,) in sample_completions(run.trainer, run.rewards, rows, 1, greedy=True)]
    rollouts.keep_panel(rows, completions)
    reward = fmean(completion.score for completion in completions)
    loss = None if learner is run.trainer else learner.heldout_loss()
    measures = {"heldout_reward": reward} | ({} if loss is None else {"heldout_loss": loss})
    for name, value in (measures | probe.ask(learner.state.global_step)).items():
        learner.add_metric(name, value)
    log.info("evaluated rows=%d heldout_reward=%.4f in %.1f s", len(rows), reward, time.monotonic() - began)
    return measures
