"""SageMaker, Application Auto Scaling and Bedrock's Custom Model Import on this machine: an HTTP server.

boto3 reaches it through AWS_ENDPOINT_URL_SAGEMAKER, …_SAGEMAKER_RUNTIME, …_APPLICATION_AUTO_SCALING, …_BEDROCK and
…_BEDROCK_RUNTIME.

    python -m local_app.sagemaker.server --port 4570 --state-dir .tunedrop/sagemaker --s3-endpoint https://127.0.0.1:4566 \\
      --event-sink https://127.0.0.1:4566/_tunedrop/events --authorizer https://127.0.0.1:4566/_tunedrop/authorize

Training jobs are real processes on this machine (`job_process`), and so are the copies of inference components and of
imported models (`copies`). Their state survives a kill (`store`), and each change of a job's or an endpoint's state is an
EventBridge event. Every request is signed, and IAM decides about the request. The root credentials are the environment's.
Besides the AWS API, the server has `GET /_tunedrop/health`, which answers everybody, and, for root,
`POST /_tunedrop/interrupt/<job>` (a spot interruption).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs

from local_app.asgi import Application, Receive, Scope, Send, ThreadedServer, answer_json, headers_of, read_body
from local_app.common import ACCOUNT, REGION, Json
from local_app.credentials import Credentials, post_signed
from local_app.sagemaker import rest
from local_app.sagemaker.api import ServiceError
from local_app.sagemaker.emulator import BEDROCK_OPERATIONS, SageMakerEmulator
from local_app.sagemaker.permissions import RequiredPermission, bedrock_permissions, required_permissions
from local_app.sagemaker.runtime import parse
from local_app.sagemaker.sandbox import StartupError

logger = logging.getLogger(__name__)

# Raises ServiceError unless IAM grants a signed request (path, headers, body) the permissions that it needs.
Authorizer = Callable[[Json, list[RequiredPermission]], None]
# The same for one request.
Require = Callable[..., None]
# The services by the prefix of X-Amz-Target.
SERVICES = {"SageMaker": "sagemaker", "AnyScaleFrontendService": "application-autoscaling"}


def remote_authorizer(url: str, root: Credentials) -> Authorizer:
    """Return an authorizer that asks the AWS emulator at `url`, which verifies signatures and knows the account's roles."""

    def authorize(signed: Json, permissions: list[RequiredPermission]) -> None:
        checks = [permission._asdict() | {"context": dict(permission.context)} for permission in permissions]
        question = json.dumps({"signed": signed, "checks": checks}).encode()
        if refusal := post_signed(url, root, question, os.environ.get("AWS_CA_BUNDLE")):
            raise ServiceError(refusal["code"], refusal["message"])

    return authorize


