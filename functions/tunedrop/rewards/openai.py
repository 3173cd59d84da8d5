"""OpenAI's grader JSON as a reward: `string_check`, `text_similarity`, `score_model`, `label_model`, and `multi`.

A `multi` combines graders in a formula. A config with any other grader (`python`, `endpoint`) is refused with its type.
"""

import ast
import json
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from tunedrop.problems import nearest
from tunedrop.rewards.bedrock import ATTEMPTS, converse, escaped, score_in
from tunedrop.rewards.permissions import NO_PERMISSIONS, RewardPermissions
from tunedrop.rewards.registry import Concurrency, Need, Parameters, reward
from tunedrop.rewards.sample import RewardError, Sample, content_text, elements
from tunedrop.rewards.text import rouge_score, similar

_TEMPLATE = re.compile(r"{{\s*([\w.\[\]]+)\s*}}")
# Names of an item's expected answer in OpenAI's templates. A row keeps the expected answer as `answer`.
_ANSWERS = frozenset("answer correct_answer expected_answer ground_truth label reference reference_answer target".split())
_MODEL_TYPES = frozenset({"score_model", "label_model"})
_OUTPUTS = ("output_text", "output_json", "output_tools")
MAX_FORMULA = 1000  # characters
MAX_TOKENS = 1000  # of a model's reason and grade
_CHECKS: dict[str, Callable[[str, str], bool]] = {
    "eq": lambda text, reference: text == reference,
    "ne": lambda text, reference: text != reference,
    "like": lambda text, reference: reference in text,
    "ilike": lambda text, reference: reference.casefold() in text.casefold(),
}
_METRICS: dict[str, Callable[[str, str], float]] = {
    "fuzzy_match": similar,
    "gleu": lambda text, reference: _gleu(text.split(), reference.split()),
} | {f"rouge_{variant}": partial(rouge_score, variant=variant) for variant in "12345l"}
_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": min,
    "max": max,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "log": math.log,
}


def _gleu(text: list[str], reference: list[str]) -> float:
    """Return the sentence GLEU (Wu et al., 2016): shared 1- to 4-grams, divided by the larger of both counts."""
    counts = [
        Counter(tuple(words[at : at + n]) for n in range(1, 5) for at in range(len(words) - n + 1))
        for words in (text, reference)
    ]
    most = max(each.total() for each in counts)
    return (counts[0] & counts[1]).total() / most if most else 0.0


def _checked(grader: dict[str, Any]) -> dict[str, Any]:
    """Return the grader. Raises ValueError with the reason for a grader that this reward cannot run."""
    kind = grader.get("type")
    if kind == "multi":
        graders = grader.get("graders")
        if not isinstance(graders, dict) or not all(isinstance(each, dict) for each in graders.values()) or not graders:
            raise ValueError("multi needs 'graders': a mapping of names to graders")
        for each in graders.values():
            _checked(each)
        _formula(grader.get("calculate_output"), set(graders))
        return grader
    if kind in _MODEL_TYPES:
        return _checked_model(grader)
    choices: dict[Any, tuple[str, Collection[str]]] = {
        "string_check": ("operation", _CHECKS),
        "text_similarity": ("evaluation_metric", _METRICS),
    }
    if kind not in choices:
        known = ", ".join([*choices, *sorted(_MODEL_TYPES)])
        raise ValueError(f"graders of type '{kind}' cannot be imported: use {known} or multi, or a python reward")
    key, known_values = choices[kind]
    if grader.get(key) not in known_values:
        raise ValueError(f"{kind} has no {key} '{grader.get(key)}': {nearest(str(grader.get(key)), known_values)}")
    for part in ("input", "reference"):
        if not isinstance(grader.get(part), str):
            raise ValueError(f"{kind} needs a text for '{part}'")
        _check_template(grader[part])
    return grader


def _checked_model(grader: dict[str, Any]) -> dict[str, Any]:
    """Return a grader that asks a model. Raises ValueError for what its prompt or its grade lacks."""
    kind, messages = grader["type"], grader.get("input")
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages)
    ):
        raise ValueError(f"{kind} needs 'input': a list of messages with role and content")
    for message in messages:
        _check_template(content_text(message["content"]))
    if kind == "score_model":
        bounds = grader.get("range", [0, 1])
        numbers = isinstance(bounds, list | tuple) and all(type(bound) in {int, float} for bound in bounds)
        if not numbers or len(bounds) != 2 or bounds[0] >= bounds[1]:
            raise ValueError(f"score_model needs a 'range' of two rising numbers, not {bounds}")
        return grader
    labels, passing = grader.get("labels"), grader.get("passing_labels")
    if not isinstance(labels, list) or not isinstance(passing, list) or not passing or not set(passing) <= set(labels):
        raise ValueError("label_model needs 'labels', and 'passing_labels' that are some of them")
    return grader


