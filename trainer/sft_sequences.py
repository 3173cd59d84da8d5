"""The sequences of supervised fine-tuning: prompts as a rollout has them, the rows' targets, and the end of the turn.

`tunedrop.targets` makes the texts. Only the tokens of the target and of the turn's end have a loss.
"""

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.dataset import chat_ids
from tunedrop.config.model import RunConfig
from tunedrop.dataset.rows import Row
from tunedrop.rewards import Reward
from tunedrop.targets import targets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("trainer")

IGNORED = -100  # the label of a token without a loss, as in torch's cross_entropy
TOO_LONG, CONTROL_TOKEN = "longer than grpo.max_completion_length", "control tokens in the text"


class Sequences(NamedTuple):
    """Sequences to learn, as `{"input_ids", "labels"}`, and how many rows have one, and have none, by reason."""

    items: list[dict[str, list[int]]]
    summary: dict[str, Any]


def sequences(
    config: RunConfig,
    rewards: Sequence[Reward],
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    ends: Collection[int],
    *,
    reasoned_only: bool,
) -> Sequences:
    """Return the sequences of the rows that have a target, in the rows' order.

    `ends` are the tokens that end a completion. `reasoned_only` is that of `tunedrop.targets.targets`.
    """
    template = config.grpo.get("chat_template_kwargs") or {}
    begun, end = begun_answer(tokenizer, template), end_of_turn(tokenizer, ends, template)
    found = targets(config, rewards, rows, begun=begun, reasoned_only=reasoned_only)
    limit, special = config.grpo_value("max_completion_length"), set(tokenizer.all_special_ids)
    items: list[dict[str, list[int]]] = []
    left_out = Counter(found.left_out)
    for row, text in zip(rows, found.texts, strict=True):
        if text is None:
            continue
        answer = tokenizer(text, add_special_tokens=False)["input_ids"]
        if special.intersection(answer) or len(answer) >= limit:
            left_out[CONTROL_TOKEN if special.intersection(answer) else TOO_LONG] += 1
            continue
        prompt = chat_ids(row["prompt"], tokenizer, template)
        items.append({"input_ids": [*prompt, *answer, end], "labels": [*[IGNORED] * len(prompt), *answer, end]})
    return Sequences(items, found.summary() | {"usable": len(items), "left_out": dict(sorted(left_out.items()))})


def begun_answer(tokenizer: "PreTrainedTokenizerBase", template: dict[str, Any]) -> str:
    """Return `<think>` if the chat template itself begins each answer with it, else an empty text."""
    text = _render(tokenizer, [{"role": "user", "content": "?"}], template, add_generation_prompt=True)
    return "<think>" if text.rstrip().endswith("<think>") else ""


def end_of_turn(tokenizer: "PreTrainedTokenizerBase", ends: Collection[int], template: dict[str, Any]) -> int:
    """Return the token of `ends` with which the chat template ends an assistant's turn, else the tokenizer's EOS."""
    mark = "The turn ends here"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    after = _render(tokenizer, messages, template).rpartition(mark)[2]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return next((int(token) for token in ids if token in ends), int(tokenizer.eos_token_id))


def _render(
    tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]], template: dict[str, Any], **more: Any
) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, **template, **more)
    return text
