"""One reward, every contract: a reward served as a reward Lambda or to verl, and others' rewards used as ours.

What others call and expect is in `tunedrop.rewards.wire` (SageMaker RLVR, Nova, Bedrock RFT) and
`tunedrop.rewards.openai` (grader JSON).
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

from tunedrop.rewards import Reward, RewardPermissions, RewardSpec, build_rewards, score
from tunedrop.rewards.wire import read_request, write_result


def lambda_handler_for(
    reward: Reward | Sequence[Reward], contract: Literal["auto", "rlvr", "nova"] = "auto"
) -> Callable[[Any, Any], Any]:
    """Return a Lambda handler that serves a reward, or the weighted sum of several, as a reward Lambda.

    `rlvr` (SageMaker, open-weight models) answers `{"statusCode": 200, "headers", "body": "[result, …]"}`, `nova` (Nova and
    Bedrock RFT) the bare list; `auto` answers a request with a `body` in an envelope and a bare list with a bare list, so
    a service that sends bare lists but expects envelopes needs `rlvr`. A result is `{"id", "aggregate_reward_score",
    "metrics_list"}` with one metric per reward that did not abstain; where all abstain the score is 0.0. A request that
    cannot be read raises ValueError and a reward that fails RewardError: Lambda reports both to the caller.
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
    """A reward Lambda as a reward: `client` is a boto3 Lambda client, `parameters` are those of the type `lambda`."""

    def __init__(self, function_arn: str, client: Any, *, weight: float = 1.0, name: str | None = None, **parameters: Any):
        spec = {"type": "lambda", "function_arn": function_arn, "weight": weight, "name": name} | parameters
        super().__init__(RewardSpec.model_validate(spec), RewardPermissions(lambda _: client, functions=(function_arn,)))


def from_openai_grader(grader: str | dict[str, Any]) -> Reward:
    """Return the reward of an OpenAI grader, given as JSON or parsed. Raises ValidationError for one that cannot be run."""
    parsed: dict[str, Any] = json.loads(grader) if isinstance(grader, str) else grader
    (reward,) = build_rewards([RewardSpec.model_validate({"type": "openai_grader", "grader": parsed})])
    return reward


def verl_compute_score(reward: Reward | Sequence[Reward]) -> Callable[..., float]:
    """Return a `compute_score(data_source, solution_str, ground_truth, extra_info=None, **_)` for verl's custom reward.

    verl does not pass the prompt; `extra_info["question"]`, where its datasets keep it, stands in. Where all rewards
    abstain the score is 0.0.
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
