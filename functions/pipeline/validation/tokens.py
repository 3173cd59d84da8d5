"""Counts the tokens of prompts and answers with the model's own tokenizer and chat template, without a GPU stack.

A text never has more tokens than UTF-8 bytes. Only prompts whose bytes exceed the limit are counted, each exactly. A sample
of all rows gives the distribution.
"""

import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pipeline.validation.lengths import summary
from pipeline.validation.token_worker import MEMORY_BYTES
from tunedrop.config.model import RunConfig
from tunedrop.config.schedule import limit_of_tests, prompt_limit
from tunedrop.dataset.rows import Row
from tunedrop.inference_tests import InferenceTest, with_reasoning
from tunedrop.problems import Problem
from tunedrop.sandboxed_process import Worker, WorkerKilledError

# The files of a tokenizer, and the most bytes of each: more than any known model's file has.
TOKENIZER_FILES = {"tokenizer.json": 64 * 1024**2, "tokenizer_config.json": 8 * 1024**2, "chat_template.jinja": 1024**2}
WORKER = Path(__file__).with_name("token_worker.py")
COUNTING_SECONDS = 240.0  # prompts that come later are not counted
LIMIT_SECONDS = 300.0
SLACK = 8  # the template can add tokens between texts
MESSAGE = "the chat template of '{model}' refuses a prompt with the roles {roles}: {reason}"


class TokenizerError(Exception):
    """A model's tokenizer or chat template is broken, or takes too long."""


def unusable_tokenizer(config: RunConfig, error: TokenizerError) -> Problem:
    """Return the problem with a model's tokenizer or chat template."""
    message = f"the tokenizer of '{config.model}' cannot be used: {error}"
    return Problem("TOKENIZER", message, "upload the model's own tokenizer files, or use another model", key="model")


class TokenCounter:
    """A process with a model's tokenizer (token_worker.py). Call `close` at the end."""

    def __init__(self, folder: Path, kwargs: dict[str, Any] | None = None):
        for name, limit in TOKENIZER_FILES.items():
            if (folder / name).exists() and (folder / name).stat().st_size > limit:
                raise TokenizerError(f"{name} is larger than {limit // 1024**2} MiB")
        self._worker = Worker(WORKER, LIMIT_SECONDS)
        self._started = time.monotonic()
        try:
            self.controls: list[str] = self._ask({"folder": str(folder.resolve()), "kwargs": kwargs or {}})
        except (TokenizerError, WorkerKilledError):
            self.close()
            raise

    @property
    def seconds(self) -> float:
        """Seconds since the process started."""
        return time.monotonic() - self._started

    def render(self, prompts: Sequence[list[dict[str, str]]]) -> list[str]:
        r"""Return prompts as the model reads them, chat template included. Raises TokenizerError.

        A control token in the data, which the model reads as text, has a backslash before it: `\<|im_start|>`.
        """
        texts: list[str] = self._ask({"render": prompts})
        return texts

    def count_prompts(self, prompts: Sequence[list[dict[str, str]]]) -> list[int]:
        """Return each prompt's tokens, chat template included. Raises TokenizerError."""
        counts: list[int] = self._ask({"count_prompts": prompts})
        return counts

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return each text's tokens, without special tokens that the tokenizer would add. Raises TokenizerError."""
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
            self._worker.blame()
            raise TokenizerError(f"it took more than {LIMIT_SECONDS:.0f} s or {MEMORY_BYTES // 1024**2} MiB of memory")
        decoded = msgspec.json.decode(answer)
        if isinstance(decoded, dict):
            raise TokenizerError(decoded["error"])
        return decoded

    def close(self) -> None:
        """End the process."""
        self._worker.close()


