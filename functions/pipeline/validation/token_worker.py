"""Renders and counts prompts with a model's own tokenizer and chat template, in a process of its own with limits.

A model's author wrote both: a template, or a tokenizer's pattern, can loop for ever or fill the memory. tokens.py starts
this file, exchanges lines of JSON with it, and ends it if it takes too long. Of Tunedrop, this
file imports control_tokens.py alone, which imports nothing of it.
"""

import json
import os
import resource
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from tunedrop.control_tokens import Piece, controls_of, halves, pieces

MEMORY_BYTES = 1536 * 1024**2
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, an empty one if the file is missing."""
    value = json.loads(path.read_bytes()) if path.exists() else {}
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is not an object")
    return value


def template_source(folder: Path, settings: dict[str, Any]) -> str:
    """Return the chat template: `chat_template.jinja`, else that of tokenizer_config.json (`default`, if it has several)."""
    file = folder / "chat_template.jinja"
    source = file.read_text() if file.exists() else settings.get("chat_template")
    if isinstance(source, list):
        source = next((item.get("template") for item in source if item.get("name") == "default"), None)
    if not isinstance(source, str):
        raise ValueError("the model has no chat template, and cannot read a conversation without one: use an instruct model")
    return source


def compile_template(source: str) -> Any:
    """Compile a chat template in Transformers' environment: the same sandbox, filters and globals."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's text. This extension renders it unmarked."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

        def parse(self, parser: Any) -> Any:
            """Return the block's content."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, ensure_ascii=False, indent=None, separators=None, sort_keys=False: (
        json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format_: datetime.now().strftime(format_)  # noqa: DTZ005 - as Transformers
    return environment.from_string(source)


def _tools(prompt: list[dict[str, str]]) -> list[Any] | None:
    """Return the tools that a prompt's first message carries as JSON (`messages.tools`)."""
    tools: list[Any] | None = json.loads(prompt[0]["tools"]) if "tools" in prompt[0] else None
    return tools


class ChatTokenizer:
    """A tokenizer and its chat template."""

    def __init__(self, folder: Path, kwargs: dict[str, Any]):
        from tokenizers import Tokenizer

        settings = read_json(folder / "tokenizer_config.json")
        special = {name: settings[name] for name in SPECIAL_TOKENS if settings.get(name)}
        self._names = {name: token["content"] if isinstance(token, dict) else token for name, token in special.items()}
        self._kwargs = kwargs
        self._template = compile_template(template_source(folder, settings))
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except BaseException as error:  # noqa: BLE001 - tokenizers raises bare Exceptions, and panics outside Exception
            raise ValueError(f"tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.controls = controls_of(self._tokenizer.get_added_tokens_decoder().values())

    def _pieces(self, prompt: list[dict[str, str]]) -> list[Piece]:
        """Return a prompt as the model reads it, up to the beginning of its answer."""

        def render(messages: list[dict[str, str]], tools: Any) -> str:
            text: str = self._template.render(
                messages=messages, tools=tools, add_generation_prompt=True, **self._names, **self._kwargs
            )
            return text

        return pieces(prompt, _tools(prompt), self.controls, render)

    def render(self, prompts: list[Any]) -> list[str]:
        """Return prompts as the model reads them. A backslash is before a control token that is text."""
        return ["".join("\\" * piece.is_text + piece.text for piece in self._pieces(prompt)) for prompt in prompts]

    def count_prompts(self, prompts: list[Any]) -> list[int]:
        """Return each prompt's tokens, chat template included."""
        whole = [self._pieces(prompt) for prompt in prompts]
        parts = [
            [part for piece in each for part in (halves(piece.text) if piece.is_text else (piece.text,))] for each in whole
        ]
        lengths = iter(self._lengths([part for each in parts for part in each]))
        return [sum(next(lengths) for _ in each) for each in parts]

    def count(self, texts: list[str]) -> list[int]:
        """Return each text's tokens. Control tokens are text."""
        self._tokenizer.encode_special_tokens = True
        try:
            return self._lengths(texts)
        finally:
            self._tokenizer.encode_special_tokens = False

    def _lengths(self, texts: list[str]) -> list[int]:
        return [len(encoding) for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def main() -> None:
    """Answer requests: `{"folder", "kwargs"}` first, with the control tokens, then `{METHOD: prompts or texts}`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    tokenizer: ChatTokenizer | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any
        try:
            if tokenizer is None:
                tokenizer = ChatTokenizer(Path(request["folder"]), request["kwargs"])
                answer = tokenizer.controls
            else:
                ((method, given),) = request.items()
                answer = getattr(tokenizer, method)(given)
        except BaseException as error:  # noqa: BLE001 - a template or tokenizer can raise anything
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(answer), flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
