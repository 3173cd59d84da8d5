"""What the model sees of a dataset's columns, what only rewards see, and what nobody sees."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median

import msgspec

from pipeline.validation.section import Section
from tunedrop.config.model import RunConfig
from tunedrop.dataset.columns import CONTINUED_NAMES, is_template, normal
from tunedrop.dataset.prompts import unseen
from tunedrop.dataset.rows import Records, Row
from tunedrop.problems import Problem
from tunedrop.rewards.registry import ALL_COLUMNS
from tunedrop.rewards.sample import ACCEPTED

# An unused text of at least so many characters, and longer than the prompts, may be what the question is about.
LONG_TEXT = 200
# Parts of names of texts that a question does not need: answers, their reasons, and where a row comes from.
_NOT_THE_QUESTION = (
    "reason rationale thinking thought explanation chainofthought cot solution response completion output generation "
    "generated answer target label reference gold chosen rejected url html link source metadata meta hint feedback critique "
    "test code id"
).split()
# Columns with a text that asks for nothing by itself.
_TEXTS = {*CONTINUED_NAMES, "dialogue", "dialog", "text", "sentence"}
# A prompt asks for one of a few labels. So many rows with so few answers are a classification.
FEW_LABELS, ROWS_PER_LABEL = 20, 5


def check_columns(records: Records, sample: Sequence[Row], config: RunConfig) -> Section:
    """Return the section about the columns of a dataset that was read, from a sample of its rows."""
    variants = records.variants
    columns = next(iter(variants), {})
    read = config.reward_columns()
    seen = {name for part in columns.values() for name in part.split(", ")}
    rest = [name for name in records.extra if name not in seen and name not in config.columns.ignore]
    by_rewards = [name for name in rest if ALL_COLUMNS in read or name in read]
    unused = [name for name in rest if name not in by_rewards]
    receipt = {"columns": columns, "reward_columns": by_rewards, "unused_columns": unused}
    problems = list(_long_texts(unused, sample)) if not is_template(config.columns.prompt) else []
    warnings = [f"{note}" + (f": {count}" if count > 1 else "") for note, count in records.notes.items()]
    labels = list(_labels(sample))
    return Section(receipt, problems, [*warnings, *_variants(variants), *(labels or _no_task(columns, sample))])


def _variants(variants: Sequence[dict[str, str]]) -> Iterator[str]:
    if len(variants) > 1:
        shown = "; ".join(str(columns) for columns in variants[:3])
        yield f"the rows have their prompt and answer in different columns: {shown}"


def _long_texts(unused: Sequence[str], sample: Sequence[Row]) -> Iterator[Problem]:
    """Yield the unused columns whose texts are longer than the prompts: the question may be about them."""
    prompts = [len(row["prompt"][-1]["content"]) for row in sample]
    for name in unused:
        lengths = [len(text) for row in sample if isinstance(text := row.get(name), str)]
        if any(part in normal(name) for part in _NOT_THE_QUESTION) or 2 * len(lengths) < len(sample) or not lengths:
            continue
        if median(lengths) >= LONG_TEXT and median(lengths) > median(prompts):
            what = "has long texts, and the model does not see them: the question may be about them"
            yield msgspec.structs.replace(unseen(name, what).problem, key=name)


def _no_task(columns: Mapping[str, str], sample: Sequence[Row]) -> Iterator[str]:
    """Warn of prompts that are a text alone, such as an article, without a word about what to do with it."""
    alone = columns.keys() == {"prompt", "answer"} and normal(columns["prompt"]) in _TEXTS
    prompts = [row["prompt"] for row in sample]
    asked = sum(prompt[0]["role"] == "system" or prompt[-1]["content"].rstrip()[-1] in ":?" for prompt in prompts)
    if alone and asked <= len(prompts) / 2:
        yield (
            f"the prompt is the column '{columns['prompt']}' alone, and nothing says what the model should do with it: say "
            'it in the config, such as system_prompt: "Sum up the text in one sentence."'
        )


def _labels(sample: Sequence[Row]) -> Iterator[str]:
    """Warn of prompts that do not say which of a few labels are possible."""
    labels = {row["answer"].strip() for row in sample if ACCEPTED not in row}
    if not 2 <= len(labels) <= FEW_LABELS or len(sample) < ROWS_PER_LABEL * len(labels) or max(map(len, labels)) > 40:
        return
    texts = ["\n".join(message["content"] for message in row["prompt"]).casefold() for row in sample]
    silent = sum(not all(label.casefold() in text for label in labels) for text in texts)
    if silent > len(sample) / 2 and not {label.casefold() for label in labels} <= {"yes", "no", "true", "false"}:
        shown = ", ".join(sorted(labels)[:8]) + (", …" if len(labels) > 8 else "")
        yield (
            f"the rows have {len(labels)} different answers ({shown}), and the prompts do not name them: "
            'say in the config which answers are possible, such as system_prompt: "Answer with one of: …"'
        )
