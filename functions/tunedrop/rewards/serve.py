"""Adapters: serve a reward as a reward Lambda or to verl, and use a reward Lambda or an OpenAI grader as a reward.

`tunedrop.rewards.wire` has the messages of SageMaker RLVR, Nova and Bedrock RFT. `tunedrop.rewards.openai` has OpenAI's
grader JSON.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

from tunedrop.rewards import Reward, RewardPermissions, RewardSpec, build_rewards, score
from tunedrop.rewards.wire import read_request, write_result


def lambda_handler_for(
    reward: Reward | Sequence[Reward], contract: Literal["auto", "rlvr", "nova"] = "auto"
) -> Callable[[Any, Any], Any]:
    """Return a Lambda handler that serves a reward, or the weighted sum of several rewards.

    With the contract `rlvr` (SageMaker, open-weight models), the handler returns the envelope `{"statusCode": 200,
    "headers", "body": "[result, …]"}`. With `nova` (Nova and Bedrock RFT), it returns the bare list. With `auto`, it
    returns an envelope for a request with a `body`, and a bare list for a bare list. Use `rlvr` for a service that sends
    bare lists but expects envelopes.

    A result is `{"id", "aggregate_reward_score", "metrics_list"}`, with one metric per reward that did not abstain. Where
    all rewards abstain, the score is 0.0. The handler raises ValueError for a request that it cannot read, and
    RewardError when a reward fails. Lambda reports both to the caller.
    """
    rewards = [reward] if isinstance(reward, Reward) else list(reward)

    def lambda_handler(event: Any, context: Any) -> Any:  # noqa: ARG001 - Lambda's signature
        received = read_request(event)
        names = {name for sample in received for name in sample.columns}
        columns: dict[str, list[Any]] = {name: [sample.columns.get(name) for sample in received] for name in names}
        scored = score(
            rewards,
            [sample.prompt for sample in received],
            [sample.completion for sample in received],
            columns | {"answer": [sample.answer for sample in received]},
        )
        results = [write_result(sample.id, each) for sample, each in zip(received, scored, strict=True)]
        if contract == "rlvr" or (contract == "auto" and isinstance(event, dict) and "body" in event):
            return {"statusCode": 200, "headers": {"Content-Type": "application/json"}, "body": json.dumps(results)}
        return results

    return lambda_handler


class LambdaReward(Reward):
    """A reward Lambda as a reward. `client` is boto3's Lambda client; `parameters` are those of the type `lambda`."""

    def __init__(self, function_arn: str, client: Any, *, weight: float = 1.0, name: str | None = None, **parameters: Any):
        spec = {"type": "lambda", "function_arn": function_arn, "weight": weight, "name": name} | parameters
        super().__init__(RewardSpec.model_validate(spec), RewardPermissions(lambda _: client, functions=(function_arn,)))


def from_openai_grader(grader: str | dict[str, Any]) -> Reward:
    """Return an OpenAI grader as a reward. Raises ValidationError for a grader that the reward cannot run."""
    parsed: dict[str, Any] = json.loads(grader) if isinstance(grader, str) else grader
    (reward,) = build_rewards([RewardSpec.model_validate({"type": "openai_grader", "grader": parsed})])
    return reward


def verl_compute_score(reward: Reward | Sequence[Reward]) -> Callable[..., float]:
    """Return `compute_score(data_source, solution_str, ground_truth, extra_info=None, **_)`, verl's custom reward function.

    verl does not pass the prompt. The rewards get `extra_info["question"]` in its place, where verl's datasets keep the
    question. Where all rewards abstain, the score is 0.0.
    """
    rewards = [reward] if isinstance(reward, Reward) else list(reward)

    def compute_score(
        data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None, **_: Any
    ) -> float:
        extra = extra_info or {}
        answer = ground_truth if isinstance(ground_truth, str) else json.dumps(ground_truth, ensure_ascii=False)
        columns = {name: [value] for name, value in (extra | {"data_source": data_source}).items()}
        columns.update(answer=[answer], extra_info=[extra])
        (scored,) = score(rewards, [str(extra.get("question", ""))], [solution_str], columns)
        return float(scored["score"])

    return compute_score
