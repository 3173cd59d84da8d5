"""OpenAI's grader JSON as a reward: `string_check`, `text_similarity`, and `multi`, which combines graders in a formula.

A config with any other grader (`score_model`, `label_model`, `python`) is refused with the grader's name.
"""

import ast
import json
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator

from tunedrop.problems import nearest
from tunedrop.rewards.registry import reward
from tunedrop.rewards.sample import RewardError, Sample
from tunedrop.rewards.text import rouge_score, similar

_TEMPLATE = re.compile(r"{{\s*([\w.\[\]]+)\s*}}")
# Names of an item's expected answer in OpenAI's templates. A row keeps the expected answer as `answer`.
_ANSWERS = frozenset("answer correct_answer expected_answer ground_truth label reference reference_answer target".split())
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
    choices: dict[Any, tuple[str, Collection[str]]] = {
        "string_check": ("operation", _CHECKS),
        "text_similarity": ("evaluation_metric", _METRICS),
    }
    if kind not in choices:
        raise ValueError(f"graders of type '{kind}' cannot be imported: use string_check, text_similarity or multi")
    key, known = choices[kind]
    if grader.get(key) not in known:
        raise ValueError(f"{kind} has no {key} '{grader.get(key)}': {nearest(str(grader.get(key)), known)}")
    for part in ("input", "reference"):
        text = grader.get(part)
        if not isinstance(text, str):
            raise ValueError(f"{kind} needs a text for '{part}'")
        for name in _TEMPLATE.findall(text):
            if name.split(".")[0] not in {"item", "sample"}:
                raise ValueError(f"the template {{{{{name}}}}} must begin with item or sample")
    return grader


def _formula(text: Any, names: set[str]) -> ast.expr:
    """Parse a `calculate_output`: numbers, names of graders, + - * / ^ and the functions of `_FUNCTIONS`."""
    if not isinstance(text, str):
        raise ValueError("multi needs 'calculate_output': a formula with the graders' names")
    try:
        tree = ast.parse(text.replace("^", "**"), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"the formula '{text}' cannot be read: {error.msg}") from None
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


@reward(
    measures=lambda parameters, _: "answer" if "item." in str(parameters) else "content",
    reads=lambda parameters: re.findall(r"item\.(\w+)", str(parameters)),
)
def openai_grader(sample: Sample, *, grader: Annotated[dict[str, Any], AfterValidator(_checked)]) -> float:
    """The score of an OpenAI grader: a `string_check`, a `text_similarity`, or a `multi` of these. `grader` is its JSON.

    `{{sample.output_text}}` is the completion. `{{item.NAME}}` is a column of the row, or the row's answer.
    """
    return _grade(grader, sample)


def _grade(grader: dict[str, Any], sample: Sample) -> float:
    if grader["type"] == "multi":
        values = {name: _grade(each, sample) for name, each in grader["graders"].items()}
        return _calculate(_formula(grader["calculate_output"], set(values)), values)
    text, reference = (_filled(grader[part], sample) for part in ("input", "reference"))
    if grader["type"] == "string_check":
        return float(_CHECKS[grader["operation"]](text, reference))
    return _METRICS[grader["evaluation_metric"]](text, reference)


def _filled(template: str, sample: Sample) -> str:
    def value(match: re.Match[str]) -> str:
        space, *path = match[1].split(".")
        node: Any = _output(sample, path[0]) if space == "sample" else {**_item(sample, path[0])}
        try:
            for part in path if space == "item" else path[1:]:
                node = node[int(part)] if isinstance(node, list) else node[part]
        except (KeyError, IndexError, TypeError, ValueError):
            raise RewardError(f"the row and the completion have no value for {match[0]}") from None
        return node if isinstance(node, str) else json.dumps(node, ensure_ascii=False)

    return _TEMPLATE.sub(value, template)


def _item(sample: Sample, name: str) -> dict[str, Any]:
    return {name: sample.answer} | sample.columns if name in _ANSWERS else sample.columns


def _output(sample: Sample, name: str) -> Any:
    if name == "output_text":
        return sample.completion
    if name == "output_tools":
        return [call for turn in sample.turns for call in turn.get("tool_calls") or []]
    if name == "output_json":
        try:
            return json.loads(sample.completion)
        except ValueError:
            return {}
    raise RewardError(f"sample has no '{name}': use output_text, output_json or output_tools")
