"""SageMaker on this machine: an HTTP server that boto3 reaches through AWS_ENDPOINT_URL_SAGEMAKER.

    python -m local_app.sagemaker.server --port 4570 --state-dir .tunedrop/sagemaker --s3-endpoint http://127.0.0.1:4566

Training jobs run as real processes on this machine (`job_runner`), their state survives a kill (`sagemaker_state`), and
each change of it is an EventBridge event. Beside the AWS API there are `GET /_tunedrop/health` and
`POST /_tunedrop/interrupt/<job>` (a spot interruption).
"""

from __future__ import annotations

import argparse
import base64
import fcntl
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
from collections.abc import Callable, Collection, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from botocore import xform_name

from local_app.sagemaker.model import Json, ServiceError, validate_request
from local_app.sagemaker.permissions import Check, required_permissions
from local_app.sagemaker.registry import ModelRegistry
from local_app.sagemaker.sandbox import EnvironmentProblem
from local_app.sagemaker.services import Services
from local_app.sagemaker.store import Store
from local_app.sagemaker.training_jobs import TrainingJobs

logger = logging.getLogger(__name__)

TRAINING_OPERATIONS = ("CreateTrainingJob", "DescribeTrainingJob", "ListTrainingJobs", "StopTrainingJob")
REGISTRY_OPERATIONS = (
    *("CreateModelPackageGroup", "DescribeModelPackageGroup", "ListModelPackageGroups", "DeleteModelPackageGroup"),
    *("CreateModelPackage", "DescribeModelPackage", "ListModelPackages", "UpdateModelPackage", "DeleteModelPackage"),
)
TAG_OPERATIONS = ("AddTags", "ListTags", "DeleteTags")
OPERATIONS = (*TRAINING_OPERATIONS, *REGISTRY_OPERATIONS, *TAG_OPERATIONS)


# Raises ServiceError unless IAM allows what a signed request (method and path, headers, body) needs.
Authorizer = Callable[[Json, list[Check]], None]


