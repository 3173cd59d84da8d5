"""What keeps a stack from working, on AWS or on this machine, and how to mend it. It only reads.

Each check takes the deployed stack and yields what it finds. `ACTIONS` has every call that is made, and the IAM action that
each needs; docs/operations.md lists these. Where a permission is missing, the check is left out and that is said.
"""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import msgspec
from botocore.exceptions import BotoCoreError, ClientError

from pipeline.aws import error_code, read_object
from pipeline.validation.model_files import missing_files
from release.target import ECR_IMAGE, differences, target_of_outputs
from tunedrop import object_keys
from tunedrop_cli.deployment import Place

Json = dict[str, Any]
# The operations that the checks call, and the IAM action that allows each.
ACTIONS = {
    "DescribeStacks": "cloudformation:DescribeStacks",
    "DescribeStackEvents": "cloudformation:DescribeStackEvents",
    "ListStackResources": "cloudformation:ListStackResources",
    "GetObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "GetBucketNotificationConfiguration": "s3:GetBucketNotification",
    "ListServiceQuotas": "servicequotas:ListServiceQuotas",
    "ListAWSDefaultServiceQuotas": "servicequotas:ListAWSDefaultServiceQuotas",
    "DescribeImages": "ecr:DescribeImages",
    "DescribeKey": "kms:DescribeKey",
    "GetKeyPolicy": "kms:GetKeyPolicy",
    "ListSubscriptionsByTopic": "sns:ListSubscriptionsByTopic",
    "ListRules": "events:ListRules",
    "GetFunctionConfiguration": "lambda:GetFunctionConfiguration",
    "GetMetricData": "cloudwatch:GetMetricData",
    "DescribeAlarms": "cloudwatch:DescribeAlarms",
    "GetQueueAttributes": "sqs:GetQueueAttributes",
}
DENIED = ("AccessDenied", "AuthorizationError", "UnauthorizedOperation")
# Statuses of a stack (https://docs.aws.amazon.com/AWSCloudFormation/latest/UserGuide/view-stack-events.html) whose resources
# are all there, and what to do about the others.
WHOLE = frozenset({"CREATE_COMPLETE", "UPDATE_COMPLETE", "UPDATE_ROLLBACK_COMPLETE", "IMPORT_COMPLETE"})
NOT_WHOLE = {
    "REVIEW_IN_PROGRESS": "Its change set was not executed. Run `make deploy` and answer yes.",
    "UPDATE_ROLLBACK_FAILED": "Mend the cause, run `{continue}`, then deploy again.",
    "DELETE_FAILED": "Delete by hand what is in the way, then run `{delete}` again.",
}
NEVER_MADE = "Mend the cause, delete what is left with `{delete}`, then deploy again."
ROOM = "for spot training job usage", "for training job usage"  # how the quotas of an instance type are named
LAST = timedelta(hours=24)
# What a customer's key must let be done, by roles, log groups and alarms; docs/operations.md has the policy.
ROLES_USE = "kms:Encrypt kms:Decrypt kms:GenerateDataKey kms:DescribeKey kms:CreateGrant".split()
LOGS_USE = "kms:Encrypt kms:Decrypt kms:ReEncryptFrom kms:ReEncryptTo kms:GenerateDataKey kms:DescribeKey".split()
ALARMS_USE = "kms:Decrypt kms:GenerateDataKey".split()


class Finding(msgspec.Struct, frozen=True):
    """What is wrong, and what to do about it. What is no `trouble` keeps no run from working, but is worth knowing."""

    code: str
    what: str
    do: str
    trouble: bool = True


class Quota(msgspec.Struct, frozen=True):
    """A quota of SageMaker, in instances."""

    code: str
    value: float


