"""AWS on this machine: MiniStack in this process, with what it lacks for Tunedrop added by a few hooks.

    python -m local_app.aws.server --port 4566 --state-dir .tunedrop/aws --tls-dir .tunedrop/tls

All that touches MiniStack's private names is in this file; `tests/aws_emulator` has a contract test for each hook:

- `POST /_tunedrop/events` takes a whole EventBridge event (JSON) from an AWS service, such as a SageMaker job state
  change, which PutEvents refuses, and puts it on the default bus.
- EventBridge refuses rules that are too complex, as AWS does.
- S3's events name the object's version, as they do for versioned buckets on AWS.
- Whatever invokes a function asynchronously (rules, schedules, Invoke) is queued on disk, retried and, if it fails to
  the end, sent to the function's on-failure destination; what a rule may not or cannot deliver goes to the rule's DLQ.
- State is saved as it changes, so that a killed emulator forgets at most the last second.
- Functions run in an interpreter that sees the standard library, their code and their layers, nothing of this environment.
- IAM is enforced, over TLS. `POST /_tunedrop/authorize` says whether it lets a request to SageMaker through, services
  may assume roles that trust them for their own account, `calls.jsonl` notes what each role did and was denied, and an
  alarm reaches only topics that let CloudWatch publish.
"""

import argparse
import asyncio
import base64
import contextvars
import json
import logging
import os
import queue
import shutil
import stat
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from local_app.aws.event_patterns import MOST_COMPLEX, TOO_COMPLEX, complexity
from local_app.certificates import Certificates, certificates

ACCOUNT = "000000000000"
REGION = "us-east-1"
SAVE_EVERY_SECONDS = 0.5
# Set in the environment of everything the local app starts, to the folder it runs in: how `down` finds it all.
MARKER = "TUNEDROP_FOLDER"

logger = logging.getLogger("pipeline.aws")

Json = dict[str, Any]
Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Json]]
Send = Callable[[Json], Awaitable[None]]


def matches_pattern(pattern: Json, event: Json) -> bool:
    """Whether an EventBridge rule with this pattern takes this event (both as AWS writes them in JSON)."""
    from ministack.services import eventbridge

    status, _, body = eventbridge._test_event_pattern({"EventPattern": json.dumps(pattern), "Event": json.dumps(event)})
    answer = json.loads(body)
    if status != 200:
        raise ValueError(f"EventBridge refuses the pattern {json.dumps(pattern)}: {answer}")
    return bool(answer["Result"])


# ---- asynchronous invocations ----------------------------------------------------------------------------------------


