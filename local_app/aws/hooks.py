"""MiniStack, with the AWS behaviour that it lacks. Every private name of MiniStack is here and in `hooks_s3`.

The `hook_…` functions replace parts of MiniStack, and run once, before the server starts. The other functions give
MiniStack's own operations a public name. `tests/aws_emulator` has a contract test for each hook: a new version of MiniStack
that moves a private name fails there.
"""

import contextvars
import hmac
import json
import logging
import secrets
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from local_app.aws.event_patterns import MOST_COMPLEX, TOO_COMPLEX, complexity
from local_app.common import IMPORT_SESSION, Json
from local_app.credentials import Credentials

logger = logging.getLogger("pipeline.aws")

# Receives an event that a function must get: the function's ARN, the event, and the ARNs of the rule and of its dead-letter
# queue (empty without one).
PutInvocation = Callable[[str, Any, str, str], None]


# ---- EventBridge -----------------------------------------------------------------------------------------------------


def matches_pattern(pattern: Json, event: Json) -> bool:
    """Return whether an EventBridge rule with this pattern takes this event. Raises ValueError for an invalid pattern."""
    from ministack.services import eventbridge

    status, _, body = eventbridge._test_event_pattern({"EventPattern": json.dumps(pattern), "Event": json.dumps(event)})
    answer = json.loads(body)
    if status != 200:
        raise ValueError(f"EventBridge refuses the pattern {json.dumps(pattern)}: {answer}")
    return bool(answer["Result"])


def put_service_event(event: Json) -> None:
    """Put an event of an AWS service (`id`, `source`, `detail-type`, `account`, ...) on the default bus.

    PutEvents refuses the sources of AWS services.
    """
    from ministack.core import responses
    from ministack.services import eventbridge

    responses.set_request_account_id(event["account"])
    responses.set_request_region(event["region"])
    eventbridge._dispatch_event({**eventbridge._event_from_test_payload(event), "EventBusName": "default"})


def hook_rule_complexity() -> None:
    """Refuse rules that are too complex, with EventBridge's message. MiniStack has no limit.

    CloudFormation's provisioner creates rules without PutRule, so both are hooked.
    """
    from ministack.services import eventbridge
    from ministack.services.cloudformation import provisioners

    error_of = eventbridge._event_pattern_error
    create_rule = provisioners._RESOURCE_HANDLERS["AWS::Events::Rule"]["create"]

    def event_pattern_error(pattern: Any) -> Any:
        error = error_of(pattern)
        if error is None and pattern and complexity(json.loads(pattern)) > MOST_COMPLEX:
            return TOO_COMPLEX
        return error

    def create(logical_id: str, props: Json, stack: str) -> Any:
        if error := event_pattern_error(json.dumps(props["EventPattern"]) if "EventPattern" in props else ""):
            raise ValueError(f"Event pattern is not valid. Reason: {error}")
        return create_rule(logical_id, props, stack)

    eventbridge._event_pattern_error = event_pattern_error
    provisioners._RESOURCE_HANDLERS["AWS::Events::Rule"]["create"] = create


def hook_async_invocations(put: PutInvocation) -> None:
    """Pass every asynchronous invocation (by rules, schedules and Invoke) to `put`.

    MiniStack runs a rule's invocation at once and without retries.
    """
    from ministack.services import eventbridge, lambda_svc

    delivery: contextvars.ContextVar[tuple[Json, Json]] = contextvars.ContextVar("delivery")
    invoke_target = eventbridge._invoke_target

    def deliver(target: Json, event: Json, rule: Json, view: Any = None) -> None:
        delivery.set((target, rule))
        invoke_target(target, event, rule, view)

    def to_function(arn: str, payload: str) -> None:
        target, rule = delivery.get()
        dead_letters = (target.get("DeadLetterConfig") or {}).get("Arn", "")
        put(arn, json.loads(payload), rule["Arn"], dead_letters)

    def invoke_event(function: Json, event: Any) -> None:
        put(function["config"]["FunctionArn"], event, "", "")

    eventbridge._invoke_target = deliver
    eventbridge._dispatch_to_lambda = to_function
    lambda_svc.invoke_async_with_retry = invoke_event


# ---- Lambda ----------------------------------------------------------------------------------------------------------


def hook_interpreter(folder: Path) -> None:
    """Run Python functions with this Python, whatever version their `Runtime` names: the local build chose wheels for it.

    `-S` hides this environment's site-packages: a package that the function and its layers lack is missing here as on AWS.
    """
    from ministack.core import lambda_runtime

    folder.mkdir(parents=True, exist_ok=True)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(stat.S_IRWXU)
    detect = lambda_runtime._detect_runtime_binary

    def detect_runtime_binary(runtime: str) -> tuple[str, str]:
        binary, worker = detect(runtime)
        return (str(python) if runtime.startswith("python") else binary), worker

    lambda_runtime._detect_runtime_binary = detect_runtime_binary