def _check_template(text: str) -> None:
    """Raise ValueError for a value that no row or completion has."""
    for name in _TEMPLATE.findall(text):
        space, _, part = name.partition(".")
        if space not in {"item", "sample"} or not part:
            raise ValueError(f"the template {{{{{name}}}}} must begin with item or sample, and name a value of it")
        if space == "sample" and part.partition(".")[0] not in _OUTPUTS:
            raise ValueError(f"the template {{{{{name}}}}} must name one of {', '.join(_OUTPUTS)} of the sample")


def _formula(text: Any, names: set[str]) -> ast.expr:
    """Parse a `calculate_output`: numbers, names of graders, + - * / ^ and the functions of `_FUNCTIONS`."""
    if not isinstance(text, str) or len(text) > MAX_FORMULA:
        raise ValueError("multi needs 'calculate_output': a formula with the graders' names, of at most 1,000 characters")
    try:
        tree = ast.parse(text.replace("^", "**"), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the formula '{text}' cannot be read: {error}") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            if node.id not in names | _FUNCTIONS.keys():
                raise ValueError(f"the formula '{text}' has an unknown name '{node.id}': {nearest(node.id, names)}")
        elif isinstance(node, ast.Constant):
            if type(node.value) not in {int, float}:
                raise ValueError(f"the formula '{text}' has {node.value!r}, which is not a number")
        elif not isinstance(node, ast.BinOp | ast.UnaryOp | ast.Call | ast.Load) and type(node) not in _OPERATORS:
            raise ValueError(f"the formula '{text}' has {ast.unparse(node)}, which is not allowed in a formula")
    return tree


def _calculate(node: Any, values: dict[str, float]) -> float:
    match node:
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.Name(id=name):
            return values[name]
        case ast.BinOp(left=left, op=op, right=right):
            return float(_OPERATORS[type(op)](_calculate(left, values), _calculate(right, values)))
        case ast.UnaryOp(op=op, operand=operand):
            return float(_OPERATORS[type(op)](_calculate(operand, values)))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return float(_FUNCTIONS[name](*(_calculate(argument, values) for argument in arguments)))
        case _:
            raise RewardError(f"'{ast.unparse(node)}' cannot be calculated")


Grader = Annotated[dict[str, Any], AfterValidator(_checked)]


def _measures(parameters: Parameters, _: Mapping[str, Any]) -> Literal["answer", "content"]:
    return "answer" if "item." in str(parameters) else "content"


def _reads(parameters: Parameters) -> list[str]:
    return re.findall(r"item\.(\w+)", str(parameters))


@reward(measures=_measures, reads=_reads)
def openai_grader(sample: Sample, *, grader: Grader) -> float | None:
    """The score of an OpenAI grader. `grader` is its JSON.

    The types are `string_check`, `text_similarity`, `score_model`, `label_model`, and `multi`, a formula of these.
    `{{sample.output_text}}` is the completion. `{{item.NAME}}` is a column of the row, or the row's answer. Where the
    completion lacks what a template names, such as `{{sample.output_json.NAME}}` of a text that is no JSON, the score is 0.
    Abstains where the formula has no value, such as 1 / 0.
    """
    return _grade(grader, sample, NO_PERMISSIONS)


def _asks_a_model(grader: Any) -> bool:
    """Whether a grader of a config, which may have mistakes, asks a model."""
    if not isinstance(grader, dict):
        return False
    parts = grader.get("graders")
    return grader.get("type") in _MODEL_TYPES or (isinstance(parts, dict) and any(map(_asks_a_model, parts.values())))


@reward(
    name="openai_grader",
    when=lambda given: _asks_a_model(given.get("grader")),
    measures=_measures,
    reads=_reads,
    waits=True,
    repeatable=False,
    needs=Need(
        lambda permissions, _: bool(permissions.judge_model),
        "RewardJudgeModel",
        "asks a model for the grade, and no model is allowed here",
    ),
)
def openai_model_grader(
    samples: Sequence[Sample],
    permissions: RewardPermissions,
    *,
    grader: Grader,
    concurrency: Concurrency = 8,
) -> list[float | None]:
    """The score of an OpenAI grader that asks a model: `score_model`, `label_model`, or a `multi` with one of these.

    The stack's judge answers in place of the model that the grader names. A score is in the grader's `range`; a label is
    1.0 if it is one of `passing_labels`, else 0.0. After a reply without a grade, the reward asks once more, then abstains.
    A batch without any grade fails.
    """

    with ThreadPoolExecutor(concurrency) as pool:
        scores = list(pool.map(lambda sample: _grade(grader, sample, permissions), samples))
    if samples and all(score is None for score in scores):
        raise RewardError(f"none of {len(samples)} replies of the judge {permissions.judge_model} has a grade")
    return scores


def _grade(grader: dict[str, Any], sample: Sample, permissions: RewardPermissions) -> float | None:
    """Return a grader's score; None where a model gave no grade, or the formula has no value for these grades."""
    if grader["type"] == "multi":
        values = {name: _grade(each, sample, permissions) for name, each in grader["graders"].items()}
        grades = {name: value for name, value in values.items() if value is not None}
        if len(grades) < len(values):
            return None
        try:
            return _calculate(_formula(grader["calculate_output"], set(values)), grades)
        except (ArithmeticError, ValueError, TypeError):  # 1 / 0, the logarithm of 0, or a power that is no real number
            return None
    if grader["type"] in _MODEL_TYPES:
        return _asked(grader, sample, permissions)
    text, reference = (_filled(grader[part], sample) for part in ("input", "reference"))
    if text is None or reference is None:
        return 0.0
    if grader["type"] == "string_check":
        return float(_CHECKS[grader["operation"]](text, reference))
    return _METRICS[grader["evaluation_metric"]](text, reference)


def _asked(grader: dict[str, Any], sample: Sample, permissions: RewardPermissions) -> float | None:
    """Return a model's score; None for replies without a grade."""
    sample = sample._replace(completion=escaped(sample.completion))
    low, high = grader.get("range", (0, 1))
    texts = [(message["role"], _filled(content_text(message["content"]), sample)) for message in grader["input"]]
    if any(text is None for _, text in texts):
        return float(low) if grader["type"] == "score_model" else 0.0
    system = "\n\n".join(str(text) for role, text in texts if role in {"system", "developer"})
    question = "\n\n".join(str(text) for role, text in texts if role not in {"system", "developer"})
    if grader["type"] == "score_model":
        form = f"Give your reason in one sentence, then the score from {low:g} to {high:g} as <score>number</score>."
    else:
        form = f"Give your reason in one sentence, then one of {', '.join(grader['labels'])} as <label>…</label>."
    for _ in range(ATTEMPTS):
        reply = converse(permissions, permissions.judge_model, f"{question}\n\n{form}", system=system, max_tokens=MAX_TOKENS)
        grade = score_in(reply, low, high) if grader["type"] == "score_model" else _passing(reply, grader)
        if grade is not None:
            return grade
    return None


def _passing(reply: str, grader: dict[str, Any]) -> float | None:
    """Return whether the label in a reply is a passing one; None for a reply without one of the labels."""
    named = [each.strip() for each in elements(reply, "label")]
    label = next((label for label in grader["labels"] if named and label.casefold() == named[-1].casefold()), None)
    return None if label is None else float(label in grader["passing_labels"])


def _filled(template: str, sample: Sample) -> str | None:
    """Return a template with its values; None if the completion lacks one. Raises RewardError if the row lacks one."""
    values: dict[str, str] = {}
    for name in _TEMPLATE.findall(template):
        space, *path = re.findall(r"\w+", name)  # item.choices[0] and item.choices.0
        node: Any = _output(sample, path.pop(0)) if space == "sample" else _item(sample, path[0])
        try:
            for part in path:
                node = node[int(part)] if isinstance(node, list) else node[part]
        except (KeyError, IndexError, TypeError, ValueError):
            if space == "sample":
                return None
            raise RewardError(f"the row has no value for {{{{{name}}}}}") from None
        values[name] = node if isinstance(node, str) else json.dumps(node, ensure_ascii=False)
    return _TEMPLATE.sub(lambda match: values[match[1]], template)


def _item(sample: Sample, name: str) -> dict[str, Any]:
    return {name: sample.answer} | sample.columns if name in _ANSWERS else sample.columns


def _output(sample: Sample, name: str) -> Any:
    """Return what a completion is to a template: text, tool calls or JSON (None for a text that is no JSON)."""
    if name == "output_text":
        return sample.completion
    if name == "output_tools":
        return [call for turn in sample.turns for call in turn.get("tool_calls") or []]
    try:
        return json.loads(sample.completion)
    except (ValueError, RecursionError):
        return None
