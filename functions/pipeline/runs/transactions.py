"""Writes several items of the run table or none."""

import random
import time
from typing import Any

# Two transactions on one item cannot run at once; DynamoDB cancels one, and the SDK does not repeat it. In seconds.
CONFLICT_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)


class ConditionFailedError(Exception):
    """A transaction was cancelled: the condition of the item at `index` does not hold."""

    def __init__(self, index: int):
        self.index = index
        super().__init__(f"the condition of item {index} does not hold")


def transact(table: Any, *items: dict[str, Any]) -> None:
    """Write all items of TransactWriteItems or none. Raises ConditionFailedError."""
    client = table.meta.client
    named = [{kind: {"TableName": table.name} | item} for each in items for kind, item in each.items()]
    for pause in (*CONFLICT_PAUSES, None):
        try:
            client.transact_write_items(TransactItems=named)
            return
        except client.exceptions.TransactionCanceledException as error:
            codes = [reason["Code"] for reason in error.response["CancellationReasons"]]
            if "ConditionalCheckFailed" in codes:
                raise ConditionFailedError(codes.index("ConditionalCheckFailed")) from None
            if pause is None or "TransactionConflict" not in codes:
                raise
            time.sleep(random.uniform(0, pause))