def find_function(arn: str) -> tuple[Json | None, Json | None, str]:
    """Return a function's record, its configuration (both None when the function is gone) and its name."""
    from ministack.core import responses
    from ministack.services import lambda_svc

    responses.set_request_account_id(arn.split(":")[4])
    responses.set_request_region(arn.split(":")[3])
    function, config, name = lambda_svc._get_func_record_for_ref(arn)
    return function, config, name


def execute_function(function: Json, config: Json | None, event: Any) -> Json:
    """Run a function in its worker process and return MiniStack's result, with `throttle` or `error` where one happened."""
    from ministack.services import lambda_svc

    result: Json = lambda_svc._execute_function(lambda_svc._execution_record_for_config(function, config), event)
    return result


def send_to_destination(destination: str, name: str, event: Any, result: Json) -> None:
    """Send a failed invocation of the function `name` to its on-failure destination."""
    from ministack.services import lambda_svc

    lambda_svc._route_async_failure(destination, name, event, result)


# ---- IAM -------------------------------------------------------------------------------------------------------------


def hook_calls(file: Path) -> None:
    """Record every new kind of call that a role makes, with IAM's decision, as a line of JSON in `file`.

    Calls of the account itself are not recorded: IAM never denies them.
    """
    from ministack.core import iam_evaluator

    enforce = iam_evaluator.enforce
    recorded: set[str] = set()

    def enforce_and_record(
        access_key: str, action: str, service: str, region: str, resource_arn: str = "*", service_context: Json | None = None
    ) -> Any:
        if action == "events:PutEvents":
            service_context = (service_context or {}) | _event_condition_keys(iam_evaluator._signed_request.get())
        denied = enforce(access_key, action, service, region, resource_arn, service_context)
        credential = iam_evaluator.resolve_credential(access_key)
        principal = getattr(credential, "principal_arn", access_key)
        if not principal.endswith(":root"):
            call = {"principal": principal, "action": action, "resource": resource_arn, "context": service_context or {}}
            line = json.dumps({**call, "allowed": denied is None}, default=str)
            if line not in recorded:
                recorded.add(line)
                with file.open("a") as lines:
                    lines.write(f"{line}\n")
            if denied is not None:
                logger.warning("IAM denies %s: %s on %s", principal, action, resource_arn)
        return denied

    iam_evaluator.enforce = enforce_and_record


def _event_condition_keys(request: Any) -> Json:
    """Return the condition keys of a PutEvents request for which all its entries have the same value.

    MiniStack lacks these keys.
    https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-use-conditions.html
    """
    entries = json.loads(request.body)["Entries"] if request is not None else []
    keys = {"events:source": "Source", "events:detail-type": "DetailType"}
    values = {key: {entry.get(member) for entry in entries} for key, member in keys.items()}
    return {key: entry_values.pop() for key, entry_values in values.items() if len(entry_values) == 1}


def hook_trust_policies() -> None:
    """Add `aws:SourceAccount` when a service assumes a role, and `aws:SourceArn` when an import job of Bedrock does.

    MiniStack's services call as root and leave the keys out.
    """
    from ministack.core import iam_evaluator

    evaluate = iam_evaluator.evaluate_trust_policy

    def evaluate_trust_policy(document: Any, caller: str, context: Any = None) -> bool:
        if context is not None and caller.endswith(":root"):
            account = context.service_context["aws:sourceaccount"] = context.principal_account
            session = context.service_context.get("sts:rolesessionname") or ""
            if session.startswith(IMPORT_SESSION):
                job = f"model-import-job/{session.removeprefix(IMPORT_SESSION)}"
                context.service_context["aws:sourcearn"] = f"arn:aws:bedrock:{context.region}:{account}:{job}"
        return bool(evaluate(document, caller, context))

    iam_evaluator.evaluate_trust_policy = evaluate_trust_policy


def hook_requests_without_action(root: Credentials) -> None:
    """Refuse a role's or a user's request for which MiniStack knows no IAM action. MiniStack checks its signature only."""
    from ministack import app
    from ministack.core import iam_evaluator, router

    authenticate_only = app._authenticate_only

    def refuse(service: str, headers: Json, query: Json, request_id: str) -> Any:
        key = router.extract_access_key_id(headers, query)
        if key != root.access_key_id:
            unknown = iam_evaluator.AuthError("AccessDenied", f"No policy can allow this request to {service}.")
            return app._credential_failure(service, "", request_id, unknown, headers)
        return authenticate_only(service, headers, query, request_id)

    app._authenticate_only = refuse


