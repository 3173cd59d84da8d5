"""Whether a component answers with the model that was tested.

The test job recorded the answers of the base model, of the tuned model and, in a line with a champion, of the champion. The
questions to which these answers differ are asked again.

The log-probabilities of the answers' first tokens decide: the tuned model's change of them is looked for in the component's.
They show a small change, too, whose greedy answers rounding changes as often as the tuning does: with other kernels and
batches, and with the adapter beside the weights instead of in them, a model rounds differently.

Where the first tokens hardly change, and on Bedrock, which returns no log-probabilities, the texts decide. An answer counts
for the model whose recorded answer it follows longest, and for none if two are as long.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from math import exp, sqrt
from operator import eq
from typing import Any, NamedTuple

import msgspec
from botocore.exceptions import BotoCoreError, ClientError

from pipeline.aws import Aws, error_code
from pipeline.serving.waiting import NotYetError
from tunedrop.dataset.messages import tools_of
from tunedrop.inference_tests import MOST_LIKELY, Outcome

MOST_QUESTIONS = 20
# So many of the answers must be the tuned model's, and so many of those that are any model's.
SHARE_OF_ALL, SHARE_OF_DECIDED = 0.5, 0.8
# So much of the tuned model's change of the log-probabilities must be there, and so much of it may be something else.
LEAST_EFFECT, MOST_ERROR = 0.5, 0.5
# The least change, in nats, that stands out from rounding (root mean square over the tokens, by their probabilities).
LEAST_CHANGE = 0.02
AT_ONCE = 4


class Answer(NamedTuple):
    """A model's answer: its text, and its first token's log-probabilities (ModelResult), if the server returns them."""

    text: str
    first_token: dict[str, float]


class Effect(NamedTuple):
    """What first tokens' log-probabilities show of the tuned model's change: `share` is there, `error` is something else.

    `champions`: the champion's log-probabilities are nearer.
    """

    share: float
    error: float
    champions: bool

    @property
    def proved(self) -> bool:
        """Whether the change is the tuned model's."""
        return self.share >= LEAST_EFFECT and self.error <= MOST_ERROR and not self.champions

    def __str__(self) -> str:
        text = f"their first tokens show {self.share:.0%} of the tuning's change, with an error of {self.error:.0%}"
        return text + (", but are nearer to the champion's" if self.champions else "")


class Identity(msgspec.Struct, frozen=True):
    """How many questions were asked, how many answers were the tuned model's, and how many were another model's.

    `other` is the first answer that was not the tuned model's. `told_apart`: the recorded answers differ. `effect` is None
    where rounding hides the change of the first tokens, or the server does not return their log-probabilities.
    """

    asked: int
    right: int
    wrong: int
    told_apart: bool
    other: str | None
    effect: Effect | None

    @property
    def proved(self) -> bool:
        """Whether the tuned model answered. Without a question, nothing shows it."""
        if self.effect:
            return self.effect.proved
        shares = self.right >= SHARE_OF_ALL * self.asked and self.right >= SHARE_OF_DECIDED * (self.right + self.wrong)
        return self.asked > 0 and shares

    def __str__(self) -> str:
        text = f"{self.right} of {self.asked} answers were those of the tested model"
        if self.wrong:
            text += f", and {self.wrong} those of another model"
        if not self.told_apart:
            text += ", which answers every test as the base model does"
        if self.effect:
            text += f"; {self.effect}"
        return text if self.other is None else f"{text}; for example {self.other}"


def prove(outcomes: Sequence[Outcome], ask: Callable[[Outcome], Answer]) -> Identity:
    """Ask a model the questions that tell the tuned model from the others best, and return what it answered."""
    questions = choose(outcomes)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(ask, questions))
    owners = [is_tuned(answer.text, question) for question, answer in zip(questions, answers, strict=True)]
    other = next(
        (
            f"'{answer.text[:80]}' instead of '{question.tuned.text[:80]}' to the test {question.id}"
            for question, answer, tuned in zip(questions, answers, owners, strict=True)
            if not tuned
        ),
        None,
    )
    effect = measure([(each, answer.first_token) for each, answer in zip(questions, answers, strict=True)])
    told_apart = any(map(_differs, questions))
    return Identity(len(questions), owners.count(True), owners.count(False), told_apart, other, effect)


