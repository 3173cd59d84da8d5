"""A prompt's messages, from the formats that chat datasets have: `{"role", "content"}` in a valid order.

Read are OpenAI's, Bedrock's, Gemini's and Nova's messages, ShareGPT's `{"from", "value"}`, JSON in a text (a CSV cell), and
texts in which a chat template was already applied (ChatML, Llama 3, Gemma).
"""

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from tunedrop.dataset.bad_row import BadRowError
from tunedrop.problems import Problem, nearest

Message = dict[str, str]
ROLES = ("system", "user", "assistant", "tool")
SHOWN = 60
# Names of roles in other formats.
_ROLE_NAMES = {
    "developer": "system",  # OpenAI's newer models
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_TEMPLATES = (
    re.compile(r"<\|im_start\|>[ ]?(\w+)\n(.*?)(?:<\|im_end\|>\s*|\Z)", re.DOTALL),
    re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n*(.*?)(?:<\|eot_id\|>\s*|\Z)", re.DOTALL),
    re.compile(r"<start_of_turn>(\w+)\n(.*?)(?:<end_of_turn>\s*|\Z)", re.DOTALL),
)
# Texts with these marks already went through a chat template.
TURN_MARKS = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|<\|(?:user|assistant|system|User|Assistant)\|>|<\uff5cUser\uff5c>"
)
_BEGIN = re.compile(r"\s*(?:<s>|<bos>|<\|begin_of_text\|>)?\s*")
_PYTHON_MESSAGES = re.compile(r"\s*\[\s*\{\s*'(?:role|from|content|value)'\s*:")
_JSON_MESSAGES = re.compile(r'\s*\[\s*\{\s*"(?:role|from|content|value)"\s*:')
_MEDIA = re.compile(r"<(image|video|audio)>")
MEDIA_HINT = "Tunedrop trains on text only: leave such rows out"


def from_text(text: str) -> list[Any] | None:
    """Return the messages that a text holds, as JSON or in a chat template's marks; None for an ordinary text.

    Raises BadRowError for messages in Python's own notation, for the marks of an unknown template, and for media.
    """
    if _JSON_MESSAGES.match(text):
        try:
            value = msgspec.json.decode(text)
        except msgspec.DecodeError:
            return None
        return value if isinstance(value, list) else None
    if _PYTHON_MESSAGES.match(text):
        hint = "write the messages with json.dumps (pandas writes a list's repr into CSV)"
        raise BadRowError("BAD_MESSAGES", "the prompt is a list of messages in Python's notation, not JSON", hint)
    if media := _MEDIA.search(text):
        raise BadRowError("MEDIA", f"the prompt has the placeholder {media[0]}", MEDIA_HINT)
    begin = _BEGIN.match(text).end()  # type: ignore[union-attr]
    if not (mark := TURN_MARKS.match(text, begin)):
        return None
    for template in _TEMPLATES:
        turns = template.findall(text, begin)
        if turns and template.sub("", text[begin:]).strip() == "":
            last = turns[-1]
            turns = turns[:-1] if last[0] in {"assistant", "model"} and not last[1].strip() else turns
            return [{"role": role, "content": content} for role, content in turns]
    hint = 'the job applies the model\'s own template: write messages, [{"role": "user", "content": "…"}]'
    raise BadRowError("CHAT_TEMPLATE", f"a chat template was already applied to the prompt: it begins with {mark[0]}", hint)


def messages_of(value: list[Any]) -> tuple[list[Message], tuple[str, ...], list[str]]:
    """Return messages with only role and content, their roles, and their contents. Raises BadRowError."""
    try:
        roles = tuple([message["role"] for message in value])
        texts = [message["content"] for message in value]
        hash(roles)  # raises TypeError if a role is a list or an object
        plain = sum(map(len, value)) == 2 * len(value) and set(map(type, texts)) == {str}
    except (TypeError, KeyError):
        plain = False
    if plain and not _ROLE_NAMES.keys() & set(roles):
        return value, roles, texts
    if not value:
        raise BadRowError("EMPTY_PROMPT", "the prompt has no messages", "every row needs a prompt")
    messages = [_message(message, number) for number, message in enumerate(value, 1)]
    return messages, tuple([message["role"] for message in messages]), [message["content"] for message in messages]


def _message(message: Any, number: int) -> Message:
    if not isinstance(message, dict):
        raise _no_message(number, f"is a {type(message).__name__}")
    role = message.get("role", message.get("from"))
    content = next((message[key] for key in ("content", "value", "parts") if message.get(key) is not None), None)
    if content is None and message.get("tool_calls"):
        content = msgspec.json.encode(calls(message["tool_calls"])).decode()
    if role is None or (content is None and "content" not in message):
        raise _no_message(number, f"has: {', '.join(map(str, message))[:SHOWN]}")
    if isinstance(content, list):  # content parts, as in OpenAI's, Bedrock's and Gemini's rows
        content = "".join(_part(part, number) for part in content)
    if not isinstance(content, str) or not isinstance(role, str):
        part = "role" if isinstance(content, str) else "content"
        raise BadRowError("BAD_MESSAGES", f"the {part} of message {number} is not a string", "Tunedrop trains on text only")
    if media := _MEDIA.search(content):
        raise BadRowError("MEDIA", f"message {number} has the placeholder {media[0]}", MEDIA_HINT)
    kept = {"role": _ROLE_NAMES.get(role, role), "content": content}
    return kept | {"tools": message["tools"]} if isinstance(message.get("tools"), str) else kept