class AsyncInvocations:
    """Lambda's queue of asynchronous invocations: one file per invocation, worked off by a few threads.

    A file goes away when the function has succeeded, or when its event is in the on-failure destination or in the
    rule's dead-letter queue, and what it wrote has been saved; what a killed emulator leaves behind is run again by the
    next one (at least once, as on AWS). Attempts are a second and more apart instead of AWS's one and two minutes.
    """

    def __init__(self, folder: Path, endpoint: str) -> None:
        self._folder = folder
        self._endpoint = endpoint
        self._ready: queue.Queue[Path] = queue.Queue()
        folder.mkdir(parents=True, exist_ok=True)
        # A function runs in a process of its own and may be busy for minutes; more at once only crowd the machine.
        for _ in range(max(4, os.cpu_count() or 1)):
            threading.Thread(target=self._work, daemon=True, name="async-invocations").start()

    def put(self, function_arn: str, event: Any, rule_arn: str = "", dead_letter_arn: str = "") -> None:
        """Queue one invocation; it survives a kill as soon as this returns."""
        file = self._folder / f"{time.time_ns()}-{uuid.uuid4().hex}.json"
        entry = {"function": function_arn, "event": event, "rule": rule_arn, "dead_letters": dead_letter_arn}
        self._write(file, {**entry, "attempt": 0})
        self._ready.put(file)

    def resume(self) -> None:
        """Queue what an earlier emulator did not finish, oldest first."""
        for file in sorted(self._folder.glob("*.json")):
            self._ready.put(file)

    @staticmethod
    def _write(file: Path, entry: Json) -> None:
        draft = file.with_suffix(".draft")
        draft.write_text(json.dumps(entry))
        draft.replace(file)

    def _work(self) -> None:
        while True:
            file = self._ready.get()
            try:
                self._attempt(file)
            except Exception:  # this thread serves every function: one broken entry must not end it
                logger.exception("Asynchronous invocation %s failed; it is tried again at the next start", file.name)

    def _attempt(self, file: Path) -> None:
        from ministack.core import responses
        from ministack.services import lambda_svc

        entry = json.loads(file.read_text())
        responses.set_request_account_id(entry["function"].split(":")[4])
        responses.set_request_region(entry["function"].split(":")[3])
        function, config, name = lambda_svc._get_func_record_for_ref(entry["function"])
        if entry["rule"] and (refusal := _delivery_refusal(function, config, entry)):
            self._to_dead_letters(entry, *refusal)
            return file.unlink()
        if function is None:
            logger.error("Function %s is gone; its event %s is dropped", name, file.name)
            return file.unlink()

        result = lambda_svc._execute_function(lambda_svc._execution_record_for_config(function, config), entry["event"])
        state.changed("lambda-invocation")
        if result.get("throttle"):
            return self._later(file, 1.0)
        if not result.get("error"):
            return state.when_saved(file.unlink)
        entry["attempt"] += 1
        settings = (function.get("event_invoke_configs") or {}).get("$LATEST") or function.get("event_invoke_config") or {}
        logger.warning("%s failed (attempt %d): %s", name, entry["attempt"], result.get("body"))
        if entry["attempt"] <= settings.get("MaximumRetryAttempts", 2):
            self._write(file, entry)
            return self._later(file, float(2 ** (entry["attempt"] - 1)))
        destination = ((settings.get("DestinationConfig") or {}).get("OnFailure") or {}).get("Destination")
        if destination:
            lambda_svc._route_async_failure(destination, name, entry["event"], result)
            state.changed("sqs")
        return state.when_saved(file.unlink)

    def _later(self, file: Path, seconds: float) -> None:
        timer = threading.Timer(seconds, self._ready.put, [file])
        timer.daemon = True
        timer.start()

    def _to_dead_letters(self, entry: Json, code: str, message: str) -> None:
        logger.error("Rule %s cannot deliver to %s: %s", entry["rule"], entry["function"], message)
        if not entry["dead_letters"]:
            return
        # https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-rule-dlq.html#eb-dlq-message-attributes
        attributes = {
            "RULE_ARN": entry["rule"],
            "TARGET_ARN": entry["function"],
            "ERROR_CODE": code,
            "ERROR_MESSAGE": message,
        }
        region, account, name = entry["dead_letters"].split(":")[3:6]
        _client("sqs", self._endpoint, region).send_message(
            QueueUrl=f"{self._endpoint}/{account}/{name}",
            MessageBody=json.dumps(entry["event"]),
            MessageAttributes={k: {"DataType": "String", "StringValue": v} for k, v in attributes.items()},
        )


def _delivery_refusal(function: Json | None, config: Json | None, entry: Json) -> tuple[str, str] | None:
    """Why Lambda would not take an event from this rule: the function is gone or its policy does not name the rule."""
    from ministack.core import iam_evaluator

    if function is None or config is None:
        return "NO_RESOURCE", f"Function {entry['function']} does not exist"
    account = entry["rule"].split(":")[4]
    request = iam_evaluator.EvalContext(
        principal_arn="events.amazonaws.com",
        principal_type="Service",
        principal_account=account,
        action="lambda:InvokeFunction",
        resource_arn=config["FunctionArn"],
        region=entry["rule"].split(":")[3],
        service_context={"aws:sourcearn": entry["rule"], "aws:sourceaccount": account},
    )
    decision = iam_evaluator.evaluate_resource_policy(function["policy"], request, service="events.amazonaws.com")
    if decision.decision == "Allow":
        return None
    return "NO_PERMISSIONS", f"The policy of {config['FunctionName']} does not let rule {entry['rule']} invoke it"


