"""`tunedrop init`: looks at a dataset, proposes a run config with a comment for each decision, and writes first tests."""

import json
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from xxhash import xxh3_64_intdigest

from pipeline.publish.comparison import FEW_TESTS
from pipeline.runs.states import Run
from pipeline.validation.receipt import Receipt
from tunedrop.config.model import RunConfig
from tunedrop.config.parse import parse_run_config
from tunedrop.dataset.columns import OWN
from tunedrop.dataset.rows import Row, read_rows
from tunedrop.problems import Problem
from tunedrop.questions import prompt_text, question
from tunedrop.rewards.registry import ALL_COLUMNS
from tunedrop.rewards.sample import ACCEPTED, final_answer
from tunedrop_cli.check import check_file
from tunedrop_cli.rubric import rubric_draft

# A fifth of the questions are tests: at least as many as the gate needs to decide, and no more than that and some to spare.
MOST_TESTS = 48
TEST_SHARE = 5
# The sum of the learning rates over a run's steps that moved the reward; the highest rates, by the model's parameters.
TOTAL_RATE = 7e-3
LOWEST_RATE = 1e-5
HIGHEST_RATES = ((1e9, 7e-4), (float("inf"), 1e-4))
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
# Rewards that the choice by the answers takes for free texts.
_FREE_TEXT = {"judge", "similarity"}
RUBRIC_ROWS = 500
_WORKED = "Reason step by step. End with a line of the form: #### answer"


class Decision(NamedTuple):
    """Something that the file does not say: a question, and the change of the config that is proposed."""

    question: str
    change: dict[str, Any]


class Proposal(NamedTuple):
    """A run config, the reasons for its keys, the receipt of the dataset with it, and tests (empty: the user's own).

    `rubric` is a draft for a judge, without points where the answers are no free texts.
    """

    config: dict[str, Any]
    reasons: dict[str, str]
    receipt: Receipt
    tests: str
    rubric: Sequence[str] = ()


def propose(
    file: Path, model: Path | None, folder: Path, accept: Callable[[Decision], bool], own_tests: Path | None = None
) -> Proposal:
    """Return a config for a dataset, and tests where the user has none.

    `accept` decides where the file leaves something open; `folder` is for drafts.
    """
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
        return Proposal(config, {}, receipt, "")
    chosen, reasons = _choices(receipt, config)
    rubric = _rubric(file, chosen)
    config = _merged(config, chosen)
    tests, written = own_tests, ""
    if own_tests is None:
        written = first_tests(file, receipt, config)
        tests = folder / "tests.json"
        tests.write_text(written)
        config["tests"] = {"leave_out_rows": True}
        reasons["tests"] = "The tests are rows of this file: they, and rows with their questions, stay out of the training"
    receipt = _checked(file, model, folder, config, tests)
    steps, parameters = receipt.cost.get("steps", 1), receipt.cost.get("parameters")
    config["grpo"] |= {"learning_rate": learning_rate(steps, parameters)}
    size = f" of a model with {parameters / 1e9:.2g} billion parameters" if parameters else ""
    reasons["grpo"] += f". The learning rate is for {steps} steps{size}; halve it if the reward falls"
    return Proposal(config, reasons, receipt, written, rubric)


def from_champion(proposal: Proposal, champion: Run, champions_config: Mapping[str, Any]) -> Proposal:
    """Return a proposal that goes on from a line's champion: the same base model, and an adapter of the same shape."""
    usual, own = parse_run_config({"model": "none"}).lora, champions_config["lora"]
    shape = {key: own[key] for key in ("r", "lora_alpha", "target_modules") if own[key] != getattr(usual, key)}
    begin = {"model": champions_config["model"], "start_from": "champion"} | ({"lora": shape} if shape else {})
    reasons = {
        "model": "The base model of the line's champion",
        "start_from": f"The line has a champion, {champion.run_id}: the training goes on from its adapter, and the model is "
        "approved only if it is better. `base` begins anew",
        "lora": "The shape of the champion's adapter",
    }
    return proposal._replace(config=begin | proposal.config, reasons=reasons | proposal.reasons)


def _checked(file: Path, model: Path | None, folder: Path, config: Mapping[str, Any], tests: Path | None = None) -> Receipt:
    draft = folder / "draft.yaml"
    draft.write_text(yaml.safe_dump(dict(config), allow_unicode=True) if config else "")
    return check_file(file, draft, tests, model)