def choose(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the questions to ask: greedy ones whose recorded answers differ, those that differ earliest first.

    Answers that differ as early come in the order of their first tokens' change. If the models answer everything alike, any
    greedy question shows at least that the answers are the recorded ones.
    """

    def alike(each: Outcome) -> tuple[int, float]:
        return max(_common(each.tuned.text, other) for other in _others(each)), -_change(each)

    greedy = [each for each in outcomes if not each.tuned.samples and each.tuned.error is None]
    return sorted([each for each in greedy if _differs(each)] or greedy, key=alike)[:MOST_QUESTIONS]


def measure(asked: Sequence[tuple[Outcome, Mapping[str, float]]]) -> Effect | None:
    """Return what the log-probabilities of first tokens show, by question.

    With the recorded log-probabilities b of the base model and t of the tuned model, and those of the answers, s, the share
    is the projection Σ w (s - b)(t - b) / Σ w (t - b)², and the error √(Σ w (s - t)² / Σ w (t - b)²), over the tokens that
    all three have. The weight w is the token's mean probability. The base model has the share 0 and the error 1. Returns
    None if the change is below LEAST_CHANGE, or not recorded.
    """
    product = square = weight = error = ours = champions = 0.0
    for outcome, answer in asked:
        champion = outcome.champion.first_token if outcome.champion else {}
        for token, w, change in _changes(outcome):
            if token in answer:
                difference = answer[token] - outcome.tuned.first_token[token]
                product += w * change * (change + difference)
                square, weight, error = square + w * change**2, weight + w, error + w * difference**2
                if token in champion:
                    ours += w * difference**2
                    champions += w * (answer[token] - champion[token]) ** 2
    if square <= LEAST_CHANGE**2 * weight:
        return None
    return Effect(product / square, sqrt(error / square), champions < ours)


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


def invoke(endpoint: str, component: str, body: dict[str, Any], aws: Aws) -> Answer:
    """Ask a component and return its answer. Raises NotYetError if it gives none now, or something else."""
    try:
        answer = aws.runtime.invoke_endpoint(
            EndpointName=endpoint,
            InferenceComponentName=component,
            ContentType="application/json",
            Body=msgspec.json.encode(body | {"logprobs": True, "top_logprobs": MOST_LIKELY}),
        )
        content = answer["Body"].read()
    except ClientError as error:
        raise NotYetError(
            f"{component} does not answer: {error_code(error)}: {error.response['Error']['Message']}"
        ) from None
    except BotoCoreError as error:  # no answer in time, or half of one
        raise NotYetError(f"{component} does not answer: {error}") from None
    return answer_of(content, component)


def answer_of(completion: bytes, component: str) -> Answer:
    """Return the answer in OpenAI's chat completion. Raises NotYetError for anything else."""
    try:
        choice = msgspec.json.decode(completion)["choices"][0]
        tokens = (choice.get("logprobs") or {}).get("content") or [{"top_logprobs": []}]
        first = {each["token"]: float(each["logprob"]) for each in tokens[0]["top_logprobs"]}
        return Answer(choice["message"]["content"] or "", first)
    except (msgspec.DecodeError, LookupError, TypeError, ValueError, AttributeError):
        raise NotYetError(f"{component} answers with no chat completion: {completion[:200]!r}") from None


def _others(outcome: Outcome) -> list[str]:
    return [each.text.strip() for each in (outcome.base, outcome.champion) if each is not None]


def _differs(outcome: Outcome) -> bool:
    return outcome.tuned.text.strip() not in _others(outcome)


def _changes(outcome: Outcome) -> Iterator[tuple[str, float, float]]:
    """Yield each token that base and tuned model find likely, with its mean probability and its change in nats."""
    base, tuned = outcome.base.first_token, outcome.tuned.first_token
    for token in base.keys() & tuned.keys():
        yield token, (exp(base[token]) + exp(tuned[token])) / 2, tuned[token] - base[token]


def _change(outcome: Outcome) -> float:
    """Return how much the tuned model changes its first token's log-probabilities: the mean of their squares."""
    return sum(weight * change**2 for _, weight, change in _changes(outcome))


def _common(one: str, other: str) -> int:
    """Return the length of the common beginning."""
    return sum(1 for _ in takewhile(bool, map(eq, one, other)))