def _hook_async_invocations(invocations: AsyncInvocations) -> None:
    from ministack.services import eventbridge, lambda_svc

    delivery: contextvars.ContextVar[tuple[Json, Json]] = contextvars.ContextVar("delivery")
    invoke_target = eventbridge._invoke_target

    def deliver(target: Json, event: Json, rule: Json, view: Any = None) -> None:
        delivery.set((target, rule))
        invoke_target(target, event, rule, view)

    def to_function(arn: str, payload: str) -> None:
        target, rule = delivery.get()
        dead_letters = (target.get("DeadLetterConfig") or {}).get("Arn", "")
        invocations.put(arn, json.loads(payload), rule["Arn"], dead_letters)

    def invoke_event(function: Json, event: Any) -> None:
        invocations.put(function["config"]["FunctionArn"], event)

    eventbridge._invoke_target = deliver
    eventbridge._dispatch_to_lambda = to_function
    lambda_svc.invoke_async_with_retry = invoke_event


# ---- events of AWS services ------------------------------------------------------------------------------------------


def put_service_event(event: Json) -> None:
    """Put an event as AWS delivers it (`id`, `source`, `detail-type`, `account`, ...) on the default bus."""
    from ministack.core import responses
    from ministack.services import eventbridge

    responses.set_request_account_id(event["account"])
    responses.set_request_region(event["region"])
    eventbridge._dispatch_event({**eventbridge._event_from_test_payload(event), "EventBusName": "default"})


def _hook_s3_events() -> None:
    """Queue S3's events before the request is answered, and name the object's version in them.

    MiniStack sends them later, from a thread that dies with it, and writes the version only in bucket notifications.
    """
    from ministack.services import eventbridge, s3

    version: contextvars.ContextVar[str | None] = contextvars.ContextVar("version", default=None)
    dispatch = eventbridge._dispatch_event

    def fire(bucket: str, key: str, event_name: str, *args: Any, version_id: str | None = None, **kwargs: Any) -> None:
        version.set(version_id)
        sequencer = s3._next_event_sequencer(event_name)
        s3._fire_s3_event(bucket, key, event_name, *args, version_id=version_id, sequencer=sequencer, **kwargs)

    def dispatch_with_version(event: Json, view: Any = None) -> None:
        if event["Source"] == "aws.s3" and (version_id := version.get()):
            detail = json.loads(event["Detail"])
            detail["object"]["version-id"] = version_id
            event = {**event, "Detail": json.dumps(detail)}
        dispatch(event, view)

    s3._fire_s3_event_async = fire
    eventbridge._dispatch_event = dispatch_with_version


