"""Runs a model for the test job, in batches."""

import functools
import gc
import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer import models
from tunedrop.config.model import RunConfig
from tunedrop.config.schedule import limit_of_tests
from tunedrop.inference_tests import MOST_LIKELY

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("trainer")

# Limit of the tokens in a batch on a CPU, prompts and completions together: 128 tests of 64 tokens fit.
BATCH_TOKENS = 8192


class Completion(NamedTuple):
    """A model's completion: its text, its number of tokens, and the seconds that its batch took.

    `cut`: the limit ended it, not the model. `first_token`: ModelResult's.
    """

    text: str
    tokens: int
    seconds: float
    cut: bool
    first_token: dict[str, float]


class Decoding(NamedTuple):
    """How both models decode: at most `limit` tokens, fewer where the model's context leaves fewer.

    The sampling settings and the seed count for several samples only.
    """

    limit: int
    seed: int
    temperature: float
    top_p: float
    top_k: int

    @classmethod
    def of(cls, config: RunConfig, longest: int = 0) -> "Decoding":
        """Return the decoding settings that the run trained with, but the tests' limit (`limit_of_tests`)."""
        return cls(
            limit=limit_of_tests(config, longest),
            seed=config.grpo_value("seed"),
            temperature=config.grpo_value("temperature"),
            top_p=config.grpo_value("top_p"),
            top_k=config.grpo_value("top_k") or 0,
        )


class Engine:
    """A loaded model. The samples of a test share the prefill of their prompt.

    `decoding` may change between calls; `context` is the model's context in tokens, if it has a limit. The model is on one
    GPU: with more samples than one, its rows share a cache.
    """

    def __init__(self, location: str, tokenizer: "PreTrainedTokenizerBase", decoding: Decoding, dtype: "torch.dtype"):
        from trainer.shared_prefix_sampling import tokens_that_fit

        self._model = models.load_model(location, dtype=dtype, device_map=models.device()).eval()
        # Transformers' cache exists twice for a moment whenever it grows.
        self._tokens = max(BATCH_TOKENS, (tokens_that_fit(self._model.config) or 0) // 2)
        self._tokenizer, self.decoding = tokenizer, decoding
        self.context = models.context(location)

    def batches(self, prompts: Sequence[list[int]], samples: Sequence[int], alone: Sequence[bool]) -> Iterator[list[int]]:
        """Yield batches of indices of prompts (token ids). A batch has one number of samples; an `alone` prompt is timed."""
        return batches([len(prompt) for prompt in prompts], samples, alone, self.decoding.limit, self._tokens)

    def write(self, prompts: list[list[int]], samples: int) -> list[list[Completion]]:
        """Return the completions of each prompt (token ids): one greedy completion, or several samples."""
        import torch

        if samples > 1:
            settings = self._sampling()
        else:
            # The model's own generation config may ask for sampling. A test should give the same completion every time.
            settings = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        repeated = [prompt for prompt in prompts for _ in range(samples)]
        inputs = self._tokenizer.pad({"input_ids": repeated}, padding_side="left", return_tensors="pt").to(
            self._model.device
        )
        length = inputs["input_ids"].shape[1]
        limit = min(self.decoding.limit, self.context - length) if self.context else self.decoding.limit
        torch.manual_seed(self.decoding.seed)
        started = time.monotonic()
        likely: list[dict[str, float]] = []

        def see(logits: torch.Tensor) -> None:
            if samples == 1 and not likely:
                likely.extend(most_likely(logits, MOST_LIKELY, self._tokenizer))

        with torch.inference_mode(), models.seen_logits(self._model, see):
            output = self._model.generate(**inputs, max_new_tokens=limit, **settings)
        seconds = time.monotonic() - started
        ids = output[:, length:]
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        tokens = (ids != self._tokenizer.pad_token_id).sum(1).tolist()
        end = self._model.generation_config.eos_token_id  # one token, several or none
        ends = torch.tensor([] if end is None else end, dtype=ids.dtype, device=ids.device)
        cut = (~torch.isin(ids, ends).any(1)).tolist()
        completions = [
            Completion(text, count, seconds, at_limit, first)
            for text, count, at_limit, first in zip(texts, tokens, cut, likely or [{}] * len(texts), strict=True)
        ]
        return [completions[start : start + samples] for start in range(0, len(completions), samples)]

    def close(self) -> None:
        """Free the model's memory, for the next model."""
        import torch

        del self._model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _sampling(self) -> dict[str, Any]:
        return self._custom_generate | {
            "do_sample": True,
            "temperature": self.decoding.temperature,
            "top_p": self.decoding.top_p,
            "top_k": self.decoding.top_k,
        }

    @functools.cached_property
    def _custom_generate(self) -> dict[str, Any]:
        """The argument of `generate` with which samples share their prompt's prefill; empty for an unsupported model."""
        from trainer.shared_prefix import ATTENTION
        from trainer.shared_prefix_models import unsupported_model
        from trainer.shared_prefix_sampling import sample

        reason = unsupported_model(self._model)
        if reason:
            log.info("samples do not share their prompt's prefill: %s", reason)
            return {}
        self._model.set_attn_implementation(ATTENTION)
        return {"custom_generate": sample}


def most_likely(logits: "torch.Tensor", count: int, tokenizer: "PreTrainedTokenizerBase") -> list[dict[str, float]]:
    """Return the log-probabilities (nats) of the `count` most likely tokens by their text, for each row of logits (B, V)."""
    values, tokens = logits.float().log_softmax(-1).topk(count)
    return [
        {tokenizer.decode([token]): round(value, 4) for token, value in zip(*row, strict=True)}
        for row in zip(tokens.tolist(), values.tolist(), strict=True)
    ]


def batches(
    lengths: Sequence[int], samples: Sequence[int], alone: Sequence[bool], new_tokens: int, most: int
) -> Iterator[list[int]]:
    """Yield batches of indices of prompts of similar lengths, the longest first: a batch that does not fit fails at once.

    `lengths`: of the prompts in tokens. `new_tokens`: limit of each completion. `most`: limit of a batch's tokens. A
    batch has one number of samples. An `alone` prompt has a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda at: (samples[at], alone[at], -lengths[at]))
    batch: list[int] = []
    for at in order:
        first = batch[0] if batch else at
        fits = (len(batch) + 1) * samples[at] * (lengths[first] + new_tokens) <= most
        if batch and (not fits or alone[at] or samples[at] != samples[first]):
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch
