"""What every reward is written against: the sample it scores, the deployment it runs in, the error it fails with."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


class RewardError(Exception):
    """A reward cannot score, or returned something that is no score. It fails the job: it must not train as 0.0."""


class Sample(NamedTuple):
    """What a reward sees of one completion.

    `completion` is its text, `answer` and `columns` are its row's, `question` is the last user message; `prompt` and
    `turns` are the prompt's and the completion's messages (`{"role", "content", …}`).
    """

    completion: str
    answer: str
    question: str = ""
    columns: dict[str, Any] = {}  # noqa: RUF012 - never written to: a NamedTuple default is shared on purpose
    prompt: list[dict[str, Any]] = []  # noqa: RUF012
    turns: list[dict[str, Any]] = []  # noqa: RUF012

    def column(self, name: str) -> Any:
        """Return a column of the sample's row. Raises RewardError when the row has none of that name."""
        if name not in self.columns:
            names = ", ".join(sorted(self.columns)) or "none beside prompt and answer"
            raise RewardError(f"the row has no column '{name}' (columns: {names})")
        return self.columns[name]


@dataclass(frozen=True)
class RewardPermissions:
    """What the place a reward runs in gives and allows; the default allows only what needs nothing but the text.

    `client` gives an AWS client by its service name, as `functools.cache(boto3.client)` does: it is asked for every
    batch, and the client's own time-outs and retries hold. `functions` are the ARNs that `lambda` rewards may call,
    `judge_model` is the model that `judge` rewards may ask, and `hosts` are those that `http` rewards may call.
    `allow_code` lets rewards run programs that models wrote; `python_folder` holds the files that `python` rewards may
    come from.
    """

    client: Callable[[str], Any] | None = None
    functions: tuple[str, ...] = ()
    judge_model: str = ""
    hosts: tuple[str, ...] = ()
    allow_code: bool = False
    python_folder: Path | None = None


NO_PERMISSIONS = RewardPermissions()
# What a stack allows, named as its template's parameters are. `release` writes them into the environment of the
# launch plan's jobs; validate_dataset reads that same plan, so that what it accepts is what the job may do.
REWARD_ENVIRONMENT = {
    "REWARD_FUNCTION_ARNS": "RewardFunctionArns",
    "REWARD_JUDGE_MODEL": "RewardJudgeModel",
    "REWARD_HTTP_HOSTS": "RewardHttpHosts",
    "ALLOW_CODE_REWARDS": "AllowCodeRewards",
    "ALLOW_PYTHON_REWARDS": "AllowPythonRewards",
}


def reward_permissions(
    environment: Mapping[str, str], client: Callable[[str], Any] | None = None, python_folder: Path | None = None
) -> RewardPermissions:
    """Return what the environment of a stack's jobs allows (`REWARD_ENVIRONMENT`; what is absent is not allowed)."""

    def names(variable: str) -> tuple[str, ...]:
        return tuple(name for name in environment.get(variable, "").split(",") if name)

    return RewardPermissions(
        client,
        functions=names("REWARD_FUNCTION_ARNS"),
        judge_model=environment.get("REWARD_JUDGE_MODEL", ""),
        hosts=names("REWARD_HTTP_HOSTS"),
        allow_code=environment.get("ALLOW_CODE_REWARDS") == "true",
        python_folder=python_folder if environment.get("ALLOW_PYTHON_REWARDS") == "true" else None,
    )


def text_of(completion: Any) -> str:
    """Return the text of a completion: a string, or the content of its messages (TRL's conversational format)."""
    if isinstance(completion, str):
        return completion
    return "".join(content_text(message.get("content")) for message in completion)


def content_text(content: Any) -> str:
    """Return the text of a message's content: a string, content parts, or nothing (a bare tool call)."""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content)
    return "" if content is None else str(content)


def final_answer(completion: str) -> str:
    """Return what the completion gives as its answer.

    The content of the last `<answer>` element if there is one, else what follows the last `</think>`, else everything.
    """
    tagged = re.findall(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    return (tagged[-1] if tagged else completion.rpartition("</think>")[2]).strip()


def fenced(text: str, languages: str) -> str | None:
    """Return the content of the last Markdown code block in one of the `languages` (a regex), or None."""
    blocks = re.findall(rf"```(?:{languages})?[ \t]*\r?\n(.*?)```", text, re.DOTALL)
    return blocks[-1].strip() if blocks else None