def _hook_rule_complexity() -> None:
    """Refuse rules that are too complex, in EventBridge's words; MiniStack measures nothing.

    CloudFormation makes its rules past PutRule.
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


# ---- clients ---------------------------------------------------------------------------------------------------------


def _client(service: str, endpoint: str, region: str = REGION) -> Any:
    import boto3

    key = {"aws_access_key_id": ACCOUNT, "aws_secret_access_key": "test"}
    return boto3.client(service, endpoint_url=endpoint, region_name=region, **key)


# ---- IAM -------------------------------------------------------------------------------------------------------------


def _hook_calls(file: Path) -> None:
    """Note every new kind of call that a role makes, and whether IAM allowed it, as a line of JSON in `file`.

    The account's own calls are not noted: nothing is ever denied to it.
    """
    from ministack.core import iam_evaluator

    enforce = iam_evaluator.enforce
    seen: set[str] = set()

    def noting(
        access_key: str, action: str, service: str, region: str, resource_arn: str = "*", service_context: Json | None = None
    ) -> Any:
        if action == "events:PutEvents":
            service_context = (service_context or {}) | _event_keys(iam_evaluator._signed_request.get())
        denied = enforce(access_key, action, service, region, resource_arn, service_context)
        credential = iam_evaluator.resolve_credential(access_key)
        principal = getattr(credential, "principal_arn", access_key)
        if not principal.endswith(":root"):
            call = {"principal": principal, "action": action, "resource": resource_arn, "context": service_context or {}}
            line = json.dumps({**call, "allowed": denied is None}, default=str)
            if line not in seen:
                seen.add(line)
                with file.open("a") as lines:
                    lines.write(f"{line}\n")
            if denied is not None:
                logger.warning("IAM denies %s: %s on %s", principal, action, resource_arn)
        return denied

    iam_evaluator.enforce = noting


def _event_keys(request: Any) -> Json:
    """Return the condition keys of a PutEvents request whose entries agree, which MiniStack does not know.

    https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-use-conditions.html
    """
    entries = json.loads(request.body)["Entries"] if request is not None else []
    keys = {"events:source": "Source", "events:detail-type": "DetailType"}
    values = {key: {entry.get(member) for entry in entries} for key, member in keys.items()}
    return {key: found.pop() for key, found in values.items() if len(found) == 1}


def _hook_trust_policies() -> None:
    """Let a service's call say for which account it is made: MiniStack's services call as root, and do not."""
    from ministack.core import iam_evaluator

    evaluate = iam_evaluator.evaluate_trust_policy

    def evaluate_trust_policy(document: Any, caller: str, context: Any = None) -> bool:
        if context is not None and caller.endswith(":root"):
            context.service_context["aws:sourceaccount"] = context.principal_account
        return bool(evaluate(document, caller, context))

    iam_evaluator.evaluate_trust_policy = evaluate_trust_policy


def authorize(request: Json) -> Json:
    """Whether IAM lets a signed request to SageMaker through: `{}`, or the `code` and `message` of AWS's refusal.

    `signed` is the request (`path`, `headers` as pairs, `body` in base64), `checks` what it needs (`action`, `resource`
    and condition keys as `context`).
    """
    from ministack import app
    from ministack.core import iam_actions, iam_evaluator, responses, router

    signed = request["signed"]
    headers = {name.lower(): value for name, value in signed["headers"]}
    access_key = router.extract_access_key_id(headers, {})
    responses.set_request_account_id(app._request_account_scope(access_key))
    responses.set_request_region(REGION)
    raw_headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    iam_evaluator.pin_signed_request("POST", signed["path"], {}, raw_headers)
    iam_evaluator.pin_signed_body(base64.b64decode(signed["body"]))
    for check in request["checks"]:
        action, resource = check["action"], check["resource"]
        denied = iam_evaluator.enforce(access_key, action, "sagemaker", REGION, resource, check["context"])
        if isinstance(denied, iam_evaluator.AuthError):
            return {"code": denied.code, "message": denied.message}
        if denied is not None:
            explicit = denied.decision == "Deny"
            message = iam_actions.identity_denial_message(action, denied.principal_arn, resource, explicit)
            return {"code": "AccessDeniedException", "message": message}
    return {}


def _hook_alarms() -> None:
    """Announce alarms to the topics whose policies let CloudWatch publish; MiniStack does not ask them."""
    from ministack.services import cloudwatch, sns

    dispatch = cloudwatch._dispatch_alarm_actions
    lists = ("AlarmActions", "OKActions", "InsufficientDataActions")

    def dispatch_alarm_actions(alarm: Json, *args: Any) -> None:
        def open_to_us(topic: str) -> bool:
            arn = alarm["AlarmArn"]
            allowed = bool(sns.topic_policy_allows(topic, "cloudwatch.amazonaws.com", arn, arn.split(":")[4]))
            if not allowed:
                logger.warning("The policy of %s does not let CloudWatch announce %s", topic, alarm["AlarmName"])
            return allowed

        dispatch(alarm | {name: list(filter(open_to_us, alarm.get(name) or [])) for name in lists}, *args)

    cloudwatch._dispatch_alarm_actions = dispatch_alarm_actions


# ---- state -----------------------------------------------------------------------------------------------------------


class State:
    """Saves MiniStack's services while they change; MiniStack itself does so only when it is shut down in order."""

    def __init__(self) -> None:
        self._changed: set[str] = set()
        self._when_saved: list[Callable[[], None]] = []

    def when_saved(self, do: Callable[[], None]) -> None:
        """Do something once what has changed until now is saved."""
        self._when_saved.append(do)

    def changed(self, service: str) -> None:
        """Note that a request to, or work of, this service may have changed something."""
        self._changed.add(service)

    def save(self) -> None:
        """Write what may have changed since the last time, unless a stack is half deployed.

        A deploy is saved when it has ended: killed in the middle, the emulator wakes up with the state before it.
        """
        from ministack import app
        from ministack.core import persistence
        from ministack.services import cloudformation

        statuses = {stack["StackStatus"] for stack in cloudformation._stacks.all_values()} - {"REVIEW_IN_PROGRESS"}
        if any(status.endswith("_IN_PROGRESS") for status in statuses):
            return
        when_saved, self._when_saved = self._when_saved, []
        changed, self._changed = self._changed, set()
        services = app._build_persistence_save_dict()
        if not changed & {"cloudformation", "lambda", "iam"}:
            # Deploys change these and nothing else does; a function's code is too big to look at twice a second.
            services = {k: v for k, v in services.items() if k not in ("cloudformation", "lambda", "iam")}
        if changed:
            persistence.save_all(services)
        for do in when_saved:
            do()

    async def keep_saving(self) -> None:
        """Save, forever. Runs on the server's event loop, so no request changes what is being written."""
        while True:
            await asyncio.sleep(SAVE_EVERY_SECONDS)
            self.save()


