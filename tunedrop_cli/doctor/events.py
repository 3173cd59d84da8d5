"""Checks the events and notifications: the bucket's events, the rules, and the e-mail subscriptions."""

from collections.abc import Iterator

from tunedrop_cli.doctor.finding import DeployedStack, Finding

# CloudFormation creates a deleted resource again only after a change of its template.
REPLACE_STACK = "Delete the stack and deploy it again. Its buckets, table and models stay; the new stack gets new ones."


def bucket_events(stack: DeployedStack) -> Iterator[Finding]:
    """S3 sends the data bucket's events to EventBridge."""
    bucket = stack.outputs["DataBucket"]
    if "EventBridgeConfiguration" in stack.client("s3").get_bucket_notification_configuration(Bucket=bucket):
        return
    command = f"s3api put-bucket-notification-configuration --bucket {bucket}"
    command = stack.location.aws_command(f"{command} --notification-configuration '{{\"EventBridgeConfiguration\": {{}}}}'")
    message = f"The bucket {bucket} sends no events to EventBridge: an uploaded file starts no run."
    yield Finding("BUCKET_EVENTS_OFF", message, f"Run `{command}`. It replaces the bucket's other notifications.")


def rules(stack: DeployedStack) -> Iterator[Finding]:
    """The stack's rules are enabled."""
    # The physical id of a rule on a custom bus may be `bus|rule`.
    expected = {physical.rpartition("|")[2]: name for name, physical in stack.resources("AWS::Events::Rule").items()}
    states: dict[str, tuple[str, str]] = {}  # state and bus
    for bus in ("default", stack.outputs["EventBusName"]):
        for page in stack.client("events").get_paginator("list_rules").paginate(EventBusName=bus):
            states |= {rule["Name"]: (rule["State"], bus) for rule in page["Rules"]}
    for rule, name in expected.items():
        state, bus = states.get(rule, ("", ""))
        if not state:
            message = f"The rule {rule} ({name}) was deleted: its function receives no events."
            yield Finding("RULE_MISSING", message, REPLACE_STACK)
        elif state == "DISABLED":
            enable = stack.location.aws_command(f"events enable-rule --name {rule} --event-bus-name {bus}")
            message = f"The rule {rule} ({name}) is disabled: its function receives no events."
            yield Finding("RULE_DISABLED", message, f"Run `{enable}`.")


def subscriptions(stack: DeployedStack) -> Iterator[Finding]:
    """The e-mail subscriptions of both topics exist and are confirmed."""
    address = stack.parameters["NotificationEmail"]
    for name in ("TopicArn", "AlarmTopicArn"):
        topic = stack.outputs[name]
        pages = stack.client("sns").get_paginator("list_subscriptions_by_topic").paginate(TopicArn=topic)
        emails = [each for page in pages for each in page["Subscriptions"] if each["Protocol"].startswith("email")]
        for each in emails:
            if each["SubscriptionArn"] == "PendingConfirmation":
                message = f"{each['Endpoint']} has not confirmed its subscription to {topic}: it receives no messages."
                fix = "Follow the link in the e-mail 'AWS Notification - Subscription Confirmation'. Check the spam folder."
                yield Finding("SUBSCRIPTION_UNCONFIRMED", message, fix)
        if address and address not in {each["Endpoint"] for each in emails}:
            # SNS deletes a subscription that is not confirmed within 48 hours, and one that its owner ends
            # (https://aws.amazon.com/about-aws/whats-new/2023/05/amazon-sns-automatic-deletion-unconfirmed-subscriptions/).
            subscribe = f"sns subscribe --topic-arn {topic} --protocol email --notification-endpoint {address}"
            subscribe = stack.location.aws_command(subscribe)
            message = f"{address} (NotificationEmail) is no longer subscribed to {topic}: it receives no messages."
            yield Finding("SUBSCRIPTION_GONE", message, f"Run `{subscribe}` and confirm the e-mail.")
