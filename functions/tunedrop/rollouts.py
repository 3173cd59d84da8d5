"""Rollouts: the answers behind a training's numbers, as a training job stores them and the report and the command read them.

A job's folder `rollouts/` has parts, which are gzipped JSON Lines with one `Group` per line, and `index.json`, an `Index` of
them. A part has groups of one rollout (`step-000012.jsonl.gz`), or the greedy answers to the prompts of the panel in the
evaluation after a step (`panel-000020.jsonl.gz`). The panel are the rows that each evaluation asks: its answers show what a
prompt's answer was through the training.
"""

import gzip
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, cast

import msgspec

FOLDER, INDEX = "rollouts", "index.json"
Kind = Literal["step", "panel"]
Item = TypeVar("Item")


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model's answer. `score` is the weighted sum of its `rewards`; None means that a reward gave no score.

    `tokens` is its length, `cut` whether the limit of tokens ended it. `advantage` is what the training used; the panel has
    none. `sampler_log_prob` and `trainer_log_prob` are the mean log-probabilities of its tokens, in nats, as it was sampled
    and as the loss computed it first; None where the job did not compute them.
    """

    text: str
    score: float | None
    rewards: dict[str, float | None]
    tokens: int
    cut: bool
    advantage: float | None = None
    sampler_log_prob: float | None = None
    trainer_log_prob: float | None = None


class Group(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answers to one prompt in one step. `prompt_id` is the row's id, `prompt` its messages, `reference` its answer."""

    step: int
    prompt_id: str
    prompt: list[dict[str, Any]]
    answers: list[Answer]
    reference: str | None = None
    panel: bool = False

    @property
    def mean(self) -> float:
        """The mean score of the answers that have a score; 0.0 if none has."""
        scores = [answer.score for answer in self.answers if answer.score is not None]
        return sum(scores) / len(scores) if scores else 0.0


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A part: its file, its step, and how many bytes it has."""

    name: str
    step: int
    kind: Kind
    bytes: int


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of a folder, in the order of their steps, and the limit of their sizes in megabytes."""

    max_mb: float
    parts: list[Part]


def part_name(kind: Kind, step: int) -> str:
    """Return the file of a part."""
    return f"{kind}-{step:06d}.jsonl.gz"


def part_of(name: str, size: int) -> Part | None:
    """Return the part that a file of this name and size is, None for any other file."""
    match = re.fullmatch(r"(step|panel)-([0-9]{6,})\.jsonl\.gz", name)
    return Part(name=name, step=int(match[2]), kind=cast(Kind, match[1]), bytes=size) if match else None


def encode(groups: Sequence[Group]) -> bytes:
    """Return the bytes of a part. The same groups give the same bytes. A number that is not finite becomes null."""
    lines = b"".join(msgspec.json.encode(group) + b"\n" for group in groups)
    # zlib's level 6 needs nine times the time of level 1 for files that are a tenth smaller.
    return gzip.compress(lines, compresslevel=1, mtime=0)


def decode(raw: bytes) -> list[Group]:
    """Return the groups of a part."""
    decoder = msgspec.json.Decoder(Group)
    return [decoder.decode(line) for line in gzip.decompress(raw).splitlines()]


def read_index(read: Callable[[str], bytes | None]) -> Index | None:
    """Return the index of a folder, None without one. `read` returns the bytes of a file of the folder, or None."""
    raw = read(INDEX)
    return None if raw is None else msgspec.json.decode(raw, type=Index)


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """Return at most `most` items, evenly spread, including the first and, if there is room for two, the last."""
    if len(items) <= most:
        return list(items)
    if most <= 1:
        return list(items[:most])
    return [items[round(at * (len(items) - 1) / (most - 1))] for at in range(most)]