def hook_function_credentials() -> None:
    """Give each function's role session random credentials. MiniStack derives them from the names of function and role."""
    from ministack.core import lambda_runtime
    from ministack.services import lambda_svc, sts

    seed = secrets.token_bytes(32)

    def execution_credentials(config: Json) -> dict[str, str]:
        account, role = config["FunctionArn"].split(":")[4], config["Role"].rpartition("/")[2]
        key, secret, token = (
            hmac.new(seed, f"{part} of {config['FunctionArn']} {role}".encode(), "sha256").hexdigest()
            for part in ("key", "secret", "token")
        )
        credentials = {
            "AWS_ACCESS_KEY_ID": f"ASIA{key[:16].upper()}",
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_SESSION_TOKEN": token,
        }
        name = config["FunctionName"][:64]
        session = {
            "Arn": f"arn:aws:sts::{account}:assumed-role/{role}/{name}",
            "UserId": f"{role}:{name}",
            "SecretAccessKey": secret,
            "SessionToken": token,
        }
        sts.register_session(credentials["AWS_ACCESS_KEY_ID"], session)
        return credentials

    lambda_runtime.execution_credentials = execution_credentials
    lambda_svc.execution_credentials = execution_credentials


# ---- CloudWatch ------------------------------------------------------------------------------------------------------


def hook_alarms() -> None:
    """Send an alarm only to topics whose policy lets CloudWatch publish, and keep an alarm's metric math.

    MiniStack does not check the policy, and forgets the member Metrics of PutMetricAlarm. It evaluates alarms without their
    dimensions; the SageMaker emulator evaluates those about SageMaker.
    """
    from ministack.services import cloudwatch, sns

    dispatch = cloudwatch._dispatch_alarm_actions
    put_metric_alarm, evaluate_alarm = cloudwatch._put_metric_alarm, cloudwatch._evaluate_alarm
    lists = ("AlarmActions", "OKActions", "InsufficientDataActions")

    def dispatch_alarm_actions(alarm: Json, *args: Any) -> None:
        def lets_cloudwatch_publish(topic: str) -> bool:
            arn = alarm["AlarmArn"]
            if not cloudwatch._is_sns_action_arn(topic):  # a scaling policy
                return False
            allowed = bool(sns.topic_policy_allows(topic, "cloudwatch.amazonaws.com", arn, arn.split(":")[4]))
            if not allowed:
                logger.warning("The policy of %s does not let CloudWatch publish the alarm %s", topic, alarm["AlarmName"])
            return allowed

        dispatch(alarm | {name: list(filter(lets_cloudwatch_publish, alarm.get(name) or [])) for name in lists}, *args)

    def put_alarm_with_metrics(params: Json, request: Json, *protocol: bool) -> Any:
        answer = put_metric_alarm(params, request, *protocol)
        alarm = cloudwatch._alarms.get(request.get("AlarmName", ""))
        if alarm and request.get("Metrics"):
            for member in ("Namespace", "MetricName", "Statistic", "Period"):
                alarm.pop(member, None)
            alarm["Metrics"] = request["Metrics"]
        return answer

    cloudwatch._dispatch_alarm_actions = dispatch_alarm_actions

    def evaluate_other_alarms(alarm: Json) -> None:
        if alarm.get("Namespace") != "AWS/SageMaker":
            evaluate_alarm(alarm)

    cloudwatch._put_metric_alarm = put_alarm_with_metrics
    cloudwatch._evaluate_alarm = evaluate_other_alarms


def hook_alarm_arns() -> None:
    """Hold DeleteAlarms against the alarm that it names first, and DescribeAlarms against all alarms.

    MiniStack finds no resource in both, because they have a list of names. AWS documents that both need an alarm
    (https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazoncloudwatch.html). Assumption:
    DescribeAlarms is checked on `alarm:*`, whatever names it has.
    """
    from ministack.core import iam_actions

    arn_of = iam_actions.extract_resource_arn

    def extract_resource_arn(
        service: str, method: str, path: str, headers: Json, body: bytes, query: Json, region: str, account: str
    ) -> str:
        if service == "monitoring":
            action = iam_actions.extract_iam_action(service, method, path, headers, body, query)
            if action in ("cloudwatch:DeleteAlarms", "cloudwatch:DescribeAlarms"):
                names = ["*"] if action == "cloudwatch:DescribeAlarms" else json.loads(body)["AlarmNames"]
                return f"arn:aws:cloudwatch:{region}:{account}:alarm:{names[0] if names else ''}"
        return str(arn_of(service, method, path, headers, body, query, region, account))

    iam_actions.extract_resource_arn = extract_resource_arn


# ---- state -----------------------------------------------------------------------------------------------------------


def deploy_in_progress() -> bool:
    """Return whether CloudFormation is in the middle of a deploy."""
    from ministack.services import cloudformation

    statuses = {stack["StackStatus"] for stack in cloudformation._stacks.all_values()} - {"REVIEW_IN_PROGRESS"}
    return any(status.endswith("_IN_PROGRESS") for status in statuses)


def states_of_services() -> Json:
    """Return the functions that read each service's state, for `save_states`."""
    from ministack import app

    states: Json = app._build_persistence_save_dict()
    return states


def save_states(states: Json) -> list[str]:
    """Save states of services; return MiniStack's messages about those that it could not save."""
    from ministack.core import persistence

    failures: list[str] = []

    class Failures(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            failures.append(record.getMessage())

    handler = Failures(logging.ERROR)
    persistence.logger.addHandler(handler)
    try:
        persistence.save_all(states)
    finally:
        persistence.logger.removeHandler(handler)
    return failures
