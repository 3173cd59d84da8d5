"""Prepares a run for GRPO: asks the model what it can learn, and, where it is lost, begins with supervised fine-tuning.

    prepare(run)  →  True: GRPO may begin; False: SIGTERM ended the warm start, whose checkpoint is there

GRPO learns only from prompts that the model sometimes gets right. Where more than `warm_start.dead_above` of them are dead,
the same adapter first learns the rows' own worked solutions (`tunedrop.targets`): as little as needed, until the gate,
asked again, finds fewer dead prompts, or the loss on held-out rows rises. The warm start has checkpoints of its own, in the
folder `warm_start`, its own record, and a share of the run's time. It uses none of the run's random numbers: a run that is
killed in it or after it goes on as if nothing had happened.
"""

import functools
import logging
import signal
from pathlib import Path
from typing import Any

import safetensors.torch
from peft import set_peft_model_state_dict
from transformers import TrainerState

from trainer import checkpoints, folders
from trainer.bounds import Bounds, Limit
from trainer.checkpoints import Checkpoint, Record
from trainer.evaluation import interval
from trainer.general_probe import Probe
from trainer.job import JobError, started
from trainer.learnability import Learnability
from trainer.learnability_gate import Asked, ask_first, ask_model, check_learnability
from trainer.progress import Progress, Watch, history
from trainer.run_trainer import RunTrainer
from trainer.sampling import own_random_numbers
from trainer.sft import Run, evaluation_steps, learned_sequences, make
from trainer.sft_sequences import Sequences
from trainer.sft_trainer import RunSftTrainer
from tunedrop.config.model import RunConfig
from tunedrop.config.schedule import GATE_SHARE

log = logging.getLogger("trainer")

WARM_START = "warm_start"  # the folder of its checkpoints, beside those of the run


def folder() -> Path:
    """Return the folder of the warm start's checkpoints."""
    return folders.checkpoint_dir() / WARM_START


def prepare(run: Run) -> bool:
    """Ask the model, warm it up if the config and its answers say so, and decide about the training by its answers.

    Writes the run's record. Returns whether GRPO may begin. Raises JobError as `check_learnability`, and where
    `warm_start: {policy: always}` has no row to learn from.
    """
    trainer, record = run.trainer, run.trainer.record
    if run.config.learnability.samples:
        log.info("note=asking the model what it can learn")
    if run.config.method == "sft":
        asked = ask_first(trainer, run.config, run.rewards, run.data.rows)
        record.learnability = asked.summary() if asked else None
        return True
    saved = checkpoints.newest(folder(), trainer.run)
    gate = functools.partial(ask_model, trainer, run.config, run.rewards, run.data.rows, GATE_SHARE * run.limit.seconds)
    if saved is None:
        find = functools.cache(lambda: _enough_sequences(run))
        asked = gate(enough=lambda estimate: why(run.config, estimate) is not None and find() is not None)
        reason = why(run.config, asked.estimate if asked else None)
        learned = find() if reason else None
        if learned is None:
            check_learnability(trainer, run.config, run.data.rows, asked)
            return True
        Probe(trainer, run.config, run.heldout, interval(run, trainer))  # it keeps what the model knows before any step
        told = {"reason": reason, "targets": learned.summary, "before": shares(asked)}
        phase = Record(warm_start=told, probe=record.probe)
        log.info("warm start: %s", learned.summary)
        log.info("note=warm start, because %s", reason)
    else:
        phase, learned = saved.record, None
        record.seconds, record.probe = phase.seconds, phase.probe
    if not phase.ended:
        warm_up(run, phase, saved, learned or learned_sequences(run, run.data.rows))
        saved = checkpoints.newest(folder(), trainer.run)
    elif saved:
        load_adapter(trainer, saved)
    record.alerts = phase.alerts
    record.warm_start = summary(phase, saved)
    if not phase.ended:
        return False
    asked = gate()
    record.warm_start["after"] = shares(asked)
    check_learnability(trainer, run.config, run.data.rows, asked)
    return True


def why(config: RunConfig, estimate: Learnability | None) -> str | None:
    """Return the reason to begin with a warm start, None if there is none. `estimate`: what the gate found, if it asked."""
    policy = config.warm_start
    if policy.policy == "always":
        return "warm_start.policy is always"
    if policy.policy == "never" or estimate is None or estimate.dead <= policy.dead_above:
        return None
    return f"{estimate.dead:.0%} of {estimate.prompts} prompts are dead, more than warm_start.dead_above"


def _looks_again(run: Run) -> bool:
    return run.trainer.record.warm_start is not None or run.config.method == "sft"


def look_again_seconds(run: Run) -> float:
    """Return about how long `look_again` will take: as long as the gate did."""
    gate = run.trainer.record.learnability
    return float(gate["seconds"]) if gate and _looks_again(run) else 0.0


