"""Tunes a model with GRPO and LoRA, in a training job or in a shell.

    SM_CHANNEL_TRAINING=data python -m trainer.train --model-name SmolLM2-135M-Instruct --dataset-filename cars.jsonl

The job reads the run config (channel `run`; flags override it) and the rows (channel `training`), trains with TRL's
`GRPOTrainer`, and writes to `/opt/ml/model`, in a shell to `output/model`:

    adapter/          the LoRA adapter, as PEFT saves it
    adapter.tar.gz    the same two files, as an endpoint loads them
    merged/           base model and adapter in bf16, or in fp32 for an adapter that bf16 loses, with the tokenizer
    run_config.json   the run config with all values
    metrics.jsonl     one line per logging step
    alerts.jsonl      one line per alert
    rollouts/         answers with their scores, see tunedrop/rollouts.py
    tensorboard/      the metrics again
    training.json     the summary

The job writes checkpoints as it trains. A killed run resumes from the newest whole checkpoint. A finished run keeps the
checkpoint with the highest reward on held-out rows.
"""

import argparse
import functools
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from trainer import container, folders, models
from trainer.dataset import check_step, check_whole_groups, dataset_file, fit_prompts, heldout_rows, load_rows, with_rewards
from trainer.job import JobError, failure_reported, set_up_logging, started
from trainer.permissions import job_permissions
from tunedrop.config.model import RunConfig
from tunedrop.config.parse import parse_run_config
from tunedrop.config.schedule import fit_batches
from tunedrop.dataset.rows import Row
from tunedrop.rewards import Reward, build_rewards
from tunedrop.rollouts import FOLDER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import GRPOConfig

    from trainer.bounds import Limit
    from trainer.checkpoints import Checkpoint, Record
    from trainer.run_trainer import RunTrainer
    from trainer.sft import Run
    from trainer.sft_trainer import Learner
    from trainer.start import Start

log = logging.getLogger("trainer")

CHECKPOINTS_KEPT = 2  # the newest ones; the best checkpoint stays as well


def _boolean(value: str) -> bool:
    """Parse a flag's value as people and SageMaker write it. Plain `bool` takes "False" for true."""
    if value.lower() not in {"true", "false", "1", "0", "yes", "no"}:
        raise argparse.ArgumentTypeError(f"'{value}' is neither true nor false")
    return value.lower() in {"true", "1", "yes"}


# The key of the run config that each hyperparameter sets, and its type.
FLAGS: dict[str, tuple[str, Any]] = {
    "model-name": ("model", str),
    "max-seq-length": ("max_seq_length", int),
    "max-prompt-length": ("max_prompt_length", int),
    "lora-rank": ("lora.r", int),
    "load-in-4bit": ("lora.load_in_4bit", _boolean),
    "learning-rate": ("grpo.learning_rate", float),
    "num-train-epochs": ("grpo.num_train_epochs", float),
    "per-device-train-batch-size": ("grpo.per_device_train_batch_size", int),
    "gradient-accumulation-steps": ("grpo.gradient_accumulation_steps", int),
    "num-generations": ("grpo.num_generations", int),
    "max-completion-length": ("grpo.max_completion_length", int),
    "temperature": ("grpo.temperature", float),
    "beta": ("grpo.beta", float),
    "logging-steps": ("grpo.logging_steps", float),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise JobError(f"{message} (valid hyperparameters: {', '.join(sorted(FLAGS))}, dataset-filename, max-samples)")


def parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse command-line flags, which are also the job's hyperparameters. Raises JobError for an unknown or bad flag."""
    parser = _Parser(prog="python -m trainer.train", description=__doc__.split("\n")[0], allow_abbrev=False)
    for flag, (key, kind) in FLAGS.items():
        switch: dict[str, Any] = {"nargs": "?", "const": True} if kind is _boolean else {}
        parser.add_argument(f"--{flag}", type=kind, dest=key, help=f"{key} of the run config", **switch)
    parser.add_argument(
        "--dataset-filename", help="a file of the training channel; default: train.jsonl, else the first file"
    )
    parser.add_argument("--max-samples", type=int, help="use only this many rows, from the first")
    parser.add_argument("--run-id", default="", help="the pipeline's name of this run, for the logs")
    parser.add_argument("--max-runtime", type=int, help="seconds that the job may run, if less than compute.max_runtime")
    return parser.parse_args(arguments)


def read_config(flags: argparse.Namespace) -> RunConfig:
    """Return the run config of the `run` channel, overridden by the flags. Raises RejectedError or JobError."""
    path = folders.channel_file("run")
    values: dict[str, Any] = json.loads(path.read_bytes()) if path else {}
    for key, _ in FLAGS.values():
        value = getattr(flags, key)
        if value is not None:
            *sections, name = key.split(".")
            target = values
            for section in sections:
                target = target.setdefault(section, {})
            target[name] = value
    if "model" not in values:
        raise JobError("No base model is named. Pass --model-name, or a run config with 'model' in the channel 'run'.")
    return fit_batches(parse_run_config(values))[0]


def grpo_config(config: RunConfig, rewards: list[Reward]) -> "GRPOConfig":
    """Return TRL's config: our defaults, overridden by the run's `grpo` section. Raises JobError for contradictions."""
    import torch
    from trl import GRPOConfig

    defaults: dict[str, Any] = {
        "save_strategy": "steps" if "save_steps" in config.grpo else "no",  # without it only trainer/bounds.py saves
        "save_total_limit": CHECKPOINTS_KEPT,
        "bf16": models.fast_bf16(),
        "disable_tqdm": True,
    }
    try:
        return GRPOConfig(
            **defaults
            | config.grpo
            | {
                "output_dir": str(folders.checkpoint_dir()),
                "reward_weights": [reward.weight for reward in rewards],
                "report_to": [],  # see trainer/trackers.py
                "use_cpu": not torch.cuda.is_available(),
            }
        )
    except ValueError as error:
        raise JobError(f"The config's grpo section: {error}") from None


def build_trainer(
    config: RunConfig,
    location: str,
    tokenizer: "PreTrainedTokenizerBase",
    rows: list[Row],
    rewards: list[Reward],
    run: dict[str, Any],
    record: "Record",
    start: "Start | None" = None,
) -> "RunTrainer":
    """Make the trainer: the base model (in 4 bits if the config says so), a LoRA adapter, the rewards and the rows.

    The adapter is new, or has the weights of `start`. `run` and `record` are stored in the trainer's checkpoints (see
    `trainer.checkpoints`).
    """
    from datasets import Dataset as ArrowDataset
    from peft import LoraConfig

    from trainer.curriculum import Curriculum
    from trainer.row_rewards import row_rewards
    from trainer.run_trainer import SharedPrefixRunTrainer, StockRunTrainer
    from trainer.shared_prefix_models import unsupported
    from trainer.start import begin_at

    arguments = grpo_config(config, rewards)
    check_step(len(rows), arguments, "lower one of them")
    if any(spec.reward_type.ranks for spec in config.rewards):
        check_whole_groups(arguments)
    quantization = models.four_bit() if config.lora.load_in_4bit else {}
    model = models.load_model(location, dtype=models.weights_dtype(), device_map=models.device(), **quantization)
    lora = LoraConfig(task_type="CAUSAL_LM", **config.lora.peft_kwargs())
    reason, sampling = unsupported(model, arguments, lora), config.sampling
    log.info("trainer=%s", f"stock TRL: {reason}" if reason else "shared prefix")
    trainer = (StockRunTrainer if reason else SharedPrefixRunTrainer)(
        model=model,
        reward_funcs=row_rewards(rewards, rows),
        args=arguments,
        train_dataset=ArrowDataset.from_list([{"prompt": row["prompt"], "row": index} for index, row in enumerate(rows)]),
        processing_class=tokenizer,
        peft_config=lora,
        run=run,
        record=record,
        prompt_limit=config.max_prompt_length,
        curriculum=Curriculum(record, arguments.seed, sampling.refills) if sampling.policy == "teach" else None,
    )
    if start:
        begin_at(start, trainer, config)
    return trainer


def runtime_limit(config: RunConfig, flags: argparse.Namespace) -> "Limit":
    """Return the limit of the run: `--max-runtime`, which `max_cost_usd` allows, if it is below `compute.max_runtime`."""
    from trainer.bounds import Limit

    if flags.max_runtime is not None and flags.max_runtime < config.compute.max_runtime:
        return Limit(flags.max_runtime, "max_cost_usd")
    return Limit(config.compute.max_runtime, "max_runtime")


def train(flags: argparse.Namespace) -> str | None:
    """Do the run, and return why it ended (`Record.ended`). After SIGTERM it ends with the step, and saves its model."""
    import_seconds = container.check("train")
    config = read_config(flags)
    path = dataset_file(flags.dataset_filename)
    rows = load_rows(path, config, flags.max_samples)
    config = with_rewards(config, rows)
    location = models.locate(config.model)
    log.info("run=%s model=%s data=%s rows=%d", flags.run_id or "-", location, path.name, len(rows))

    tokenizer = models.load_tokenizer(location)
    data = fit_prompts(rows, tokenizer, config)
    log.info("prompts kept=%d dropped=%d truncated=%d", len(data.rows), data.dropped, data.truncated)
    heldout = heldout_rows(tokenizer, config)
    rewards = build_rewards(config.rewards, job_permissions())

    from trainer import checkpoints, sft, trackers, warm_start
    from trainer.announce import announcer
    from trainer.learnability_gate import drop_rows
    from trainer.start import read as read_start

    folder = folders.checkpoint_dir()
    start = read_start(config)
    identity = checkpoints.identity(config, data.rows, start.digest if start else None)
    checkpoint = checkpoints.newest(folder, identity)
    record = checkpoint.record if checkpoint else checkpoints.Record()
    with trackers.tracked(config, flags.run_id) as pages:
        began = time.monotonic()
        trainer = build_trainer(config, location, tokenizer, data.rows, rewards, identity, record, start)
        # After the training, the job loads the model once to merge it, and a second process loads two for the proofs.
        finish_seconds = import_seconds + 4 * (time.monotonic() - began) + trackers.FINISH_SECONDS * len(pages)
        if trainer.accelerator.is_local_main_process:
            checkpoints.clean(folder)
            checkpoints.clean(warm_start.folder())
        limit = runtime_limit(config, flags)
        run = sft.Run(config, trainer, rewards, data, heldout, limit, finish_seconds, announcer(), pages)
        learner = sft.whole_run(run) if config.method == "sft" else trainer
        if checkpoint or warm_start.prepare(run):
            drop_rows(trainer, data.rows)
            learn(run, learner, checkpoint)
        if trainer.is_world_process_zero():
            save(run, learner, location, start, flags.run_id)
    return record.ended


def learn(run: "Run", learner: "Learner", checkpoint: "Checkpoint | None") -> None:
    """Train from a checkpoint, or from the beginning, to the end of the run, to a limit, an alert or SIGTERM."""
    from trainer import warm_start
    from trainer.bounds import Bounds
    from trainer.evaluation import evaluate, interval
    from trainer.general_probe import Probe
    from trainer.memory_probe import MemoryProbe
    from trainer.progress import Progress, Watch
    from trainer.rollouts import Rollouts
    from trainer.watchdog import train_watched

    trainer, config, record, target = run.trainer, run.config, run.trainer.record, folders.model_dir()
    rollouts = Rollouts(folders.checkpoint_dir() / FOLDER, config.rollouts.max_mb, learner, run.data.rows)
    watch = Watch(
        target / "alerts.jsonl",
        record,
        formats=[spec.label for spec in config.rewards if spec.reward_type.measures == "form"],
        stop_on=config.alerts.stop_on,
        samples=trainer.latest_samples,
        telling=functools.partial(trainer.telling, run.data.rows),
        announce=run.announce,
        mean_rises=trainer.curriculum is None and not any(spec.reward_type.ranks for spec in config.rewards),
    )
    every = interval(run, learner)
    bounds = Bounds(
        record,
        run.limit,
        watch,
        functools.partial(evaluate, run, learner, Probe(trainer, config, run.heldout, every), rollouts),
        every,
        began=started(),
        finish_seconds=run.finish_seconds + warm_start.look_again_seconds(run),
        at_end=functools.partial(warm_start.look_again, run),
    )
    earlier = record.warm_start["points"] if record.warm_start else []
    for tracker in run.trackers:
        tracker.earlier = earlier
    for callback in (Progress(target, config.method, earlier), watch, bounds, rollouts, *run.trackers):
        learner.add_callback(callback)
    if bounds.go_on(checkpoint):
        log.info("resuming from %s", checkpoint.path if checkpoint else "nothing")
        go = functools.partial(learner.train, resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        if learner is trainer:
            chooses = "activation_checkpointing" not in config.grpo
            trainer.add_callback(MemoryProbe(trainer, run.data.lengths, chooses_checkpointing=chooses))
            train_watched(trainer, watch, len(run.heldout) / trainer.args.generation_batch_size, go)
        else:
            go()
    else:  # the run was killed after its last step, or no time is left
        assert checkpoint is not None  # `go_on` raises without one
        learner.finish_from(checkpoint)


def save(run: "Run", learner: "Learner", location: str, start: "Start | None", run_id: str) -> None:
    """Write the model of the best checkpoint and the summary, with proofs on some prompts. Uses the trainers up."""
    from trainer import checkpoints, results, warm_start
    from trainer.progress import history

    config, record = run.config, learner.record
    # This process wrote these checkpoints or verified them. The files of other machines are not in this folder.
    saved = checkpoints.whole(folders.checkpoint_dir(), verify=False)
    saved = saved or checkpoints.whole(warm_start.folder(), verify=False)  # SIGTERM ended the warm start
    if not saved:
        raise JobError(f"There is nothing to save: {record.alerts[-1]['message']}.")
    chosen = checkpoints.best(saved)
    result = results.summary(learner, config, run_id, run.data, start, chosen)
    points = [point for point in history(learner.state, config.method) if point["step"] <= chosen.step]
    shutil.rmtree(folders.model_dir() / FOLDER, ignore_errors=True)
    if (folders.checkpoint_dir() / FOLDER).is_dir():  # not if SIGTERM ended the warm start
        shutil.copytree(folders.checkpoint_dir() / FOLDER, folders.model_dir() / FOLDER)
    tokenizer = run.trainer.processing_class
    for each in dict.fromkeys((learner, run.trainer)):  # for the models that are merged and compared
        each.free_memory()
    results.save(chosen, tokenizer, location, config)
    if record.ended:  # a run that SIGTERM stopped has only seconds left, and may resume
        prompts = [row["prompt"] for row in run.heldout or run.data.rows]
        result["proofs"] = results.prove(config, location, prompts, points)
    written = folders.model_dir() / "training.json"
    written.write_text(json.dumps(result, indent=1))
    if run.trackers:
        written.write_text(json.dumps(result | {"trackers": run.trackers.finish(record.ended)}, indent=1))
    log.info("saved %s with the adapter of step %d", folders.model_dir(), chosen.step)


def leave_process_group() -> None:
    """End torch's process group: https://docs.pytorch.org/docs/stable/distributed.html#shutdown.

    Without it the group's threads may abort a process that exits while other ranks still work.
    """
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with the command-line flags. Exits with 0, or with 1 and the reason in the failure file."""
    set_up_logging()
    with failure_reported():
        ended = train(parse_flags(sys.argv[1:] if arguments is None else arguments))
        leave_process_group()
    if ended == "STALLED" or os.environ.get("RANK", "0") != "0":
        # A thread that hangs would keep the process from ending, and native threads of the group have aborted a rank that
        # shut down while others still worked.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
