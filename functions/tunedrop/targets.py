r"""The targets of supervised fine-tuning: each row's own worked solution, in the form that the run's rewards ask for.

    targets(config, rewards, rows)  →  a text for each row, None for rows that are left out, and the reasons

A target has to earn what the run pays: 1.0 from each reward for a form, and from each reward that compares with the answer
at least what the row's bare answer earns. Where the form has room for reasoning, a target has the row's reasoning. A bare
answer there would teach the model to skip it.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tunedrop.config.model import RunConfig
from tunedrop.dataset.columns import REASONING_NAMES, SOLUTION_NAMES
from tunedrop.dataset.rows import Row
from tunedrop.forms import asked_form, in_form, texts_of
from tunedrop.rewards import Reward
from tunedrop.rewards.registry import Form
from tunedrop.rewards.sample import final_answer, make_samples

NO_REASONING = "no reasoning"
ROUNDING = 1e-9
# Where a worked solution ends and its final answer begins, as `final_answer` reads it.
_MARKS = ("<answer>", "</think>", "####", "The answer is:")
_TAG = re.compile(r"</?(?:think|reasoning)>")


class Targets(NamedTuple):
    """The texts to learn by row, None for a row that is left out. `reasoned`: the rows whose target has reasoning.

    `left_out` has the number of rows that are left out, by reason: NO_REASONING, or the name of the reward of which no text
    of the row earns full marks.
    """

    texts: list[str | None]
    reasoned: list[bool]
    left_out: Counter[str]

    @property
    def usable(self) -> int:
        """The number of rows with a target."""
        return sum(text is not None for text in self.texts)

    def summary(self) -> dict[str, Any]:
        """Return the numbers for a receipt and for training.json."""
        counts = {"rows": len(self.texts), "usable": self.usable, "with_reasoning": sum(self.reasoned)}
        return counts | {"left_out": dict(sorted(self.left_out.items()))}


def targets(
    config: RunConfig, rewards: Sequence[Reward], rows: Sequence[Row], *, begun: str = "", reasoned_only: bool = False
) -> Targets:
    """Return the targets of rows.

    `begun` is what the chat template itself writes at the beginning of an answer, such as `<think>`: a target goes on from
    there. `reasoned_only` leaves out the rows whose target has no reasoning, whatever the form.
    """
    found = Targets([], [], Counter())
    judges = [reward for reward in rewards if _judges(reward)]
    for row in rows:
        failed, chosen, has_reasoning = NO_REASONING, None, False
        for solution, reasoned in _solutions(asked_form(config, row), row):
            if reasoned_only and not reasoned:
                continue
            text = solution.removeprefix(begun).lstrip("\n") if begun else solution
            reason = failed_reward(judges, row, text)
            if reason is None:
                chosen, has_reasoning = text, reasoned
                break
            failed = reason
        found.texts.append(chosen)
        found.reasoned.append(has_reasoning)
        if chosen is None:
            found.left_out[failed] += 1
    return found


def needs_reasoning(form: Form) -> bool:
    """Return whether a form has room for reasoning, so that a bare answer in it would teach to skip the reasoning."""
    return form.think or form.boxed or any(tag != "answer" for tag in form.tags)


def reasoning_of(row: Mapping[str, Any]) -> str | None:
    """Return a row's reasoning: its column, a column with the worked solution, or the answer's text before its end."""
    columns = texts_of(row)
    if text := next((columns[name] for name in (*REASONING_NAMES, *SOLUTION_NAMES) if name in columns), None):
        return text.strip()
    answer: str = row["answer"].strip()
    if final_answer(answer) == answer:
        return None
    for mark in _MARKS:
        if mark in answer:
            return _TAG.sub("", answer[: answer.rfind(mark)]).strip() or None
    return answer  # a solution with its answer in a box


def _solutions(form: Form, row: Row) -> Iterator[tuple[str, bool]]:
    """Yield the texts that may be the row's target, the best first, each with whether it has reasoning."""
    answer, reasoning = row["answer"].strip(), reasoning_of(row)
    final = final_answer(answer)
    if reasoning is not None:
        if form == Form():
            own = final != answer  # the dataset's own way to end a solution
            yield (answer if own else f"{reasoning}\nThe answer is: {answer}"), True
        elif form.boxed and not form.think:
            yield (reasoning if r"\boxed{" in reasoning else f"{reasoning}\n\\boxed{{{final}}}"), True
        else:
            yield in_form(form, final, reasoning, row), True
            yield in_form(form, answer, reasoning, row), True
    if not needs_reasoning(form):
        yield in_form(form, answer, "", row), False


def _judges(reward: Reward) -> bool:
    """Return whether a reward may judge targets: one that calls no service, runs no program, and pays for the better."""
    kind = reward.spec.reward_type
    costly = kind.external or kind.penalty or kind.per_batch
    return reward.weight > 0 and not costly and (reward.gate is None or _judges(reward.gate))


def failed_reward(rewards: Sequence[Reward], row: Row, text: str) -> str | None:
    """Return the name of the first of these rewards of which a text does not earn full marks, None if it earns them all.

    A reward that abstains asks for nothing. Raises RewardError, as the training would.
    """
    for reward in rewards:
        measures = reward.spec.measures(row)
        if measures == "content":
            continue
        earned, bare = (_score(reward, row, each) for each in (text, row["answer"]))
        wanted = 1.0 if measures == "form" else bare or ROUNDING
        if earned is not None and earned < wanted - ROUNDING:
            return reward.__name__
    return None


def _score(reward: Reward, row: Row, text: str) -> float | None:
    columns = {name: [value] for name, value in row.items() if name != "prompt"}
    return reward.score_samples(make_samples([row["prompt"]], [[{"role": "assistant", "content": text}]], columns))[0]