class Deployed:
    """A stack whose resources are there: what CloudFormation knows of it, and clients of the services it uses."""

    def __init__(self, place: Place, stack: Json):
        self.place = place
        self.client = cache(partial(place.connect, "client"))
        self.name: str = stack["StackName"]
        _, self.partition, _, self.region, self.account, _ = stack["StackId"].split(":", 5)
        self.parameters: dict[str, str] = {
            each["ParameterKey"]: each.get("ParameterValue", "") for each in stack.get("Parameters", [])
        }
        self.outputs: dict[str, str] = {each["OutputKey"]: each.get("OutputValue", "") for each in stack.get("Outputs", [])}

    @cached_property
    def _resources(self) -> list[Json]:
        pages = self.client("cloudformation").get_paginator("list_stack_resources").paginate(StackName=self.name)
        return [each for page in pages for each in page["StackResourceSummaries"] if each.get("PhysicalResourceId")]

    def resources(self, kind: str) -> dict[str, str]:
        """Return the physical ids of the stack's resources of a type, by logical id."""
        return {
            each["LogicalResourceId"]: each["PhysicalResourceId"] for each in self._resources if each["ResourceType"] == kind
        }


def examine(place: Place) -> list[Finding]:
    """Return all that is wrong with a stack, what to know beside it last; nothing of a healthy one."""
    findings: list[Finding] = []
    try:
        deployed = _deployed(place, findings)
    except ClientError as error:
        deployed = None
        findings.append(_refusal(error, "Sign in again, or name another profile (`--profile`)."))
    except BotoCoreError as error:
        deployed = None
        do = "Name a profile and a region (`--profile`, `--region`) that are set up on this machine."
        findings.append(Finding("NOT_REACHED", f"AWS cannot be asked: {error}", do))
    if deployed is None:  # nothing else can be said, then
        return [msgspec.structs.replace(finding, trouble=True) for finding in findings]
    for check in [*CHECKS, *(ON_AWS if place.on_aws else [])]:
        try:
            findings += check(deployed)
        except ClientError as error:
            findings.append(_refusal(error, "If a resource of the stack is gone, deploy again."))
        except BotoCoreError as error:
            findings.append(Finding("NOT_REACHED", f"A check was not made: {error}", "Ask again later.", False))
    return sorted(dict.fromkeys(findings), key=lambda finding: not finding.trouble)


def report(name: str, findings: list[Finding]) -> str:
    """Return what was found of the stack of this name as text for people."""
    troubles = sum(finding.trouble for finding in findings)
    verdict = {0: "nothing is wrong", 1: "one thing is wrong"}.get(troubles, f"{troubles} things are wrong")
    lines = [f"{name}: {verdict}."]
    for finding in findings:
        mark = "" if finding.trouble else " (to know)"
        lines += ["", f"{finding.code}{mark}: {finding.what}", *([f"  {finding.do}"] if finding.do else [])]
    return "\n".join(lines)


def _refusal(error: ClientError, do: str) -> Finding:
    """Say that a call was refused: no trouble of the stack's where only a permission is missing."""
    action = ACTIONS[error.operation_name]
    if error_code(error).startswith(DENIED):
        return Finding("NOT_ALLOWED", f"A check was not made: {action} is not allowed.", f"Have {action} allowed.", False)
    message = error.response["Error"].get("Message", "")
    return Finding("REFUSED", f"AWS refuses {error.operation_name}: {error_code(error)}: {message}", do)


# ---- the stack itself ------------------------------------------------------------------------------------------------


def _deployed(place: Place, findings: list[Finding]) -> Deployed | None:
    """Return the stack if its resources are there, and note in `findings` what is wrong with it as a whole."""
    cloudformation = place.connect("client", "cloudformation")
    try:
        (stack,) = cloudformation.describe_stacks(StackName=place.stack_name)["Stacks"]
    except ClientError as error:
        if error_code(error) != "ValidationError":
            raise
        message = f"There is no stack '{place.stack_name}' in {place.aws_options['region']}."
        findings.append(Finding("STACK_MISSING", message, "Deploy it with `make deploy`, or name another (`--stack`)."))
        return None
    status = stack["StackStatus"]
    if status not in {"CREATE_COMPLETE", "UPDATE_COMPLETE", "IMPORT_COMPLETE"}:
        findings.append(_state(place, status, cloudformation))
    if status not in WHOLE:
        return None
    deployed = Deployed(place, stack)
    try:
        target_of_outputs(deployed.outputs)
    except KeyError as missing:
        message = f"The stack has no output {missing}: it is not a stack of this template."
        findings.append(
            Finding("STACK_FOREIGN", message, "Name another (`--stack`), or deploy this version with `make deploy`.")
        )
        return None
    return deployed