def _no_message(number: int, what: str) -> BadRowError:
    message = f"message {number} needs a role and a content, and {what}"
    return BadRowError("BAD_MESSAGES", message, 'a message is {"role": "user", "content": "…"}')


def _part(part: Any, number: int) -> str:
    if isinstance(part, dict):
        text = next((part[key] for key in ("text", "value") if isinstance(part.get(key), str)), None)
        if text is not None and str(part.get("type", "text")).endswith("text"):
            return str(text)
        kind = part.get("type") or next(iter(part), "")
        if any(name in str(kind) for name in ("image", "video", "audio", "file", "document")):
            raise BadRowError("MEDIA", f"message {number} has a part of the type {kind}", MEDIA_HINT)
    shown = ", ".join(map(str, part))[:SHOWN] if isinstance(part, dict) else f"a {type(part).__name__}"
    hint = 'a part is {"type": "text", "text": "…"}'
    raise BadRowError("BAD_MESSAGES", f"a part of message {number} has no text; it has: {shown}", hint)


def calls(tool_calls: Any) -> list[dict[str, Any]]:
    """Return OpenAI's `tool_calls` as `[{"name", "arguments"}, …]`, the form of the answers of the reward `tool_call`."""
    made = []
    for call in tool_calls if isinstance(tool_calls, list) else [tool_calls]:
        function = call.get("function", call) if isinstance(call, dict) else {}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            hint = 'a call is {"function": {"name": "…", "arguments": {…}}}'
            raise BadRowError("BAD_MESSAGES", "an entry of tool_calls names no function", hint)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = msgspec.json.decode(arguments or "{}")
            except msgspec.DecodeError:
                hint = "OpenAI writes a call's arguments as JSON in a string"
                raise BadRowError("BAD_MESSAGES", f"the arguments of {function['name']} are not JSON", hint) from None
        made.append({"name": function["name"], "arguments": arguments})
    return made


def history(value: Any) -> list[Message]:
    """Return the turns before a prompt: pairs of user and assistant texts (LLaMA-Factory, ms-swift), or messages."""
    if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return [
            {"role": role, "content": str(text)}
            for pair in value
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    if isinstance(value, list):
        return messages_of(value)[0]
    hint = "it is a list of [user, assistant] pairs, or of messages"
    raise BadRowError("BAD_MESSAGES", f"the column 'history' is a {type(value).__name__}", hint)


def system(value: Any) -> str:
    """Return a system prompt: a text, or Bedrock's and Anthropic's list of `{"text"}`."""
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "\n\n".join(part["text"] for part in value)
    if isinstance(value, str):
        return value
    raise BadRowError("BAD_MESSAGES", f"the system prompt is a {type(value).__name__}, not a string", "write it as a text")


def wrong_order(roles: Sequence[str]) -> Problem | None:
    """Return the problem with the order of a prompt's roles, or None."""
    unknown = next((role for role in roles if role not in ROLES), None)
    if unknown is not None:
        message = f"the role '{unknown[:SHOWN]}' is not one of {', '.join(ROLES)}"
        return Problem("BAD_MESSAGES", message, nearest(unknown, ROLES))
    order = ", ".join(roles[:8]) + (", …" if len(roles) > 8 else "")
    turns = roles[1:] if roles[:1] == ("system",) else roles
    if "system" in turns:
        return Problem("ROLE_ORDER", f"a system message must come first; the roles are: {order}", "move it to the beginning")
    if not turns or turns[-1] not in {"user", "tool"}:
        hint = "the model answers the last user message"
        return Problem("ROLE_ORDER", f"the prompt must end with a user message; the roles are: {order or 'none'}", hint)
    if turns[0] != "user":
        return Problem(
            "ROLE_ORDER", f"the first turn must be the user's; the roles are: {order}", "remove the turns before it"
        )
    return None


def tools(value: Any) -> str:
    """Return a row's tools as JSON, from a list of OpenAI's or of plain function schemas, or from JSON in a text.

    A prompt's first message carries them in the key `tools`. Raises BadRowError for another value.
    """
    try:
        value = msgspec.json.decode(value) if isinstance(value, str) else value
        functions = [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]
        names = [tool["function"]["name"] for tool in functions]
    except (msgspec.DecodeError, TypeError, KeyError):
        names = []
    if not names or not all(isinstance(name, str) for name in names):
        hint = 'tools are a list such as [{"type": "function", "function": {"name": "…", "parameters": {…}}}]'
        raise BadRowError("BAD_TOOLS", "the row's tools are not a list of functions", hint)
    return msgspec.json.encode(functions).decode()


def tools_of(prompt: Sequence[Message]) -> list[dict[str, Any]] | None:
    """Return the tools of a canonical prompt, for `apply_chat_template`; None without tools."""
    tools = prompt[0].get("tools")  # None where Arrow filled the key in
    return msgspec.json.decode(tools, type=list[dict[str, Any]]) if tools else None
