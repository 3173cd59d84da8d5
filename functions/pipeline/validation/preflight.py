"""Rewards tried before a GPU is: the dataset's own answers must win against answers that are known to be wrong.

Of a few rows, each row's answer (*gold*) is scored beside an empty one, another row's, an echo of the prompt, a very long
text and the bare form that rewards and system prompt ask for. A reward set that does not prefer gold would teach the
model one of the others, or nothing.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from math import ceil, isclose
from statistics import fmean, median
from typing import Any, NamedTuple, TypeVar

from tunedrop.config.model import RunConfig
from tunedrop.config.schedule import generated_answers, generation_batch
from tunedrop.dataset.rows import Row
from tunedrop.inference_tests import InferenceTest
from tunedrop.problems import Problem
from tunedrop.rewards import Reward, RewardError

T = TypeVar("T")

# Rows where a reward calls out or starts processes: at six answers a row, the most that a pre-flight may cost.
FEW_ROWS = 4
# What is tried, and what it is called in messages.
GOLD = "gold"
WRONG = {
    "empty": "an empty answer",
    "other_row": "another row's answer",
    "echo": "an echo of the prompt",
    "long": "a long text that says nothing",
    "form_only": "the form without an answer",
}
# A wrong answer that scores as much as gold in more rows than this is worth a warning: some tie by chance.
TIES = 1 / 2
SLOW_SECONDS = 600
_FILLER = (
    "lorem ipsum dolor sit amet consectetur adipiscing elit sed do eiusmod tempor incididunt ut labore et dolore".split()
)
# Columns that hold a worked way to the answer, compared without case and underscores.
_REASONING = ("reasoning", "rationale", "thinking", "thought", "explanation", "chainofthought", "cot")
_NO_REASONING = "First I look at what is asked."


class Findings(NamedTuple):
    """What the pre-flight found: the receipt's `rewards`, what rejects the run, and what is only worth knowing."""

    receipt: dict[str, Any]
    problems: list[Problem]
    warnings: list[str]


class _Answer(NamedTuple):
    """An answer that is tried: of which row, of which kind (gold or one of WRONG), and its text."""

    row: int
    kind: str
    text: str


class _Tried(NamedTuple):
    """All answers, each reward's scores of them, and how long each call of a reward took."""

    answers: list[_Answer]
    scores: dict[str, list[float | None]]
    seconds: dict[str, list[float]]


def check_rewards(
    rewards: Sequence[Reward], rows: Sequence[Row], config: RunConfig, tests: Sequence[InferenceTest], *, trained_rows: int
) -> Findings:
    """Try the rewards on rows of the dataset, and on the tests' expected answers.

    `rows` are a sample of the dataset, the same for the same dataset, of which `config.preflight.rows` are tried; where a
    reward calls out it is FEW_ROWS, twice (a judge once). `on_failure` says whether what must hold rejects the run.
    """
    limit = config.preflight.rows
    if any(reward.per_batch for reward in rewards):
        limit = min(limit, FEW_ROWS)
    chosen, tested = _spread(rows, limit), _spread(tests, limit)
    problems: list[Problem] = []
    warnings: list[str] = []
    receipt: dict[str, Any] = {}
    if not chosen:
        return Findings(receipt, problems, warnings)
    try:
        tried = _try(rewards, chosen, config)
        _try_tests(rewards, tested, config)
        problems += _unstable(rewards, chosen, tried)
    except RewardError as error:
        if isinstance(error.__cause__, ModuleNotFoundError):  # the job has packages that a function has not
            warnings.append(f"the rewards could not be tried here: {error}")
        else:
            problems.append(Problem("REWARD_FAILS", str(error), "a job would end at this row", key="rewards"))
        return _by_policy(Findings(receipt, problems, warnings), config)
    totals = _totals(rewards, tried)
    receipt = _receipt(rewards, chosen, tried, totals, config, trained_rows)
    paid = [reward for reward in rewards if reward.weight > 0 and _compares(reward, chosen[0])]
    problems += _pays_wrong(paid, totals, warnings)
    warnings += _warnings(rewards, paid, tried, totals, receipt)
    return _by_policy(Findings(receipt, problems, warnings), config)