def _state(place: Place, status: str, cloudformation: Any) -> Finding:
    name = place.stack_name
    what = f"The stack is {status}"
    if status == "UPDATE_ROLLBACK_COMPLETE":
        what, do = f"{what}: the last deploy failed, and the stack is as before it", "Mend the cause, then deploy again."
    elif status in NOT_WHOLE:
        do = NOT_WHOLE[status]
    elif "ROLLBACK" in status or "FAILED" in status:
        do = NEVER_MADE
    else:
        do = "Wait until CloudFormation has ended, then ask again."
    for word, command in {"delete": "delete-stack", "continue": "continue-update-rollback"}.items():
        do = do.replace(f"{{{word}}}", place.aws_command(f"cloudformation {command} --stack-name {name}"))
    cause = None if status == "REVIEW_IN_PROGRESS" else _cause(name, cloudformation)
    return Finding("STACK_STATE", f"{what}. It began with {cause}" if cause else f"{what}.", do)


def _cause(name: str, cloudformation: Any) -> str | None:
    """Return what failed first in what CloudFormation did last with the stack. Its events come the newest first."""
    cause = None
    for page in cloudformation.get_paginator("describe_stack_events").paginate(StackName=name):
        for event in page["StackEvents"]:
            status, of_stack = event.get("ResourceStatus", ""), event.get("LogicalResourceId") == name
            if of_stack and status in {"CREATE_IN_PROGRESS", "UPDATE_IN_PROGRESS", "DELETE_IN_PROGRESS"}:
                return cause
            if not of_stack and status.endswith("_FAILED"):
                cause = f"{event['LogicalResourceId']}: {event.get('ResourceStatusReason', status)}"
    return cause


# ---- launch plan, model ----------------------------------------------------------------------------------------------


def launch_plan(deployed: Deployed) -> Iterator[Finding]:
    """The launch plan is there, and made of the stack's present parameters."""
    s3, bucket = deployed.client("s3"), deployed.outputs["ArtifactBucket"]
    release = f"Run `{deployed.place.release}`."
    key = object_keys.CURRENT_PLAN
    current = read_object(s3, bucket, key)
    plan = None
    if current is not None:
        key = f"{object_keys.LAUNCH_PLANS}{msgspec.json.decode(current)['digest']}.json"
        plan = read_object(s3, bucket, key)
    if plan is None:
        yield Finding("PLAN_MISSING", f"There is no launch plan: s3://{bucket}/{key} is missing.", release)
        return
    target, requests = target_of_outputs(deployed.outputs), msgspec.json.decode(plan)
    others = dict.fromkeys(each for kind in ("train", "test") for each in differences(target, requests[kind]))
    if others:
        said = "; ".join(f"{name} is '{now}' and was '{then}'" for name, now, then in others)
        yield Finding("PLAN_OUTDATED", f"The launch plan was made of other parameters: {said}.", release)


def base_model(deployed: Deployed) -> Iterator[Finding]:
    """The base model that runs have by default is there, and whole."""
    model, bucket = deployed.parameters["BaseModel"], deployed.outputs["DataBucket"]
    if "/" in model:  # a hub id
        return
    prefix = object_keys.model_prefix(model)
    pages = deployed.client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    names = {item["Key"].removeprefix(prefix) for page in pages for item in page.get("Contents", [])}
    if missing := missing_files(names):
        place = f"s3://{bucket}/{prefix}"
        code = "MODEL_INCOMPLETE" if names else "MODEL_MISSING"
        what = f"The base model '{model}' lacks {', '.join(missing)} in {place}."
        upload = deployed.place.aws_command(f"s3 sync ./{model} {place}")
        yield Finding(code, what, f"Upload its files with `{upload}`, or name another in each run's config (`model:`).")


