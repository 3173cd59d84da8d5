"""The HTTP interface of the serving container, as an ASGI application: SageMaker's and vLLM's contract.

    GET    /ping             200 as soon as the model is loaded
    POST   /invocations      a chat completion (`messages`) or a completion (`prompt`), whole or as server-sent events
    POST   /adapters         {"name", "src"}: load a LoRA adapter from a folder
    DELETE /adapters/<name>  forget it

SageMaker names an inference component's adapter in the header `X-Amzn-SageMaker-Adapter-Identifier`, and the container puts
that name into the body's `model`; without header, the base model answers. Sources: https://github.com/vllm-project/vllm/pull/27892
and https://github.com/aws/model-hosting-container-standards.

One thread computes, one request after the other: the adapter is the model's state, and a request that waits needs no core.
A request whose client is gone ends after the next token.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import msgspec

from local_app.asgi import Receive, Scope, Send, answer_json, headers_of, read_body
from local_app.serving.model import ServedModel
from local_app.serving.protocol import Answers, Invocation, RequestError, Written, parse

log = logging.getLogger("serving")

ADAPTER_HEADER = "x-amzn-sagemaker-adapter-identifier"


class _Adapter(msgspec.Struct):
    """The body of POST /adapters."""

    name: str
    src: str


class ServingApp:
    """The ASGI application of one model. Every request needs `Authorization: Bearer <token>`."""

    def __init__(self, model: ServedModel, token: str) -> None:
        self._model, self._token = model, token
        self._thread = ThreadPoolExecutor(1, "model")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; an error has OpenAI's shape."""
        if scope["type"] != "http":
            return
        body = await read_body(receive)
        try:
            await self._answer(scope, body, receive, send)
        except RequestError as error:
            await answer_json(send, error.status, error.document)
        except Exception as error:  # the client gets a response, the log gets the traceback
            log.exception("%s %s", scope["method"], scope["path"])
            await answer_json(send, 500, RequestError(500, "InternalServerError", repr(error)).document)

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        headers, method, path = headers_of(scope), scope["method"], scope["path"]
        if not hmac.compare_digest(headers.get("authorization", "").encode(), f"Bearer {self._token}".encode()):
            raise RequestError(401, "AuthenticationError", "Expected the header `Authorization: Bearer <SERVING_TOKEN>`.")
        parent, _, name = path.rpartition("/")
        if (method, path) == ("GET", "/ping"):
            await answer_json(send, 200, {})
        elif (method, path) == ("POST", "/invocations"):
            await self._invoke(parse(body, headers.get(ADAPTER_HEADER)), receive, send)
        elif (method, path) == ("POST", "/adapters"):
            adapter = _adapter(body)
            await self._in_thread(self._model.add, adapter.name, Path(adapter.src))
            await answer_json(send, 200, {"message": f"Success: LoRA adapter '{adapter.name}' added successfully."})
        elif (method, parent) == ("DELETE", "/adapters"):
            await self._in_thread(self._model.remove, name)
            await answer_json(send, 200, {"message": f"Success: LoRA adapter '{name}' removed successfully."})
        else:
            raise RequestError(404, "NotFoundError", f"There is no {method} {path} here.")

    async def _in_thread(self, call: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)

    # ---- answers -----------------------------------------------------------------------------------------------------

    async def _invoke(self, question: Invocation, receive: Receive, send: Send) -> None:
        """Have the model answer. The status waits for the first text: a refused question is no stream."""
        loop, gone = asyncio.get_running_loop(), Event()
        parts: asyncio.Queue[str | None] = asyncio.Queue()

        def hand_out(text: str | None) -> None:
            loop.call_soon_threadsafe(parts.put_nowait, text)

        def write() -> Written:
            try:
                return self._model.write(
                    question.model, self._ids(question), question.sampling, on_text=hand_out, cancelled=gone.is_set
                )
            finally:
                hand_out(None)

        writing = loop.run_in_executor(self._thread, write)
        watching = asyncio.create_task(_until_gone(receive, gone))
        try:
            first = await parts.get()
            if first is None:
                await writing  # raises the reason of a refusal; an empty answer has none
            answers = Answers(question.model or self._model.name, chat=question.messages is not None)
            texts = _texts(first, parts)
            if question.stream:
                await _stream(send, answers, texts, writing, question.with_usage)
            else:
                text = "".join([part async for part in texts])
                await answer_json(send, 200, answers.whole(text, await writing))
        finally:
            gone.set()
            watching.cancel()

    def _ids(self, question: Invocation) -> list[int]:
        if question.messages is None:
            return self._model.text_ids(question.prompt)
        return self._model.chat_ids(question.messages, question.template)


async def _texts(first: str | None, parts: asyncio.Queue[str | None]) -> AsyncIterator[str]:
    """Yield the parts of an answer, up to None."""
    text = first
    while text is not None:
        yield text
        text = await parts.get()


async def _until_gone(receive: Receive, gone: Event) -> None:
    """Set `gone` when the client closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
    gone.set()


async def _stream(
    send: Send, answers: Answers, texts: AsyncIterator[str], writing: Awaitable[Written], with_usage: bool
) -> None:
    """Answer with server-sent events: the parts as they come, how the answer ended, and `[DONE]`."""

    async def event(content: str, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": f"data: {content}\n\n".encode(), "more_body": more})

    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await event(json.dumps(answers.chunk("", role="assistant")))
    async for text in texts:
        await event(json.dumps(answers.chunk(text)))
    try:
        written = await writing
        await event(json.dumps(answers.chunk("", written.finish_reason)))
        if with_usage:
            await event(json.dumps(answers.usage(written)))
    except Exception as error:  # the status is sent already
        log.exception("the model failed in the middle of an answer")
        await event(json.dumps(RequestError(500, "InternalServerError", repr(error)).document))
    await event("[DONE]", more=False)


def _adapter(body: bytes) -> _Adapter:
    try:
        return msgspec.json.decode(body, type=_Adapter)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        message = f'Expected {{"name": "…", "src": "<folder>"}}: {error}'
        raise RequestError(400, "BadRequestError", message) from None