class SageMakerEmulator:
    """One account's SageMaker in one region; its state is in `state_dir`, which one emulator at a time may use.

    `endpoint_url` serves S3 and CloudWatch Logs of the same account (credentials from boto3's usual places).
    `on_state_change` gets every "SageMaker Training Job State Change" event in order; while it raises, the event is
    kept and tried again, after a restart too: delivery is at least once, as on AWS.
    """

    def __init__(
        self,
        state_dir: Path,
        endpoint_url: str,
        *,
        on_state_change: Callable[[Json], object],
        max_instances: int = 4,
        quotas: Mapping[str, int] = MappingProxyType({}),
        without_capacity: Collection[str] = (),
        grace: float = 120,
        checkpoint_interval: float = 5,
        region: str = "us-east-1",
        account: str = "000000000000",
    ) -> None:
        state_dir.mkdir(parents=True, exist_ok=True)
        state_dir.chmod(0o700)
        (state_dir / "jobs").mkdir(exist_ok=True)
        self._guard = (state_dir / "lock").open("w")
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EnvironmentProblem(
                f"Another SageMaker emulator uses {state_dir}: end it, or choose another folder"
            ) from error
        self._store = Store(state_dir / "state.sqlite")
        self.arn_prefix = arn_prefix = f"arn:aws:sagemaker:{region}:{account}"
        self._training = TrainingJobs(
            self._store,
            state_dir / "jobs",
            Services(endpoint_url, region),
            arn_prefix,
            max_instances=max_instances,
            quotas=quotas,
            without_capacity=without_capacity,
            grace=grace,
            checkpoint_interval=checkpoint_interval,
        )
        self._registry = ModelRegistry(self._store, arn_prefix)
        self._on_state_change = on_state_change
        self._closed = threading.Event()
        self._outbox = threading.Thread(target=self._deliver, name="outbox", daemon=True)
        self._outbox.start()
        self._training.resume()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the jobs' processes and let go of the state; open jobs go on when an emulator takes the folder again."""
        self._training.close()
        self._closed.set()
        self._training.changed.set()
        self._outbox.join(5)
        self._store.close()
        self._guard.close()

    def call(self, operation: str, request: Json) -> Json:
        """Do one API operation (named as in the API reference); raises ServiceError."""
        if operation not in OPERATIONS:
            raise ServiceError(
                "UnknownOperationException",
                f"The local SageMaker emulator has no operation {operation}. It has: {', '.join(OPERATIONS)}.",
            )
        validate_request(operation, request)
        if operation in TAG_OPERATIONS:
            return self._tags(operation, request)
        owner = self._training if operation in TRAINING_OPERATIONS else self._registry
        result: Json = getattr(owner, xform_name(operation))(request)
        return result

    def interrupt(self, job_name: str) -> None:
        """Interrupt a running spot job: SIGTERM, grace time, then the same job again with its checkpoints."""
        self._training.interrupt(job_name)

    def health(self) -> Json:
        """Say that the emulator works, and what it has to do."""
        return {"status": "ok", "jobs": self._training.counts(), "undelivered_events": self._store.undelivered()}

    def _tags(self, operation: str, request: Json) -> Json:
        arn = request["ResourceArn"]
        with self._store.transaction():
            tags = self._store.get("tags", arn)
            if tags is None:
                raise ServiceError("ValidationException", f"Requested resource {arn} not found.")
            for tag in request.get("Tags", []):
                tags[tag["Key"]] = tag["Value"]
            for key in request.get("TagKeys", []):
                tags.pop(key, None)
            if len(tags) > 50:
                raise ServiceError("ResourceLimitExceeded", f"{arn} would have {len(tags)} tags; the limit is 50.")
            if operation != "ListTags":
                self._store.put("tags", arn, tags)
        return {} if operation == "DeleteTags" else {"Tags": [{"Key": key, "Value": tags[key]} for key in tags]}

    def _deliver(self) -> None:
        """Hand events to `on_state_change`, oldest first, until the emulator is closed."""
        pause = 0.1
        while not self._closed.is_set():
            self._training.changed.clear()
            item = self._store.oldest_event()
            if item is None:
                self._training.changed.wait()
                continue
            number, event = item
            try:
                self._on_state_change(event)
            except Exception as error:  # noqa: BLE001 - whatever the receiver's trouble is, the event is kept
                logger.warning("event %s is kept, next try in %.1f s: %s", event["id"], pause, error)
                self._closed.wait(pause)
                pause = min(2 * pause, 10)
            else:
                self._store.delivered(number)
                pause = 0.1


