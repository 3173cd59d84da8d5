"""`tunedrop init`: looks at a dataset and proposes a run config, with a comment for each decision."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pipeline.validation.receipt import Receipt
from tunedrop.rewards.sample import final_answer
from tunedrop_cli.check import check_file

# A held-out half judges the model, and the gate needs 20 questions to decide: twice as many, and some to spare.
HELD_OUT = 48
# Tokens of reasoning before a final answer.
REASONING_TOKENS = 256
CHARACTERS_PER_TOKEN = 4
ATTEMPTS = 4
# The form of an answer that a reward can read, for models that nobody has told it.
_FORMS = {
    "numeric": "Answer with a number only.",
    "math": r"Reason step by step. Put the final answer into \boxed{}.",
    "multiple_choice": "Answer with the letter of the right option only.",
    "json_match": "Answer with JSON only.",
    "exact_match": "Answer with a few words, without an explanation.",
}
_WORKED = "Reason step by step. End with a line of the form: #### answer"


class Decision(NamedTuple):
    """Something that the file does not say: a question, and the change of the config that is proposed."""

    question: str
    change: dict[str, Any]


class Proposal(NamedTuple):
    """A run config, the reasons for its keys, and the receipt of the dataset with it."""

    config: dict[str, Any]
    reasons: dict[str, str]
    receipt: Receipt


def propose(file: Path, model: Path | None, folder: Path, accept: Callable[[Decision], bool]) -> Proposal:
    """Return a config for a dataset. `accept` decides where the file leaves something open; `folder` is for drafts."""
    config: dict[str, Any] = {}
    receipt = _checked(file, model, folder, config)
    refused: set[str] = set()
    for _ in range(ATTEMPTS):
        decision = next((each for each in _decisions(receipt) if each.question not in refused), None)
        if receipt.ok or decision is None:
            break
        if accept(decision):
            config = _merged(config, decision.change)
            receipt = _checked(file, model, folder, config)
        else:
            refused.add(decision.question)
    if not receipt.ok:
        return Proposal(config, {}, receipt)
    chosen, reasons = _choices(receipt, config)
    return Proposal(_merged(config, chosen), reasons, _checked(file, model, folder, _merged(config, chosen)))


def _checked(file: Path, model: Path | None, folder: Path, config: Mapping[str, Any]) -> Receipt:
    draft = folder / "draft.yaml"
    draft.write_text(yaml.safe_dump(dict(config), allow_unicode=True) if config else "")
    return check_file(file, draft, None, model)


def _merged(config: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for key, value in change.items():
        merged[key] = _merged(merged[key], value) if isinstance(merged.get(key), dict) else value
    return merged


def _decisions(receipt: Receipt) -> list[Decision]:
    """Return what the errors of a receipt leave open. The names are quoted in the messages of prompts.py."""
    decisions = []
    for error in receipt.errors:
        names = re.findall(r"the column '([^']+)'", error.message)
        hinted = re.search(r'columns: \{prompt: "([^"…]+)"', error.hint)
        if error.code == "UNSEEN_COLUMN" and names:
            question = receipt.columns.get("prompt", "question")
            shown = {"columns": {"prompt": f"{{{names[0]}}}\n\n{{{question}}}"}}
            decisions.append(Decision(f"Show the column '{names[0]}' to the model, before '{question}'?", shown))
            decisions.append(Decision(f"Leave the column '{names[0]}' out?", {"columns": {"ignore": [names[0]]}}))
        elif error.code == "NO_PROMPT" and hinted:
            template = hinted[1].replace("\\n", "\n")
            decisions.append(Decision(f"Make the prompt of these columns: {template!r}?", {"columns": {"prompt": template}}))
        elif error.code == "PREFERENCES":
            decisions.append(Decision("Are the chosen answers right answers?", {"columns": {"answer": "chosen"}}))
        elif error.code == "MARKED_WRONG":
            share = error.count / (receipt.rows + sum(receipt.error_counts.values()))
            change: dict[str, Any] = {"max_bad_rows": round(min(share + 0.01, 0.99), 2)}
            decisions.append(Decision(f"Set {error.count} rows with wrong answers aside?", change))
    return decisions


def _choices(receipt: Receipt, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the keys that a valid receipt decides, and their reasons."""
    columns = {part: receipt.columns[part] for part in ("prompt", "answer") if part in receipt.columns}
    others = ", ".join(f"{part} from {column}" for part, column in receipt.columns.items() if part not in columns)
    chosen: dict[str, Any] = {"columns": columns | dict(config.get("columns", {})), "rewards": receipt.rewards["chosen"]}
    reasons = {
        "columns": "What the model sees" + (f"; also {others}" if others else ""),
        "rewards": f"Because {receipt.rewards['reason']}",
    }
    worked = _answer_length(receipt, "p50") > 4 * _final_length(receipt)
    if "system" not in receipt.columns and (form := _form(receipt, worked)):
        chosen["system_prompt"] = form
        reasons["system_prompt"] = "Says the form of an answer that the reward reads"
    longest = receipt.tokens.get("longest_prompt") or receipt.stats["prompt_characters"]["max"] / CHARACTERS_PER_TOKEN + 64
    chosen["max_prompt_length"] = _rounded(longest * 1.1 + len(chosen.get("system_prompt", "")) / 3)
    reasons["max_prompt_length"] = "In tokens; fits the longest prompt" + (
        "" if receipt.tokens else " (estimated: pass --model DIR)"
    )
    room = _answer_length(receipt, "max") * 1.5 + (
        REASONING_TOKENS if worked or chosen["rewards"][0]["type"] == "math" else 16
    )
    chosen["grpo"] = {"max_completion_length": _rounded(room)}
    reasons["grpo"] = "Room for the longest answer" + (", with reasoning before it" if worked else "")
    fraction = min(0.5, max(0.1, HELD_OUT / receipt.rows))
    chosen["heldout_fraction"] = round(fraction, 2)
    reasons["heldout_fraction"] = "Rows that choose the checkpoint and judge the model, as long as there is no test file"
    return chosen, reasons


