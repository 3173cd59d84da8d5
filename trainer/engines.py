"""Runs a model for the test job: with vLLM on a GPU where it is installed, else with Transformers, in batches.

Both engines have the same methods. `batches` divides prompts into batches, and `write` completes the prompts of a batch.
"""

import functools
import gc
import importlib.util
import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer import models
from tunedrop.config.model import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("trainer")

# Limit of the tokens in a batch, prompts and completions together: 128 tests of 64 tokens fit.
BATCH_TOKENS = 8192


class Completion(NamedTuple):
    """A model's completion: its text, its number of tokens, and the seconds that its batch took."""

    text: str
    tokens: int
    seconds: float


class Decoding(NamedTuple):
    """How both models decode: at most `limit` tokens. The sampling settings and the seed count for several samples only."""

    limit: int
    seed: int
    temperature: float
    top_p: float
    top_k: int

    @classmethod
    def of(cls, config: RunConfig) -> "Decoding":
        """Return the decoding settings that the run trained with."""
        return cls(
            limit=int(config.grpo["max_completion_length"]),
            seed=config.grpo_value("seed"),
            temperature=config.grpo_value("temperature"),
            top_p=config.grpo_value("top_p"),
            top_k=config.grpo_value("top_k") or 0,
        )


class Engine:
    """A loaded model. `decoding` may change between calls; `context` is the model's context in tokens, if it has a limit."""

    decoding: Decoding
    context: int | None
    _model: Any

    def batches(self, prompts: Sequence[list[int]], samples: Sequence[int], alone: Sequence[bool]) -> Iterator[list[int]]:
        """Yield batches of indices of prompts (token ids). A batch has one number of samples; an `alone` prompt is timed."""
        raise NotImplementedError

    def write(self, prompts: list[list[int]], samples: int) -> list[list[Completion]]:
        """Return the completions of each prompt (token ids): one greedy completion, or several samples."""
        raise NotImplementedError

    def close(self) -> None:
        """Free the model's memory, for the next model."""
        import torch

        del self._model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Transformers(Engine):
    """A model that Transformers runs. The samples of a test share the prefill of their prompt."""

    def __init__(self, location: str, tokenizer: "PreTrainedTokenizerBase", decoding: Decoding):
        import torch

        dtype = torch.bfloat16 if models.fast_bf16() else torch.float32
        device = "auto" if torch.cuda.is_available() else None
        self._model = models.load_model(location, dtype=dtype, device_map=device).eval()
        self._tokenizer, self.decoding = tokenizer, decoding
        self.context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)

    def batches(self, prompts: Sequence[list[int]], samples: Sequence[int], alone: Sequence[bool]) -> Iterator[list[int]]:
        """Yield batches of prompts of similar lengths, see `batches`."""
        return batches([len(prompt) for prompt in prompts], samples, alone, self.decoding.limit)

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
        torch.manual_seed(self.decoding.seed)
        started = time.monotonic()
        with torch.inference_mode():
            output = self._model.generate(**inputs, max_new_tokens=self.decoding.limit, **settings)
        seconds = time.monotonic() - started
        ids = output[:, inputs["input_ids"].shape[1] :]
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        tokens = (ids != self._tokenizer.pad_token_id).sum(1).tolist()
        completions = [Completion(text, count, seconds) for text, count in zip(texts, tokens, strict=True)]
        return [completions[start : start + samples] for start in range(0, len(completions), samples)]

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


class Vllm(Engine):
    """A model that vLLM runs. vLLM batches by itself and shares common prefixes."""

    def __init__(self, location: str, decoding: Decoding):
        from vllm import LLM

        self._model = LLM(
            model=location, dtype="bfloat16", seed=decoding.seed, enable_prefix_caching=True, load_format="safetensors"
        )
        self.decoding = decoding
        self.context = self._model.llm_engine.model_config.max_model_len

    def batches(self, prompts: Sequence[list[int]], samples: Sequence[int], alone: Sequence[bool]) -> Iterator[list[int]]:
        """Yield one batch for each number of samples, and one for each `alone` prompt."""
        for count in sorted(set(samples)):
            together = [at for at in range(len(prompts)) if samples[at] == count and not alone[at]]
            yield from [together] if together else []
            yield from ([at] for at in range(len(prompts)) if samples[at] == count and alone[at])

    def write(self, prompts: list[list[int]], samples: int) -> list[list[Completion]]:
        """Return the completions of each prompt (token ids): one greedy completion, or several samples."""
        from vllm import SamplingParams

        drawn = {"temperature": self.decoding.temperature, "top_p": self.decoding.top_p, "top_k": self.decoding.top_k}
        settings = SamplingParams(
            n=samples,
            max_tokens=self.decoding.limit,
            seed=self.decoding.seed,
            **(drawn if samples > 1 else {"temperature": 0.0}),
        )
        started = time.monotonic()
        outputs = self._model.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
        seconds = time.monotonic() - started
        return [[Completion(each.text, len(each.token_ids), seconds) for each in output.outputs] for output in outputs]


def load(location: str, tokenizer: "PreTrainedTokenizerBase", decoding: Decoding) -> Engine:
    """Load a model into vLLM if there is a GPU and vLLM is installed, else into Transformers."""
    import torch

    if torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None:
        return Vllm(location, decoding)
    return Transformers(location, tokenizer, decoding)


def batches(lengths: Sequence[int], samples: Sequence[int], alone: Sequence[bool], new_tokens: int) -> Iterator[list[int]]:
    """Yield batches of indices of prompts of similar lengths, the longest first: a batch that does not fit fails at once.

    `lengths`: of the prompts in tokens. `new_tokens`: limit of each completion. A batch has one number of samples. An
    `alone` prompt has a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda at: (samples[at], alone[at], -lengths[at]))
    batch: list[int] = []
    for at in order:
        first = batch[0] if batch else at
        fits = (len(batch) + 1) * samples[at] * (lengths[first] + new_tokens) <= BATCH_TOKENS
        if batch and (not fits or alone[at] or samples[at] != samples[first]):
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch
