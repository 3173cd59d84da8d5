"""Another user of this machine, or a job, that has no credentials of the application and tries to use it."""

import datetime
import http.client
import json
import os
import ssl
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from botocore.auth import S3SigV4QueryAuth, SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

NOBODY = 65534
Json = dict[str, Any]


class Attempt(NamedTuple):
    """A request: its name, URL, method, headers and body."""

    name: str
    url: str
    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""


def signed(
    name: str, url: str, service: str, key: Credentials, body: bytes = b"", method: str = "POST", **headers: str
) -> Attempt:
    """A request that is signed with `key`, as an SDK does it."""
    request = AWSRequest(method, url, {"Content-Type": "application/x-amz-json-1.1", **headers}, body)
    SigV4Auth(key, service, "us-east-1").add_auth(request)
    return Attempt(name, url, method, tuple(request.headers.items()), body)


def forged_keys(root_key: str) -> Iterator[tuple[str, Credentials]]:
    """Keys that MiniStack takes as root, or knows, with secrets that a neighbour can guess."""
    yield "test", Credentials("test", "test")
    yield "account", Credentials("000000000000", "test")
    yield "other account", Credentials("111111111111", "test")
    yield "unknown", Credentials("AKIAIOSFODNN7EXAMPLE", "test")
    yield "root with another secret", Credentials(root_key, "test")
    yield "root with an empty secret", Credentials(root_key, "")
    yield "root with its name as the secret", Credentials(root_key, root_key)


def attempts(aws: str, sagemaker: str, bucket: str, root_key: str) -> Iterator[Attempt]:
    """Requests to both servers that must all be refused. `bucket` exists, and has an object `runs/index.json`."""
    event = {
        "id": "1",
        "source": "aws.sagemaker",
        "detail-type": "SageMaker Training Job State Change",
        "account": "000000000000",
        "region": "us-east-1",
        "time": "2026-01-02T03:04:05Z",
        "detail": {},
    }
    own, json_body = json.dumps(event).encode(), b"{}"
    target = {"X-Amz-Target": "SageMaker.ListTrainingJobs"}
    yield Attempt("unsigned buckets", aws)
    yield Attempt("unsigned objects", f"{aws}/{bucket}?list-type=2")
    yield Attempt("unsigned object", f"{aws}/{bucket}/runs/index.json")
    yield Attempt("unsigned upload", f"{aws}/{bucket}/training_data/forged.jsonl", "PUT", body=b"{}")
    yield Attempt("unsigned event", f"{aws}/_tunedrop/events", "POST", body=own)
    yield Attempt("unsigned decision", f"{aws}/_tunedrop/authorize", "POST", body=json_body)
    yield Attempt("unsigned interruption", f"{sagemaker}/_tunedrop/interrupt/job", "POST")
    yield Attempt("unsigned SageMaker", sagemaker, "POST", tuple(target.items()), json_body)
    for path in ("_ministack/reset", "_ministack/config", "_localstack/health", "_aws/lambda-url/x/", "health"):
        yield Attempt(f"unsigned {path}", f"{aws}/{path}", "POST" if path.startswith("_ministack") else "GET")
    for scheme in ("AWS4-HMAC-SHA256", "AWS4-ECDSA-P256-SHA256", "AWS", "Basic", "Bearer"):
        yield Attempt(f"{scheme} nonsense", f"{aws}/{bucket}?list-type=2", headers=(("Authorization", f"{scheme} x"),))
    yield Attempt("SigV2 as root", f"{aws}/{bucket}/runs/index.json", headers=(("Authorization", f"AWS {root_key}:x"),))
    yield Attempt(
        "SigV2 query as root", f"{aws}/{bucket}/runs/index.json?AWSAccessKeyId={root_key}&Signature=x&Expires=9999999999"
    )
    for link in ("Action=ConfirmSubscription", "Action=Unsubscribe"):
        yield Attempt(f"{link} to a bucket's path", f"{aws}/{bucket}?{link}")
        yield Attempt(
            f"{link} to a bucket's host", f"{aws}/?{link}&list-type=2", headers=(("Host", f"{bucket}.s3.localhost"),)
        )
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    scope = quote(f"{root_key}/{now[:8]}/us-east-1/s3/aws4_request", safe="")
    yield Attempt(
        "presigned by nobody",
        f"{aws}/{bucket}/runs/index.json?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential={scope}&X-Amz-Date={now}"
        "&X-Amz-Expires=900&X-Amz-SignedHeaders=host&X-Amz-Signature=00",
    )
    for name, key in forged_keys(root_key):
        yield signed(f"{name}: event", f"{aws}/_tunedrop/events", "tunedrop", key, own)
        yield signed(f"{name}: decision", f"{aws}/_tunedrop/authorize", "tunedrop", key, json_body)
        yield signed(f"{name}: interruption", f"{sagemaker}/_tunedrop/interrupt/job", "tunedrop", key)
        yield signed(f"{name}: SageMaker", sagemaker, "sagemaker", key, json_body, **target)
        yield signed(f"{name}: buckets", aws, "s3", key, b"", "GET", **{"x-amz-content-sha256": "UNSIGNED-PAYLOAD"})
        yield signed(f"{name}: reset", f"{aws}/_ministack/reset", "s3", key)
        yield signed(f"{name}: role", aws, "sts", key, b"Action=GetCallerIdentity&Version=2011-06-15")
        presigned = AWSRequest("GET", f"{aws}/{bucket}/runs/index.json")
        S3SigV4QueryAuth(key, "s3", "us-east-1", expires=900).add_auth(presigned)
        yield Attempt(f"{name}: presigned", str(presigned.url))


def send(attempt: Attempt, trust: ssl.SSLContext) -> tuple[int, bytes]:
    """Send a request and return the status and the body of its response."""
    url = urlsplit(attempt.url)
    secure = url.scheme == "https"
    connection = (
        http.client.HTTPSConnection(url.netloc, timeout=20, context=trust)
        if secure
        else http.client.HTTPConnection(url.netloc, timeout=20)
    )
    given = {name.lower() for name, _ in attempt.headers}
    connection.putrequest(attempt.method, f"{url.path or '/'}?{url.query}", skip_host="host" in given)
    for name, value in attempt.headers:
        connection.putheader(name, value)
    if "content-length" not in given:
        connection.putheader("Content-Length", str(len(attempt.body)))
    connection.endheaders(attempt.body)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body


def as_nobody(work: Callable[[], Any]) -> Any:
    """Return `work()`, run by the user `nobody` if this process may become that user, else by this process's user."""
    context = get_context("fork")  # the child has the modules that `nobody` may not read
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        sender.send(work())

    process = context.Process(target=child)
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


def readable(folder: Path) -> list[str]:
    """Return what this process's user can read or write of a folder, which must be nothing for another user."""
    try:
        return [str(path) for path in [folder, *folder.rglob("*")] if os.access(path, os.R_OK) or os.access(path, os.W_OK)]
    except PermissionError:
        return []
