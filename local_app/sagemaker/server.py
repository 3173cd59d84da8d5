"""SageMaker on this machine: an HTTP server that boto3 reaches through AWS_ENDPOINT_URL_SAGEMAKER.

    python -m local_app.sagemaker.server --port 4570 --state-dir .tunedrop/sagemaker --s3-endpoint http://127.0.0.1:4566 \\
      --event-sink http://127.0.0.1:4566/_tunedrop/events

Training jobs are real processes on this machine (`job_process`). Their state survives a kill (`store`), and each change of
the state is an EventBridge event. Besides the AWS API, the server has `GET /_tunedrop/health` and
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
import ssl
import sys
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Collection
from pathlib import Path

from local_app.asgi import Application, Receive, Scope, Send, ThreadedServer, answer_json, headers_of, read_body
from local_app.common import ACCOUNT, REGION, Json
from local_app.sagemaker.api import ServiceError
from local_app.sagemaker.emulator import SageMakerEmulator
from local_app.sagemaker.permissions import RequiredPermission, required_permissions
from local_app.sagemaker.sandbox import StartupError

logger = logging.getLogger(__name__)

# Raises ServiceError unless IAM grants a signed request (path, headers, body) the permissions that it needs.
Authorizer = Callable[[Json, list[RequiredPermission]], None]


def post_json(url: str) -> Callable[[Json], Json]:
    """Return a function that POSTs JSON to `url` and returns the JSON response; it raises for a status other than 2xx.

    An https URL is verified with AWS_CA_BUNDLE, as boto3 verifies the endpoints.
    """
    context = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE")) if url.startswith("https:") else None

    def post(content: Json) -> Json:
        request = urllib.request.Request(  # noqa: S310 - the URL is the operator's
            url, data=json.dumps(content).encode(), headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30, context=context) as response:  # noqa: S310
            return dict(json.loads(response.read() or b"{}"))

    return post


def remote_authorizer(url: str, own_keys: Collection[str]) -> Authorizer:
    """Return an authorizer that asks the AWS emulator at `url`, whose IAM knows the account's roles.

    A request signed with one of `own_keys` comes from the account itself, which may do everything.
    """
    post = post_json(url)

    def authorize(signed: Json, permissions: list[RequiredPermission]) -> None:
        signature = next((value for name, value in signed["headers"] if name.lower() == "authorization"), "")
        if any(f"Credential={key}/" in signature for key in own_keys):
            return
        checks = [permission._asdict() | {"context": dict(permission.context)} for permission in permissions]
        if refusal := post({"signed": signed, "checks": checks}):
            raise ServiceError(refusal["code"], refusal["message"])

    return authorize


def application(emulator: SageMakerEmulator, authorize: Authorizer | None) -> Application:
    """Return the ASGI application: AWS JSON 1.1 (POST / with `X-Amz-Target: SageMaker.<operation>`) and `/_tunedrop/`."""

    async def serve_request(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = await read_body(receive)
        # SQLite, the authorizer and STS block, so each request has a thread.
        status, content = await asyncio.to_thread(_respond, emulator, authorize, scope, body)
        headers = {"content-type": "application/x-amz-json-1.1", "x-amzn-requestid": str(uuid.uuid4())}
        await answer_json(send, status, content, headers)

    return serve_request


def _respond(emulator: SageMakerEmulator, authorize: Authorizer | None, scope: Scope, body: bytes) -> tuple[int, Json]:
    """Return the HTTP status and the JSON document for a request."""
    headers, path = headers_of(scope), scope["path"]
    try:
        if scope["method"] == "GET":
            if path == "/_tunedrop/health":
                return 200, emulator.health()
            raise ServiceError("NotFound", f"There is no {path} here.", 404)
        if headers.get("origin"):  # a web page in the user's browser must not start jobs
            raise ServiceError("AccessDeniedException", "This server does not answer browsers.", 403)
        prefix, _, job = path.rpartition("/")
        if prefix == "/_tunedrop/interrupt":
            emulator.interrupt(job)
            return 202, {}
        return 200, _call(emulator, authorize, path, headers, body)
    except json.JSONDecodeError as error:
        return 400, {"__type": "SerializationException", "message": str(error)}
    except ServiceError as error:
        return error.status, {"__type": error.code, "message": error.message}
    except Exception as error:  # the client gets a response, the log gets the traceback
        logger.exception("%s %s", path, headers.get("x-amz-target"))
        return 500, {"__type": "InternalFailure", "message": repr(error)}


def _call(
    emulator: SageMakerEmulator, authorize: Authorizer | None, path: str, headers: dict[str, str], body: bytes
) -> Json:
    target, _, operation = headers.get("x-amz-target", "").partition(".")
    if target != "SageMaker":
        raise ServiceError("UnknownOperationException", "Expected a header X-Amz-Target: SageMaker.<operation>.")
    request = json.loads(body or b"{}")
    if authorize:
        signed = {"path": path, "headers": list(headers.items()), "body": base64.b64encode(body).decode()}
        authorize(signed, required_permissions(operation, request, emulator.arn_prefix))
    return emulator.call(operation, request)


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
    parser.add_argument("--authorizer", help="URL that decides about each signed request (default: allow everything)")
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
    end = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end.set())
    try:
        emulator = SageMakerEmulator(
            options.state_dir,
            options.s3_endpoint,
            on_state_change=post_json(options.event_sink),
            max_instances=options.max_instances,
            quotas=dict(options.quota),
            without_capacity=tuple(filter(None, options.no_capacity.split(","))),
            grace=options.grace,
            region=options.region,
            account=options.account,
        )
    except StartupError as error:
        sys.exit(f"The SageMaker emulator cannot start. {error}")
    own_keys = (os.environ.get("AWS_ACCESS_KEY_ID", options.account), options.account)
    authorize = remote_authorizer(options.authorizer, own_keys) if options.authorizer else None
    with emulator, serve(emulator, options.port, options.host, authorize) as server:
        logger.info("SageMaker emulator: http://%s:%s, state in %s", options.host, server.port, options.state_dir)
        end.wait()


if __name__ == "__main__":
    main()
