"""Other frameworks' reward functions, and the reward that does the same here."""

import json
from typing import Any

_THINK_AND_ANSWER = {"type": "xml_format", "tags": ["think", "answer"]}
# TRL and Open R1 (accuracy_reward, …), ms-swift (accuracy, cosine, …), Unsloth's notebooks (correctness_reward_func, …).
# A name counts without its module and without "_reward", "_reward_func" or "get_".
_REWARDS: dict[str, dict[str, Any]] = {
    "accuracy": {"type": "math"},
    "reasoning_accuracy": {"type": "math"},
    "correctness": {"type": "exact_match"},
    "check_answer": {"type": "exact_match"},
    "check_numbers": {"type": "numeric"},
    "int": {"type": "regex", "pattern": r"<answer>\s*\d+\s*</answer>"},
    "format": _THINK_AND_ANSWER,
    "match_format_exactly": _THINK_AND_ANSWER,
    "match_format_approximately": _THINK_AND_ANSWER | {"mode": "partial"},
    "tag_count": _THINK_AND_ANSWER | {"mode": "partial"},
    "strict_format": {"type": "xml_format", "mode": "strict"},
    "soft_format": {"type": "xml_format", "mode": "soft"},
    "xmlcount": {"type": "xml_format", "mode": "partial"},
    "think_format": {"type": "think_format"},
    "repetition": {"type": "repetition_penalty"},
    "repetition_penalty": {"type": "repetition_penalty"},
    "soft_overlong": {"type": "overlong_penalty"},
    "soft_overlong_punishment": {"type": "overlong_penalty"},
    "len": {"type": "length"},
    "code": {"type": "code_tests"},
    "binary_code": {"type": "code_tests", "partial": False},
}


def reward_like(name: str) -> dict[str, Any] | None:
    """Return the entry of `rewards` that does what another framework's reward function does; None for an unknown name."""
    plain = name.rpartition(".")[2].removeprefix("get_")
    for end in ("_reward_func", "_reward_fn", "_reward", "_func", "_fn"):
        plain = plain.removesuffix(end)
    return _REWARDS.get(plain)


def written(entry: dict[str, Any]) -> str:
    """Return an entry of `rewards` in YAML's flow style."""
    return "{" + ", ".join(f"{key}: {_scalar(value)}" for key, value in entry.items()) + "}"


def _scalar(value: Any) -> str:
    return value if isinstance(value, str) and value.isidentifier() else json.dumps(value)