def post_json(url: str) -> Callable[[Json], Json]:
    """Return a function that POSTs JSON to `url` and returns the answer's; an answer other than 2xx raises.

    An https URL is checked against AWS_CA_BUNDLE, as boto3 checks the endpoints.
    """
    context = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE")) if url.startswith("https:") else None

    def post(content: Json) -> Json:
        request = urllib.request.Request(  # noqa: S310 - the URL is the operator's
            url, data=json.dumps(content).encode(), headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:  # noqa: S310
            return dict(json.loads(answer.read() or b"{}"))

    return post


def ask(authorizer: str, own_keys: Collection[str]) -> Authorizer:
    """Return an authorizer that asks the AWS emulator at the URL `authorizer`, whose IAM knows the account's roles.

    Who signs with one of `own_keys` is the account itself, and may do everything.
    """
    post = post_json(authorizer)

    def authorize(signed: Json, checks: list[Check]) -> None:
        signature = next((value for name, value in signed["headers"] if name.lower() == "authorization"), "")
        if any(f"Credential={key}/" in signature for key in own_keys):
            return
        answer = post({"signed": signed, "checks": [check._asdict() | {"context": dict(check.context)} for check in checks]})
        if answer:
            raise ServiceError(answer["code"], answer["message"])

    return authorize


class _Handler(BaseHTTPRequestHandler):
    """AWS JSON 1.1: POST / with X-Amz-Target: SageMaker.<operation>."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body leave in one packet
    emulator: SageMakerEmulator
    authorize: Authorizer | None

    def do_POST(self) -> None:
        """Answer an API call or a control request."""
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        try:
            if self.headers.get("Origin"):  # a web page in the user's browser has no business here
                raise ServiceError("AccessDeniedException", "This server does not answer browsers.", 403)
            prefix, _, job = self.path.rpartition("/")
            if prefix == "/_tunedrop/interrupt":
                self.emulator.interrupt(job)
                return self._answer(202, {})
            target, _, operation = self.headers.get("X-Amz-Target", "").partition(".")
            if target != "SageMaker":
                raise ServiceError("UnknownOperationException", "Expected a header X-Amz-Target: SageMaker.<operation>.")
            request = json.loads(body or b"{}")
            if self.authorize:
                signed = {
                    "path": self.path,
                    "headers": self.headers.items(),
                    "body": base64.b64encode(body).decode(),
                }
                self.authorize(signed, required_permissions(operation, request, self.emulator.arn_prefix))
            self._answer(200, self.emulator.call(operation, request))
        except json.JSONDecodeError as error:
            self._answer(400, {"__type": "SerializationException", "message": str(error)})
        except ServiceError as error:
            self._answer(error.status, {"__type": error.code, "message": error.message})
        except Exception as error:  # the client gets an answer, the log gets the traceback
            logger.exception("%s", self.headers.get("X-Amz-Target"))
            self._answer(500, {"__type": "InternalFailure", "message": repr(error)})

    def do_GET(self) -> None:
        """Answer the health check."""
        if self.path == "/_tunedrop/health":
            self._answer(200, self.emulator.health())
        else:
            self._answer(404, {"__type": "NotFound", "message": f"There is no {self.path} here."})

    def _answer(self, status: int, body: Json) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/x-amz-json-1.1")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("x-amzn-RequestId", str(uuid.uuid4()))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Keep requests out of the log unless it is verbose."""
        logger.debug(format, *args)


def serve(
    emulator: SageMakerEmulator, port: int = 0, host: str = "127.0.0.1", authorize: Authorizer | None = None
) -> ThreadingHTTPServer:
    """Serve the emulator from a background thread; `server_port` tells the port when `port` is 0.

    Without `authorize` whoever reaches the server may do everything.
    """
    members = {"emulator": emulator, "authorize": staticmethod(authorize) if authorize else None}
    server = ThreadingHTTPServer((host, port), type("Handler", (_Handler,), members))
    threading.Thread(target=server.serve_forever, args=(0.05,), name="http", daemon=True).start()
    return server


def _quota(text: str) -> tuple[str, int]:
    """Read `ml.g5.4xlarge for training job usage=2`."""
    name, _, number = text.rpartition("=")
    return name, int(number)


def main(arguments: list[str] | None = None) -> None:
    """Run the emulator until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m local_app.sagemaker.server", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: a free one, see the log)")
    parser.add_argument("--state-dir", type=Path, required=True, help="where jobs and their state live")
    parser.add_argument("--s3-endpoint", required=True, help="URL of the account's S3 and CloudWatch Logs")
    parser.add_argument("--event-sink", required=True, help="URL that gets each state change event by POST")
    parser.add_argument("--authorizer", help="URL that decides what a signed request may do (default: everything)")
    parser.add_argument("--max-instances", type=int, default=4, help="every quota of an instance type that has no --quota")
    parser.add_argument("--quota", type=_quota, action="append", default=[], metavar="NAME=N", help="a quota, by AWS's name")
    parser.add_argument("--grace", type=float, default=120, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("--no-capacity", default="", help="instance types without capacity, with commas between")
    parser.add_argument("--region", default="us-east-1")
    parser.add_argument("--account", default="000000000000")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    os.umask(0o077)  # a job's data is its user's alone
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
    except EnvironmentProblem as error:
        sys.exit(f"The SageMaker emulator cannot start. {error}")
    with emulator:
        own_keys = (os.environ.get("AWS_ACCESS_KEY_ID", options.account), options.account)
        authorize = ask(options.authorizer, own_keys) if options.authorizer else None
        server = serve(emulator, options.port, options.host, authorize)
        logger.info("SageMaker emulator: http://%s:%s, state in %s", options.host, server.server_port, options.state_dir)
        end.wait()
        server.shutdown()


if __name__ == "__main__":
    main()
