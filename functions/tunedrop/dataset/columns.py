"""Which columns of a dataset make the prompt and the answer: by the config, else by the columns' names.

Names are compared without case, spaces, `_` and `-`. The names are those of datasets on public hubs, most of them as the
tasks of lm-evaluation-harness and the dataset lists of LLaMA-Factory and ms-swift read them, and those of the fine-tuning
formats of OpenAI, Amazon Bedrock, Amazon Nova, Anthropic, verl, TRL and Axolotl. tests/unit/test_public_shapes.py has rows.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from tunedrop.config.model import RunConfig

# Best first.
CONVERSATION_NAMES = "messages conversations conversation".split()
PROMPT_NAMES = [
    *"prompt question query instruction problem questionstem sqlprompt".split(),
    *CONVERSATION_NAMES,
    *"dialog dialogue contents input inputs goal claim statement startphrase sent1 text sentence utterance".split(),
    *"sent2 questions q".split(),
]
# Texts that are the prompt where no other column is: the model continues or sums up the text, or picks its ending.
CONTINUED_NAMES = "ctx context document article passage story paragraph".split()
# The number of the right option. Beside such a column, `answers` are the options.
INDEX_NAMES = "label goldlabel correctanswerid correctansweridx answeridx answerindex correctidx correctindex".split()
ANSWER_NAMES = (
    "answer referenceanswer groundtruth rewardmodel expectedanswer correctanswer finalanswer finaldecision bestanswer "
    "correctanswers expectedoutput answerkey answers answersspans output response completion solution solutions "
    "canonicalsolution target targets expected reference correctoption correct cop gold goldanswer goldenanswers sql code "
    "summary highlights a"
).split()
ANSWER_NAMES += [*INDEX_NAMES, *"labels class intent sentiment description".split()]
CONTEXT_NAMES = (
    "context contexts premise premises passage passages document documents article paragraph paragraphs para background "
    "story scenario situation theory body ctx text dialog dialogue support sqlcontext evidence facts pretext table posttext "
    "schema"
).split()
# Columns that belong to the question in some datasets, and give its answer away in others.
ASKED_NAMES = "hypothesis code sourcecode snippet hint".split()
OPTIONS_NAMES = (
    "choices choice options candidates endings alternatives answerchoices answeroptions multiplechoiceoptions"
).split()
SYSTEM_NAMES = "system systemprompt systemmessage systeminstruction".split()
HISTORY_NAMES = ["history"]
TOOLS_NAMES = "tools functions availabletools".split()
_MEDIA = re.compile(r"(?:decoded)?(?:image|img|picture|photo|video|audio)s?(?:path|url|bytes)?\d*")
# A column that says whether a row's answer is right, as in KTO's datasets.
MARK_NAMES = "label iscorrect correct correctness isgood accepted".split()
RIGHT, WRONG = {"true", "1", "1.0"}, {"false", "0", "0.0"}
# Columns with the reasoning behind an answer.
REASONING_NAMES = "reasoning rationale thinking thought thoughts explanation chainofthought cot".split()
# Columns with a worked solution, where another column has the answer.
SOLUTION_NAMES = "solution workedsolution fullsolution solutiontext".split()
# Names of an option's own column, before its letter or number: option_a, choice1, opa, ending0.
_OPTION_COLUMN = re.compile(r"(?:option|choice|candidate|ending|alternative|answer|opt|op|sol)?([a-j]|\d)")
OWN = frozenset({"id", "prompt", "answer"})
_FIELD = re.compile(r"\{([^{}]+)\}")
MISSING = object()


def normal(name: Any) -> str:
    """Return a column's name without case, spaces, `_` and `-`."""
    return re.sub(r"[\s_-]", "", str(name)).casefold()


