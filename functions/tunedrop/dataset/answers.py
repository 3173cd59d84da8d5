"""A row's answer as a text, and the other answers that a row accepts."""

from typing import Any, NamedTuple

import msgspec

from tunedrop.dataset.bad_row import BadRowError
from tunedrop.dataset.columns import normal
from tunedrop.dataset.messages import calls, messages_of

# The key of the answer in an object: of verl and SageMaker RLVR, Nova, TriviaQA (value), SQuAD (text) and DROP (spans).
_KEYS = ("ground_truth", "final_answer", "answer", "value", "text", "spans")
_MORE = ("aliases", "normalized_aliases")
# Other keys of TriviaQA's, SQuAD's and DROP's answers.
_OTHERS = "answer_start types type matched_wiki_entity_name normalized_value normalized_matched_wiki_entity_name".split()
_KNOWN = {*_KEYS, *_MORE, *_OTHERS}


class Answer(NamedTuple):
    """An answer's text, all accepted answers if there are several, and the key of the object that held the answer."""

    text: str | None
    accepted: list[str] = []  # noqa: RUF012 - nothing writes to the default, and a NamedTuple has no factories
    key: str = ""


def read_answer(value: Any, column: str) -> Answer:
    """Return the answer in a column's value. `text` is None for null. Raises BadRowError for an object without an answer."""
    if isinstance(value, str) and holds_texts(value, column):
        value = msgspec.json.decode(value)
    if isinstance(value, str) or value is None:
        return Answer(value)
    if isinstance(value, dict):
        return _of_object(value, column)
    if isinstance(value, list):
        return _of_list(value, column)
    return Answer(_json(value))


def holds_texts(value: str, column: str) -> bool:
    """Return whether a text of a column for several answers is a list of texts as JSON (Skywork-OR1, APPS)."""
    if not value.startswith('["') or normal(column) not in {"answers", "groundtruth", "solutions"}:
        return False
    try:
        return all(isinstance(each, str) for each in msgspec.json.decode(value, type=list[Any]))
    except msgspec.DecodeError:
        return False


def _of_object(value: dict[str, Any], column: str) -> Answer:
    key = next((key for key in _KEYS if value.get(key) is not None), None)
    if normal(column) == "rewardmodel" and "ground_truth" not in value:
        shown = ", ".join(map(str, value))[:80]
        hint = "verl's reward_model needs ground_truth; or name the answer in the config: columns: {answer: …}"
        raise BadRowError("NO_ANSWER", f"reward_model has no ground_truth; it has: {shown}", hint)
    # An object with more keys than an answer and its aliases may be the JSON that the model has to give.
    if key is None or (key != "ground_truth" and not value.keys() <= _KNOWN):
        return Answer(_json(value))
    inner = read_answer(value[key], "answers")
    more = [alias for name in _MORE if isinstance(value.get(name), list) for alias in value[name]]
    accepted = list(dict.fromkeys([*(inner.accepted or [inner.text or ""]), *map(str, more)]))
    return Answer(inner.text, accepted if len(accepted) > 1 else [], key)


def _of_list(value: list[Any], column: str) -> Answer:
    if len(value) == 1 and isinstance(value[0], dict) and value[0].get("role") == "assistant":  # TRL's completion
        if value[0].get("content"):
            return Answer(messages_of(value)[2][0])
        return Answer(_json(calls(value[0]["tool_calls"])) if value[0].get("tool_calls") else None)
    texts = [_json(each) for each in value if isinstance(each, str | int | float)]
    is_answers = any(word in normal(column) for word in ("answer", "groundtruth", "alias", "solutions"))
    if is_answers and not value:  # SQuAD 2.0's questions without an answer
        return Answer("")
    if is_answers and len(texts) == len(value):
        accepted = list(dict.fromkeys(texts))
        return Answer(accepted[0], accepted if len(accepted) > 1 else [])
    return Answer(_json(value))


def _json(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