def _form(receipt: Receipt, worked: bool) -> str:
    (reward,) = (spec["type"] for spec in receipt.rewards["chosen"])
    labels = next((warning for warning in receipt.warnings if "the prompts do not name them" in warning), "")
    if named := re.search(r"different answers \((.+?)\), and", labels):
        return f"Answer with one of: {named[1]}." if "…" not in named[1] else ""
    return _WORKED if worked and reward in {"numeric", "exact_match"} else _FORMS.get(reward, "")


def _answer_length(receipt: Receipt, statistic: str) -> float:
    """Return a statistic of the answers' tokens, estimated from characters without a tokenizer."""
    if receipt.tokens:
        return float(receipt.tokens["answer"][statistic])
    return float(receipt.stats["answer_characters"][statistic]) / CHARACTERS_PER_TOKEN


def _final_length(receipt: Receipt) -> float:
    """Return the tokens of a final answer, estimated from the receipt's examples."""
    lengths = [len(final_answer(example["answer"])) for example in receipt.examples]
    return max(1.0, sum(lengths) / max(1, len(lengths)) / CHARACTERS_PER_TOKEN)


def _rounded(tokens: float) -> int:
    return max(32, -(-int(tokens) // 32) * 32)


def config_text(proposal: Proposal, name: str) -> str:
    """Return a proposal as commented YAML."""
    lines = [f"# Run config for {name}, proposed by `tunedrop init`. `tunedrop config --defaults` prints all keys."]
    for each in proposal.receipt.cost.get("instances", []):
        if each["hours"]:
            dollars = "" if each["usd"] is None else ", ${:.2f} to ${:.2f}".format(*each["usd"])
            lines.append("# {}: {:.1f} to {:.1f} hours".format(each["instance_type"], *each["hours"]) + dollars)
    for key, value in proposal.config.items():
        reason = proposal.reasons.get(key, "As you decided")
        lines += ["", f"# {reason}.", yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=120).rstrip()]
    return "\n".join(lines) + "\n"