class PromptTokens:
    """Compares the tokens of a dataset's prompts with the config's limit, batch by batch."""

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
        return self._counter.count_prompts(prompts)

    def add(self, rows: Sequence[Row], sizes: Sequence[int]) -> list[tuple[int, int]]:
        """Count the prompts whose texts' bytes exceed the limit; return index and tokens of each prompt that is too long."""
        room = self.limit - SLACK
        long = [n for n, size in enumerate(sizes) if size + self._overhead(rows[n]["prompt"]) > room]
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

    def _overhead(self, prompt: Sequence[dict[str, str]]) -> int:
        """Return at most how many tokens a prompt has beside its texts: of the template, and of the tools."""
        return len(prompt) * self._per_message + 2 * len(prompt[0].get("tools", ""))

    def without_tools(self, sample: Sequence[Row]) -> list[Problem]:
        """Return a problem if prompts have tools and the chat template does not show them to the model."""
        prompt = next((row["prompt"] for row in sample if "tools" in row["prompt"][0]), None)
        if prompt is None:
            return []
        plain = [{"role": message["role"], "content": message["content"]} for message in prompt]
        shown, bare = self._counter.render([prompt, plain])
        if shown != bare:
            return []
        message = f"the rows have tools, and the chat template of '{self._config.model}' does not show tools to the model"
        hint = "use a model whose template does, or describe the tools in the prompts and leave the column out"
        return [Problem("TOOLS_UNSEEN", message, hint, key="model")]

    def refused(self, roles: Collection[tuple[str, ...]]) -> list[Problem]:
        """Return a problem for each of the dataset's orders of roles that the chat template refuses."""
        problems = []
        for order in sorted(roles):
            try:
                self._counter.render([[{"role": role, "content": "x"} for role in order]])
            except TokenizerError as error:
                message = MESSAGE.format(model=self._config.model, roles=", ".join(order), reason=error)
                problems.append(Problem("CHAT_TEMPLATE", message, "change these rows, or use another model", key="model"))
        return problems

    def result(self, sample: Sequence[Row], tests: Sequence[InferenceTest] = ()) -> tuple[dict[str, Any], list[str]]:
        """Return the receipt's `tokens`, with the distribution over a sample of the rows, and the warnings."""
        prompts = self._tokens([row["prompt"] for row in sample])
        answers = self._counter.count([with_reasoning(row["answer"], row) for row in sample])
        of_tests = self._counter.count([with_reasoning(test.reference, test.columns) for test in tests])
        longest, completion = max(self._longest, *prompts), int(self._config.grpo_value("max_completion_length"))
        needed = max(answers + of_tests) + 1  # the end of an answer is a token, too
        tokens: dict[str, Any] = {
            "limit": self.limit,
            "over_limit": self._over,
            "counted": self._counted,
            "not_counted": self._skipped,
            "longest_prompt": longest,
            "sample": len(sample),
            "prompt": summary(Counter(prompts)),
            "answer": summary(Counter(answers)),
            "answers_over_limit": sum(count >= completion for count in answers),
            "tests_over_limit": sum(count >= completion for count in of_tests),
            "tests_limit": limit_of_tests(self._config, needed - 1),
            "suggested": {},
        }
        warnings = []
        if self._over:
            fits = _rounded(longest)
            tokens["suggested"]["max_prompt_length"] = fits
            fate = {"drop": "dropped", "truncate": "cut", "reject": "rejected"}[self._config.prompt_overflow]
            warnings.append(
                f"prompts of more than {self.limit} tokens, which will be {fate} (prompt_overflow: "
                f"{self._config.prompt_overflow}): {self._over}; max_prompt_length {fits} fits all counted prompts"
            )
        if self._skipped:
            warnings.append(f"prompts that may be too long and were not counted for lack of time: {self._skipped}")
        if needed > completion:
            fits = _rounded(needed)
            tokens["suggested"]["max_completion_length"] = fits
            counts = f"{tokens['answers_over_limit']} of {len(sample)} sampled"
            counts += f", {tokens['tests_over_limit']} of {len(tests)} inference tests" if tests else ""
            warnings.append(
                f"answers, with their reasoning if a column has it, that do not fit into grpo.max_completion_length "
                f"{completion}, which the model cannot give: {counts}; {fits} fits them all"
            )
        if needed > tokens["tests_limit"]:
            warnings.append(
                f"tests.max_completion_length {tokens['tests_limit']} is below the {needed} tokens of the longest expected "
                "answer: tests will cut right answers"
            )
        return tokens, warnings


def _rounded(tokens: int) -> int:
    return -(-tokens // 32) * 32