# ---- events and notifications ----------------------------------------------------------------------------------------


def bucket_events(deployed: Deployed) -> Iterator[Finding]:
    """S3 tells EventBridge of what is dropped."""
    bucket = deployed.outputs["DataBucket"]
    if "EventBridgeConfiguration" in deployed.client("s3").get_bucket_notification_configuration(Bucket=bucket):
        return
    on = f"s3api put-bucket-notification-configuration --bucket {bucket}"
    on = deployed.place.aws_command(f"{on} --notification-configuration '{{\"EventBridgeConfiguration\": {{}}}}'")
    do = f"Run `{on}`, which replaces what else the bucket notifies."
    yield Finding("BUCKET_EVENTS_OFF", f"The bucket {bucket} tells EventBridge nothing: no dropped file starts a run.", do)


def rules(deployed: Deployed) -> Iterator[Finding]:
    """The stack's rules are enabled."""
    # A rule on a bus of one's own may have its bus before its name, and a bar between them.
    wanted = {physical.rpartition("|")[2]: name for name, physical in deployed.resources("AWS::Events::Rule").items()}
    there: dict[str, tuple[str, str]] = {}  # state and bus
    for bus in ("default", deployed.outputs["EventBusName"]):
        for page in deployed.client("events").get_paginator("list_rules").paginate(EventBusName=bus):
            there |= {rule["Name"]: (rule["State"], bus) for rule in page["Rules"]}
    for rule, name in wanted.items():
        state, bus = there.get(rule, ("", ""))
        if not state:
            yield Finding("RULE_MISSING", f"The rule {rule} ({name}) is gone: its events reach nobody.", _REPLACE)
        elif state == "DISABLED":
            on = deployed.place.aws_command(f"events enable-rule --name {rule} --event-bus-name {bus}")
            yield Finding("RULE_DISABLED", f"The rule {rule} ({name}) is disabled: its events reach nobody.", f"Run `{on}`.")


# CloudFormation makes a resource again only when its template changes.
_REPLACE = "Delete the stack and deploy it again. Its buckets, table and models stay; the new stack has its own."


def subscriptions(deployed: Deployed) -> Iterator[Finding]:
    """E-mail addresses have confirmed that they want the messages."""
    address = deployed.parameters["NotificationEmail"]
    for name in ("TopicArn", "AlarmTopicArn"):
        topic = deployed.outputs[name]
        pages = deployed.client("sns").get_paginator("list_subscriptions_by_topic").paginate(TopicArn=topic)
        there = [each for page in pages for each in page["Subscriptions"] if each["Protocol"].startswith("email")]
        for each in there:
            if each["SubscriptionArn"] == "PendingConfirmation":
                what = f"{each['Endpoint']} has not confirmed its subscription of {topic}: it gets no message."
                do = "Follow the link in the e-mail 'AWS Notification - Subscription Confirmation' (look into the spam)."
                yield Finding("SUBSCRIPTION_UNCONFIRMED", what, do)
        if address and address not in {each["Endpoint"] for each in there}:
            # One that nobody confirms goes away after 48 hours, and so does one that somebody ends
            # (https://aws.amazon.com/about-aws/whats-new/2023/05/amazon-sns-automatic-deletion-unconfirmed-subscriptions/).
            again = f"sns subscribe --topic-arn {topic} --protocol email --notification-endpoint {address}"
            again = deployed.place.aws_command(again)
            what = f"{address} (NotificationEmail) does not subscribe {topic} any more: it gets no message."
            yield Finding("SUBSCRIPTION_GONE", what, f"Run `{again}` and confirm the e-mail that comes.")


# ---- functions, queue, alarms ----------------------------------------------------------------------------------------


