"""The rows of a training job: the file that they are in, and the rows whose prompts fit."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer import folders
from trainer.job import JobError
from trainer.permissions import job_permissions
from tunedrop import control_tokens
from tunedrop.config.model import RunConfig
from tunedrop.config.schedule import prompt_limit
from tunedrop.dataset.messages import Message, tools_of
from tunedrop.dataset.readers import DATA_SUFFIXES, suffix_of
from tunedrop.dataset.rows import Row, read_rows
from tunedrop.problems import Problem, RejectedError
from tunedrop.rewards.default import choose_rewards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import GRPOConfig

log = logging.getLogger(__name__)
EVALUATED_ROWS = 64
SHOWN_PROBLEMS = 20


def dataset_file(filename: str | None) -> Path:
    """Return the file to train on. Raises JobError if it is missing."""
    folder = folders.channel("training")
    if folder is None and filename is None:
        raise JobError("No dataset. Pass --dataset-filename, or set SM_CHANNEL_TRAINING to the folder of the dataset.")
    folder = folder or Path()
    files = sorted(path for path in folder.glob("*") if suffix_of(path.name))
    wanted = folder / (filename or "train.jsonl")
    if wanted.is_file():
        return wanted
    if filename or not files:
        names = ", ".join(path.name for path in files[:10]) or "no data files"
        raise JobError(f"No data file '{filename or '*' + ' *'.join(DATA_SUFFIXES)}' in {folder.resolve()}: found {names}.")
    return files[0]


def heldout_rows(tokenizer: "PreTrainedTokenizerBase", config: RunConfig) -> list[Row]:
    """Return the rows for evaluations during training: the first held-out rows whose prompt fits."""
    path = (folders.channel("training") or Path()) / "heldout.jsonl"
    if not path.is_file() or not path.stat().st_size:
        return []
    rows = load_rows(path, config, EVALUATED_ROWS)
    return [row for row in rows if prompt_tokens(row["prompt"], tokenizer, config) <= prompt_limit(config)]


class Dataset(NamedTuple):
    """The rows to train on, the numbers of rows that were dropped or cut for their length, and the prompts' tokens."""

    rows: list[Row]
    dropped: int
    truncated: int
    lengths: list[int]


def load_rows(path: Path, config: RunConfig, max_samples: int | None) -> list[Row]:
    """Read at most `max_samples` rows. Raises RejectedError with the first problems, JobError for a file without rows."""
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


def with_rewards(config: RunConfig, rows: Sequence[Mapping[str, Any]]) -> RunConfig:
    """Return the config; without rewards, with those that fit the rows' answers. A validated run's config names its own."""
    if config.rewards:
        return config
    choice = choose_rewards(rows[:EVALUATED_ROWS], job_permissions())
    log.info("rewards=%s because %s", [spec.model_dump(exclude_defaults=True) for spec in choice.rewards], choice.reason)
    return config.model_copy(update={"rewards": choice.rewards})


def chat_ids(prompt: list[Message], tokenizer: "PreTrainedTokenizerBase", kwargs: dict[str, Any]) -> list[int]:
    """Return a prompt's token ids: the chat template, with the prompt's tools, up to the beginning of the answer.

    Control tokens in the prompt's own texts are encoded as text (tunedrop.control_tokens).
    """

    def render(messages: list[Message], tools: Any) -> str:
        text: str = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False, **kwargs
        )
        return text

    ids: list[int] = []
    controls = control_tokens.controls_of(tokenizer.added_tokens_decoder.values())
    for text, is_text in control_tokens.pieces(prompt, tools_of(prompt), controls, render):
        for part in control_tokens.halves(text) if is_text else (text,):
            ids += tokenizer(part, add_special_tokens=False)["input_ids"]
    return ids


def prompt_tokens(prompt: list[Message], tokenizer: "PreTrainedTokenizerBase", config: RunConfig) -> int:
    """Return the number of a prompt's tokens, chat template included."""
    return len(chat_ids(prompt, tokenizer, config.grpo.get("chat_template_kwargs") or {}))


def fit_prompts(rows: list[Row], tokenizer: "PreTrainedTokenizerBase", config: RunConfig) -> Dataset:
    """Apply `prompt_overflow` to prompts above the limit in tokens, chat template included.

    `truncate` cuts the beginning of the last user message. It drops a row if its other messages alone exceed the limit.
    Raises JobError if no row is left, or for a long prompt with `reject`.
    """
    limit, policy = prompt_limit(config), config.prompt_overflow

    def excess(prompt: list[dict[str, str]]) -> int:
        return prompt_tokens(prompt, tokenizer, config) - limit

    def cut(prompt: list[dict[str, str]], over: int) -> list[dict[str, str]] | None:
        *before, last = prompt
        while over > 0:
            text = tokenizer(last["content"], add_special_tokens=False)["input_ids"]
            if len(text) <= over:
                return None
            last = last | {"content": tokenizer.decode(text[over:])}
            over = excess([*before, last])  # a cut can change the tokens of the rest
        return [*before, last]

    kept: list[Row] = []
    lengths: list[int] = []
    truncated = 0
    for row in rows:
        over = excess(row["prompt"])
        if over <= 0:
            kept.append(row)
            lengths.append(limit + over)
        elif policy == "reject":
            raise JobError(f"The prompt of row '{row['id']}' has {limit + over} tokens, more than the limit of {limit}.")
        elif policy == "truncate" and (prompt := cut(row["prompt"], over)):
            kept.append(row | {"prompt": prompt})
            lengths.append(limit)
            truncated += 1
    if not kept:
        raise JobError(f"All {len(rows)} prompts exceed the limit of {limit} tokens: raise max_prompt_length.")
    return Dataset(kept, len(rows) - len(kept), truncated, lengths)


def check_step(rows: int, arguments: "GRPOConfig", advice: str) -> None:
    """Raise JobError with this advice if the rows are too few for one step."""
    prompts = arguments.generation_batch_size // arguments.num_generations
    if rows < prompts:
        raise JobError(
            f"{rows} rows are too few for one step, which takes {prompts} prompts "
            f"(per_device_train_batch_size * gradient_accumulation_steps * GPUs / num_generations): {advice}."
        )


def check_whole_groups(arguments: "GRPOConfig") -> None:
    """Raise JobError if a group's completions are on several GPUs, where a reward that ranks them sees only some."""
    own = arguments.per_device_train_batch_size * arguments.steps_per_generation
    if own % arguments.num_generations:
        raise JobError(
            f"Each GPU generates {own} completions at a time, which are no whole groups of num_generations "
            f"({arguments.num_generations}), and a reward ranks the completions of a group: raise "
            "per_device_train_batch_size or gradient_accumulation_steps."
        )