class Shape(NamedTuple):
    """The roles of a row's columns: names of columns, None or empty without such a column.

    `prompt` and `answer` may be dotted paths, and `prompt` a template with columns in braces. A template alone decides the
    user's message: the columns in `question` then have no role. `options` is one column, or one column for each option with
    their letters or numbers in `option_labels`. `question` has the columns that may belong to the question and have no role.
    """

    prompt: str | None
    answer: str | None
    instruction: str | None = None
    contexts: tuple[str, ...] = ()
    input: str | None = None
    options: tuple[str, ...] = ()
    option_labels: tuple[str, ...] = ()
    system: str | None = None
    history: str | None = None
    tools: str | None = None
    media: tuple[str, ...] = ()
    mark: str | None = None
    rejected: str | None = None
    question: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether one column is the prompt and at most one other column is the answer."""
        return not any(self[2:-1]) and not is_template(self.prompt)

    @property
    def columns(self) -> dict[str, str]:
        """The columns that the prompt and the answer come from, by part."""
        parts = {
            "prompt": self.prompt,
            "answer": self.answer,
            "system": self.system,
            "instruction": self.instruction,
            "context": ", ".join(self.contexts),
            "input": self.input,
            "options": ", ".join(self.options),
            "history": self.history,
            "tools": self.tools,
        }
        return {part: column for part, column in parts.items() if column}


def guess_shape(names: Sequence[str], config: RunConfig) -> Shape:
    """Return the roles of columns. The config's names win."""
    named = config.columns
    free = {normal(name): name for name in names if name not in named.ignore}
    labels, options = _option_columns([name for name in names if name not in named.ignore])

    def take(known: Sequence[str]) -> str | None:
        return next((free.pop(name) for name in known if name in free), None)

    for name in (named.prompt, named.answer, *options):
        free.pop(normal(name), None)
    prompt = named.prompt or take(PROMPT_NAMES) or take(CONTINUED_NAMES)
    preference = "chosen" in free and "rejected" in free
    right = named.answer
    if "answers" in free and not (named.answer or options or free.keys() & OPTIONS_NAMES) and (index := take(INDEX_NAMES)):
        options, right = (free.pop("answers"),), index
    answer = right or take(ANSWER_NAMES)
    if prompt and not (named.prompt or answer) and (conversation := take(CONVERSATION_NAMES)):  # which holds the answer
        free[normal(prompt)] = prompt
        prompt = conversation
    if answer in names and (text := _label_text(answer, free)) and not named.answer:
        free.pop(normal(text))
        answer = text
    mark = next((free[name] for name in MARK_NAMES if name in free), None)
    roles: dict[str, Any] = {
        "prompt": prompt,
        "answer": answer,
        "rejected": free["rejected"] if preference and not answer else None,
        "mark": mark if answer else None,
        "media": tuple(column for name, column in free.items() if _MEDIA.fullmatch(name)),
    }
    if is_template(prompt):
        roles |= _template_roles(prompt, names)
    else:
        is_instruction = normal(prompt) == "instruction"
        roles |= {
            "instruction": None if is_instruction else take(["instruction", "definition"]),
            "input": take(["input", "startercode"]),
            "options": options or (((one := take(OPTIONS_NAMES)) and (one,)) or ()),
            "option_labels": labels,
            "system": take(SYSTEM_NAMES),
            "history": take(HISTORY_NAMES),
            "tools": take(TOOLS_NAMES),
        }
        roles["contexts"] = tuple(column for name in CONTEXT_NAMES if (column := take([name])))
        asked = [name for name in ASKED_NAMES if free.get(name) not in config.reward_columns()]
        roles["question"] = () if named.prompt else tuple(free[name] for name in [*PROMPT_NAMES, *asked] if name in free)
    used = OWN | {prompt, answer}
    return Shape(**roles, extra=tuple(name for name in names if name not in used))


def inspect(shape: Shape, rows: Sequence[Mapping[str, Any]]) -> Shape:
    """Return a shape without the roles that the first rows with these columns speak against.

    A text with both the question and the answer is the whole example, not a context. Only values for true and false mark an
    answer as right or wrong.
    """
    pairs = [(row.get(shape.prompt), row.get(shape.answer)) for row in rows] if shape.prompt and shape.answer else []
    whole = {
        name
        for name in shape.contexts
        if pairs
        and all(
            isinstance(part, str) and part in str(row[name]) for row, pair in zip(rows, pairs, strict=True) for part in pair
        )
    }
    contexts = tuple(name for name in shape.contexts if name not in whole)
    marks = {str(row[shape.mark]).casefold() for row in rows} if shape.mark else set()
    return shape._replace(contexts=contexts, mark=shape.mark if marks <= RIGHT | WRONG | {"none"} else None)


def is_template(prompt: str | None) -> bool:
    """Return whether a config's `columns.prompt` is a template, with columns in braces."""
    return prompt is not None and "{" in prompt


def template_fields(template: str) -> list[str]:
    """Return the columns and paths in a template's braces."""
    return _FIELD.findall(template)


def _template_roles(template: Any, names: Sequence[str]) -> dict[str, Any]:
    """A template shows options in a list of letters, for which the answer becomes a letter."""
    options = tuple(field for field in template_fields(template) if normal(field) in OPTIONS_NAMES and field in names)
    return {"options": options[:1]}


def _option_columns(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the letters or numbers of columns that hold one option each, and these columns."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        if match := _OPTION_COLUMN.fullmatch(normal(name)):
            stem = normal(name)[: -len(match[1])]
            # Single lowercase letters are often numbers of a task ("a", "b"); A, B, C, D are options.
            if stem or str(name).isupper():
                groups.setdefault(stem + ("0" if match[1].isdigit() else "a"), []).append((match[1].upper(), name))
    for group in groups.values():
        first = group[0][0]
        expected = [chr(ord(first) + index) for index in range(len(group))]
        if len(group) > 1 and first in "A01" and [label for label, _ in group] == expected:
            labels, columns = zip(*group, strict=True)
            return labels, columns
    return (), ()


def _label_text(answer: str | None, free: Mapping[str, str]) -> str | None:
    """Return the column with the names of an answer column that holds numbers: label_text for label."""
    return next((free[name] for end in ("text", "name", "str") if (name := normal(answer) + end) in free), None)


def value_at(record: Mapping[str, Any], path: str) -> Any:
    """Return the value of a column or at a dotted path (`reference_answer.final_answer`); MISSING without one."""
    if path in record:
        return record[path]
    value: Any = record
    for part in path.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            return MISSING
    return value


def fill(template: str, record: Mapping[str, Any], replaced: Mapping[str, str]) -> Any:
    """Return a template with columns in place of their names. A template of one column alone returns the column's value.

    `replaced` has texts for some columns. Returns MISSING if the record lacks a column.
    """
    if (one := _FIELD.fullmatch(template)) and one[1] not in replaced:
        return value_at(record, one[1])
    values = {field: replaced.get(field, value_at(record, field)) for field in template_fields(template)}
    if MISSING in values.values():
        return MISSING
    return _FIELD.sub(lambda match: text(values[match[1]]), template)


def text(value: Any) -> str:
    """Return a value as a prompt shows it: texts as they are, lists of texts as paragraphs, other values as JSON."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        return "\n\n".join(value)
    return msgspec.json.encode(value).decode()