def functions(deployed: Deployed) -> Iterator[Finding]:
    """The functions can be invoked."""
    for function in deployed.resources("AWS::Lambda::Function").values():
        about = deployed.client("lambda").get_function_configuration(FunctionName=function)
        state, update = about.get("State", "Active"), about.get("LastUpdateStatus", "Successful")
        if state != "Active":
            reason = about.get("StateReason", "no reason is known")
            do = "Wait a minute and ask again." if state == "Pending" else "Mend the cause, then deploy again."
            yield Finding("FUNCTION_STATE", f"The function {function} is {state}: {reason}", do)
        elif update == "Failed":
            reason = about.get("LastUpdateStatusReason", "no reason is known")
            what = f"The last update of the function {function} failed: {reason}"
            yield Finding("FUNCTION_STATE", what, "Mend the cause, then deploy again.")


def function_errors(deployed: Deployed) -> Iterator[Finding]:
    """No function has failed in the last day."""
    names = deployed.resources("AWS::Lambda::Function")
    groups = deployed.resources("AWS::Logs::LogGroup")
    queries = [
        {
            "Id": f"function{number}",
            "MetricStat": {
                "Metric": {
                    "Namespace": "AWS/Lambda",
                    "MetricName": "Errors",
                    "Dimensions": [{"Name": "FunctionName", "Value": function}],
                },
                "Period": 3600,
                "Stat": "Sum",
            },
        }
        for number, function in enumerate(names.values())
    ]
    now = datetime.now(UTC)
    pages = deployed.client("cloudwatch").get_paginator("get_metric_data")
    sums = dict.fromkeys((query["Id"] for query in queries), 0)
    for page in pages.paginate(MetricDataQueries=queries, StartTime=now - LAST, EndTime=now):
        for result in page["MetricDataResults"]:
            sums[result["Id"]] += int(sum(result["Values"]))
    for (name, function), errors in zip(names.items(), sums.values(), strict=True):
        if errors:
            group = groups[name.removesuffix("Function") + "Logs"]
            read = deployed.place.aws_command(f"logs tail {group} --since 24h --filter-pattern ERROR")
            times = "once" if errors == 1 else f"{errors} times"
            what = f"The function {function} failed {times} in the last 24 hours. A user's mistake is never such a failure."
            yield Finding("FUNCTION_ERRORS", what, f"Read its log with `{read}`.")


def dead_letters(deployed: Deployed) -> Iterator[Finding]:
    """No event waits for somebody to look at it."""
    queue, count = deployed.outputs["DeadLetterQueueUrl"], "ApproximateNumberOfMessages"
    attributes = deployed.client("sqs").get_queue_attributes(QueueUrl=queue, AttributeNames=[count])["Attributes"]
    if letters := int(attributes[count]):
        what = f"{letters} event{'s' if letters > 1 else ''} that no function could take in the dead-letter queue {queue}."
        redrive = deployed.place.command("redrive")
        do = f"Mend the cause, which the functions' logs name; then `{redrive}` gives them to their functions."
        yield Finding("DEAD_LETTERS", what, do)


def alarms(deployed: Deployed) -> Iterator[Finding]:
    """No alarm has gone off."""
    names = list(deployed.resources("AWS::CloudWatch::Alarm").values())
    pages = deployed.client("cloudwatch").get_paginator("describe_alarms")
    for alarm in (alarm for page in pages.paginate(AlarmNames=names) for alarm in page["MetricAlarms"]):
        if alarm["StateValue"] == "ALARM":
            what = f"The alarm {alarm['AlarmName']} has gone off. {alarm['AlarmDescription']}"
            yield Finding("ALARM", what, "docs/operations.md says what each alarm asks for.")


# ---- keys ------------------------------------------------------------------------------------------------------------


