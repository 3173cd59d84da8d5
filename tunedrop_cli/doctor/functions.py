"""Checks the functions, their dead-letter queue, and the alarms."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from tunedrop_cli.doctor.finding import DeployedStack, Finding, Json

ERRORS_SINCE = timedelta(hours=24)


def functions(stack: DeployedStack) -> Iterator[Finding]:
    """Every function can be invoked."""
    for function in stack.resources("AWS::Lambda::Function").values():
        configuration = stack.client("lambda").get_function_configuration(FunctionName=function)
        state, update = configuration.get("State", "Active"), configuration.get("LastUpdateStatus", "Successful")
        if state != "Active":
            reason = configuration.get("StateReason", "Lambda names no reason")
            pending = state == "Pending"
            fix = "Wait a minute, then run the command again." if pending else "Fix the cause, then deploy again."
            yield Finding("FUNCTION_STATE", f"The function {function} is {state}: {reason}", fix)
        elif update == "Failed":
            reason = configuration.get("LastUpdateStatusReason", "Lambda names no reason")
            message = f"The last update of the function {function} failed: {reason}"
            yield Finding("FUNCTION_STATE", message, "Fix the cause, then deploy again.")


def function_errors(stack: DeployedStack) -> Iterator[Finding]:
    """No function failed in the last 24 hours."""
    names = stack.resources("AWS::Lambda::Function")
    groups = stack.resources("AWS::Logs::LogGroup")
    for name, errors in _errors(stack, names).items():
        if errors:
            group = groups[name.removesuffix("Function") + "Logs"]
            read = stack.location.aws_command(f"logs tail {group} --since 24h --filter-pattern ERROR")
            times = "once" if errors == 1 else f"{errors} times"
            message = (
                f"The function {names[name]} failed {times} in the last 24 hours. User mistakes do not count as failures."
            )
            yield Finding("FUNCTION_ERRORS", message, f"Read its log with `{read}`.")


def _errors(stack: DeployedStack, names: dict[str, str]) -> dict[str, int]:
    """Return the number of errors of each function (physical name by logical id) since `ERRORS_SINCE`, by logical id."""
    queries = [_query(number, function) for number, function in enumerate(names.values())]
    now = datetime.now(UTC)
    pages = stack.client("cloudwatch").get_paginator("get_metric_data")
    sums = dict.fromkeys((query["Id"] for query in queries), 0)
    for page in pages.paginate(MetricDataQueries=queries, StartTime=now - ERRORS_SINCE, EndTime=now):
        for result in page["MetricDataResults"]:
            sums[result["Id"]] += int(sum(result["Values"]))
    return dict(zip(names, sums.values(), strict=True))


def _query(number: int, function: str) -> Json:
    metric = {
        "Namespace": "AWS/Lambda",
        "MetricName": "Errors",
        "Dimensions": [{"Name": "FunctionName", "Value": function}],
    }
    return {"Id": f"function{number}", "MetricStat": {"Metric": metric, "Period": 3600, "Stat": "Sum"}}


def dead_letters(stack: DeployedStack) -> Iterator[Finding]:
    """The dead-letter queue is empty."""
    queue, count = stack.outputs["DeadLetterQueueUrl"], "ApproximateNumberOfMessages"
    attributes = stack.client("sqs").get_queue_attributes(QueueUrl=queue, AttributeNames=[count])["Attributes"]
    if letters := int(attributes[count]):
        events = "1 undelivered event" if letters == 1 else f"{letters} undelivered events"
        redrive = stack.location.command("redrive")
        fix = f"Read the cause in the functions' logs and fix it. Then send the events to their functions with `{redrive}`."
        yield Finding("DEAD_LETTERS", f"The dead-letter queue {queue} contains {events}.", fix)


def alarms(stack: DeployedStack) -> Iterator[Finding]:
    """No alarm is on."""
    names = list(stack.resources("AWS::CloudWatch::Alarm").values())
    pages = stack.client("cloudwatch").get_paginator("describe_alarms")
    for alarm in (alarm for page in pages.paginate(AlarmNames=names) for alarm in page["MetricAlarms"]):
        if alarm["StateValue"] == "ALARM":
            message = f"The alarm {alarm['AlarmName']} is on. {alarm['AlarmDescription']}"
            yield Finding("ALARM", message, "Follow docs/operations.md, section Alarms.")