def application(emulator: SageMakerEmulator, authorize: Authorizer | None) -> Application:
    """Return the ASGI application: AWS JSON 1.1 (POST / with `X-Amz-Target`), `/_tunedrop/`, and REST-JSON elsewhere."""

    async def serve_request(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = await read_body(receive)
        headers = {"x-amzn-requestid": str(uuid.uuid4())}
        require = _authorization(authorize, scope, body)
        if scope["path"] != "/" and not scope["path"].startswith("/_tunedrop/"):
            serve_rest = _invoke if scope["path"].startswith("/endpoints/") else _serve_bedrock
            try:
                _refuse_browsers(scope)
                await serve_rest(emulator, require, scope, body, receive, send)
            except Exception as error:  # noqa: BLE001 - the client gets a response
                status, content = _failure(error, scope)
                code = headers["x-amzn-errortype"] = content.pop("__type")  # as REST-JSON has it
                status = rest.error_statuses("sagemaker-runtime", *BEDROCK_OPERATIONS).get(code, status)
                await answer_json(send, status, content | {"Message": content["message"]}, headers)
            return
        # SQLite, the authorizer and STS block, so each request has a thread.
        status, content = await asyncio.to_thread(_respond, emulator, require, scope, body)
        await answer_json(send, status, content, headers | {"content-type": "application/x-amz-json-1.1"})

    return serve_request


def _authorization(authorize: Authorizer | None, scope: Scope, body: bytes) -> Require:
    """Return the function that raises ServiceError unless IAM grants a request the permissions that it needs."""
    request = _request(scope, body)
    signed = request._asdict() | {"body": base64.b64encode(body).decode()}

    def require(*permissions: RequiredPermission) -> None:
        if authorize:
            authorize(signed, list(permissions))

    return require


def _request(scope: Scope, body: bytes) -> rest.Request:
    query = parse_qs(scope["query_string"].decode(), keep_blank_values=True)
    return rest.Request(scope["method"], scope["raw_path"].decode("latin-1"), query, headers_of(scope), body)


def _refuse_browsers(scope: Scope) -> None:
    if headers_of(scope).get("origin"):  # a web page in the user's browser must not start jobs
        raise ServiceError("AccessDeniedException", "This server does not answer browsers.", 403)


def _failure(error: Exception, scope: Scope) -> tuple[int, Json]:
    """Return the HTTP status and the JSON document for an error."""
    if isinstance(error, json.JSONDecodeError):
        return 400, {"__type": "SerializationException", "message": str(error)}
    if isinstance(error, ServiceError):
        return error.status, {"__type": error.code, "message": error.message, **error.members}
    logger.error("%s %s", scope["path"], headers_of(scope).get("x-amz-target"), exc_info=error)
    return 500, {"__type": "InternalFailure", "message": repr(error)}


async def _invoke(
    emulator: SageMakerEmulator, require: Require, scope: Scope, body: bytes, receive: Receive, send: Send
) -> None:
    """Answer a request of SageMaker Runtime."""
    invocation = parse(scope["method"], scope["path"], headers_of(scope), body)
    permissions = required_permissions(invocation.operation, invocation.parameters, emulator.arn_prefix)
    await asyncio.to_thread(require, *permissions)
    await emulator.runtime.serve(invocation, receive, send)


async def _serve_bedrock(
    emulator: SageMakerEmulator, require: Require, scope: Scope, body: bytes, receive: Receive, send: Send
) -> None:
    """Answer a request of Bedrock or of Bedrock Runtime."""
    call = rest.parse(_request(scope, body), BEDROCK_OPERATIONS)
    if call is None:
        there = ", ".join(name for names in BEDROCK_OPERATIONS.values() for name in names)
        message = f"There is no {scope['method']} {scope['path']} here. Of Bedrock, the local application has {there}."
        raise ServiceError("UnknownOperationException", f"{message} It has no foundation models.", 404)
    await asyncio.to_thread(_authorize_bedrock, emulator, require, call)
    if call.operation.name in BEDROCK_OPERATIONS["bedrock-runtime"]:
        await emulator.bedrock_runtime.serve(call, receive, send)
        return
    result = await asyncio.to_thread(emulator.call_bedrock, call)
    await answer_json(send, *rest.answer(call, result), {"x-amzn-requestid": str(uuid.uuid4())})


def _authorize_bedrock(emulator: SageMakerEmulator, require: Require, call: rest.Call) -> None:
    """Raise ServiceError unless IAM grants a call to Bedrock its permissions, by the ARN and the tags of the model."""
    request = call.parameters
    named = {name: request[name] for name in ("modelId", "modelIdentifier") if name in request}
    model = next(filter(None, map(emulator.imported_models.find, named.values())), None)
    tags = model["tags"] if model else {}
    request = request | (dict.fromkeys(named, model["modelArn"]) if model else {})
    require(*bedrock_permissions(call.operation.name, request, emulator.bedrock_prefix, tags))


def _respond(emulator: SageMakerEmulator, require: Require, scope: Scope, body: bytes) -> tuple[int, Json]:
    """Return the HTTP status and the JSON document for a request."""
    path = scope["path"]
    try:
        if scope["method"] == "GET":
            if path == "/_tunedrop/health":
                return 200, emulator.health()
            raise ServiceError("NotFound", f"There is no {path} here.", 404)
        _refuse_browsers(scope)
        prefix, _, job = path.rpartition("/")
        if prefix == "/_tunedrop/interrupt":
            # An action of no AWS service: policies grant it to nobody but root.
            require(RequiredPermission("tunedrop:InterruptTrainingJob", f"{emulator.arn_prefix}:training-job/{job}"))
            emulator.interrupt(job)
            return 202, {}
        require()  # the signature, before the request is read
        return 200, _call(emulator, require, headers_of(scope).get("x-amz-target", ""), body)
    except Exception as error:  # noqa: BLE001 - the client gets a response
        return _failure(error, scope)


def _call(emulator: SageMakerEmulator, require: Require, target: str, body: bytes) -> Json:
    prefix, _, operation = target.partition(".")
    if prefix not in SERVICES:
        raise ServiceError(
            "UnknownOperationException",
            f"Expected a header X-Amz-Target: <service>.<operation>, of {', '.join(SERVICES)}.",
        )
    request = json.loads(body or b"{}")
    if not isinstance(request, dict):
        raise ServiceError("SerializationException", "The body must be a JSON object.")
    require(*required_permissions(operation, request, emulator.arn_prefix))
    return emulator.call(operation, request, SERVICES[prefix])


def serve(
    emulator: SageMakerEmulator, port: int = 0, host: str = "127.0.0.1", authorize: Authorizer | None = None
) -> ThreadedServer:
    """Serve the emulator from a background thread. Without `authorize`, every caller may do everything."""
    return ThreadedServer(application(emulator, authorize), host, port)


def _quota(text: str) -> tuple[str, int]:
    """Read `ml.g5.4xlarge for training job usage=2`."""
    name, _, number = text.rpartition("=")
    return name, int(number)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m local_app.sagemaker.server", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: a free port, see the log)")
    parser.add_argument("--state-dir", type=Path, required=True, help="folder of the jobs and their state")
    parser.add_argument("--s3-endpoint", required=True, help="URL of the account's S3 and CloudWatch Logs")
    parser.add_argument("--event-sink", required=True, help="URL that gets each state change event by POST")
    parser.add_argument("--authorizer", required=True, help="URL that decides about each signed request")
    parser.add_argument("--private", type=Path, help="folder that jobs must not see")
    parser.add_argument("--max-instances", type=int, default=4, help="quota of each instance type without a --quota")
    parser.add_argument("--quota", type=_quota, action="append", default=[], metavar="NAME=N", help="a quota, by AWS's name")
    parser.add_argument("--grace", type=float, default=120, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("--no-capacity", default="", help="comma-separated instance types without capacity")
    parser.add_argument("--region", default=REGION, help="AWS region of the jobs")
    parser.add_argument("--account", default=ACCOUNT, help="AWS account of the jobs")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the emulator until SIGTERM or SIGINT."""
    options = _options(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    os.umask(0o077)  # only this user may read the jobs' data
    root = Credentials.of_environment()
    end = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end.set())
    try:
        emulator = SageMakerEmulator(
            options.state_dir,
            options.s3_endpoint,
            on_state_change=lambda event: post_signed(
                options.event_sink, root, json.dumps(event).encode(), os.environ.get("AWS_CA_BUNDLE")
            ),
            private=options.private,
            max_instances=options.max_instances,
            quotas=dict(options.quota),
            without_capacity=tuple(filter(None, options.no_capacity.split(","))),
            grace=options.grace,
            region=options.region,
            account=options.account,
        )
    except StartupError as error:
        sys.exit(f"The SageMaker emulator cannot start. {error}")
    with emulator, serve(emulator, options.port, options.host, remote_authorizer(options.authorizer, root)) as server:
        logger.info("SageMaker emulator: http://%s:%s, state in %s", options.host, server.port, options.state_dir)
        end.wait()


if __name__ == "__main__":
    main()