def _spread(items: Sequence[T], count: int) -> list[T]:
    """Return so many of the items, from all over them: neighbours are often alike."""
    return [items[at * len(items) // count] for at in range(count)] if count < len(items) else list(items)


def _by_policy(found: Findings, config: RunConfig) -> Findings:
    if config.preflight.on_failure == "reject":
        return found
    return Findings(found.receipt, [], [str(problem) for problem in found.problems] + found.warnings)


# ---- answers ----------------------------------------------------------------------------------------------------------


def _form(config: RunConfig, row: Row) -> Callable[[str], str] | None:
    """Return what puts an answer into the form that is asked for, or None where none is known.

    Known are the forms of `xml_format` and `think_format`, and `<answer>`, `<think>` and `\\boxed{}` where the system
    message shows them. Reasoning is the row's own where it has a column for it.
    """
    system = next((message["content"] for message in row["prompt"] if message["role"] == "system"), "")
    shown = [tag for tag in dict.fromkeys(re.findall(r"<([A-Za-z_]+)>", system)) if f"</{tag}>" in system]
    tags: Sequence[str] = [tag for tag in shown if tag != "think"] if "answer" in shown else []
    think = "think" in shown
    for spec in config.rewards:
        if spec.type == "xml_format":
            tags = (spec.model_extra or {}).get("tags", ("reasoning", "answer"))
        think = think or spec.type == "think_format"
    boxed = r"\boxed{" in system and not tags
    if not (tags or think or boxed):
        return None
    columns = {re.sub(r"[\s_-]", "", name).casefold(): value for name, value in row.items() if isinstance(value, str)}
    reasoning = next((columns[name] for name in _REASONING if columns.get(name, "").strip()), _NO_REASONING)
    last = "answer" if "answer" in tags else tags[-1] if tags else ""

    def put(answer: str) -> str:
        text = rf"\boxed{{{answer}}}" if boxed and r"\boxed" not in answer else answer
        if not all(f"<{tag}>" in answer for tag in tags):
            parts = {tag: answer if tag == last else columns.get(tag.casefold()) or reasoning for tag in tags}
            text = "\n".join(f"<{tag}>\n{content}\n</{tag}>" for tag, content in parts.items())
        return f"<think>\n{reasoning}\n</think>\n{text}" if think and "</think>" not in answer else text

    return put


def _answers(rows: Sequence[Row], config: RunConfig) -> Iterator[_Answer]:
    words = -(-int(config.grpo_value("max_completion_length")) // len(_FILLER)) * _FILLER
    for at, row in enumerate(rows):
        form = _form(config, row)
        put = form or str
        yield _Answer(at, GOLD, put(row["answer"]))
        yield _Answer(at, "empty", "")
        others = (other["answer"] for other in [*rows[at + 1 :], *rows[:at]])
        other = next((other for other in others if _folded(other) != _folded(row["answer"])), None)
        if other is not None:
            yield _Answer(at, "other_row", put(other))
        yield _Answer(at, "echo", row["prompt"][-1]["content"])
        yield _Answer(at, "long", " ".join(words))
        if form:
            yield _Answer(at, "form_only", form("…"))


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


# ---- scores -----------------------------------------------------------------------------------------------------------


def _call(reward: Reward, prompt: Any, answers: Sequence[_Answer], columns: dict[str, Any]) -> list[float | None]:
    return reward(
        [prompt] * len(answers),
        [[{"role": "assistant", "content": answer.text}] for answer in answers],
        **{name: [value] * len(answers) for name, value in columns.items()},
    )


def _columns(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "prompt"}


def _try(rewards: Sequence[Reward], rows: Sequence[Row], config: RunConfig) -> _Tried:
    """Score all answers, a row's together; raises RewardError as a job would."""
    answers = list(_answers(rows, config))
    tried = _Tried(answers, {reward.__name__: [] for reward in rewards}, {reward.__name__: [] for reward in rewards})
    for at, row in enumerate(rows):
        own = [answer for answer in answers if answer.row == at]
        for reward in rewards:  # in their order, so that a reward's gate has just scored the same answers
            started = time.perf_counter()
            tried.scores[reward.__name__] += _call(reward, row["prompt"], own, _columns(row))
            tried.seconds[reward.__name__].append(time.perf_counter() - started)
    return tried


def _try_tests(rewards: Sequence[Reward], tests: Sequence[InferenceTest], config: RunConfig) -> None:
    """Score the tests' expected answers: a reward that lacks a column there would fail hours later, in the test job."""
    for test in tests:
        columns = test.columns | {"id": test.id, "answer": test.reference}
        form = _form(config, columns | {"prompt": test.prompt}) or str
        for reward in rewards:
            try:
                _call(reward, test.prompt, [_Answer(0, GOLD, form(test.reference))], columns)
            except RewardError as error:
                raise RewardError(f"inference test '{test.id}': {error}") from error.__cause__


def _asks_a_model(reward: Reward) -> bool:
    return reward.spec.type == "judge" or (reward.gate is not None and _asks_a_model(reward.gate))


def _unstable(rewards: Sequence[Reward], rows: Sequence[Row], tried: _Tried) -> Iterator[Problem]:
    """Score everything once more, backwards: neither when nor beside what an answer is scored may matter.

    A judge is not asked again: what a model says differs a little each time, and costs money.
    """

    def differs(reward: Reward, step: int) -> bool:
        again: dict[int, list[float | None]] = {}
        for at in range(len(rows))[::step]:
            own = [answer for answer in tried.answers if answer.row == at]
            again[at] = _call(reward, rows[at]["prompt"], own[::step], _columns(rows[at]))[::step]
        scores = [score for at in range(len(rows)) for score in again[at]]
        return any(
            (one is None) != (other is None)
            or (one is not None and other is not None and not isclose(one, other, abs_tol=1e-9))
            for one, other in zip(scores, tried.scores[reward.__name__], strict=True)
        )

    for reward in rewards:
        if _asks_a_model(reward) or not differs(reward, -1):
            continue
        if differs(reward, 1):
            message, hint = "gives the same answer another score each time", "take chance and time out of it"
        else:
            message = "scores an answer by what stands beside it in the batch"
            hint = "let it look at one answer at a time: a batch holds other answers every time"
        yield Problem("REWARD_UNSTABLE", f"reward '{reward.__name__}' {message}", hint, key="rewards")


# ---- what the scores say ----------------------------------------------------------------------------------------------


def _totals(rewards: Sequence[Reward], tried: _Tried) -> list[tuple[_Answer, float]]:
    """Return each answer with the weighted sum that training would raise."""
    by_reward = [(reward.weight, tried.scores[reward.__name__]) for reward in rewards]
    return [
        (answer, sum(weight * score for weight, scores in by_reward if (score := scores[at]) is not None))
        for at, answer in enumerate(tried.answers)
    ]


def _means(totals: Sequence[tuple[_Answer, float]]) -> dict[str, float]:
    kinds = dict.fromkeys(answer.kind for answer, _ in totals)
    return {kind: fmean(total for answer, total in totals if answer.kind == kind) for kind in kinds}


def _ours(reward: Reward) -> bool:
    return not reward.spec.waits and reward.spec.type != "python"


def _compares(reward: Reward, row: Row) -> bool:
    """Whether the row's answer is one that the reward should pay for. Unit tests that stand as the answer are none."""
    tests, column = (reward.parameters.get(name) for name in ("tests", "column"))
    without_program = reward.spec.type == "code_tests" and tests is None and column not in row
    return reward.spec.compares and not without_program


def _pays_wrong(paid: Sequence[Reward], totals: Sequence[tuple[_Answer, float]], warnings: list[str]) -> list[Problem]:
    """Return why the rewards that are `paid` for comparing with the dataset's answers do not prefer these.

    Without any there is no right answer: a set may pay for form alone. What somebody else's reward looks at is not known,
    so that for these a tie only warns.
    """
    if not paid:
        return []
    scores = {round(total, 9) for _, total in totals}
    if len(scores) == 1:
        message = f"every answer scores {scores.pop():g}, right or wrong: there is nothing to learn"
        hint = "see receipt.rewards for each reward; a reward must tell the dataset's answers from wrong ones"
        return [Problem("REWARD_CONSTANT", message, hint, key="rewards")]
    means = _means(totals)
    found = [
        Problem(
            "REWARD_PAYS_WRONG",
            f"the dataset's own answers score {means[GOLD]:.3g} on average, {name} {means[kind]:.3g}",
            _FIXES[kind],
            key="rewards",
        )
        for kind, name in WRONG.items()
        if kind in means and means[GOLD] <= means[kind] + 1e-9
    ]
    if any(_ours(reward) for reward in paid):
        return found
    warnings += map(str, found)
    return []


_FIXES = {
    "empty": "does the reward read these answers? numeric needs numbers, math needs mathematics, exact_match the whole text",
    "other_row": "add a reward that compares with the row's answer, and give it more weight than the others",
    "echo": "the prompt holds the answer: use exact_match or multiple_choice, or add overlong_penalty",
    "long": "add overlong_penalty, or compare all of the answer (exact_match) instead of looking for a part of it",
    "form_only": "give the reward for the right answer more weight than those for the form, or gate these with only_if",
}


def _warnings(
    rewards: Sequence[Reward],
    paid: Sequence[Reward],
    tried: _Tried,
    totals: Sequence[tuple[_Answer, float]],
    receipt: dict[str, Any],
) -> Iterator[str]:
    for reward in rewards:
        name, scores = reward.__name__, tried.scores[reward.__name__]
        given = [score for score in scores if score is not None]
        if not given:
            yield f"reward '{name}' abstained on every answer: the rows hold nothing that it could compare with"
        elif max(given) - min(given) < 1e-9:
            yield (
                f"reward '{name}' gave {given[0]:g} to every answer tried, right or wrong, so that it teaches nothing: "
                "change its parameters, or leave it out"
            )
        if not _ours(reward) and reward.spec.clip is None and given and not -1.0 <= min(given) <= max(given) <= 1.0:
            yield f"reward '{name}' gives {min(given):g} to {max(given):g}, beyond -1 to 1: bound it with clip"
        if (seconds := receipt["by_reward"][name]["run_seconds"]) > SLOW_SECONDS:
            yield (
                f"reward '{name}' would take about {seconds / 60:.0f} minutes of the run, in which the GPU waits: "
                "make it faster, or raise its concurrency"
            )
    gold = {answer.row: total for answer, total in totals if answer.kind == GOLD}
    beaten = {
        row["kind"] for row in receipt["answers"] if row["kind"] != GOLD and row["mean"] >= receipt["answers"][0]["mean"]
    }
    if not paid:
        return
    for kind, text in WRONG.items():
        rows = [answer.row for answer, total in totals if answer.kind == kind]
        ties = [answer for answer, total in totals if answer.kind == kind and total >= gold[answer.row] - 1e-9]
        if kind not in beaten and len(ties) > TIES * len(rows):
            yield f"in {len(ties)} of {len(rows)} rows tried, {text} scores as much as the dataset's answer: {_FIXES[kind]}"


def _receipt(
    rewards: Sequence[Reward],
    rows: Sequence[Row],
    tried: _Tried,
    totals: Sequence[tuple[_Answer, float]],
    config: RunConfig,
    trained_rows: int,
) -> dict[str, Any]:
    gold = {answer.row: total for answer, total in totals if answer.kind == GOLD}
    best, score = max(
        ((answer, total) for answer, total in totals if answer.kind != GOLD), key=lambda each: each[1] - gold[each[0].row]
    )
    means = _means(totals)
    return {
        "rows": len(rows),
        "answers": [
            {
                "kind": kind,
                "mean": round(means[kind], 4),
                "lowest": round(min(total for answer, total in totals if answer.kind == kind), 4),
                "highest": round(max(total for answer, total in totals if answer.kind == kind), 4),
            }
            for kind in means
        ],
        "by_reward": {reward.__name__: _of_reward(reward, tried, config, trained_rows) for reward in rewards},
        "best_wrong": {
            "kind": best.kind,
            "row": rows[best.row]["id"],
            "text": best.text[:200],
            "score": round(score, 4),
            "gold": rows[best.row]["answer"][:200],
            "gold_score": round(gold[best.row], 4),
        },
    }


def _of_reward(reward: Reward, tried: _Tried, config: RunConfig, trained_rows: int) -> dict[str, Any]:
    scores = tried.scores[reward.__name__]
    given = [(answer.kind, score) for answer, score in zip(tried.answers, scores, strict=True) if score is not None]
    kinds = dict.fromkeys(answer.kind for answer in tried.answers)
    return {
        "weight": reward.weight,
        "mean": {
            kind: round(fmean(found), 4) if (found := [score for of, score in given if of == kind]) else None
            for kind in kinds
        },
        "lowest": min((score for _, score in given), default=None),
        "highest": max((score for _, score in given), default=None),
        "abstained": round(1 - len(given) / len(scores), 4),
    } | _latency(reward, tried, config, trained_rows)


def _latency(reward: Reward, tried: _Tried, config: RunConfig, trained_rows: int) -> dict[str, Any]:
    """Return p50 and p95 of an answer, or of a request where one is made, and what that means for the whole run.

    A call scored one row's answers: in one request, or by a judge in as many at once.
    """
    calls = sorted(tried.seconds[reward.__name__])
    answers = generated_answers(config, trained_rows)
    parameters = reward.parameters
    if reward.spec.waits:
        at_once = parameters["concurrency"] * parameters.get("batch_size", 1)
        batch = generation_batch(config)
        share, times = 1.0, answers / batch * ceil(batch / at_once)
    else:
        share, times = len(calls) / len(tried.answers), answers
    p50, p95 = median(calls) * share, calls[ceil(0.95 * len(calls)) - 1] * share
    return {"p50_ms": round(1000 * p50, 3), "p95_ms": round(1000 * p95, 3), "run_seconds": round(times * p50, 1)}
