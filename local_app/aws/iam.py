"""IAM's decisions about requests that MiniStack does not serve itself."""

import base64

from local_app.aws.signatures import Refused, Signed, check_signature
from local_app.common import ACCOUNT, REGION, Json
from local_app.credentials import Credentials


def authorize(request: Json, root: Credentials) -> Json:
    """Return `{}` if IAM allows a signed request to the SageMaker emulator, else the `code` and `message` of AWS's refusal.

    `request["signed"]` is the request (`method`, `path`, `query`, `headers`, `body` in base64). `request["checks"]` are the
    permissions that it needs (`action`, `resource`, and condition keys as `context`). `root` are the account's own
    credentials.
    """
    from ministack.core import iam_actions, iam_evaluator, responses

    signed = request["signed"]
    try:
        access_key = check_signature(
            Signed(signed["method"], signed["path"], signed["query"], signed["headers"], base64.b64decode(signed["body"])),
            root,
        )
    except Refused as refused:
        return {"code": refused.code, "message": refused.message}
    responses.set_request_account_id(ACCOUNT)
    responses.set_request_region(REGION)
    for check in request["checks"]:
        action, resource = check["action"], check["resource"]
        denied = iam_evaluator.enforce(access_key, action, action.partition(":")[0], REGION, resource, check["context"])
        if denied is not None:
            explicit = denied.decision == "Deny"
            message = iam_actions.identity_denial_message(action, denied.principal_arn, resource, explicit)
            return {"code": "AccessDeniedException", "message": message}
    return {}


def rule_may_invoke(function: Json, config: Json, rule_arn: str) -> bool:
    """Return whether a function's resource policy lets an EventBridge rule invoke it."""
    from ministack.core import iam_evaluator

    _, _, _, region, account, _ = rule_arn.split(":", 5)
    request = iam_evaluator.EvalContext(
        principal_arn="events.amazonaws.com",
        principal_type="Service",
        principal_account=account,
        action="lambda:InvokeFunction",
        resource_arn=config["FunctionArn"],
        region=region,
        service_context={"aws:sourcearn": rule_arn, "aws:sourceaccount": account},
    )
    decision = iam_evaluator.evaluate_resource_policy(function["policy"], request, service="events.amazonaws.com")
    return bool(decision.decision == "Allow")
