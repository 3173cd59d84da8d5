"""Tune a model with GRPO and LoRA: what a training job does, and what a shell can do without one.

    SM_CHANNEL_TRAINING=data python -m trainer.train --model-name SmolLM2-135M-Instruct --dataset-filename cars.jsonl

Reads the run config (`run` channel, flags win over it) and the rows (`training` channel), trains with TRL's
`GRPOTrainer`, and leaves in `/opt/ml/model`: `adapter/` (PEFT), `merged/` (bf16 model and tokenizer), `run_config.json`
(as it was run), `metrics.jsonl` (a line per logging step) and `training.json` (a summary). In a shell they are in
`output/model`. Checkpoints are kept while it runs, and the newest whole one is resumed from.
"""

import argparse
import json
import logging
import re
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from trainer import folders, models
from trainer.job import JobError, failure_reported, set_up_logging
from tunedrop.problems import Problem, RejectedError
from tunedrop.records import DATA_SUFFIXES, Row, read_rows
from tunedrop.rewards import Reward, build_rewards
from tunedrop.run_config import RunConfig, parse_run_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import GRPOConfig, GRPOTrainer

log = logging.getLogger("trainer")

CHECKPOINT_DEFAULTS = {"save_steps": 20, "save_total_limit": 2}
SHOWN_PROBLEMS = 20


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
    return parse_run_config(given)


def dataset_file(filename: str | None) -> Path:
    """Return the file to train on. Raises JobError when it is not there."""
    folder = folders.channel("training")
    if folder is None and filename is None:
        raise JobError("Which data? Give --dataset-filename, or the folder with the data in SM_CHANNEL_TRAINING.")
    folder = folder or Path()
    here = sorted(path for path in folder.glob("*") if path.suffix.lower() in DATA_SUFFIXES)
    wanted = folder / (filename or "train.jsonl")
    if wanted.is_file():
        return wanted
    if filename or not here:
        names = ", ".join(path.name for path in here[:10]) or "no data files"
        raise JobError(f"No data file '{filename or '*' + ' *'.join(DATA_SUFFIXES)}' in {folder.resolve()}: found {names}.")
    return here[0]


class Dataset(NamedTuple):
    """The rows to train on, and how many were left out or cut for the length of their prompt."""

    rows: list[Row]
    dropped: int
    truncated: int


def load_rows(path: Path, config: RunConfig, max_samples: int | None) -> list[Row]:
    """Read the rows. Raises RejectedError with the first problems when the file has any, JobError when it has no rows."""
    rows: list[Row] = []
    problems: list[Problem] = []
    for item in read_rows(path, config):
        if isinstance(item, Problem):
            problems.append(item)
        else:
            rows.append(item)
        if len(rows) == max_samples or len(problems) == SHOWN_PROBLEMS:
            break
    if problems:
        raise RejectedError(problems)
    if not rows:
        raise JobError(f"{path.name} has no rows to train on.")
    return rows


def prompt_limit(config: RunConfig) -> int:
    """Return how many tokens a prompt may have, so that prompt and completion fit `max_seq_length`."""
    if config.max_seq_length is None:
        return config.max_prompt_length
    return min(config.max_prompt_length, config.max_seq_length - int(config.grpo["max_completion_length"]))


def fit_prompts(rows: list[Row], tokenizer: "PreTrainedTokenizerBase", config: RunConfig) -> Dataset:
    """Apply `prompt_overflow` to prompts longer than the limit in tokens, chat template included.

    `truncate` cuts the beginning of the last user message; a row whose other messages alone are too long is dropped.
    """
    limit, policy = prompt_limit(config), config.prompt_overflow
    kwargs = config.grpo.get("chat_template_kwargs") or {}

    def excess(prompt: list[dict[str, str]]) -> int:
        tokens = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False, **kwargs)
        return len(tokens) - limit

    def cut(prompt: list[dict[str, str]], over: int) -> list[dict[str, str]] | None:
        *before, last = prompt
        while over > 0:
            text = tokenizer(last["content"], add_special_tokens=False)["input_ids"]
            if len(text) <= over:
                return None
            last = last | {"content": tokenizer.decode(text[over:])}
            over = excess([*before, last])  # cutting can change how the rest is split into tokens
        return [*before, last]

    kept: list[Row] = []
    truncated = 0
    for row in rows:
        over = excess(row["prompt"])
        if over <= 0:
            kept.append(row)
        elif policy == "reject":
            raise JobError(f"The prompt of row '{row['id']}' has {limit + over} tokens, more than the limit of {limit}.")
        elif policy == "truncate" and (prompt := cut(row["prompt"], over)):
            kept.append(row | {"prompt": prompt})
            truncated += 1
    if not kept:
        raise JobError(f"All {len(rows)} prompts are longer than the limit of {limit} tokens: raise max_prompt_length.")
    return Dataset(kept, len(rows) - len(kept), truncated)


class RowReward:
    """A reward that TRL calls with row numbers and that sees the rows' own columns.

    Rows stay Python objects: Arrow, which holds the trainer's dataset, would fail on a column of mixed types and give
    every nested object the keys of all others.
    """

    def __init__(self, reward: Reward, rows: list[Row]):
        self.__name__ = reward.__name__
        self._reward = reward
        self._rows = rows

    def __call__(self, prompts: list[Any], completions: list[Any], row: list[int], **_trainer: Any) -> list[float | None]:
        """Score completions; see `tunedrop.rewards.Reward`."""
        chosen = [self._rows[index] for index in row]
        names = {name for each in chosen for name in each} - {"prompt"}
        columns: dict[str, Any] = {name: [each.get(name) for each in chosen] for name in names}
        return self._reward(prompts, completions, **columns)


