"""The model on Bedrock that grades answers (Converse API)."""

import re
from typing import Any

from tunedrop.rewards.aws import aws_client
from tunedrop.rewards.permissions import RewardPermissions
from tunedrop.rewards.sample import RewardError

# A grader asks once more after a reply without a grade.
ATTEMPTS = 2
# The beginning of a tag that frames a part of a request or a grade.
_TAG = re.compile(r"<(?=\s*/?\s*(?:answer|score|label|rubric|reference|question)\b)", re.IGNORECASE)


def converse(permissions: RewardPermissions, model: str, text: str, *, system: str = "", max_tokens: int) -> str:
    """Return a model's reply to a message, without randomness. Raises RewardError if the model cannot be called."""
    from botocore.exceptions import BotoCoreError, ClientError

    client = aws_client(permissions.client, "bedrock-runtime")
    request: dict[str, Any] = {
        "modelId": model,
        "messages": [{"role": "user", "content": [{"text": text}]}],
        "inferenceConfig": {"maxTokens": max_tokens, "temperature": 0.0},
    }
    if system:
        request["system"] = [{"text": system}]
    try:
        response = client.converse(**request)
    except (BotoCoreError, ClientError) as error:
        raise RewardError(f"the judge {model} cannot be called: {error}") from error
    return "".join(part.get("text", "") for part in response["output"]["message"]["content"])


def escaped(text: str) -> str:
    """Return untrusted text whose tags are no tags of a judge's request or reply. A second tag cannot come out of it."""
    return _TAG.sub("&lt;", text)


def score_in(reply: str, low: float, high: float) -> float | None:
    """Return the last `<score>` of a reply; None if there is none from `low` to `high`."""
    scores = re.findall(r"<score>\s*(-?\d+(?:\.\d+)?)\s*</score>", reply)
    return float(scores[-1]) if scores and low <= float(scores[-1]) <= high else None