def key(deployed: Deployed) -> Iterator[Finding]:
    """A customer's key is enabled and lets those use it who must (docs/operations.md, Keys)."""
    arn = deployed.outputs["KmsKeyArn"]
    if not arn:
        return
    kms = deployed.client("kms")
    about = kms.describe_key(KeyId=arn)["KeyMetadata"]
    if about["KeyState"] != "Enabled":
        on = deployed.place.aws_command(f"kms enable-key --key-id {arn}")
        do = f"Cancel its deletion, if that is planned, and run `{on}`."
        yield Finding("KEY_STATE", f"The key {arn} is {about['KeyState']}: nothing can be read or written under it.", do)
    policy = msgspec.json.decode(kms.get_key_policy(KeyId=arn, PolicyName="default")["Policy"])
    allowed = [statement for statement in _listed(policy["Statement"]) if statement["Effect"] == "Allow"]
    missing: dict[str, dict[str, None]] = {}
    for use in _uses(deployed):
        for action in use.actions:
            if not any(_lets(statement, use, action) for statement in allowed):
                missing.setdefault(use.who, {})[action] = None
    for who, actions in missing.items():
        what = f"The policy of the key {arn} does not let {who} do {', '.join(actions)}."
        do = "Add the statement that docs/operations.md (Keys) has for that, with this stack's names in its conditions."
        yield Finding("KEY_POLICY", what, do)


class _Use(NamedTuple):
    """Who must do what with a customer's key: principals of a `kind`, any of which will do, and what a request says."""

    who: str
    kind: str
    principals: set[str]
    actions: list[str]
    context: dict[str, str]


def _uses(deployed: Deployed) -> Iterator[_Use]:
    """Yield what a customer's key must let be done (docs/operations.md, Keys)."""
    region, account, partition = deployed.region, deployed.account, deployed.partition
    of_account = f"arn:{partition}:iam::{account}"
    for role in deployed.resources("AWS::IAM::Role").values():
        principals = {account, f"{of_account}:root", f"{of_account}:role/{role}"}
        yield _Use("the account's roles", "AWS", principals, ROLES_USE, {"aws:PrincipalAccount": account})
    logs = {f"logs.{region}.amazonaws.com", f"logs.{region}.amazonaws.com.cn"}
    for group in deployed.resources("AWS::Logs::LogGroup").values():
        context = {"kms:EncryptionContext:aws:logs:arn": f"arn:{partition}:logs:{region}:{account}:log-group:{group}"}
        yield _Use("CloudWatch Logs", "Service", logs, LOGS_USE, context)
    yield _Use("alarms", "Service", {"cloudwatch.amazonaws.com"}, ALARMS_USE, {"aws:SourceAccount": account})


