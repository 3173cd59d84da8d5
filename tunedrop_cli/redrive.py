"""Sends the events in a dead-letter queue to their functions again."""

import json
from collections.abc import Iterator
from typing import Any


def redrive(sqs: Any, functions: Any, queue_url: str) -> Iterator[str]:
    """Invoke the function of every message with its event, delete the message, and yield the function's name.

    `sqs` and `functions` are boto3 clients of SQS and Lambda. A message is deleted after Lambda has accepted its event. An
    event that fails again comes back into the queue.
    """
    names = ["TARGET_ARN"]
    # After two minutes, a message that Lambda did not accept is visible again.
    request = {"QueueUrl": queue_url, "MaxNumberOfMessages": 10, "VisibilityTimeout": 120, "MessageAttributeNames": names}
    request["WaitTimeSeconds"] = 1  # above 0, SQS asks every server of the queue
    while messages := sqs.receive_message(**request).get("Messages"):
        for message in messages:
            function, event = _undelivered(message)
            functions.invoke(FunctionName=function, InvocationType="Event", Payload=json.dumps(event).encode())
            sqs.delete_message(QueueUrl=queue_url, ReceiptHandle=message["ReceiptHandle"])
            yield function.split(":")[6]


def _undelivered(message: dict[str, Any]) -> tuple[str, Any]:
    """Return the ARN of the function that a message is for, and the event.

    A rule's dead letter is the event, with the function as an attribute
    (https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-rule-dlq.html#eb-dlq-message-attributes); the dead letter of
    a failed function has the event in an envelope (https://docs.aws.amazon.com/lambda/latest/dg/invocation-async-retain-records.html).
    """
    body = json.loads(message["Body"])
    if target := message.get("MessageAttributes", {}).get("TARGET_ARN"):
        return target["StringValue"], body
    return body["requestContext"]["functionArn"], body["requestPayload"]
