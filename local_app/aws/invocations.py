"""Lambda's queue of asynchronous invocations, with retries, on-failure destinations and dead letters."""

import json
import logging
import os
import queue
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from local_app.aws import durable, hooks
from local_app.aws.iam import rule_may_invoke
from local_app.aws.state import State
from local_app.common import Json
from local_app.credentials import Credentials

logger = logging.getLogger("pipeline.aws")


class AsyncInvocations:
    """The queue: one file per invocation in `folder`, processed by a few threads.

    A file is deleted when the function has succeeded, or when the event is in the on-failure destination or in the rule's
    dead-letter queue, and after the function's writes have been saved. After a kill, the next emulator runs the remaining
    files again (at least once, as on AWS). The second attempt follows after one second and the third after two, instead of
    AWS's minutes.
    """

    def __init__(self, folder: Path, endpoint: str, state: State, root: Credentials) -> None:
        self._folder = folder
        self._endpoint = endpoint
        self._state = state
        self._root = root
        self._ready: queue.Queue[Path] = queue.Queue()
        folder.mkdir(parents=True, exist_ok=True)
        # Each function runs in a process of its own, possibly for minutes. More threads would only overload the machine.
        for _ in range(max(4, os.cpu_count() or 1)):
            threading.Thread(target=self._work, daemon=True, name="async-invocations").start()

    def put(self, function_arn: str, event: Any, rule_arn: str = "", dead_letter_arn: str = "") -> None:
        """Queue one invocation. It survives a kill and a power cut as soon as this returns; OSError if the disk is full."""
        file = self._folder / f"{time.time_ns()}-{uuid.uuid4().hex}.json"
        entry = {"function": function_arn, "event": event, "rule": rule_arn, "dead_letters": dead_letter_arn}
        durable.write(file, json.dumps({**entry, "attempt": 0}).encode())
        self._ready.put(file)

    def resume(self) -> None:
        """Queue the invocations that an earlier emulator did not finish, oldest first."""
        for file in sorted(self._folder.glob("*.json")):
            self._ready.put(file)

    def _work(self) -> None:
        while True:
            file = self._ready.get()
            try:
                self._attempt(file)
            except Exception:  # this thread serves every function: one broken entry must not end it
                logger.exception("Asynchronous invocation %s failed; the next start tries it again", file.name)

    def _attempt(self, file: Path) -> None:
        entry = json.loads(file.read_text())
        function, config, name = hooks.find_function(entry["function"])
        if entry["rule"] and (refusal := _delivery_refusal(function, config, entry)):
            self._to_dead_letters(entry, *refusal)
            return file.unlink()
        if function is None:
            logger.error("Function %s does not exist; its event %s is dropped", name, file.name)
            return file.unlink()
        result = hooks.execute_function(function, config, entry["event"])
        self._state.changed("lambda-invocation")
        if result.get("throttle"):
            return self._later(file, 1.0)
        if not result.get("error"):
            return self._state.after_save(file.unlink)
        return self._failed(file, entry, function, name, result)

    def _failed(self, file: Path, entry: Json, function: Json, name: str, result: Json) -> None:
        """Queue the next attempt of an invocation; after the last one, send it to the function's on-failure destination."""
        entry["attempt"] += 1
        settings = (function.get("event_invoke_configs") or {}).get("$LATEST") or function.get("event_invoke_config") or {}
        logger.warning("%s failed (attempt %d): %s", name, entry["attempt"], result.get("body"))
        if entry["attempt"] <= settings.get("MaximumRetryAttempts", 2):
            durable.write(file, json.dumps(entry).encode())
            return self._later(file, float(2 ** (entry["attempt"] - 1)))
        destination = ((settings.get("DestinationConfig") or {}).get("OnFailure") or {}).get("Destination")
        if destination:
            hooks.send_to_destination(destination, name, entry["event"], result)
            self._state.changed("sqs")
        return self._state.after_save(file.unlink)

    def _later(self, file: Path, seconds: float) -> None:
        timer = threading.Timer(seconds, self._ready.put, [file])
        timer.daemon = True
        timer.start()

    def _to_dead_letters(self, entry: Json, code: str, message: str) -> None:
        import boto3

        logger.error("Rule %s cannot deliver to %s: %s", entry["rule"], entry["function"], message)
        if not entry["dead_letters"]:
            return
        # https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-rule-dlq.html#eb-dlq-message-attributes
        attributes = {
            "RULE_ARN": entry["rule"],
            "TARGET_ARN": entry["function"],
            "ERROR_CODE": code,
            "ERROR_MESSAGE": message,
        }
        region, account, name = entry["dead_letters"].split(":")[3:6]
        session = boto3.Session(*self._root, region_name=region)
        session.client("sqs", endpoint_url=self._endpoint).send_message(
            QueueUrl=f"{self._endpoint}/{account}/{name}",
            MessageBody=json.dumps(entry["event"]),
            MessageAttributes={k: {"DataType": "String", "StringValue": v} for k, v in attributes.items()},
        )


def _delivery_refusal(function: Json | None, config: Json | None, entry: Json) -> tuple[str, str] | None:
    """Return the error code and message for a rule that may not invoke its function, None for a rule that may."""
    if function is None or config is None:
        return "NO_RESOURCE", f"Function {entry['function']} does not exist"
    if rule_may_invoke(function, config, entry["rule"]):
        return None
    return "NO_PERMISSIONS", f"The policy of {config['FunctionName']} does not let rule {entry['rule']} invoke it"
