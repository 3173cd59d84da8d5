"""The answers of a model in a test job: those that it gave in earlier jobs, and those that it still has to give.

    model = AskedModel("base", location, dtype)
    model.complete(part)  →  the completions of the part's tests
    model.save(folder)    →  answers_base.jsonl, what this job generated

A line of such a file is `{"key", "completions": [{"text", "tokens", "cut", "first_token"}]}`. The channel
`answers_<model>` has files of earlier jobs. A key is a digest of all that determines an answer beside the model and the
image. A model whose answers are all known is not loaded. Timed tests are always asked.
"""

import hashlib
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from trainer import folders, models
from trainer.dataset import chat_ids
from trainer.engines import Completion, Decoding, Engine
from trainer.scoring import Part
from tunedrop.inference_tests import InferenceTest

if TYPE_CHECKING:
    import torch

log = logging.getLogger("trainer")

Answers = dict[str, list[Completion]]


class _Written(msgspec.Struct, frozen=True):
    text: str
    tokens: int
    cut: bool
    first_token: dict[str, float]


class _Line(msgspec.Struct, frozen=True):
    """A line of a file of answers."""

    key: str
    completions: list[_Written]


class Question(NamedTuple):
    """What a model is asked: a prompt's token ids, for a number of samples. A timed one is asked alone."""

    ids: list[int]
    samples: int
    timed: bool


class AskedModel:
    """A model that is tested: `name` is its name in the job's files and channels, `dtype` the type in which it runs.

    `answers` counts the tests that it answered, `asked` those of them that this job had to ask.
    """

    def __init__(self, name: str, location: str, dtype: "torch.dtype"):
        self.name, self._location, self._dtype = name, location, dtype
        self._tokenizer = models.load_tokenizer(location)
        self._context = models.context(location)
        folder = folders.channel(f"answers_{name}")
        self._known = read_answers(sorted(folder.glob("*.jsonl"))) if folder else {}
        self._generated: Answers = {}
        self._engine: Engine | None = None
        self.answers = self.asked = 0

    def complete(self, part: Part) -> list[list[Completion] | str]:
        """Return the completions of every test, in the order of the tests, or the reason why there are none."""
        results: list[list[Completion] | str] = []
        keys: dict[int, str] = {}
        missing: dict[str, Question] = {}  # a question that two tests ask is asked once
        for at, test in enumerate(part.tests):
            ids = self._prompt(test, part)
            results.append(ids if isinstance(ids, str) else [])
            if not isinstance(ids, str):
                keys[at] = f"timed {at}" if test.timed else answer_key(ids, test.samples, part.decoding, self._dtype)
                if keys[at] not in self._known:
                    missing.setdefault(keys[at], Question(ids, test.samples, test.timed))
        asked = self._ask(part, missing, len(keys)) if keys else {}
        for at, key in keys.items():
            results[at] = asked[key] if key in asked else self._known[key]
        self.answers += len(keys)
        self.asked += len(missing)
        return results

    def _prompt(self, test: InferenceTest, part: Part) -> list[int] | str:
        """Return the token ids of a test's prompt, or the reason why the model cannot take it."""
        try:
            ids = chat_ids(test.prompt, self._tokenizer, part.template)
        except Exception as error:  # noqa: BLE001 - a chat template is a program; the other tests go on
            return f"the chat template does not accept this conversation: {error}"
        if self._context and len(ids) + part.least > self._context:
            return (
                f"{len(ids)} tokens of prompt and {part.least} of completion exceed the model's context of {self._context}"
            )
        return ids

    def _ask(self, part: Part, missing: dict[str, Question], total: int) -> dict[str, list[Completion] | str]:
        """Return the completions of questions by key, or the reasons why there are none. Loads the model if it must."""
        name = f"{self.name}_{part.name}" if part.name else self.name
        known, started = total - len(missing), time.monotonic()
        if not missing:
            log.info("tested=%d total=%d model=%s eta_seconds=0", total, total, name)
            return {}
        if self._engine is None:
            self._engine = Engine(self._location, self._tokenizer, part.decoding, self._dtype)
        self._engine.decoding = part.decoding
        keys, questions = list(missing), list(missing.values())
        found: dict[str, list[Completion] | str] = {}
        for batch in self._engine.batches(*zip(*questions, strict=True)):
            prompts = [questions[at].ids for at in batch]
            for at, result in zip(batch, _write(self._engine, prompts, questions[batch[0]].samples), strict=True):
                found[keys[at]] = result
                if not isinstance(result, str) and not questions[at].timed:
                    self._known[keys[at]] = self._generated[keys[at]] = result
            eta = (time.monotonic() - started) / len(found) * (len(missing) - len(found))
            log.info("tested=%d total=%d model=%s eta_seconds=%.0f", known + len(found), total, name, eta)
        return found

    def save(self, folder: Path) -> None:
        """Write the answers that this job generated to `answers_<model>.jsonl`."""
        lines = [
            _Line(key, [_Written(each.text, each.tokens, each.cut, each.first_token) for each in completions])
            for key, completions in self._generated.items()
        ]
        (folder / f"answers_{self.name}.jsonl").write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))

    def close(self) -> None:
        """Free the model's memory, for the next model."""
        if self._engine:
            self._engine.close()
            self._engine = None


def _write(engine: Engine, prompts: list[list[int]], samples: int) -> list[list[Completion] | str]:
    """Return the completions of each prompt. If a batch fails, its prompts are tried again one by one."""
    try:
        return list(engine.write(prompts, samples))
    except Exception as error:  # noqa: BLE001 - out of memory mostly; the other tests go on
        if len(prompts) == 1:
            return [f"the model failed on this test: {type(error).__name__}: {error}"[:1000]]
        log.warning("a batch of %d failed; trying its prompts one by one: %s", len(prompts), error)
    return [_write(engine, [prompt], samples)[0] for prompt in prompts]


def answer_key(ids: Sequence[int], samples: int, decoding: Decoding, dtype: "torch.dtype") -> str:
    """Return the digest of all that determines an answer to a prompt (token ids), beside the model and the image.

    One sample is decoded greedily: seed and sampling settings count for several samples only.
    """
    content: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "limit": decoding.limit,
        "prompt": ids,
        "samples": samples,
    }
    if samples > 1:
        content |= {"seed": decoding.seed, "temperature": float(decoding.temperature)}
        content |= {"top_p": float(decoding.top_p), "top_k": decoding.top_k}
    return hashlib.sha256(msgspec.json.encode(content)).hexdigest()


def read_answers(paths: Iterable[Path]) -> Answers:
    """Read files of answers. A damaged line is left out, and the log names it: its answer is generated again."""
    answers: Answers = {}
    for path in paths:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    read = msgspec.json.decode(line, type=_Line)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    log.warning("line %d of %s is not an answer and is left out: %s", number, path.name, error)
                else:
                    answers[read.key] = [
                        Completion(each.text, each.tokens, 0.0, each.cut, each.first_token) for each in read.completions
                    ]
    return answers
