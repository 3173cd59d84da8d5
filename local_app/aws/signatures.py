"""Lets a request through only if it is signed with credentials of the local account.

MiniStack itself takes every request with the access key `test` or an account's number as root, without looking at the
signature, takes unsigned requests to S3, and has administrative paths that need no credentials at all.
"""

import hashlib
import json
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, cast
from urllib.parse import parse_qs

from local_app.asgi import Receive, Scope, headers_of
from local_app.common import ACCOUNT
from local_app.credentials import OWN_SERVICE, Credentials

# AWS serves the links in SNS's messages without credentials: the token, or the subscription's ARN, is the secret.
_UNSIGNED_LINKS = ("ConfirmSubscription", "Unsubscribe")
_SERVICES_WITH_JSON_ERRORS = ("lambda", OWN_SERVICE)
_HASH = re.compile("[0-9a-f]{64}")
_UNKNOWN = ("InvalidClientTokenId", "The security token included in the request is invalid.")


class Refused(Exception):  # noqa: N818 - the caller's error
    """A request without a valid signature. `code` and `message` are AWS's."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message


class Signed(NamedTuple):
    """The parts of a request that its signature covers."""

    method: str
    raw_path: str
    query: Mapping[str, Any]
    headers: Mapping[str, str]
    body: bytes


def signed_parts(scope: Scope, body: bytes) -> Signed:
    """Return the parts of an ASGI request that its signature covers."""
    query = parse_qs(scope.get("query_string", b"").decode(), keep_blank_values=True)
    return Signed(scope["method"], scope["raw_path"].decode("latin-1"), query, headers_of(scope), body)


def check_signature(request: Signed, root: Credentials) -> str:
    """Return the access key of a request with a valid SigV4 signature, in its headers or (presigned) in its query.

    The key is `root`'s, an IAM user's or a role session's. Raises Refused.
    https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html
    """
    from ministack.core import router, sigv4

    in_header = request.headers.get("authorization", "").startswith("AWS4-HMAC-SHA256 ")
    if not in_header and "X-Amz-Signature" not in request.query:
        raise Refused("MissingAuthenticationToken", "Missing Authentication Token: the request is not signed")
    parse = sigv4.parse_header_signature if in_header else sigv4.parse_query_signature
    signature = parse(request.headers if in_header else request.query)
    if isinstance(signature, tuple):
        raise Refused(*signature)
    # MiniStack must decide about the key of this signature, and not about a second key in the request.
    if signature.access_key_id != router.extract_access_key_id(request.headers, request.query) or signature.region_set:
        raise Refused(*_UNKNOWN)
    # An unsigned x-amz-target would direct a signed request to another operation.
    unsigned = {name for name in request.headers if name.startswith("x-amz-")} - set(signature.signed_headers.split(";"))
    if unsigned - {"x-amz-content-sha256"}:
        raise Refused("AccessDenied", f"There were headers present in the request which were not signed: {sorted(unsigned)}")
    digest = request.headers.get("x-amz-content-sha256", "")
    if _HASH.fullmatch(digest) and digest != hashlib.sha256(request.body).hexdigest():
        raise Refused("XAmzContentSHA256Mismatch", "The provided 'x-amz-content-sha256' header does not match the body.")
    secret = _secret(signature.access_key_id, request, root)
    if failure := _too_old(signature, request, in_header) or sigv4.header_signature_failure(
        signature, secret, *request, presigned=not in_header
    ):
        raise Refused(*failure)
    return str(signature.access_key_id)


def _secret(key: str, request: Signed, root: Credentials) -> str:
    """Return the secret of an access key. Raises Refused for an unknown key, or for a wrong session token."""
    from ministack.core import iam_evaluator

    if key == root.access_key_id:
        return root.secret_access_key
    if iam_evaluator.is_root_access_key(key):
        raise Refused(*_UNKNOWN)
    token = request.headers.get("x-amz-security-token") or request.query.get("X-Amz-Security-Token", [""])[0]
    credential = iam_evaluator.resolve_credential(key, ACCOUNT, token)
    if isinstance(credential, iam_evaluator.CredentialResolutionError):
        raise Refused(credential.code, credential.message)
    return str(credential.secret_access_key)


def _too_old(signature: Any, request: Signed, in_header: bool) -> tuple[str, str] | None:
    """Return the code and message for a request that was signed too long ago, None for a fresh one."""
    from ministack.core import sigv4

    try:
        time.strptime(signature.amz_date, "%Y%m%dT%H%M%SZ")
        if in_header:
            return cast(tuple[str, str] | None, sigv4.request_time_failure(signature))
        over = sigv4.presigned_request_is_expired(signature.amz_date, request.query["X-Amz-Expires"][0])
    except (ValueError, KeyError):
        return "IncompleteSignature", "The request's date or its X-Amz-Expires is not valid."
    return ("AccessDenied", "Request has expired") if over else None


def is_unsigned_link(scope: Scope) -> bool:
    """Return whether a request is a link in an SNS message."""
    query = parse_qs(scope.get("query_string", b"").decode(), keep_blank_values=True)
    return (scope["method"], scope["path"]) == ("GET", "/") and query.get("Action", [""])[0] in _UNSIGNED_LINKS


def replayed(body: bytes) -> Receive:
    """Return ASGI's `receive` for a request whose body has been read."""
    messages = iter([{"type": "http.request", "body": body}])

    async def receive() -> dict[str, Any]:
        return next(messages, {"type": "http.disconnect"})

    return receive


def refusal(scope: Scope, refused: Refused) -> tuple[bytes, str]:
    """Return the body and the content type of a response 403 that the SDKs understand."""
    headers = headers_of(scope)
    service = (headers.get("authorization", "").split("/") + [""] * 4)[3]
    if "json" in headers.get("content-type", "") or service in _SERVICES_WITH_JSON_ERRORS:
        return json.dumps({"__type": refused.code, "message": refused.message}).encode(), "application/json"
    text = f"<Code>{refused.code}</Code><Message>{refused.message}</Message>"
    error = f"<Error>{text}</Error>"
    body = error if service == "s3" else f"<ErrorResponse>{error}</ErrorResponse>"
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{body}'.encode(), "application/xml"