def _lets(statement: Json, use: _Use, action: str) -> bool:
    """Whether a statement that allows lets an action be done.

    Conditions on what is in the use's context are held against it; others are taken to hold.
    """
    named = statement.get("Principal", {})
    principals = {"*"} if named == "*" else set(_listed(named.get(use.kind, [])))
    actions = [pattern.lower() for pattern in _listed(statement.get("Action", []))]
    return (
        bool(principals & (use.principals | {"*"}))
        and any(fnmatchcase(action.lower(), pattern) for pattern in actions)
        and all(
            any(fnmatchcase(use.context[name], pattern) for pattern in _listed(patterns))
            for condition in statement.get("Condition", {}).values()
            for name, patterns in condition.items()
            if name in use.context
        )
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


# ---- what only AWS has -----------------------------------------------------------------------------------------------


def quotas(deployed: Deployed) -> Iterator[Finding]:
    """The account may use one of the instance types that runs use by default: a type without room is passed over.

    On demand, SageMaker chooses among all types only if each one's quota covers the job
    (https://docs.aws.amazon.com/sagemaker/latest/dg/train-instance-preferences.html); else they are tried one by one.
    """
    spot = deployed.parameters["UseSpot"] == "true"
    jobs = int(deployed.parameters["MaxConcurrentJobs"])
    types = [name.strip() for name in deployed.parameters["InstanceTypes"].split(",")]
    names = [f"{each} {ROOM[0] if spot else ROOM[1]}" for each in types]
    found = _quotas(deployed, set(names))
    works = any(found[name].value >= 1 for name in names if name in found)
    rest = " The other types work." if works else ""
    for name in names:
        quota = found.get(name)
        if quota is None:
            what = f"Service Quotas has no quota '{name}' in {deployed.region}: SageMaker has no such instance there.{rest}"
            do = "Name other types (parameter InstanceTypes), or deploy in another region."
            yield Finding("QUOTA_UNKNOWN", what, do, trouble=not works)
            continue
        more = f"service-quotas request-service-quota-increase --service-code sagemaker --quota-code {quota.code}"
        ask = f"Ask for more with `{deployed.place.aws_command(f'{more} --desired-value {jobs}')}`."
        if quota.value < 1:
            what = f"The quota '{name}' ({quota.code}) is {quota.value:g} in {deployed.region}: no job starts on it.{rest}"
            yield Finding("QUOTA_ZERO", what, ask, trouble=not works)
        elif quota.value < jobs:
            what = f"The quota '{name}' ({quota.code}) is {quota.value:g}, and MaxConcurrentJobs {jobs}: further runs wait."
            yield Finding("QUOTA_LOW", what, ask, trouble=False)


def _quotas(deployed: Deployed, names: set[str]) -> dict[str, Quota]:
    """Return SageMaker's quotas of these names: those that apply to the account, else those that every account begins with.

    ListServiceQuotas leaves out a quota whose applied value is not known
    (https://docs.aws.amazon.com/servicequotas/2019-06-24/apireference/API_ListServiceQuotas.html).
    """
    found: dict[str, Quota] = {}
    for operation in ("list_service_quotas", "list_aws_default_service_quotas"):
        if names <= found.keys():
            break
        for page in deployed.client("service-quotas").get_paginator(operation).paginate(ServiceCode="sagemaker"):
            there = {each["QuotaName"]: Quota(each["QuotaCode"], each["Value"]) for each in page["Quotas"]}
            found |= {name: there[name] for name in names - found.keys() & there.keys()}
            if names <= found.keys():  # SageMaker has thousands
                break
    return found


def image(deployed: Deployed) -> Iterator[Finding]:
    """The jobs' image is in the stack's region, and is there.

    SageMaker takes an image of the job's own region only (https://github.com/aws-samples/mlops-amazon-sagemaker/issues/9).
    AWS's registries answer DescribeImages, too, for those whom IAM allows it.
    """
    uri = deployed.outputs["TrainingImageUri"]
    parts = ECR_IMAGE.fullmatch(uri)
    if parts is None:
        what = f"The image '{uri}' is not in ECR, where SageMaker's jobs pull from."
        yield Finding("IMAGE_PLACE", what, "Push it to ECR, and deploy again with its URI (parameter TrainingImageUri).")
        return
    if parts["region"] != deployed.region:
        what = f"The image '{uri}' is in {parts['region']}, and the stack in {deployed.region}."
        do = f"Push it to ECR in {deployed.region}, and deploy again with its URI (parameter TrainingImageUri)."
        yield Finding("IMAGE_PLACE", what, do)
        return
    names = {"imageDigest": parts["digest"]} if parts["digest"] else {"imageTag": parts["tag"] or "latest"}
    place = {"registryId": parts["account"], "repositoryName": parts["repository"]}
    try:
        deployed.client("ecr").describe_images(**place, imageIds=[names])
    except ClientError as error:
        if error_code(error) not in {"ImageNotFoundException", "RepositoryNotFoundException"}:
            raise
        what = f"There is no image '{uri}': {error.response['Error']['Message']}"
        do = "Push it, or deploy again with another one or without one (parameter TrainingImageUri)."
        yield Finding("IMAGE_MISSING", what, do)


CHECKS: list[Callable[[Deployed], Iterator[Finding]]] = [
    *(launch_plan, base_model, bucket_events, rules, functions, function_errors, dead_letters, alarms, key, subscriptions),
]
# The local application pulls no image, and its SageMaker counts its own places.
ON_AWS: list[Callable[[Deployed], Iterator[Finding]]] = [quotas, image]
