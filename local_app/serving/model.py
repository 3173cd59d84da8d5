"""A model that is served: its base weights once, and LoRA adapters beside them, which a request names.

Prompts and greedy answers are those of the test job: the same functions load the model and encode a conversation
(trainer.models, trainer.dataset). One thread uses a `ServedModel`: the adapter is the model's state.

The refusals are vLLM's: https://github.com/vllm-project/vllm, vllm/lora/peft_helper.py (adapters),
vllm/entrypoints/openai/models/serving.py (their names), and vllm/entrypoints/openai/serving_engine.py (the context).
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.functional import delete_adapter, inject_adapter_in_model, set_adapter, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import StoppingCriteria, StoppingCriteriaList

from local_app.serving.protocol import RequestError, Sampling, Written
from trainer import models
from trainer.dataset import chat_ids
from tunedrop.dataset.messages import Message

log = logging.getLogger("serving")

# vLLM's default of --max-lora-rank.
MAX_LORA_RANK = 16
# What a decoder puts for the first bytes of a character whose other bytes are in the next token.
UNFINISHED = "\ufffd"


class ServedModel:
    """The model in `folder`, with the settings of vLLM's container in `environment` (`SM_VLLM_…`).

    `name` is the base model's name in answers, `adapters` are the names of the loaded adapters.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        location = str(folder)
        dtype = _dtype(location, environment.get("SM_VLLM_DTYPE", "auto"))
        self._model = models.load_model(location, dtype=dtype).eval()
        self._tokenizer = models.load_tokenizer(location)
        self._context = int(environment.get("SM_VLLM_MAX_MODEL_LEN") or models.context(location) or sys.maxsize)
        self._takes_adapters = all(
            environment.get(name, "").lower() in {"1", "true"}
            for name in ("SM_VLLM_ENABLE_LORA", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")
        )
        self._max_rank = int(environment.get("SM_VLLM_MAX_LORA_RANK", MAX_LORA_RANK))
        self.name = environment.get("SM_VLLM_SERVED_MODEL_NAME", folder.name)
        self._base_names = {self.name, location, folder.name, environment.get("SM_VLLM_MODEL", location)}
        # By an adapter's name, its name in the model: PEFT allows no dot in a name.
        self._adapters: dict[str, str] = {}
        self._numbers = itertools.count()

    @property
    def adapters(self) -> list[str]:
        """The names of the loaded adapters."""
        return list(self._adapters)

    # ---- adapters ----------------------------------------------------------------------------------------------------

    def add(self, name: str, folder: Path) -> None:
        """Load an adapter: `adapter_config.json` and `adapter_model.safetensors`, as PEFT writes them.

        Raises RequestError for a name that is taken, and for an adapter that vLLM cannot serve or that does not fit.
        """
        if not self._takes_adapters:
            message = "SM_VLLM_ENABLE_LORA and VLLM_ALLOW_RUNTIME_LORA_UPDATING are not true: this server takes no adapters."
            raise RequestError(404, "NotFoundError", message)
        if name in self._adapters:
            raise RequestError(400, "InvalidUserInput", f"The lora adapter '{name}' has already been loaded.")
        own_name = f"adapter{next(self._numbers)}"
        try:
            self._load(own_name, folder)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            self._forget(own_name)
            raise RequestError(500, "InternalServerError", f"Loading the lora adapter '{name}' failed: {error}") from error
        self._adapters[name] = own_name
        log.info("adapter=%s loaded from %s", name, folder)

    def _load(self, own_name: str, folder: Path) -> None:
        config = PeftConfig.from_pretrained(str(folder))
        self._check(config)
        config.inference_mode = True
        # PEFT's files name the parameters of a model in PEFT's wrapper.
        weights = {
            key.removeprefix("base_model.model."): value
            for key, value in load_file(folder / "adapter_model.safetensors").items()
        }
        inject_adapter_in_model(config, self._model, own_name)
        result = set_peft_model_state_dict(self._model, weights, adapter_name=own_name)
        missing = [key for key in result.missing_keys if f".{own_name}." in key]
        if missing or result.unexpected_keys:
            raise ValueError(f"its weights do not fit the base model: {(missing + result.unexpected_keys)[0]}")

    def _check(self, config: Any) -> None:
        """Raise ValueError for an adapter that vLLM refuses."""
        if config.peft_type != "LORA":
            raise ValueError(f"its type is {config.peft_type}, not LORA")
        if config.modules_to_save:
            raise ValueError("vLLM only supports modules_to_save being None.")
        if config.use_dora:
            raise ValueError("vLLM does not yet support DoRA.")
        if config.r > self._max_rank:
            raise ValueError(f"LoRA rank {config.r} is greater than max_lora_rank {self._max_rank}.")

    def remove(self, name: str) -> None:
        """Forget an adapter. Raises RequestError if there is none of this name."""
        if name not in self._adapters:
            raise RequestError(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
        self._forget(self._adapters.pop(name))
        log.info("adapter=%s removed", name)

    def _forget(self, own_name: str) -> None:
        configs = getattr(self._model, "peft_config", {})
        if configs.pop(own_name, None):
            delete_adapter(self._model, own_name, prefix="lora_")

    def _use(self, model: str | None) -> None:
        """Have the model compute with the adapter that a request names, or with none. Raises RequestError (404)."""
        if model is not None and model not in self._base_names and model not in self._adapters:
            raise RequestError(404, "NotFoundError", f"The model `{model}` does not exist.", "model")
        set_adapter(self._model, [self._adapters[model]] if model in self._adapters else [], inference_mode=True)

    # ---- answers -----------------------------------------------------------------------------------------------------

    def chat_ids(self, messages: list[Message], template: Mapping[str, Any]) -> list[int]:
        """Return a conversation's token ids, as the test job encodes it. Raises RequestError."""
        try:
            return chat_ids(messages, self._tokenizer, dict(template))
        except Exception as error:  # a chat template is a program
            message = f"The chat template does not accept this conversation: {error}"
            raise RequestError(400, "BadRequestError", message) from error

    def text_ids(self, text: str) -> list[int]:
        """Return a text's token ids."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def write(
        self,
        model: str | None,
        ids: Sequence[int],
        sampling: Sampling,
        on_text: Callable[[str], None],
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Written:
        """Answer a prompt with the base model or the adapter `model`; `on_text` gets the answer part by part.

        Raises RequestError for an unknown model, and for a prompt and answer that exceed the context.
        """
        self._use(model)
        limit = self._limit(len(ids), sampling.limit)
        prompt = torch.tensor([ids], device=self._model.device)
        progress = _Progress(self._tokenizer, len(ids), sampling.stop, on_text, cancelled)
        if sampling.seed is None:
            torch.seed()
        else:
            torch.manual_seed(sampling.seed)
        steps: list[torch.Tensor] = []

        def see(logits: torch.Tensor) -> None:
            if sampling.likely is not None:
                steps.append(logits[0].float().log_softmax(-1))

        with torch.inference_mode(), models.seen_logits(self._model, see):
            output = self._model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=limit,
                stopping_criteria=StoppingCriteriaList([progress]),
                **self._settings(sampling),
            )
        new = output[0, len(ids) :]
        end = self._model.generation_config.eos_token_id  # one token, several or none
        ended = bool(torch.isin(new, torch.tensor([] if end is None else end, dtype=new.dtype)).any())
        progress.finish(new)
        tokens = None
        if sampling.likely is not None:
            tokens = [self._token(step, int(token), sampling.likely) for step, token in zip(steps, new, strict=True)]
        return Written("stop" if ended or progress.stopped else "length", len(ids), len(new), tokens)

    def _token(self, log_probs: torch.Tensor, token: int, count: int) -> dict[str, Any]:
        """Return OpenAI's description of a token, and of the `count` most likely ones in its place."""

        def described(token: int) -> dict[str, Any]:
            text = self._tokenizer.decode([token])
            return {"token": text, "logprob": log_probs[token].item(), "bytes": list(text.encode())}

        return described(token) | {"top_logprobs": [described(each) for each in log_probs.topk(count).indices.tolist()]}

    def _limit(self, prompt: int, asked: int | None) -> int:
        """Return the most tokens of an answer to a prompt of so many tokens. Raises RequestError, with vLLM's messages."""
        context = f"This model's maximum context length is {self._context} tokens"
        if prompt >= self._context:
            message = f"{context}. However, your request has {prompt} input tokens. "
            raise RequestError(400, "BadRequestError", message + "Please reduce the length of the input messages.")
        if asked is not None and prompt + asked > self._context:
            message = f"'max_tokens' or 'max_completion_tokens' is too large: {asked}. {context} and your request has "
            raise RequestError(
                400, "BadRequestError", message + f"{prompt} input tokens ({asked} > {self._context} - {prompt})."
            )
        return asked or self._context - prompt

    def _settings(self, sampling: Sampling) -> dict[str, Any]:
        """Return arguments of `generate`. As in vLLM, the model's generation config has the defaults."""
        own = self._model.generation_config
        temperature = _first(sampling.temperature, own.temperature, 1.0)
        if temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {
            "do_sample": True,
            "temperature": temperature,
            "top_p": _first(sampling.top_p, own.top_p, 1.0),
            "top_k": _first(own.top_k, 0),
        }


def _dtype(location: str, asked: str) -> torch.dtype:
    """Return the type to compute in: the one asked for or the model's own, but fp32 where bf16 is slow, as in a test job."""
    if asked == "auto":
        return models.test_dtype(location)
    dtype: torch.dtype = getattr(torch, asked)
    return torch.float32 if dtype == torch.bfloat16 and not models.fast_bf16() else dtype


def _first(*values: Any) -> Any:
    """Return the first value that is not None."""
    return next(value for value in values if value is not None)


class _Progress(StoppingCriteria):  # type: ignore[misc]
    """Follows an answer: it hands out its new text after each token, and ends it at a stop string or when nobody waits.

    A text that may be the beginning of a stop string, or of a character, waits for the next token.
    """

    def __init__(
        self,
        tokenizer: Any,
        start: int,
        stop: Sequence[str],
        on_text: Callable[[str], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self._tokenizer, self._start, self._stop = tokenizer, start, stop
        self._on_text, self._cancelled = on_text, cancelled
        self._held = max(map(len, stop), default=1) - 1
        self._sent = 0
        self.stopped = False

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        text = self._text(input_ids[0, self._start :])
        if not text.endswith(UNFINISHED):
            self._send(text, len(text) if self.stopped else len(text) - self._held)
        return torch.tensor([self.stopped or self._cancelled()], device=input_ids.device)

    def finish(self, new: torch.Tensor) -> None:
        """Hand out what waited."""
        text = self._text(new)
        self._send(text, len(text))

    def _text(self, new: torch.Tensor) -> str:
        """Return the text up to a stop string."""
        text: str = self._tokenizer.decode(new, skip_special_tokens=True)
        ends = [at for at in map(text.find, self._stop) if at >= 0]
        self.stopped = bool(ends)
        return text[: min(ends)] if ends else text

    def _send(self, text: str, end: int) -> None:
        if end > self._sent:
            self._on_text(text[self._sent : end])
            self._sent = end
