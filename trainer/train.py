"""Tune a model with GRPO and LoRA: what a training job does, and what a shell can do without one.

    SM_CHANNEL_TRAINING=data python -m trainer.train --model-name SmolLM2-135M-Instruct --dataset-filename cars.jsonl

Reads the run config (`run` channel, flags win over it) and the rows (`training` channel), trains with TRL's
`GRPOTrainer`, and leaves in `/opt/ml/model`: `adapter/` (PEFT), `merged/` (bf16 model and tokenizer), `run_config.json`
(as it was run), `metrics.jsonl` (a line per logging step), `alerts.jsonl` (what went wrong), `tensorboard/` and
`training.json` (a summary). In a shell they are in `output/model`.

Checkpoints are kept while it runs: a run that was killed goes on from the newest whole one, and a run ends with the one
that did best on held-out rows.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from statistics import fmean
from typing import TYPE_CHECKING, Any, NoReturn

from trainer import container, folders, models
from trainer.dataset import Dataset, dataset_file, fit_prompts, heldout_rows, load_rows
from trainer.job import JobError, failure_reported, set_up_logging, started
from trainer.permissions import job_permissions
from tunedrop.config.model import RunConfig
from tunedrop.config.parse import parse_run_config
from tunedrop.config.schedule import fit_batches, generated_answers, optimizer_steps
from tunedrop.dataset.rows import Row
from tunedrop.rewards import Reward, build_rewards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import GRPOConfig, GRPOTrainer

    from trainer.bounds import Bounds
    from trainer.checkpoints import Checkpoint, Record

log = logging.getLogger("trainer")

CHECKPOINTS_KEPT = 2  # the newest; the best one stays, too


def _boolean(value: str) -> bool:
    """Parse a flag's value as people and SageMaker write it; plain `bool` would take "False" for true."""
    if value.lower() not in {"true", "false", "1", "0", "yes", "no"}:
        raise argparse.ArgumentTypeError(f"'{value}' is neither true nor false")
    return value.lower() in {"true", "1", "yes"}


# Hyperparameter names and where they go in the run config.
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
    "use-vllm": ("grpo.use_vllm", _boolean),
    "logging-steps": ("grpo.logging_steps", float),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise JobError(f"{message} (valid hyperparameters: {', '.join(sorted(FLAGS))}, dataset-filename, max-samples)")


def parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse command-line flags, which are also the job's hyperparameters. Raises JobError for an unknown or bad one."""
    parser = _Parser(prog="python -m trainer.train", description=__doc__.split("\n")[0], allow_abbrev=False)
    for flag, (key, kind) in FLAGS.items():
        switch: dict[str, Any] = {"nargs": "?", "const": True} if kind is _boolean else {}
        parser.add_argument(f"--{flag}", type=kind, dest=key, help=f"{key} of the run config", **switch)
    parser.add_argument("--dataset-filename", help="the training channel's file to read; default train.jsonl, or the first")
    parser.add_argument("--max-samples", type=int, help="use only the first rows")
    parser.add_argument("--run-id", default="", help="the pipeline's name for this run, for the logs")
    parser.add_argument("--max-runtime", type=int, help="seconds the job may live, if less than compute.max_runtime")
    return parser.parse_args(arguments)


def read_config(flags: argparse.Namespace) -> RunConfig:
    """Return the run config: the `run` channel's, overridden by the flags given. Raises RejectedError or JobError."""
    path = folders.channel_file("run")
    given: dict[str, Any] = json.loads(path.read_bytes()) if path else {}
    for key, _ in FLAGS.values():
        value = getattr(flags, key)
        if value is not None:
            *sections, name = key.split(".")
            target = given
            for section in sections:
                target = target.setdefault(section, {})
            target[name] = value
    if "model" not in given:
        raise JobError("Which model? Give --model-name, or a run config with 'model' in the 'run' channel.")
    return fit_batches(parse_run_config(given))[0]


def trackers() -> list[str]:
    """Return where transformers reports to: MLflow where a tracking server is named. Raises JobError without MLflow."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        return []
    if find_spec("mlflow") is None:
        raise JobError("MLFLOW_TRACKING_URI is set, but the image has no mlflow: AWS's PyTorch images have it.")
    return ["mlflow"]


def grpo_config(config: RunConfig, rewards: list[Reward]) -> "GRPOConfig":
    """Make TRL's config: the run's `grpo` section over our defaults. Raises JobError for values that contradict."""
    import torch
    from trl import GRPOConfig

    defaults: dict[str, Any] = {
        "save_strategy": "steps" if "save_steps" in config.grpo else "no",  # then trainer/bounds.py alone says when
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
                "report_to": trackers(),
                "use_cpu": not torch.cuda.is_available(),
            }
        )
    except ValueError as error:
        raise JobError(f"The config's grpo section: {error}") from None


def build_trainer(
    config: RunConfig, location: str, tokenizer: "PreTrainedTokenizerBase", rows: list[Row], rewards: list[Reward]
) -> "GRPOTrainer":
    """Make the trainer: base model (4-bit if the config says so), fresh LoRA adapter, rewards and rows."""
    from datasets import Dataset as ArrowDataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import GRPOTrainer

    from trainer.checkpoints import Durable
    from trainer.grpo import SharedPrefixGRPOTrainer, why_not
    from trainer.progress import Observed
    from trainer.row_rewards import row_rewards

    arguments = grpo_config(config, rewards)
    check_step(len(rows), arguments, "lower one of these")
    quantization = models.four_bit() if config.lora.load_in_4bit else {}
    model = models.load_model(location, dtype=models.weights_dtype(), **quantization)
    lora = LoraConfig(task_type="CAUSAL_LM", **config.lora.peft_kwargs())
    reason = why_not(model, arguments, lora)
    log.info("trainer=%s", f"stock TRL: {reason}" if reason else "shared prefix")
    base = GRPOTrainer if reason else SharedPrefixGRPOTrainer
    trainer = type("RunTrainer", (Durable, Observed, base), {})(
        model=model,
        reward_funcs=row_rewards(rewards, rows),
        args=arguments,
        train_dataset=ArrowDataset.from_list([{"prompt": row["prompt"], "row": index} for index, row in enumerate(rows)]),
        processing_class=tokenizer,
        peft_config=lora,
    )
    # TRL makes an adapter on 4-bit weights bf16, which PEFT does not when a run resumes. Small steps get lost in bf16.
    for weights in trainer.model.parameters():
        if weights.requires_grad:
            weights.data = weights.data.float()
    trainer.remove_callback(PrinterCallback)
    return trainer


def check_step(rows: int, arguments: "GRPOConfig", advice: str) -> None:
    """Raise JobError if so many rows are too few for one step."""
    prompts = arguments.generation_batch_size // arguments.num_generations
    if rows < prompts:
        raise JobError(
            f"{rows} rows are too few for one step, which takes {prompts} prompts "
            f"(per_device_train_batch_size * gradient_accumulation_steps * GPUs / num_generations): {advice}."
        )


def ask_base_model(
    trainer: "GRPOTrainer", config: RunConfig, rewards: list[Reward], rows: list[Row], record: "Record"
) -> None:
    """Let the learnability gate look at the run before its first step. Raises JobError where the policy is to stop."""
    from trainer import learnability
    from trainer.sampling import sample_completions

    policy, began = config.learnability, time.monotonic()
    if policy.samples == 0:
        return
    total = generated_answers(config, len(rows), trainer.accelerator.num_processes)
    # The rows that training comes to first: they are in random order, and what they show is what it will measure.
    order = dict.fromkeys(trainer._get_train_sampler())
    chosen = list(order)[: learnability.prompts_to_ask(total, policy.samples)]
    given = sample_completions(trainer, rewards, [rows[index] for index in chosen], policy.samples)
    found = learnability.judge([[answer.score for answer in each] for each in given], trainer.num_generations)
    record.learnability = found.summary() | {"seconds": round(time.monotonic() - began, 1)}
    log.info("learnability %s", " ".join(f"{name}={value}" for name, value in record.learnability.items()))
    if policy.policy == "stop" and found.expected_nonzero_groups < policy.min_nonzero_groups:
        raise JobError(
            f"Only {found.expected_nonzero_groups:.0%} of the groups would teach the base model anything, fewer than "
            f"learnability.min_nonzero_groups ({policy.min_nonzero_groups:.0%}): of {found.prompts} prompts it never gets "
            f"{found.dead:.0%} right and always gets {found.solved:.0%}. Take rows that it gets right now and then, or "
            "rewards that also pay for a part of the way."
        )
    if policy.policy == "drop":
        record.dropped = [str(rows[chosen[index]]["id"]) for index in found.flat]


def bounds_of(
    trainer: "GRPOTrainer",
    config: RunConfig,
    flags: argparse.Namespace,
    rewards: list[Reward],
    heldout: list[Row],
    finish_seconds: float,
) -> "Bounds":
    """Give the trainer the callbacks that report, judge and end the run, and return the one that ends it."""
    from trainer.announce import announcer
    from trainer.bounds import Bounds, Limit, evaluation_steps
    from trainer.progress import Board, Progress, Watch, latest_samples
    from trainer.sampling import sample_completions

    target, record = folders.model_dir(), trainer.record

    def board() -> Board:
        from tensorboardX import SummaryWriter

        shutil.rmtree(target / "tensorboard", ignore_errors=True)  # a resumed run writes again what it had
        writer: Board = SummaryWriter(str(target / "tensorboard"))
        return writer

    def evaluate() -> float | None:
        if not heldout:
            return None
        began = time.monotonic()
        reward = fmean(given.score for (given,) in sample_completions(trainer, rewards, heldout, 1, greedy=True))
        trainer._metrics["train"]["heldout_reward"].append(reward)
        log.info("evaluated rows=%d heldout_reward=%.4f in %.1f s", len(heldout), reward, time.monotonic() - began)
        return reward

    arguments, compute = trainer.args, config.compute
    steps = optimizer_steps(config, len(trainer.train_dataset), trainer.accelerator.num_processes)
    trained = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    watch = Watch(
        target / "alerts.jsonl",
        record,
        formats=[spec.label for spec in config.rewards if spec.reward_type.measures == "form"],
        stop_on=config.alerts.stop_on,
        samples=lambda: latest_samples(trainer),
        tell=announcer(),
    )
    cut = flags.max_runtime is not None and flags.max_runtime < compute.max_runtime
    bounds = Bounds(
        record,
        Limit(flags.max_runtime, "max_cost_usd") if cut else Limit(compute.max_runtime, "max_runtime"),
        watch,
        evaluate,
        evaluation_steps(steps, trained / arguments.num_iterations, len(heldout)) if heldout else steps,
        began=started(),
        finish_seconds=finish_seconds,
    )
    for callback in (Progress(target / "metrics.jsonl", board), watch, bounds):
        trainer.add_callback(callback)
    return bounds


def save(checkpoint: "Checkpoint", tokenizer: "PreTrainedTokenizerBase", location: str, config: RunConfig) -> None:
    """Write the run's config, a checkpoint's `adapter/`, and `merged/`: the base model read again in bf16, with it added."""
    import torch
    from peft import PeftModel

    adapter, merged = folders.model_dir() / "adapter", folders.model_dir() / "merged"
    adapter.mkdir(parents=True, exist_ok=True)
    shutil.copy(checkpoint.path / "adapter_model.safetensors", adapter)
    # PEFT names the base model by the folder it lay in here.
    described = json.loads((checkpoint.path / "adapter_config.json").read_bytes()) | {
        "base_model_name_or_path": config.model
    }
    (adapter / "adapter_config.json").write_text(json.dumps(described, indent=1))
    base = models.load_model(location, dtype=torch.bfloat16)  # never the 4-bit weights: they would round twice
    whole = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    whole.save_pretrained(str(merged))
    tokenizer.save_pretrained(str(merged))
    (folders.model_dir() / "run_config.json").write_text(config.model_dump_json(indent=1))


def prove(trainer: "GRPOTrainer", config: RunConfig, location: str, prompts: list[list[dict[str, str]]]) -> dict[str, Any]:
    """Return the proofs that what was saved is what was trained. Raises JobError if one fails."""
    import torch

    from trainer import proofs

    if torch.cuda.is_available():  # the process that proves it needs the room
        trainer.model.to("cpu")
        torch.cuda.empty_cache()
    return proofs.prove(
        location,
        folders.model_dir(),
        prompts,
        load_in_4bit=config.lora.load_in_4bit,
        template=config.grpo.get("chat_template_kwargs") or {},
    )


def summary(
    trainer: "GRPOTrainer", config: RunConfig, flags: argparse.Namespace, data: Dataset, chosen: "Checkpoint"
) -> dict[str, Any]:
    """Return what `training.json` says."""
    from trainer.bounds import LIMITS
    from trainer.learnability import measured
    from trainer.progress import history

    record, state, points = trainer.record, trainer.state, history(trainer.state)
    gate = record.learnability
    if gate:
        gate = gate | measured(points, gate, trainer.num_generations)
    return {
        "model": config.model,
        "run_id": flags.run_id,
        "steps": state.global_step,
        "max_steps": state.max_steps,
        "stopped": state.global_step < state.max_steps,
        "ended": record.ended,
        "bounded": record.ended if record.ended in LIMITS else None,
        "checkpoint": {"step": chosen.step, "heldout_reward": chosen.record.heldout_reward},
        "evaluations": record.evaluations,
        "learnability": gate,
        "alerts": [alert["code"] for alert in record.alerts],
        "rows": len(trainer.train_dataset),
        "rows_dropped": data.dropped + len(record.dropped),
        "rows_truncated": data.truncated,
        "seconds": round(time.time() - started(), 1),
        "reward_first": points[0]["reward"] if points else None,
        "reward_last": points[-1]["reward"] if points else None,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "datasets")},
    }


def train(flags: argparse.Namespace) -> None:
    """Do the run. A SIGTERM ends it after the current step; what it has learned by then is saved all the same."""
    import_seconds = container.check("train")
    config = read_config(flags)
    path = dataset_file(flags.dataset_filename)
    rows = load_rows(path, config, flags.max_samples)
    location = models.locate(config.model)
    log.info("run=%s model=%s data=%s rows=%d", flags.run_id or "-", location, path.name, len(rows))

    tokenizer = models.load_tokenizer(location)
    data = fit_prompts(rows, tokenizer, config)
    log.info("prompts kept=%d dropped=%d truncated=%d", len(data.rows), data.dropped, data.truncated)
    rewards = build_rewards(config.rewards, job_permissions())

    from transformers import TrainerState

    from trainer import checkpoints, memory_probe

    began = time.monotonic()
    trainer = build_trainer(config, location, tokenizer, data.rows, rewards)
    # What follows the training reads the model again and writes it, and proves it in a process that reads it twice.
    finish_seconds = import_seconds + 4 * (time.monotonic() - began)

    folder = folders.checkpoint_dir()
    trainer.run = checkpoints.identity(config, data.rows)
    checkpoint = checkpoints.newest(folder, trainer.run)
    if trainer.accelerator.is_local_main_process:
        checkpoints.clean(folder)
    trainer.record = checkpoint.record if checkpoint else checkpoints.Record()
    if checkpoint is None:
        ask_base_model(trainer, config, rewards, data.rows, trainer.record)
    if trainer.record.dropped:
        kept = [index for index, row in enumerate(data.rows) if str(row["id"]) not in trainer.record.dropped]
        check_step(len(kept), trainer.args, "set learnability.policy to go_on")
        trainer.train_dataset = trainer.train_dataset.select(kept)

    heldout = heldout_rows(tokenizer, config)
    bounds = bounds_of(trainer, config, flags, rewards, heldout, finish_seconds)
    if bounds.go_on(checkpoint):
        trainer.add_callback(memory_probe.MemoryProbe(trainer, data.lengths))
        log.info("resuming from %s", checkpoint.path if checkpoint else "nothing")
        trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    else:  # it was killed after its last step, or came back with no time left
        assert checkpoint is not None  # else there would be something to do
        trainer.state = TrainerState.load_from_json(str(checkpoint.path / "trainer_state.json"))
        for hear in (trainer.callback_handler.on_train_begin, trainer.callback_handler.on_train_end):
            hear(trainer.args, trainer.state, trainer.control)
    if trainer.is_world_process_zero():
        # What this process wrote is whole, and what it found has been looked at. Another machine's files are not here.
        found = checkpoints.whole(folder, verify=False)
        if not found:
            raise JobError(f"There is nothing to save: {trainer.record.alerts[-1]['message']}.")
        chosen, target = checkpoints.best(found), folders.model_dir()
        save(chosen, tokenizer, location, config)
        told = summary(trainer, config, flags, data, chosen)
        if trainer.record.ended:  # one that was told to stop has seconds left, and may go on
            asked = [row["prompt"] for row in heldout or data.rows]
            told["proofs"] = prove(trainer, config, location, asked)
        (target / "training.json").write_text(json.dumps(told, indent=1))
        log.info("saved %s with the adapter of step %d", target, chosen.step)


def leave_process_group() -> None:
    """End torch's process group: https://docs.pytorch.org/docs/stable/distributed.html#shutdown.

    Otherwise the group's threads may abort a process that exits while other ranks still work.
    """
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the flags say; exits 0, or 1 with the reason in the failure file."""
    set_up_logging()
    with failure_reported():
        train(parse_flags(sys.argv[1:] if arguments is None else arguments))
        leave_process_group()


if __name__ == "__main__":
    main()
