"""Whether a component answers with the model that was tested.

The test job recorded the answers of the base model, of the tuned model and, in a line with a champion, of the champion. The
same questions are asked again. An answer counts for the tuned model if it is the tuned model's, to the letter, or if it
begins much longer like the tuned model's than like any other: with other kernels and batches a model rounds differently, and
a long greedy answer leaves the recorded one at some token.
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
# Of the questions, so many must be answered by the tuned model.
SHARE = 0.8
# So many characters more must be like the tuned model's answer than like any other's.
LEAD = 40
AT_ONCE = 4


class Identity(msgspec.Struct, frozen=True):
    """How many questions were asked, how many answers were the tuned model's, and the first other answer."""

    asked: int
    right: int
    told_apart: bool
    other: str | None

    @property
    def proved(self) -> bool:
        """Whether the tuned model answered. Without a question, nothing shows it."""
        return self.asked > 0 and self.right >= SHARE * self.asked

    def __str__(self) -> str:
        text = f"{self.right} of {self.asked} answers were those of the tested model"
        if not self.told_apart:
            text += ", which answers every test as the base model does"
        return text if self.other is None else f"{text}; another one: {self.other}"


def prove(outcomes: Sequence[Outcome], ask: Callable[[Outcome], str]) -> Identity:
    """Ask a model the questions that tell the tuned model from the others best, and return what it answered."""
    questions = choose(outcomes)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(ask, questions))
    told_apart = any(_differs(question) for question in questions)
    wrong = [
        f"'{answer[:80]}' instead of '{question.tuned.text[:80]}' to the test {question.id}"
        for question, answer in zip(questions, answers, strict=True)
        if not is_tuned(answer, question)
    ]
    return Identity(len(questions), len(questions) - len(wrong), told_apart, wrong[0] if wrong else None)


def choose(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the questions to ask: greedy ones whose recorded answers differ, those that differ earliest first.

    If the models answer everything alike, any greedy question shows at least that the answers are the recorded ones.
    """
    greedy = [each for each in outcomes if not each.tuned.samples and each.tuned.error is None]
    differing = [each for each in greedy if _differs(each)]
    return sorted(differing or greedy, key=lambda each: max(_common(each.tuned.text, other) for other in _others(each)))[
        :MOST_QUESTIONS
    ]


def is_tuned(answer: str, outcome: Outcome) -> bool:
    """Return whether an answer is the tuned model's.

    A recorded answer that its limit cut may go on: the test job's general questions have a lower limit than the tests.
    """
    answer, tuned = answer.strip(), outcome.tuned.text.strip()
    if answer == tuned or (outcome.tuned.cut and tuned and answer.startswith(tuned)):
        return True
    return _common(answer, tuned) >= LEAD + max(_common(answer, other) for other in _others(outcome))


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
    try:
        text: str | None = msgspec.json.decode(content)["choices"][0]["message"]["content"]
    except (msgspec.DecodeError, LookupError, TypeError):
        raise NotYetError(f"{component} answers with no chat completion: {content[:200]!r}") from None
    return text or ""


def _others(outcome: Outcome) -> list[str]:
    return [each.text.strip() for each in (outcome.base, outcome.champion) if each is not None]


def _differs(outcome: Outcome) -> bool:
    return outcome.tuned.text.strip() not in _others(outcome)


def _common(one: str, other: str) -> int:
    """Return the length of the common beginning."""
    return sum(1 for _ in takewhile(bool, map(eq, one, other)))
