"""A sample is one completion with its row: the input of a reward. Helpers read text from both."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Message = dict[str, Any]
# TRL passes these lists beside the columns of the dataset. Rewards do not see a dataset's columns of the same names.
TRAINER_COLUMNS = frozenset({"prompts", "completions", "completion_ids", "prompt_ids", "environments"})


# The column with all answers that a row accepts, if these are several.
ACCEPTED = "accepted_answers"


class RewardError(Exception):
    """A reward cannot score, or returned something other than a score.

    The error fails the job. A score of 0.0 in its place would train the model on the failure.
    """


class Sample(NamedTuple):
    """One completion and its row.

    `completion` is the completion's text. `answer` and `columns` come from the row. `question` is the last user message.
    `prompt` and `turns` are the messages (`{"role", "content", …}`) of the prompt and of the completion.
    """

    completion: str
    answer: str
    question: str = ""
    columns: dict[str, Any] = {}  # noqa: RUF012 - nothing writes to the default, and a NamedTuple has no factories
    prompt: list[Message] = []  # noqa: RUF012
    turns: list[Message] = []  # noqa: RUF012

    def column(self, name: str) -> Any:
        """Return a column of the sample's row. Raises RewardError when the row has no such column."""
        if name not in self.columns:
            names = ", ".join(sorted(self.columns)) or "only prompt and answer"
            raise RewardError(f"the row has no column '{name}' (columns: {names})")
        return self.columns[name]

    @property
    def row_name(self) -> str:
        """The row's name in an error message: its id, if the row has one, and its question."""
        id_ = f" '{self.columns['id']}'" if "id" in self.columns else ""
        return f"the row{id_} asking {self.question[:200]!r}"


def make_samples(prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]) -> list[Sample]:
    """Return one Sample per completion of a batch in TRL's format.

    `columns` is everything that TRL passes beside prompts and completions. Only lists with one value per completion are
    columns of the dataset. `answer` may be missing; the samples' answers are empty then.
    """
    rows = {
        name: values
        for name, values in columns.items()
        if isinstance(values, list) and len(values) == len(completions) and name not in {*TRAINER_COLUMNS, "answer"}
    }
    answers = columns.get("answer")
    return [
        Sample(
            text_of(completion),
            "" if answers is None else answers[index],
            _question(prompt),
            {name: values[index] for name, values in rows.items()},
            _messages(prompt, "user"),
            _messages(completion, "assistant"),
        )
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]


def distinct(samples: Sequence[Sample]) -> tuple[list[Sample], list[int]]:
    """Return the distinct samples, and for each of `samples` its index among the distinct ones."""
    unique: list[Sample] = []
    by_text: dict[tuple[str, str, str], list[int]] = {}  # a column may be unhashable, so columns are compared one by one
    indices = []
    for sample in samples:
        candidates = by_text.setdefault((sample.completion, sample.answer, sample.question), [])
        index = next((index for index in candidates if unique[index] == sample), None)
        if index is None:
            index = len(unique)
            candidates.append(index)
            unique.append(sample)
        indices.append(index)
    return unique, indices


def rows_of(samples: Sequence[Sample]) -> list[list[int]]:
    """Return the places of the samples by row: the samples that differ in their completion alone."""
    _, indices = distinct([sample._replace(completion="", turns=[]) for sample in samples])
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(index, []).append(place)
    return list(places.values())


def _question(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return next((content_text(message.get("content")) for message in reversed(prompt) if message["role"] == "user"), "")


def _messages(value: Any, role: str) -> list[Message]:
    """Return a prompt or completion as messages. A plain text becomes one message."""
    return ([{"role": role, "content": value}] if value else []) if isinstance(value, str) else list(value)


def text_of(completion: Any) -> str:
    """Return a completion's text. The completion is a text or a list of messages (TRL's conversational format)."""
    if isinstance(completion, str):
        return completion
    return "".join(content_text(message.get("content")) for message in completion)


def content_text(content: Any) -> str:
    """Return the text of a message's content: a text, a list of content parts, or None (a message with only tool calls)."""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content)
    return "" if content is None else str(content)


def final_answer(text: str) -> str:
    r"""Return the final answer of a completion, or of a row's answer.

    The final answer is the content of the last `<answer>` element, else the text after the last `</think>`, else the whole
    text. In this part, a last line `#### …` (GSM8K), the last `\boxed{…}`, or the end of a last line `The answer is: …`
    (MetaMath) is the final answer.
    """
    end = text.rfind("</answer>")
    begin = text.rfind("<answer>", 0, end) if end >= 0 else -1
    part = (text[begin + len("<answer>") : end] if begin >= 0 else text.rpartition("</think>")[2]).strip()
    last_line = part.rpartition("\n")[2].strip()
    if last_line.startswith("####") and last_line.strip("# "):
        return last_line.strip("# ")
    _, said, end_of_line = last_line.rpartition("The answer is:")
    return _boxed(part) or (end_of_line.strip().removesuffix(".") if said else "") or part


def _boxed(text: str) -> str:
    r"""Return the content of the last `\boxed{…}`, empty without one."""
    mark = r"\boxed{"
    begin = text.rfind(mark)
    if begin < 0:
        return ""
    depth, start = 1, begin + len(mark)
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            content = text[start : start + brace.start()].strip()
            inner = re.fullmatch(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}", content)
            return inner[1].strip() if inner else content
    return ""


def fenced(text: str, languages: str) -> str | None:
    """Return the content of the last Markdown code block in one of the `languages` (a regex). None without a block."""
    last = None
    end = 0
    # A search for the end from every opening would take time by the square of the text's length.
    for opening in re.finditer(rf"```(?:{languages})?[ \t]*+\r?\n", text):
        if opening.start() < end:
            continue
        close = text.find("```", opening.end())
        if close < 0:
            break
        last, end = text[opening.end() : close], close + 3
    return None if last is None else last.strip()


def elements(text: str, tag: str) -> list[str]:
    """Return the contents of a text's elements `<tag>…</tag>`, in order, in linear time."""
    found = []
    end = 0
    while (begin := text.find(f"<{tag}>", end)) >= 0 and (close := text.find(f"</{tag}>", begin)) >= 0:
        found.append(text[begin + len(tag) + 2 : close])
        end = close + len(tag) + 3
    return found
