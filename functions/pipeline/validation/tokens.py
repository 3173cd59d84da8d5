"""How many tokens prompts and answers have, with the model's own tokenizer and chat template and no GPU stack.

Prompts that could be longer than the limit are counted exactly: a text never has more tokens than UTF-8 bytes, so the
others need no counting. Of those a sample is counted, for the distribution.
"""

import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pipeline.validation.lengths import summary
from tunedrop.config.model import RunConfig
from tunedrop.config.schedule import prompt_limit
from tunedrop.dataset.rows import Row
from tunedrop.problems import Problem
from tunedrop.sandboxed_process import Worker

# Of a model's files, those that are read here. Larger ones than any known model has are not.
TOKENIZER_FILES = {"tokenizer.json": 64 * 1024**2, "tokenizer_config.json": 8 * 1024**2, "chat_template.jinja": 1024**2}
WORKER = Path(__file__).with_name("token_worker.py")
COUNTING_SECONDS = 240.0  # after that, prompts are no longer counted one by one
LIMIT_SECONDS = 300.0
SLACK = 8  # tokens that joining texts can add
MESSAGE = "the chat template of '{model}' refuses a prompt with the roles {roles}: {reason}"


class TokenizerError(Exception):
    """A model's tokenizer or chat template cannot be used, or takes too long."""


def unusable_tokenizer(config: RunConfig, error: TokenizerError) -> Problem:
    """Return the problem that a model's tokenizer or chat template is."""
    message = f"the tokenizer of '{config.model}' cannot be used: {error}"
    return Problem("TOKENIZER", message, "upload the model's own tokenizer files, or take another model", key="model")


class TokenCounter:
    """The worker process with a model's tokenizer. Close it."""

    def __init__(self, folder: Path, kwargs: dict[str, Any] | None = None):
        for name, limit in TOKENIZER_FILES.items():
            if (folder / name).exists() and (folder / name).stat().st_size > limit:
                raise TokenizerError(f"{name} is larger than {limit // 1024**2} MiB")
        self._worker = Worker(WORKER, LIMIT_SECONDS)
        self._started = time.monotonic()
        try:
            self._ask({"folder": str(folder.resolve()), "kwargs": kwargs or {}})
        except TokenizerError:
            self.close()
            raise

    @property
    def seconds(self) -> float:
        """How long it has been at work."""
        return time.monotonic() - self._started

    def render(self, prompts: Sequence[list[dict[str, str]]]) -> list[str]:
        """Return prompts as the model reads them. Raises TokenizerError."""
        texts: list[str] = self._ask({"render": prompts})
        return texts

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text has, without any that a tokenizer adds by itself. Raises TokenizerError."""
        counts: list[int] = self._ask({"count": texts})
        return counts

    def _ask(self, request: dict[str, Any]) -> Any:
        stdin, stdout = self._worker.process.stdin, self._worker.process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(msgspec.json.encode(request) + b"\n")
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer:
            raise TokenizerError(f"it took more than {LIMIT_SECONDS:.0f} s or more memory than a tokenizer needs")
        decoded = msgspec.json.decode(answer)
        if isinstance(decoded, dict):
            raise TokenizerError(decoded["error"])
        return decoded

    def close(self) -> None:
        """End the process."""
        self._worker.close()


class PromptTokens:
    """Counts the tokens of a dataset's prompts against the config's limit while its rows come in."""

    def __init__(self, counter: TokenCounter, config: RunConfig):
        self._counter = counter
        self._config = config
        self.limit = prompt_limit(config)
        system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
        (self._per_message,) = self._tokens([[*system, {"role": "user", "content": ""}]])
        self._over = 0
        self._longest = 0
        self._counted = 0
        self._skipped = 0

    def _tokens(self, prompts: Sequence[list[dict[str, str]]]) -> list[int]:
        return self._counter.count(self._counter.render(prompts))

    def add(self, rows: Sequence[Row], sizes: Sequence[int]) -> list[tuple[int, int]]:
        """Count the prompts that could be too long, given their texts' bytes; return index and tokens of those that are."""
        room = self.limit - SLACK
        long = [n for n, size in enumerate(sizes) if size + len(rows[n]["prompt"]) * self._per_message > room]
        if not long:
            return []
        if self._counter.seconds > COUNTING_SECONDS:
            self._skipped += len(long)
            return []
        counts = self._tokens([rows[n]["prompt"] for n in long])
        over = [(n, count) for n, count in zip(long, counts, strict=True) if count > self.limit]
        self._counted += len(long)
        self._longest = max(self._longest, *counts)
        self._over += len(over)
        return over

    def refused(self, roles: Collection[tuple[str, ...]]) -> list[Problem]:
        """Return which orders of roles, of those that the dataset has, the chat template does not take."""
        problems = []
        for order in sorted(roles):
            try:
                self._counter.render([[{"role": role, "content": "x"} for role in order]])
            except TokenizerError as error:
                message = MESSAGE.format(model=self._config.model, roles=", ".join(order), reason=error)
                problems.append(Problem("CHAT_TEMPLATE", message, "change these rows, or take another model", key="model"))
        return problems

    def result(self, sample: Sequence[Row]) -> tuple[dict[str, Any], list[str]]:
        """Return the receipt's `tokens`, with the distribution of a sample, and what is worth a warning."""
        prompts = self._tokens([row["prompt"] for row in sample])
        answers = self._counter.count([row["answer"] for row in sample])
        longest, completion = max(self._longest, *prompts), self._config.grpo_value("max_completion_length")
        long_answers = sum(count >= completion for count in answers)  # the end of the answer is a token, too
        found: dict[str, Any] = {
            "limit": self.limit,
            "over_limit": self._over,
            "counted": self._counted,
            "not_counted": self._skipped,
            "longest_prompt": longest,
            "sample": len(sample),
            "prompt": summary(Counter(prompts)),
            "answer": summary(Counter(answers)),
            "answers_over_limit": long_answers,
            "suggested": {},
        }
        warnings = []
        if self._over:
            fits = _rounded(longest)
            found["suggested"]["max_prompt_length"] = fits
            fate = {"drop": "left out", "truncate": "cut", "reject": "refused"}[self._config.prompt_overflow]
            warnings.append(
                f"{self._over} prompts have more than {self.limit} tokens and will be {fate} (prompt_overflow: "
                f"{self._config.prompt_overflow}); max_prompt_length: {fits} fits all that were counted"
            )
        if self._skipped:
            warnings.append(f"{self._skipped} prompts that may be too long were not counted, for want of time")
        if long_answers:
            fits = _rounded(max(answers) + 1)
            found["suggested"]["max_completion_length"] = fits
            warnings.append(
                f"{long_answers} of {len(sample)} sampled answers do not fit into grpo.max_completion_length {completion}: "
                f"the model cannot give them; {fits} fits all of the sample"
            )
        return found, warnings


def _rounded(tokens: int) -> int:
    return -(-tokens // 32) * 32
