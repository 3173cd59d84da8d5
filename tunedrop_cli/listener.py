"""Receives a local stack's notifications (by HTTP) and events (from a queue), as a subscriber of the user would."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from local_app.stack import Stack
from tunedrop.event_bus import SOURCE

RULE = "every-tunedrop-event"


class Listener:
    """The received SNS messages, and the events, which are fetched from their queue on request."""

    def __init__(self, sqs: Any, queue_url: str) -> None:
        self.notifications: list[dict[str, Any]] = []
        self._events: list[dict[str, Any]] = []
        self._sqs, self._queue_url = sqs, queue_url

    def events(self) -> list[dict[str, Any]]:
        """Return the events of the stack's bus, as EventBridge delivered them."""
        take = {"QueueUrl": self._queue_url, "MaxNumberOfMessages": 10}
        while messages := self._sqs.receive_message(**take).get("Messages"):
            for message in messages:
                self._events.append(json.loads(message["Body"]))
                self._sqs.delete_message(QueueUrl=self._queue_url, ReceiptHandle=message["ReceiptHandle"])
        return self._events

    def heard_of(self, run_id: str, detail_type: str, timeout: float = 30) -> tuple[dict[str, Any], list[str]]:
        """Return the notification of a run's end, and the types of the run's events in order.

        Raises TimeoutError unless the notification and an event `detail_type` arrive within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            ended = [each for each in self.notifications if run_id in each["Message"]]
            events = [event for event in self.events() if event["detail"].get("run_id") == run_id]
            types = [event["detail-type"] for event in sorted(events, key=lambda event: event["time"])]
            if ended and detail_type in types:
                return ended[0], types
            time.sleep(0.2)
        raise TimeoutError(f"no notification, or no event '{detail_type}', for {run_id} within {timeout:.0f} s")


@contextmanager
def listening(stack: Stack) -> Iterator[Listener]:
    """Subscribe to a local stack's topic and bus for the duration of the block."""
    sns, sqs, events = (stack.client(name) for name in ("sns", "sqs", "events"))
    queue_url = sqs.create_queue(QueueName=f"{RULE}-{time.time_ns()}")["QueueUrl"]
    queue_arn = sqs.get_queue_attributes(QueueUrl=queue_url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    listener = Listener(sqs, queue_url)

    class Subscriber(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            message = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()
            if message["Type"] == "SubscriptionConfirmation":
                sns.confirm_subscription(TopicArn=message["TopicArn"], Token=message["Token"])
            else:
                listener.notifications.append(message)

        def log_message(self, *arguments: Any) -> None:
            """Log nothing: the terminal shows the run."""

    bus = stack.outputs.event_bus_name
    events.put_rule(Name=RULE, EventBusName=bus, EventPattern=json.dumps({"source": [SOURCE]}))
    events.put_targets(Rule=RULE, EventBusName=bus, Targets=[{"Id": "queue", "Arn": queue_arn}])
    with ThreadingHTTPServer(("127.0.0.1", 0), Subscriber) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}/"
        subscription = sns.subscribe(
            TopicArn=stack.outputs.topic_arn, Protocol="http", Endpoint=endpoint, ReturnSubscriptionArn=True
        )["SubscriptionArn"]
        try:
            yield listener
        finally:
            sns.unsubscribe(SubscriptionArn=subscription)
            events.remove_targets(Rule=RULE, EventBusName=bus, Ids=["queue"])
            events.delete_rule(Name=RULE, EventBusName=bus)
            sqs.delete_queue(QueueUrl=queue_url)
            server.shutdown()
