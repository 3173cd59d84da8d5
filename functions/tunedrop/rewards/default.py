"""The reward of a run whose config names none: chosen by the dataset's answers, so that a right answer can earn it."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from string import ascii_uppercase
from typing import Any, NamedTuple

from tunedrop.rewards.code import read_job
from tunedrop.rewards.permissions import RewardPermissions
from tunedrop.rewards.sample import ACCEPTED, RewardError, Sample, final_answer
from tunedrop.rewards.spec import RewardSpec
from tunedrop.rewards.text import last_number

# Share of the answers that must be of a kind.
MOST = 0.95
# Up to so many words, a model can give an answer word for word.
SHORT_WORDS = 8
# A number, and its unit ("7 pens", "7 (pens)").
_NUMBER = re.compile(r"[^\w]*+[\d.,]*\d[\s(]*+(?:%|[^\W\d]{1,12})?+\W*+")
_LATEX = re.compile(r"\\(?:d?frac|sqrt|boxed|pi|text|left|cdot|infty|begin)|\$[^$]+\$|\^\{?\w|\bx\s*=")
_OPTION_LINE = re.compile(r"(?m)^\(?([A-Z])[).:]\s*\S")
_TESTS = re.compile(r"test|input_?output", re.IGNORECASE)


class Choice(NamedTuple):
    """The chosen rewards, the reason, and warnings about what they cannot teach."""

    rewards: list[RewardSpec]
    reason: str
    warnings: list[str] = []  # noqa: RUF012 - nothing writes to the default, and a NamedTuple has no factories


def choose_rewards(rows: Sequence[Mapping[str, Any]], permissions: RewardPermissions) -> Choice:
    """Return the reward for canonical rows (a sample of the dataset) without `rewards` in the config."""
    finals = [final_answer(row["answer"]) for row in rows]
    if _share(finals, _is_calls) and any("tools" in row["prompt"][0] for row in rows):
        return _choice("tool_call", "the answers are calls of the rows' tools")
    tests = next((name for name in rows[0] if _TESTS.search(name) and _share(rows, partial(_is_tested, name))), "")
    if tests and permissions.allow_code:
        return _choice("code_tests", f"the column '{tests}' has tests for programs", column=tests)
    if letters := _letters(rows, finals):
        return _choice("multiple_choice", "the answers are letters of options in the prompts", choices=letters)
    if _share(finals, _NUMBER.fullmatch) and not _echoed(rows, finals):
        return _choice("numeric", "the final answers are numbers")
    if sum(bool(_LATEX.search(row["answer"])) for row in rows) >= len(rows) / 5 and _share(finals, _is_short):
        return _choice("math", "the answers are mathematical expressions")
    if _share(finals, _is_json):
        return _choice("json_match", "the answers are JSON")._replace(warnings=list(_unasked_json(rows)))
    if tests:
        return _free_text("the answers are programs, which can be right in many ways", permissions, tests)
    if any(row.get(ACCEPTED) for row in rows) and _share(finals, _is_short):
        return _choice("exact_match", "the rows accept several short answers, and one of them is enough")
    if _share(finals, _is_short):
        return _choice("exact_match", "the answers are short")
    lengths = sorted(len(final.split()) for final in finals)
    reason = f"the answers are texts (median {lengths[len(lengths) // 2]} words), too long to be given word for word"
    return _free_text(reason, permissions)


def _choice(type_: str, reason: str, **parameters: Any) -> Choice:
    return Choice([RewardSpec.model_validate({"type": type_} | parameters)], reason)


def _is_tested(column: str, row: Mapping[str, Any]) -> bool:
    """Whether a row's column has tests for programs."""
    try:
        read_job(Sample(row["answer"], row["answer"], row["prompt"][-1]["content"], dict(row)), column)
    except RewardError:
        return False
    return True


def _free_text(reason: str, permissions: RewardPermissions, tests: str = "") -> Choice:
    if permissions.judge_model:
        return _choice("judge", reason, model=permissions.judge_model)
    if tests:
        way = f"code_tests scores programs by the column '{tests}', if the stack allows it (AllowCodeRewards)"
    else:
        way = "a judge knows a good answer (stack parameter RewardJudgeModel); keywords or a python reward can check facts"
    warning = f"the reward 'similarity' teaches the wording of the dataset's answers, not whether an answer is right; {way}"
    return _choice("similarity", reason)._replace(warnings=[warning])


def _share(values: Sequence[Any], kind: Callable[[Any], object]) -> bool:
    return sum(bool(kind(value)) for value in values) >= MOST * len(values)


def _echoed(rows: Sequence[Mapping[str, Any]], finals: Sequence[str]) -> bool:
    """Whether most prompts end with the answer's number: `numeric` would pay for a copy of the prompt."""
    prompts = [row["prompt"][-1]["content"] for row in rows]
    return (
        sum(last_number(prompt) == last_number(final) for prompt, final in zip(prompts, finals, strict=True)) > len(rows) / 2
    )


def _is_short(text: str) -> bool:
    return len(text.split()) <= SHORT_WORDS and len(text) <= 80


def _letters(rows: Sequence[Mapping[str, Any]], finals: Sequence[str]) -> str:
    """Return the letters of the rows' options, empty if the answers are not letters of options in the prompts."""
    if not _share(finals, lambda final: re.fullmatch(r"\(?[A-Z][).]?", final)):
        return ""
    shown = [set(_OPTION_LINE.findall(row["prompt"][-1]["content"])) for row in rows]
    listed = [final.strip("().") in letters for final, letters in zip(finals, shown, strict=True)]
    # A line of a dialogue ("W: Good") looks like an option: letters count from A without a gap.
    run = max(len(list(takewhile(letters.__contains__, ascii_uppercase))) for letters in shown)
    return ascii_uppercase[:run] if sum(listed) >= MOST * len(rows) and run > 1 else ""


def _is_json(text: str) -> bool:
    if text[:1] not in {"{", "["}:
        return False
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _unasked_json(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Warn of JSON for which no prompt asks: the column may hold parameters of a check, or something else about the row."""
    texts = ["\n".join(message["content"] for message in row["prompt"]).casefold() for row in rows]
    if not any("json" in text or "{" in text for text in texts):
        yield (
            "the answers are JSON, and no prompt asks for JSON: check that the answer's column holds what the model must "
            "write, or say the form in the config (system_prompt)"
        )


def _is_calls(text: str) -> bool:
    if not _is_json(text):
        return False
    value = json.loads(text)
    calls = value if isinstance(value, list) else [value]
    return bool(calls) and all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls)
