"""AWS on this machine: MiniStack in this process, with the AWS behaviour that it lacks and Tunedrop needs.

    python -m local_app.aws.server --port 4566 --state-dir .tunedrop/aws --tls-dir .tunedrop/tls

- `hooks` changes MiniStack: EventBridge refuses rules that are too complex, S3's events name the object's version, functions
  see only the standard library, their code and their layers, and an alarm reaches only topics that let CloudWatch publish.
- `invocations` queues asynchronous invocations of functions on disk, retries them, and sends them to destinations and
  dead-letter queues.
- `state` saves the services as they change: a killed emulator forgets at most the last second.
- `signatures` lets only signed requests through. The root credentials are the environment's (`local_app.credentials`).
- IAM is enforced, over TLS. `calls.jsonl` in the state folder records the calls of each role, with IAM's decisions.
- With root's credentials, `POST /_tunedrop/events` puts an EventBridge event (JSON) of an AWS service, such as a SageMaker
  job state change, on the default bus, and `POST /_tunedrop/authorize` returns IAM's decision about a request to the
  SageMaker emulator. `GET /_tunedrop/health` answers 200 to everybody.
"""

import argparse
import asyncio
import contextvars
import json
import logging
import os
import shutil
import threading
import time
from pathlib import Path

from local_app.asgi import Application, Receive, Scope, Send, answer, answer_json, headers_of, read_body, server_config
from local_app.aws import hooks, hooks_s3
from local_app.aws.iam import authorize
from local_app.aws.invocations import AsyncInvocations
from local_app.aws.signatures import Refused, check_signature, is_unsigned_link, refusal, replayed, signed_parts
from local_app.aws.state import State
from local_app.certificates import Certificates, certificates
from local_app.common import MARKER, REGION, Json
from local_app.credentials import Credentials

logger = logging.getLogger("pipeline.aws")

# MiniStack's administration: it resets the state and returns functions' code.
MINISTACK_PATHS = ("/_ministack/", "/_localstack/", "/_aws/")


def _own_request(scope: Scope, body: bytes, root: Credentials) -> tuple[int, Json]:
    """Answer a signed request to `/_tunedrop/...` with an HTTP status and a JSON document."""
    if scope["method"] != "POST" or scope["path"] not in ("/_tunedrop/events", "/_tunedrop/authorize"):
        return 404, {"message": "expected GET /_tunedrop/health, or POST /_tunedrop/events or /_tunedrop/authorize"}
    # Each runs in a context of its own, which holds MiniStack's account and region of the request.
    if scope["path"] == "/_tunedrop/authorize":
        return 200, contextvars.copy_context().run(authorize, json.loads(body), root)
    missing = {"id", "source", "detail-type", "account", "region", "time", "detail"}
    try:
        event = json.loads(body)
        missing -= event.keys()
    except (ValueError, AttributeError):
        pass  # not JSON, or not an object: every field is missing
    if missing:
        return 400, {"message": f"expected an EventBridge event as JSON; missing: {', '.join(sorted(missing))}"}
    contextvars.copy_context().run(hooks.put_service_event, event)
    return 200, {"id": event["id"]}


async def _checked(scope: Scope, receive: Receive, root: Credentials) -> tuple[Scope, Receive, bytes]:
    """Return a request that may pass to MiniStack, and its body. Raises Refused."""
    if is_unsigned_link(scope):  # without headers, which could direct the request to another service
        return scope | {"headers": [(b"host", b"localhost")]}, receive, b""
    body = await read_body(receive)
    key = check_signature(signed_parts(scope, body), root)
    own = scope["path"].startswith("/_tunedrop/")
    if scope["path"].startswith(MINISTACK_PATHS) or (own and key != root.access_key_id):
        raise Refused("AccessDenied", f"{scope['path']} is not a path for this access key.")
    return scope, replayed(body), body


async def _serve_request(scope: Scope, receive: Receive, send: Send, state: State, root: Credentials) -> None:
    from ministack import app
    from ministack.core import router

    if (scope["method"], scope["path"]) == ("GET", "/_tunedrop/health"):
        await answer_json(send, 200, {"status": "ok"})
        return
    try:
        scope, receive, body = await _checked(scope, receive, root)
    except Refused as refused:
        logger.warning("%s %s refused: %s", scope["method"], scope["path"], refused)
        await answer(send, 403, *refusal(scope, refused))
        return
    if scope["path"].startswith("/_tunedrop/"):
        await answer_json(send, *_own_request(scope, body, root))
        return
    await app.app(scope, receive, send)
    if scope["method"] not in ("GET", "HEAD"):
        state.changed(router.detect_service(scope["method"], scope["path"], headers_of(scope), {}))


