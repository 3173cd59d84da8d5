"""The bodies of vLLM's OpenAI API, as far as this server has it: chat completions and completions.

https://docs.vllm.ai/en/stable/serving/openai_compatible_server/ and vllm/entrypoints/sagemaker: the body decides what an
invocation is, and fields that nobody knows are ignored.
"""

from __future__ import annotations

import time
import uuid
from typing import Any, NamedTuple

import msgspec

from tunedrop.dataset.bad_row import BadRowError
from tunedrop.dataset.messages import Message, messages_of, tools
from tunedrop.inference_tests import MOST_LIKELY

# vLLM's default of `max_tokens` for completions. A chat completion may fill the context.
COMPLETION_TOKENS = 16
# Fields of vLLM that change the answer and that this server does not have.
NOT_SERVED = (
    *("allowed_token_ids", "bad_words", "best_of", "echo", "frequency_penalty", "ignore_eos", "logit_bias"),
    *("min_p", "min_tokens", "presence_penalty", "prompt_logprobs", "repetition_penalty", "response_format"),
    *("stop_token_ids", "structured_outputs", "suffix", "top_k", "use_beam_search"),
)


class RequestError(Exception):
    """A request that is refused, with its HTTP status. `document` is OpenAI's shape of an error."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.document = {"error": {"message": message, "type": kind, "param": param, "code": status}}


class Sampling(NamedTuple):
    """How an answer is drawn; None is the model's own setting, for `limit` (tokens) the rest of the context.

    With `likely`, the answer has the log-probabilities of its tokens, and of so many of the most likely ones.
    """

    limit: int | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    stop: list[str]
    likely: int | None = None


class _Body(msgspec.Struct):
    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    n: int | None = 1
    logprobs: bool | None = False
    top_logprobs: int | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    prompt: str | None = None


class Invocation(NamedTuple):
    """A request for an answer: to `messages` (a chat completion), else to the text `prompt` (a completion)."""

    model: str | None
    messages: list[Message] | None
    template: dict[str, Any]
    prompt: str
    sampling: Sampling
    stream: bool
    with_usage: bool


def parse(content: bytes, adapter: str | None) -> Invocation:
    """Read the body of an invocation. The adapter of SageMaker's header replaces the body's model. Raises RequestError."""
    try:
        raw = msgspec.json.decode(content)
        body = msgspec.convert(raw, _Body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _refused(f"The body is not a request: {error}") from None
    if (body.messages is None) == (body.prompt is None):
        raise _refused("Expected `messages` (a chat completion) or `prompt` (a completion).")
    if unserved := [name for name in NOT_SERVED if raw.get(name)]:
        raise _refused(f"This server does not have `{unserved[0]}`: vLLM does.", unserved[0])
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    _check(body, limit)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return Invocation(
        model=adapter or body.model,
        messages=None if body.messages is None else _messages(body),
        template=body.chat_template_kwargs or {},
        prompt=body.prompt or "",
        sampling=Sampling(
            COMPLETION_TOKENS if limit is None and body.messages is None else limit,
            body.temperature,
            body.top_p,
            body.seed,
            [text for text in stop if text],
            (body.top_logprobs or 0) if body.logprobs else None,
        ),
        stream=bool(body.stream),
        with_usage=bool((body.stream_options or {}).get("include_usage")),
    )


def _check(body: _Body, limit: int | None) -> None:
    """Raise RequestError for a value out of range, with vLLM's message (vllm/sampling_params.py)."""
    if body.n not in {None, 1}:
        raise _refused(f"n must be 1 here, got {body.n}.", "n")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MOST_LIKELY:
        raise _refused(f"top_logprobs must be from 0 to {MOST_LIKELY}, got {body.top_logprobs}.", "top_logprobs")
    if body.top_logprobs and not body.logprobs:
        raise _refused("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
    if body.logprobs and (body.stream or body.messages is None):
        raise _refused("This server has `logprobs` in whole chat completions only: vLLM has them elsewhere.", "logprobs")
    if limit is not None and limit < 1:
        raise _refused(f"max_tokens must be at least 1, got {limit}.", "max_tokens")
    if body.temperature is not None and body.temperature < 0:
        raise _refused(f"temperature must be non-negative, got {body.temperature}.", "temperature")
    if body.top_p is not None and not 0 < body.top_p <= 1:
        raise _refused(f"top_p must be in (0, 1], got {body.top_p}.", "top_p")


def _messages(body: _Body) -> list[Message]:
    """Return the body's messages in Tunedrop's own form: texts alone, and the body's tools in the first one."""
    try:
        # As in vLLM, other keys of a message do nothing.
        messages = [{key: each[key] for key in ("role", "content")} for each in messages_of(body.messages or [])[0]]
        return [messages[0] | {"tools": tools(body.tools)}, *messages[1:]] if body.tools else messages
    except BadRowError as error:
        raise _refused(f"{error}", "messages") from None


def _refused(message: str, param: str | None = None) -> RequestError:
    return RequestError(400, "BadRequestError", message, param)


class Written(NamedTuple):
    """An answer that is complete: how it ended (`stop` or `length`), and the tokens of the prompt and of the answer.

    `tokens` are OpenAI's `logprobs.content`, if the request asks for it.
    """

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    tokens: list[dict[str, Any]] | None = None

    def usage(self) -> dict[str, int]:
        """Return OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class Answers:
    """Writes the documents of one answer: whole, or as chunks of a stream."""

    def __init__(self, model: str, chat: bool) -> None:
        self._chat = chat
        self._head = {"created": int(time.time()), "model": model}
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"

    def _document(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = f"chat.completion{kind}" if self._chat else "text_completion"
        return {"id": self._id, "object": name, **self._head, "choices": choices}

    def whole(self, text: str, written: Written) -> dict[str, Any]:
        """Return the answer as one document."""
        content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        logprobs = None if written.tokens is None else {"content": written.tokens}
        choice = {"index": 0, **content, "logprobs": logprobs, "finish_reason": written.finish_reason}
        return self._document("", [choice]) | {"usage": written.usage()}

    def chunk(self, text: str, finish_reason: str | None = None, **delta: str) -> dict[str, Any]:
        """Return the next part of the answer; in a chat, `delta` are further keys of the message."""
        content = {"delta": {**delta, "content": text}} if self._chat else {"text": text}
        return self._document(".chunk", [{"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}])

    def usage(self, written: Written) -> dict[str, Any]:
        """Return the last part of a stream with `stream_options.include_usage`."""
        return self._document(".chunk", []) | {"usage": written.usage()}
