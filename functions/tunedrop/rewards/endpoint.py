"""HTTP endpoints that rewards call: which URLs are safe, which hosts a stack allows, and the POST of JSON."""

import json
import re
import time
import urllib.error
import urllib.request
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator

from tunedrop.rewards.permissions import RewardPermissions
from tunedrop.rewards.sample import RewardError

ATTEMPTS = 3
ERROR_BYTES = 64 * 1024  # of a response that is an error; its message has the first 200


def _safe(url: str) -> str:
    parts = urlsplit(url)
    # Plain HTTP would also reach the metadata services, which return the job's credentials.
    if parts.scheme != "https" and (parts.scheme, parts.hostname) not in {("http", "127.0.0.1"), ("http", "localhost")}:
        raise ValueError("must be https:// (http:// only on 127.0.0.1)")
    return url


SafeUrl = Annotated[str, AfterValidator(_safe)]


def _names(url: str) -> tuple[str, str]:
    """Return the names of a URL's host, with its port first."""
    parts = urlsplit(url)
    return parts.netloc, parts.hostname or ""


def host_allowed(url: str, permissions: RewardPermissions) -> bool:
    """Return whether a stack lets rewards call a URL's host, named with or without its port."""
    return not set(_names(url)).isdisjoint(permissions.hosts)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow no redirect: a redirect could leave https, or send the samples to another host."""


def json_bytes(payload: Any) -> bytes:
    """Return a payload as JSON. A Parquet column may hold dates, which become text."""
    return json.dumps(payload, default=str).encode()


def post(url: SafeUrl, payload: Any, timeout: float, permissions: RewardPermissions) -> Any:
    """Return the JSON that an endpoint answers to a POST of a payload, within `timeout` seconds.

    The request has the token of the endpoint's host, if there is one. After status 429 or 5xx, or a connection that fails or
    times out, it tries again, ATTEMPTS times in all. Raises RewardError if the endpoint cannot be called, or does not answer
    with JSON. Neither the JSON nor the error has the token, even where the endpoint repeats it.
    """
    token = permissions.tokens.token(_names(url)) if permissions.tokens else None
    request = _request(url, payload, token)
    # A proxy would read what plain HTTP sends to this machine.
    proxies = urllib.request.ProxyHandler({} if request.type == "http" else None)
    opener = urllib.request.build_opener(_NoRedirect, proxies)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with opener.open(request, timeout=timeout) as response:
                return json.loads(_without(token, response.read()))
        except urllib.error.HTTPError as error:
            answer = _without(token, error.read(ERROR_BYTES))[:200]
            reason, temporary = f"status {error.code}: {answer!r}", error.code == 429 or error.code >= 500
        except (OSError, urllib.error.URLError) as error:
            reason, temporary = str(error), True
        except ValueError:
            raise RewardError(f"the response of {url} is not JSON") from None
        if not temporary or attempt == ATTEMPTS:
            break
        time.sleep(0.1 * 4**attempt)
    raise RewardError(f"{url} cannot be called: {reason}")


def _request(url: SafeUrl, payload: Any, token: str | None) -> urllib.request.Request:
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    request = urllib.request.Request(url, json_bytes(payload), headers)  # noqa: S310 - a SafeUrl
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return request


def _without(token: str | None, response: bytes) -> bytes:
    """Return a response without the token, as it is or as JSON and URLs escape it."""
    if token is None:
        return response
    escaped = "".join(rf"(?:\\?{re.escape(each)}|\\u00{ord(each):02x}|%{ord(each):02x})" for each in token)
    return re.sub(escaped.encode(), b"***", response, flags=re.IGNORECASE)