def grpo_config(config: RunConfig, rewards: list[Reward]) -> "GRPOConfig":
    """Make TRL's config: the run's `grpo` section over our defaults. Raises JobError for values that contradict."""
    import torch
    from trl import GRPOConfig

    defaults: dict[str, Any] = CHECKPOINT_DEFAULTS | {"bf16": models.fast_bf16(), "disable_tqdm": True}
    try:
        return GRPOConfig(
            **defaults
            | config.grpo
            | {
                "output_dir": str(folders.checkpoint_dir()),
                "reward_weights": [reward.weight for reward in rewards],
                "report_to": [],
                "use_cpu": not torch.cuda.is_available(),
            }
        )
    except ValueError as error:
        raise JobError(f"The config's grpo section: {error}") from None


def build_trainer(config: RunConfig, location: str, tokenizer: "PreTrainedTokenizerBase", rows: list[Row]) -> "GRPOTrainer":
    """Make the trainer: base model (4-bit if the config says so), fresh LoRA adapter, rewards and rows."""
    import torch
    from datasets import Dataset as ArrowDataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, PrinterCallback
    from trl import GRPOTrainer

    from trainer.grpo import SharedPrefixGRPOTrainer, why_not
    from trainer.progress import Progress, StopOnSignal

    rewards = build_rewards(config.rewards)
    arguments = grpo_config(config, rewards)
    prompts_per_step = arguments.generation_batch_size // arguments.num_generations
    if len(rows) < prompts_per_step:
        raise JobError(
            f"{len(rows)} rows are too few for one step, which takes {prompts_per_step} prompts "
            "(per_device_train_batch_size * gradient_accumulation_steps * GPUs / num_generations): lower one of these."
        )
    dtype = models.weights_dtype()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if models.fast_bf16() else torch.float32,
    )
    model = models.load_model(
        location, dtype=dtype, **({"quantization_config": quantization} if config.lora.load_in_4bit else {})
    )
    lora = LoraConfig(task_type="CAUSAL_LM", **config.lora.peft_kwargs())
    reason = why_not(model, arguments, lora)
    log.info("trainer=%s", f"stock TRL: {reason}" if reason else "shared prefix")
    trainer = (GRPOTrainer if reason else SharedPrefixGRPOTrainer)(
        model=model,
        reward_funcs=[RowReward(reward, rows) for reward in rewards],
        args=arguments,
        train_dataset=ArrowDataset.from_list([{"prompt": row["prompt"], "row": index} for index, row in enumerate(rows)]),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[Progress(folders.model_dir() / "metrics.jsonl"), StopOnSignal()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def newest_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint that was written to its end (`trainer_state.json` is its last file), or None.

    Newer ones that were not are removed: the trainer, which keeps the newest few, would keep them and remove whole ones.
    """
    numbered = [
        (int(path.name.rpartition("-")[2]), path) for path in folder.glob("checkpoint-*") if re.search(r"-\d+$", path.name)
    ]
    for _, path in sorted(numbered, reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_bytes())
        except (FileNotFoundError, json.JSONDecodeError):
            log.info("removing %s: it was not written to its end", path)
            shutil.rmtree(path, ignore_errors=True)  # every rank does
            continue
        return str(path)
    return None


def save(trainer: "GRPOTrainer", tokenizer: "PreTrainedTokenizerBase", location: str, model: str) -> None:
    """Write `adapter/`, and `merged/`: the base model, read again in bf16 (never in 4 bits), with the adapter added."""
    import torch
    from peft import PeftModel

    adapter, merged = folders.model_dir() / "adapter", folders.model_dir() / "merged"
    trainer.model.save_pretrained(str(adapter))
    base = models.load_model(location, dtype=torch.bfloat16)
    whole = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    whole.save_pretrained(str(merged))
    tokenizer.save_pretrained(str(merged))
    # PEFT names the base model by the folder it lay in here, and adds a model card with nothing filled in.
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": model}, indent=1))
    (adapter / "README.md").unlink()


def train(flags: argparse.Namespace) -> None:
    """Do the run. A SIGTERM ends it after the current step; what it has learned by then is saved all the same."""
    started = time.monotonic()
    config = read_config(flags)
    path = dataset_file(flags.dataset_filename)
    rows = load_rows(path, config, flags.max_samples)
    location = models.locate(config.model)
    log.info("run=%s model=%s data=%s rows=%d", flags.run_id or "-", location, path.name, len(rows))

    tokenizer = models.load_tokenizer(location)
    data = fit_prompts(rows, tokenizer, config)
    log.info("prompts kept=%d dropped=%d truncated=%d", len(data.rows), data.dropped, data.truncated)
    trainer = build_trainer(config, location, tokenizer, data.rows)

    checkpoint = newest_checkpoint(folders.checkpoint_dir())
    if checkpoint:
        log.info("resuming from %s", checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():
        target = folders.model_dir()
        save(trainer, tokenizer, location, config.model)
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        summary = {
            "model": config.model,
            "run_id": flags.run_id,
            "steps": trainer.state.global_step,
            "max_steps": trainer.state.max_steps,
            "stopped": trainer.state.global_step < trainer.state.max_steps,
            "rows": len(data.rows),
            "rows_dropped": data.dropped,
            "rows_truncated": data.truncated,
            "seconds": round(time.monotonic() - started, 1),
            "reward_first": rewards[0] if rewards else None,
            "reward_last": rewards[-1] if rewards else None,
            "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "datasets")},
        }
        (target / "run_config.json").write_text(config.model_dump_json(indent=1))
        (target / "training.json").write_text(json.dumps(summary, indent=1))
        log.info("saved %s", target)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the flags say; exits 0, or 1 with the reason in the failure file."""
    set_up_logging()
    with failure_reported():
        train(parse_flags(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    main()