def learning_rate(steps: int, parameters: float | None) -> float:
    """Return a learning rate for LoRA: fewer steps need larger ones, since Adam moves a weight by about the rate in a step.

    (Adam: Kingma and Ba 2015, https://arxiv.org/abs/1412.6980, section 2.1.) The sum over the steps is that of two runs
    whose reward rose: 500 steps of 1e-5 with a model of 3 billion parameters in TRL's documentation, ten times the rate of
    full tuning (https://huggingface.co/docs/trl/main/en/lora_without_regret), and 10 steps of 7e-4 with SmolLM2-135M in
    docs/benchmarks.md, where 2e-4 was too little. Larger models get at most 1e-4.
    """
    highest = next(rate for size, rate in HIGHEST_RATES if (parameters or 0) < size)
    return float(f"{min(highest, max(LOWEST_RATE, TOTAL_RATE / max(1, steps))):.0e}")


def first_tests(file: Path, receipt: Receipt, config: Mapping[str, Any]) -> str:
    """Return a test file of some rows of a valid dataset: of those whose questions have the lowest hashes, in any order."""
    duplicates = receipt.stats["duplicates"]
    questions = receipt.rows - duplicates["exact"] - duplicates["same_prompt"]
    count = min(MOST_TESTS, max(FEW_TESTS, questions // TEST_SHARE), questions // 2)
    # The run adds the system prompt to the tests, too.
    parsed = parse_run_config({"model": "none"} | dict(config) | {"system_prompt": None})
    kept: dict[int, Row] = {}
    for row in read_rows(file, parsed):
        if not isinstance(row, Problem):
            kept.setdefault(xxh3_64_intdigest(question(prompt_text(row["prompt"])).encode()), row)
            if len(kept) > count:
                del kept[max(kept)]
    cases = [_case(row, number, parsed) for number, row in enumerate(kept.values(), 1)]
    return json.dumps({"evaluations": cases}, indent=1, ensure_ascii=False) + "\n"


def _case(row: Row, number: int, config: RunConfig) -> dict[str, Any]:
    plain = len(row["prompt"]) == 1 and "tools" not in row["prompt"][0]
    asked = {"prompt": row["prompt"][0]["content"]} if plain else {"messages": row["prompt"]}
    read = config.reward_columns() | {ACCEPTED}
    columns = {name: row[name] for name in row if name not in OWN and (name in read or ALL_COLUMNS in read)}
    case = {"id": f"test-{number}"} | asked | {"description": row["answer"]}
    return case | ({"columns": columns} if columns else {})


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
    chosen["heldout_fraction"] = 0.1
    reasons["heldout_fraction"] = "Other rows that are not trained on: they choose the checkpoint"
    return chosen, reasons


def _rubric(file: Path, chosen: Mapping[str, Any]) -> list[str]:
    """Return the draft of a rubric where the chosen reward is one for free texts."""
    if chosen["rewards"][0]["type"] not in _FREE_TEXT:
        return []
    parsed = parse_run_config({"model": "none", "columns": chosen["columns"]})
    rows = (row for row in read_rows(file, parsed) if not isinstance(row, Problem))
    return rubric_draft([(prompt_text(row["prompt"]), row["answer"]) for row in islice(rows, RUBRIC_ROWS)])


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
        lines += [
            "",
            *textwrap.wrap(f"{reason}.", 118, initial_indent="# ", subsequent_indent="# "),
            yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=120).rstrip(),
            *(_ranked_by(proposal.rubric) if key == "rewards" and proposal.rubric else []),
        ]
    return "\n".join(lines) + "\n"


def _ranked_by(rubric: Sequence[str]) -> list[str]:
    """Return the comment that proposes a judge with a rubric."""
    judged = {"type": "judge_group", "model": "MODEL", "rubric": "".join(f"- {point}\n" for point in rubric)}
    text = "No answer is the only right one? Then let a judge rank the model's answers: put in its model (and its url), and "
    text += "complete the rubric, a draft of what most answers of the file have in common. docs/rewards.md explains judges."
    dumped = yaml.dump({"rewards": [judged]}, Dumper=_Literal, sort_keys=False, allow_unicode=True, width=120)
    return [f"# {line}" for line in [*textwrap.wrap(text, 118), *dumped.rstrip().split("\n")]]


class _Literal(yaml.SafeDumper):
    """Writes texts of several lines as they are."""


_Literal.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)
