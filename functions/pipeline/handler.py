"""What the functions' handlers share."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext

from pipeline.observability import logger
from pipeline.runs.states import Run, StaleMoveError

Event = dict[str, Any]


def answers_with_run(
    handle: Callable[[Event, LambdaContext], Run | None],
) -> Callable[[Event, LambdaContext], dict[str, str]]:
    """Decorate a handler: answer `{"run_id", "status"}`, or `{}` without a run.

    A StaleMoveError also gives `{}`: another delivery of the event has done the work.
    """

    @wraps(handle)
    def handler(event: Event, context: LambdaContext) -> dict[str, str]:
        try:
            run = handle(event, context)
        except StaleMoveError as error:
            logger.info("another delivery of the event was faster", detail=str(error))
            return {}
        return {"run_id": run.run_id, "status": run.state} if run else {}

    return handler