def look_again(run: Run) -> None:
    """Ask the model at the end of a run with supervised fine-tuning, for the shares after it."""
    record = run.trainer.record
    if _looks_again(run):
        asked = ask_first(run.trainer, run.config, run.rewards, run.data.rows)
        record.learnability_after = shares(asked)


def shares(asked: Asked | None) -> dict[str, Any] | None:
    """Return the shares of dead, learnable and solved prompts."""
    return asked.estimate.shares() if asked else None


def _enough_sequences(run: Run) -> Sequences | None:
    """Return the sequences to learn, None if they are no step's worth; raise JobError where the config demands them."""
    learned = learned_sequences(run, run.data.rows)
    wanted = min(run.config.sft.rows_per_step, len(run.data.rows))
    if len(learned.items) >= wanted:
        return learned
    found = f"{len(learned.items)} of {len(run.data.rows)} rows have a worked solution in the form that the rewards ask for"
    if run.config.warm_start.policy == "always":
        raise JobError(f"warm_start.policy is always, but only {found}: {learned.summary['left_out']}.")
    log.info("no warm start: only %s: %s", found, learned.summary["left_out"])
    return None


def warm_up(run: Run, phase: Record, saved: Checkpoint | None, learned: Sequences) -> None:
    """Train on the sequences, from a checkpoint if there is one. Raises JobError if the weights are not finite then.

    `phase.ended` says why it ended, None after SIGTERM.
    """
    trainer, config = run.trainer, run.config
    with own_random_numbers():
        sft = make(run, learned, phase, folder(), decays=False)
        watch = watch_of(run, phase)
        limit = Limit(config.warm_start.max_share * run.limit.seconds, "warm_start.max_share")
        bounds = Bounds(
            phase,
            limit,
            watch,
            functools.partial(evaluate, run, sft),
            evaluation_steps(sft),
            began=started(),
            finish_seconds=run.finish_seconds,
            enough=functools.partial(enough, config),
        )
        for callback in (Progress(folders.model_dir(), "sft"), watch, bounds):
            sft.add_callback(callback)
        if bounds.fits():
            sft.train(resume_from_checkpoint=str(saved.path) if saved else None)
        else:
            phase.ended = limit.name
            if saved:
                load_adapter(trainer, saved)
        sft.free_memory()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until GRPO begins, there is nothing more to save
    if watch.broken:
        raise JobError(f"The warm start failed: {phase.alerts[-1]['message']}.")


def watch_of(run: Run, record: Record) -> Watch:
    """Return the alerts of a training. Supervised fine-tuning has no completions to show."""
    return Watch(
        folders.model_dir() / "alerts.jsonl",
        record,
        formats=[],
        stop_on=run.config.alerts.stop_on,
        samples=list,
        telling=lambda _code: [],
        announce=run.announce,
        mean_rises=True,
    )


def evaluate(run: Run, sft: RunSftTrainer) -> dict[str, float]:
    """Return the loss on held-out rows and, with `auto`, what the gate finds in its first prompts."""
    measures: dict[str, float] = {}
    if (loss := sft.heldout_loss()) is not None:
        sft.add_metric("heldout_loss", loss)
        measures["heldout_loss"] = loss
    if run.config.warm_start.policy == "auto":
        measures |= shares(ask_first(run.trainer, run.config, run.rewards, run.data.rows)) or {}
    log.info("warm start: evaluated %s", " ".join(f"{name}={value:.4g}" for name, value in measures.items()))
    return measures


def enough(config: RunConfig, evaluations: list[dict[str, float]]) -> str | None:
    """Return why a warm start has done enough: `learnable`, or `heldout_loss`, which has risen. None if it goes on."""
    last = evaluations[-1] if evaluations else {}
    if config.warm_start.policy == "auto" and last.get("dead", 1.0) <= config.warm_start.dead_above:
        return "learnable"
    losses = [each["heldout_loss"] for each in evaluations if "heldout_loss" in each]
    return "heldout_loss" if len(losses) > 1 and losses[-1] > losses[-2] else None


def load_adapter(trainer: RunTrainer, saved: Checkpoint) -> None:
    """Give the model the adapter of a checkpoint."""
    tensors = safetensors.torch.load_file(saved.path / "adapter_model.safetensors", device=str(trainer.args.device))
    set_peft_model_state_dict(trainer.model, tensors)


def summary(phase: Record, saved: Checkpoint | None) -> dict[str, Any]:
    """Return what the run's record says of a warm start. `points` are its lines of metrics.jsonl."""
    assert phase.warm_start is not None
    done = {"ended": phase.ended, "steps": 0, "evaluations": phase.evaluations, "points": []}
    if saved:
        state = TrainerState.load_from_json(str(saved.path / "trainer_state.json"))
        done |= {"steps": saved.step, "points": history(state, "sft")}
    return phase.warm_start | done
