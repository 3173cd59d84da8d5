"""External rewards: a Lambda function, an HTTP endpoint, or a user's Python file gives the scores."""

import json
import runpy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from tunedrop.rewards.aws import aws_client
from tunedrop.rewards.endpoint import SafeUrl, host_allowed, json_bytes, post
from tunedrop.rewards.permissions import RewardPermissions
from tunedrop.rewards.registry import ALL_COLUMNS, Concurrency, Need, reward
from tunedrop.rewards.sample import RewardError, Sample
from tunedrop.rewards.wire import Request, read_response, sample_ids, write_request

Scores = list[float | None]
# A synchronous Lambda call may send and return 6 MB (AWS's quota). A long conversation has about 50 kB.
BatchSize = Annotated[int, Field(ge=1, le=1000)]


def _in_batches(
    send: Callable[[Any], Any], samples: Sequence[Sample], shape: Request, batch_size: int, concurrency: int
) -> Scores:
    """Send the samples in batches, up to `concurrency` batches at a time. Match the results to the samples by id."""
    ids = sample_ids(samples)

    def score(start: int) -> Scores:
        part = slice(start, start + batch_size)
        return read_response(send(write_request(samples[part], ids[part], shape)), ids[part])

    with ThreadPoolExecutor(concurrency) as pool:
        return [score for batch in pool.map(score, range(0, len(samples), batch_size)) for score in batch]


@reward(
    reads=lambda _: [ALL_COLUMNS],
    name="lambda",
    measures="answer",
    waits=True,
    batch_dependent=True,
    needs=Need(
        lambda permissions, parameters: any(
            parameters["function_arn"] in {arn, arn.partition(":function:")[2]} for arn in permissions.functions
        ),
        "RewardFunctionArns",
        "calls a function that is not in the allowed list",
    ),
)
def reward_lambda(
    samples: Sequence[Sample],
    permissions: RewardPermissions,
    *,
    function_arn: Annotated[
        str, Field(pattern=r"^(arn:aws[a-zA-Z-]*:lambda:[a-z0-9-]+:\d{12}:function:)?[\w-]+(:[\w$-]+)?$")
    ],
    request: Request = "list",
    batch_size: BatchSize = 64,
    concurrency: Concurrency = 8,
) -> Scores:
    """The score of a reward Lambda that was written for SageMaker RLVR, Nova or Bedrock reinforcement fine-tuning.

    `request` is the format that the Lambda expects: `list` is a bare list of samples, `body` is `{"body": "[…]"}`, and
    `batch` is `{"body": "{\\"batch\\": […]}"}`. A null score abstains. The AWS client retries throttling and timeouts.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    client = aws_client(permissions.client, "lambda")

    def send(body: Any) -> Any:
        try:
            response = client.invoke(FunctionName=function_arn, Payload=json_bytes(body))
        except (BotoCoreError, ClientError) as error:
            raise RewardError(f"the Lambda {function_arn} cannot be called: {error}") from error
        raw = response["Payload"].read()
        try:
            payload = json.loads(raw)
        except ValueError:
            raise RewardError(f"the response of the Lambda {function_arn} is not JSON: {raw[:200]!r}") from None
        if "FunctionError" in response:
            message = payload.get("errorMessage", payload) if isinstance(payload, dict) else payload
            raise RewardError(f"the Lambda {function_arn} failed: {message}"[:500])
        return payload

    return _in_batches(send, samples, request, batch_size, concurrency)


@reward(
    reads=lambda _: [ALL_COLUMNS],
    measures="answer",
    waits=True,
    batch_dependent=True,
    needs=Need(
        lambda permissions, parameters: host_allowed(parameters["url"], permissions),
        "RewardHttpHosts",
        "calls a host that is not in the allowed list",
    ),
)
def http(
    samples: Sequence[Sample],
    permissions: RewardPermissions,
    *,
    url: SafeUrl,
    timeout: Annotated[float, Field(gt=0, le=900)] = 30.0,
    batch_size: BatchSize = 64,
    concurrency: Concurrency = 8,
) -> Scores:
    """The score of an HTTP endpoint. The request is a POST of a JSON list of samples; the response is a reward Lambda's.

    After status 429 or 5xx, or a connection that fails or times out, the reward tries again, three times in all.
    """
    return _in_batches(lambda payload: post(url, payload, timeout, permissions), samples, "list", batch_size, concurrency)


@reward(
    reads=lambda _: [ALL_COLUMNS],
    measures="answer",
    batch_dependent=True,
    file="file",
    needs=Need(
        lambda permissions, _: permissions.python_folder is not None,
        "AllowPythonRewards",
        "runs a Python file, which is not allowed here",
    ),
)
def python(
    samples: Sequence[Sample],
    permissions: RewardPermissions,
    *,
    file: Annotated[str, Field(pattern=r"^[\w-]+\.py$")],
    function: str = "reward",
) -> Scores:
    """The score of a function in a Python file beside the dataset: `reward(prompts, completions, **columns)`, as for TRL.

    Prompts and completions are messages. Each column is a list; `answer` holds the rows' answers. The function returns a
    score or None for each completion.
    """
    assert permissions.python_folder is not None  # `needs` has checked it
    columns = {name: [sample.columns.get(name) for sample in samples] for sample in samples for name in sample.columns}
    path = permissions.python_folder / file
    if not path.is_file():
        raise RewardError(f"the folder of reward files has no file '{file}'")
    scores: Scores = _load(path, path.stat().st_mtime_ns, function)(
        prompts=[sample.prompt for sample in samples],
        completions=[sample.turns for sample in samples],
        **columns | {"answer": [sample.answer for sample in samples]},
    )
    return scores


@cache
def _load(path: Path, modified: int, function: str) -> Callable[..., Any]:  # noqa: ARG001 - a changed file is loaded again
    reward_function: Callable[..., Any] | None = runpy.run_path(str(path), run_name=path.stem).get(function)
    if not callable(reward_function):
        raise RewardError(f"'{path.name}' has no function '{function}'")
    return reward_function