state = State()


# ---- functions' interpreter ------------------------------------------------------------------------------------------


def _hook_interpreter(folder: Path) -> None:
    """Run Python functions with this Python, for which the local build chose wheels, whatever version their `Runtime` names.

    With `-S`: no site-packages, so what the function and its layers lack is missing here as on AWS.
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


# ---- server ----------------------------------------------------------------------------------------------------------


async def _own_request(scope: Scope, receive: Receive) -> tuple[int, Json]:
    """Answer `/_tunedrop/...` with an HTTP status and a JSON body."""
    if (scope["method"], scope["path"]) == ("GET", "/_tunedrop/health"):
        return 200, {"status": "ok"}
    if scope["method"] != "POST" or scope["path"] not in ("/_tunedrop/events", "/_tunedrop/authorize"):
        return 404, {"message": "expected GET /_tunedrop/health, or POST /_tunedrop/events or /_tunedrop/authorize"}
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    if scope["path"] == "/_tunedrop/authorize":
        return 200, contextvars.copy_context().run(authorize, json.loads(body))
    missing = {"id", "source", "detail-type", "account", "region", "time", "detail"}
    try:
        event = json.loads(body)
        missing -= event.keys()
    except (ValueError, AttributeError):
        pass  # not JSON or not an object: everything is missing
    if missing:
        return 400, {"message": f"expected an EventBridge event as JSON; missing: {', '.join(sorted(missing))}"}
    # In a context of its own: account and region of one event are not those of the next request.
    contextvars.copy_context().run(put_service_event, event)
    return 200, {"id": event["id"]}


def _application(invocations: AsyncInvocations) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    from ministack import app
    from ministack.core import router

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":

            async def send_started(message: Json) -> None:
                await send(message)
                if message["type"] == "lifespan.startup.complete":  # saved state is loaded by now
                    invocations.resume()

            await app.app(scope, receive, send_started)
        elif scope["type"] == "http" and scope["path"].startswith("/_tunedrop/"):
            status, answer = await _own_request(scope, receive)
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": json.dumps(answer).encode()})
        else:
            await app.app(scope, receive, send)
            if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD"):
                names = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
                state.changed(router.detect_service(scope["method"], scope["path"], names, {}))

    return application


def _throw_away(folder: Path) -> None:
    """Remove a folder in the background: the unpacked artefacts of five functions are many files."""
    if folder.exists():
        folder.rename(folder.with_name(f"trash-{time.time_ns()}"))
    for old in folder.parent.glob("trash-*"):
        threading.Thread(target=shutil.rmtree, args=(old, True), daemon=True).start()


def _configure(host: str, port: int, state_dir: Path, tls: Certificates) -> None:
    """Set MiniStack's environment, which it reads when imported.

    MiniStack hands its environment on to the functions: so nothing of the caller's stays but where programs are.
    """
    for name in os.environ.keys() - {"PATH", "HOME", "LANG", MARKER}:
        del os.environ[name]
    _throw_away(state_dir / "tmp")  # what the functions of an earlier emulator left
    for name, folder in {"STATE_DIR": "services", "S3_DATA_DIR": "s3", "TMPDIR": "tmp"}.items():
        (state_dir / folder).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(state_dir / folder)
    os.environ |= {
        "GATEWAY_PORT": str(port),
        "MINISTACK_HOST": host,
        # Where the functions find AWS: MiniStack would have it on 127.0.0.1, whatever it listens on.
        "AWS_ENDPOINT_URL": f"https://{host}:{port}",
        "MINISTACK_REGION": REGION,
        "PERSIST_STATE": "1",
        "S3_PERSIST": "1",
        "AUTH": "true",
        "USE_SSL": "1",
        "MINISTACK_SSL_CERT": str(tls.chain),
        "MINISTACK_SSL_KEY": str(tls.key),
        "AWS_CA_BUNDLE": str(tls.authority),
        # No other ports, and no look at the containers of a Docker that may be there.
        "IOT_MTLS_ENABLED": "0",
        "SFTP_ENABLED": "0",
        "DOCKER_HOST": "unix:///nonexistent",
        # There is no X-Ray daemon here.
        "POWERTOOLS_TRACE_DISABLED": "true",
    }


async def serve(host: str, port: int, tls: Certificates, invocations: AsyncInvocations) -> None:
    """Serve AWS until SIGTERM or SIGINT; state is saved at the end."""
    import hypercorn.asyncio
    from hypercorn.config import Config

    config = Config()
    config.bind = [f"{host}:{port}"]
    config.certfile, config.keyfile = str(tls.chain), str(tls.key)
    config.keep_alive_timeout = 75
    # A client that keeps its connection would hold up the end for half a minute; hypercorn has no setting for it.
    asyncio.constants.SSL_SHUTDOWN_TIMEOUT = 0.5  # type: ignore[attr-defined]
    logging.getLogger("persistence").setLevel(logging.WARNING)  # it would tell of every save
    saver = asyncio.create_task(state.keep_saving())
    await hypercorn.asyncio.serve(_application(invocations), config)  # type: ignore[arg-type]
    saver.cancel()


def main(argv: list[str] | None = None) -> None:
    """Run the emulator; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m local_app.aws.server", description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("--tls-dir", type=Path, required=True, help="where local_app.certificates has made them")
    options = parser.parse_args(argv)
    state_dir, tls = options.state_dir.resolve(), certificates(options.tls_dir.resolve())
    _configure(options.host, options.port, state_dir, tls)

    invocations = AsyncInvocations(state_dir / "invocations", f"https://{options.host}:{options.port}")
    _hook_interpreter(state_dir / "tmp")
    _hook_s3_events()
    _hook_async_invocations(invocations)
    _hook_rule_complexity()
    _hook_calls(state_dir / "calls.jsonl")
    _hook_trust_policies()
    _hook_alarms()
    asyncio.run(serve(options.host, options.port, tls, invocations))


if __name__ == "__main__":
    main()