def _application(invocations: AsyncInvocations, state: State, root: Credentials) -> Application:
    from ministack import app

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":

            async def send_started(message: Json) -> None:
                await send(message)
                if message["type"] == "lifespan.startup.complete":  # MiniStack has loaded the saved state
                    invocations.resume()

            await app.app(scope, receive, send_started)
        elif scope["type"] == "http":
            await _serve_request(scope, receive, send, state, root)

    return application


def _delete_in_background(folder: Path) -> None:
    """Move a folder out of the way and delete it in a thread: the unpacked artefacts of five functions are many files."""
    if folder.exists():
        folder.rename(folder.with_name(f"trash-{time.time_ns()}"))
    for old in folder.parent.glob("trash-*"):
        threading.Thread(target=shutil.rmtree, args=(old, True), daemon=True).start()


def _configure(host: str, port: int, state_dir: Path, tls: Certificates, root: Credentials) -> None:
    """Set MiniStack's environment, which MiniStack reads when it is imported, and which every function inherits.

    The caller's variables are removed, except those that locate programs. MiniStack replaces `root`'s variables by the
    credentials of the function's role.
    """
    for name in os.environ.keys() - {"PATH", "HOME", "LANG", MARKER}:
        del os.environ[name]
    _delete_in_background(state_dir / "tmp")  # files of the functions of an earlier emulator
    for name, folder in {"STATE_DIR": "services", "S3_DATA_DIR": "s3", "TMPDIR": "tmp"}.items():
        (state_dir / folder).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(state_dir / folder)
    os.environ |= root.environment | {
        "GATEWAY_PORT": str(port),
        "MINISTACK_HOST": host,
        # The functions' endpoint. MiniStack's own default is 127.0.0.1, whatever address it listens on.
        "AWS_ENDPOINT_URL": f"https://{host}:{port}",
        "MINISTACK_REGION": REGION,
        "PERSIST_STATE": "1",
        "S3_PERSIST": "1",
        "AUTH": "true",
        "USE_SSL": "1",
        "MINISTACK_SSL_CERT": str(tls.chain),
        "MINISTACK_SSL_KEY": str(tls.key),
        "AWS_CA_BUNDLE": str(tls.authority),
        # MiniStack opens no other ports, and does not look for a Docker engine.
        "IOT_MTLS_ENABLED": "0",
        "SFTP_ENABLED": "0",
        "DOCKER_HOST": "unix:///nonexistent",
        # No X-Ray daemon runs here.
        "POWERTOOLS_TRACE_DISABLED": "true",
    }


async def serve(
    host: str, port: int, tls: Certificates, invocations: AsyncInvocations, state: State, root: Credentials
) -> None:
    """Serve AWS until SIGTERM or SIGINT. MiniStack saves its state at the end."""
    import hypercorn.asyncio

    config = server_config(bind=[f"{host}:{port}"], certfile=str(tls.chain), keyfile=str(tls.key))
    # A client that keeps its TLS connection open would delay the end by half a minute; hypercorn has no setting for it.
    asyncio.constants.SSL_SHUTDOWN_TIMEOUT = 0.5  # type: ignore[attr-defined]
    logging.getLogger("persistence").setLevel(logging.WARNING)  # below that, it logs every save
    saver = asyncio.create_task(state.keep_saving())
    await hypercorn.asyncio.serve(_application(invocations, state, root), config)  # type: ignore[arg-type]
    saver.cancel()


def main(argv: list[str] | None = None) -> None:
    """Run the emulator; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m local_app.aws.server", description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, required=True, help="port to listen on")
    parser.add_argument("--state-dir", type=Path, required=True, help="folder of the services' state")
    parser.add_argument("--tls-dir", type=Path, required=True, help="folder of the certificates (local_app.certificates)")
    options = parser.parse_args(argv)
    os.umask(0o077)  # only this user may read the services' data
    state_dir, tls = options.state_dir.resolve(), certificates(options.tls_dir.resolve())
    root = Credentials.of_environment()
    _configure(options.host, options.port, state_dir, tls, root)

    state = State()
    invocations = AsyncInvocations(state_dir / "invocations", f"https://{options.host}:{options.port}", state, root)
    hooks.hook_interpreter(state_dir / "tmp")
    hooks_s3.hook_s3_events()
    hooks_s3.hook_writes()
    hooks.hook_async_invocations(invocations.put)
    hooks.hook_rule_complexity()
    hooks.hook_calls(state_dir / "calls.jsonl")
    hooks.hook_trust_policies()
    hooks.hook_function_credentials()
    hooks.hook_requests_without_action(root)
    hooks.hook_alarms()
    hooks.hook_alarm_arns()
    asyncio.run(serve(options.host, options.port, tls, invocations, state, root))


if __name__ == "__main__":
    main()
