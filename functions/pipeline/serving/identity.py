"""Whether a component answers with the model that was tested.

The test job recorded the answers of the base model, of the tuned model and, in a line with a champion, of the champion. The
questions to which these answers differ are asked again. With other kernels and batches, and with the adapter beside the
weights instead of in them, a model rounds differently: a greedy answer may leave the recorded one at some token. So an
answer counts for the model whose recorded answer it follows longest, and for none if two are as long.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from operator import eq
from typing import Any

import msgspec
from botocore.exceptions import BotoCoreError, ClientError

from pipeline.aws import Aws, error_code
from pipeline.serving.waiting import NotYetError
from tunedrop.dataset.messages import tools_of
from tunedrop.inference_tests import Outcome

MOST_QUESTIONS = 20
# So many of the answers must be the tuned model's, and so many of those that are any model's.
SHARE_OF_ALL, SHARE_OF_DECIDED = 0.5, 0.8
AT_ONCE = 4


class Identity(msgspec.Struct, frozen=True):
    """How many questions were asked, how many answers were the tuned model's, and how many were another model's.

    `other` is the first answer that was not the tuned model's. `told_apart`: the recorded answers differ.
    """

    asked: int
    right: int
    wrong: int
    told_apart: bool
    other: str | None

    @property
    def proved(self) -> bool:
        """Whether the tuned model answered. Without a question, nothing shows it."""
        shares = self.right >= SHARE_OF_ALL * self.asked and self.right >= SHARE_OF_DECIDED * (self.right + self.wrong)
        return self.asked > 0 and shares

    def __str__(self) -> str:
        text = f"{self.right} of {self.asked} answers were those of the tested model"
        if self.wrong:
            text += f", and {self.wrong} those of another model"
        if not self.told_apart:
            text += ", which answers every test as the base model does"
        return text if self.other is None else f"{text}; for example {self.other}"


def prove(outcomes: Sequence[Outcome], ask: Callable[[Outcome], str]) -> Identity:
    """Ask a model the questions that tell the tuned model from the others best, and return what it answered."""
    questions = choose(outcomes)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(ask, questions))
    owners = [is_tuned(answer, question) for question, answer in zip(questions, answers, strict=True)]
    other = next(
        (
            f"'{answer[:80]}' instead of '{question.tuned.text[:80]}' to the test {question.id}"
            for question, answer, tuned in zip(questions, answers, owners, strict=True)
            if not tuned
        ),
        None,
    )
    return Identity(len(questions), owners.count(True), owners.count(False), any(map(_differs, questions)), other)


def choose(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the questions to ask: greedy ones whose recorded answers differ, those that differ earliest first.

    If the models answer everything alike, any greedy question shows at least that the answers are the recorded ones.
    """
    greedy = [each for each in outcomes if not each.tuned.samples and each.tuned.error is None]
    differing = [each for each in greedy if _differs(each)]
    return sorted(differing or greedy, key=lambda each: max(_common(each.tuned.text, other) for other in _others(each)))[
        :MOST_QUESTIONS
    ]


def is_tuned(answer: str, outcome: Outcome) -> bool | None:
    """Return whether an answer is the tuned model's (True), another model's (False), or no model's (None).

    It is the tuned model's if it is equal to the recorded answer, or has a longer beginning in common with it than with any
    other model's. A recorded answer that its limit cut may go on: the test job's general questions have a lower limit than
    the tests.
    """
    answer, tuned = answer.strip(), outcome.tuned.text.strip()
    if answer == tuned or (outcome.tuned.cut and tuned and answer.startswith(tuned)):
        return True
    ours, theirs = _common(answer, tuned), max(_common(answer, other) for other in _others(outcome))
    return None if ours == theirs else ours > theirs


def question(outcome: Outcome, generation: dict[str, Any], chat_template_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a test as vLLM's chat completions take it: greedy, with the test job's limit.

    A row's tools are in the prompt, and the model's answer is text: with `tool_choice` none, vLLM shows the tools to the
    chat template and parses no call (--exclude-tools-when-tool-choice-none is off by default).
    """
    messages = [{key: text for key, text in message.items() if key != "tools"} for message in outcome.prompt]
    body = {"messages": messages, "max_tokens": generation["limit"], "temperature": 0}
    tools = tools_of(outcome.prompt)
    return (
        body
        | ({"tools": tools, "tool_choice": "none"} if tools else {})
        | ({"chat_template_kwargs": chat_template_kwargs} if chat_template_kwargs else {})
    )


def invoke(endpoint: str, component: str, body: dict[str, Any], aws: Aws) -> str:
    """Ask a component and return its answer's text. Raises NotYetError if it gives none now, or something else."""
    try:
        answer = aws.runtime.invoke_endpoint(
            EndpointName=endpoint,
            InferenceComponentName=component,
            ContentType="application/json",
            Body=msgspec.json.encode(body),
        )
        content = answer["Body"].read()
    except ClientError as error:
        raise NotYetError(
            f"{component} does not answer: {error_code(error)}: {error.response['Error']['Message']}"
        ) from None
    except BotoCoreError as error:  # no answer in time, or half of one
        raise NotYetError(f"{component} does not answer: {error}") from None
    return text_of(content, component)


def text_of(completion: bytes, component: str) -> str:
    """Return the text of OpenAI's chat completion. Raises NotYetError for anything else."""
    try:
        text: str | None = msgspec.json.decode(completion)["choices"][0]["message"]["content"]
    except (msgspec.DecodeError, LookupError, TypeError):
        raise NotYetError(f"{component} answers with no chat completion: {completion[:200]!r}") from None
    return text or ""


def _others(outcome: Outcome) -> list[str]:
    return [each.text.strip() for each in (outcome.base, outcome.champion) if each is not None]


def _differs(outcome: Outcome) -> bool:
    return outcome.tuned.text.strip() not in _others(outcome)


def _common(one: str, other: str) -> int:
    """Return the length of the common beginning."""
    return sum(1 for _ in takewhile(bool, map(eq, one, other)))
