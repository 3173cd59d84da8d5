"""The messages between a trainer and a reward Lambda or endpoint, as SageMaker RLVR, Nova and Bedrock RFT define them.

A request holds samples `{"id", "messages": [..., {"role": "assistant", "content"}], "reference_answer", ...}`: a bare
list, or an HTTP-like body. A response holds results `{"id", "aggregate_reward_score", "metrics_list"?}`: a bare list, or
an envelope. `read_request` accepts all variants. `read_response` is strict: each id of the request exactly once, no other
id, and finite numbers or null.
"""

import json
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from tunedrop.rewards.sample import RewardError, Sample, content_text

Request = Literal["list", "body", "batch"]
ASSISTANT = ("assistant", "nova_assistant")


class Received(NamedTuple):
    """A sample of a request: its id, and the arguments for a reward."""

    id: Any
    prompt: list[dict[str, Any]]
    completion: list[dict[str, Any]]
    answer: str
    columns: dict[str, Any]


def sample_ids(samples: Sequence[Sample]) -> list[str]:
    """Return a unique id per sample: the row's id, with the sample's position added where a row has several completions."""
    ids = [str(sample.columns.get("id", index)) for index, sample in enumerate(samples)]
    return ids if len(set(ids)) == len(ids) else [f"{row}:{index}" for index, row in enumerate(ids)]


def write_request(samples: Sequence[Sample], ids: Sequence[str], shape: Request = "list") -> Any:
    """Return the request for samples: a bare list, `{"body": "[…]"}` or `{"body": "{\\"batch\\": […]}"}`."""
    written = [
        sample.columns
        | {
            "id": id_,
            "messages": [*sample.prompt, {"role": "assistant", "content": sample.completion}],
            "reference_answer": _reference(sample),
            # Some Lambdas read the reference answer here, as AWS's examples do.
            "metadata": {**_mapping(sample.columns.get("metadata")), "reference_answer": _reference(sample)},
        }
        for id_, sample in zip(ids, samples, strict=True)
    ]
    if shape == "list":
        return written
    return {"body": json.dumps(written if shape == "body" else {"batch": written})}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _reference(sample: Sample) -> Any:
    """Return the answer as in the dataset. A row keeps an object or a list as JSON text; a Lambda expects the object."""
    if sample.answer.lstrip()[:1] not in {"{", "["}:
        return sample.answer
    try:
        return json.loads(sample.answer)
    except ValueError:
        return sample.answer


def read_request(event: Any) -> list[Received]:
    """Read a request in any of the formats. Raises ValueError that names the part it cannot read."""
    body = event["body"] if isinstance(event, dict) and "body" in event else event
    if isinstance(body, str):
        body = json.loads(body)
    if isinstance(body, dict):
        body = body.get("batch", [body])
    if not isinstance(body, list):
        raise ValueError(f"expected a list of samples, but got {type(body).__name__}")
    return [_received(sample, index) for index, sample in enumerate(body)]


def _received(sample: Any, index: int) -> Received:
    messages = sample.get("messages") if isinstance(sample, dict) else None
    if not isinstance(messages, list) or not all(isinstance(message, dict) and "role" in message for message in messages):
        raise ValueError(f"sample {index}: expected an object with 'messages', a list of {{role, content}}")
    turns = next((place for place in range(len(messages), 0, -1) if messages[place - 1]["role"] not in ASSISTANT), 0)
    if turns == len(messages):
        raise ValueError(f"sample {index} (id {sample.get('id')!r}): the last message must have the role assistant")
    plain = [{**message, "content": content_text(message.get("content"))} for message in messages]
    metadata = _mapping(sample.get("metadata"))
    known = ("reference_answer", "ground_truth", "answer")
    places = (sample, metadata, _mapping(sample.get("reward_model")))
    answer = next((place[key] for place in places for key in known if place.get(key) is not None), "")
    return Received(
        sample.get("id", str(index)),
        plain[:turns],
        [{**message, "role": "assistant"} for message in plain[turns:]],
        answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False),
        metadata | {key: value for key, value in sample.items() if key not in {"messages", "prompt", "answer"}},
    )


def write_result(id_: Any, scored: dict[str, Any]) -> dict[str, Any]:
    """Return a sample's result from its entry of `tunedrop.rewards.score`: one metric per reward that did not abstain."""
    metrics = [
        {"name": name, "value": value, "type": "Reward"} for name, value in scored["rewards"].items() if value is not None
    ]
    return {"id": id_, "aggregate_reward_score": float(scored["score"]), "metrics_list": metrics}


def read_response(payload: Any, ids: Sequence[str]) -> list[float | None]:
    """Return a score per id, in the order of `ids`. Raises RewardError unless each id has exactly one result."""
    results = _unwrapped(payload)
    scores: dict[str, float | None] = {}
    for result in results:
        if not isinstance(result, dict) or "id" not in result or "aggregate_reward_score" not in result:
            raise RewardError(f"expected a result {{id, aggregate_reward_score}}, but got {_short(result)}")
        id_, score = str(result["id"]), result["aggregate_reward_score"]
        if id_ in scores:
            raise RewardError(f"the response has two results for the id '{id_}'")
        number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
        if score is not None and not number:
            raise RewardError(f"the score of '{id_}' is {_short(score)}, not a finite number or null")
        scores[id_] = None if score is None else float(score)
    unknown, missing = [id_ for id_ in scores if id_ not in set(ids)], [id_ for id_ in ids if id_ not in scores]
    if unknown or missing:
        reasons = [f"unknown ids: {_short(unknown)}"] * bool(unknown) + [f"missing ids: {_short(missing)}"] * bool(missing)
        raise RewardError(f"the response has {len(results)} results for {len(ids)} samples, {', '.join(reasons)}")
    return [scores[id_] for id_ in ids]


def _unwrapped(payload: Any) -> list[Any]:
    if isinstance(payload, dict):
        if "errorMessage" in payload or "errorType" in payload:
            raise RewardError(
                f"the function failed: {payload.get('errorType', 'error')}: {payload.get('errorMessage', '')}"[:500]
            )
        if payload.get("statusCode", 200) != 200:
            raise RewardError(f"the response has status {payload['statusCode']}: {_short(payload.get('body'))}")
        payload = payload.get("body")
        if isinstance(payload, str):
            try:
                payload = json.loads(payload)
            except ValueError:
                raise RewardError(f"the response's body is not JSON: {_short(payload)}") from None
    if not isinstance(payload, list):
        raise RewardError(f"expected a list of results, or an envelope with a list as 'body', but got {_short(payload)}")
    return payload


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "…"
