r"""The form of an answer that a run asks for: `<reasoning>` and `<answer>`, `<think>`, `\boxed{}`, or none.

The preflight puts right and wrong answers into it, and supervised fine-tuning the rows' worked solutions
(`tunedrop.targets`).
"""

import re
from collections.abc import Mapping
from typing import Any

from tunedrop.config.model import RunConfig
from tunedrop.dataset.columns import normal
from tunedrop.rewards.registry import Form


def asked_form(config: RunConfig, row: Mapping[str, Any]) -> Form:
    r"""Return the form that the run asks for.

    The rewards' trait `form` comes first. A system message that shows `<answer>`, `<think>` or `\boxed{}` asks for these.
    """
    system = next((message["content"] for message in row["prompt"] if message["role"] == "system"), "")
    shown = [tag for tag in dict.fromkeys(re.findall(r"<([A-Za-z_]+)>", system)) if f"</{tag}>" in system]
    tags = tuple(tag for tag in shown if tag != "think") if "answer" in shown else ()
    form = Form(tags, think="think" in shown)
    for spec in config.rewards:
        if spec.reward_type.form:
            wanted = spec.reward_type.form(spec.parameters)
            form = Form(wanted.tags or form.tags, wanted.think or form.think)
    return form._replace(boxed=r"\boxed{" in system and not form.tags)


def texts_of(row: Mapping[str, Any]) -> dict[str, str]:
    """Return the row's columns that hold a text, by their names without case, spaces, `_` and `-`."""
    return {normal(name): value for name, value in row.items() if isinstance(value, str) and value.strip()}


def in_form(form: Form, answer: str, reasoning: str, row: Mapping[str, Any]) -> str:
    """Return an answer in a form, with the reasoning where the form has room for it. Existing elements stay.

    An element whose name is that of a column has the column's text. The element `answer`, else the last one, has the answer.
    """
    columns = texts_of(row)
    text = rf"\boxed{{{answer}}}" if form.boxed and r"\boxed" not in answer else answer
    if not all(f"<{tag}>" in answer for tag in form.tags):
        last = "answer" if "answer" in form.tags else form.tags[-1]
        contents = {tag: answer if tag == last else columns.get(normal(tag)) or reasoning for tag in form.tags}
        text = "\n".join(f"<{tag}>\n{content}\n</{tag}>" for tag, content in contents.items())
    return f"<think>\n{reasoning}\n</think>\n{text}" if form.think and "</think>" not in answer else text
