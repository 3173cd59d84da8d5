"""HTTP endpoints that rewards call: which URLs are safe, which hosts a stack allows, and the POST of JSON."""

import json
import time
import urllib.error
import urllib.request
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator

from tunedrop.rewards.permissions import RewardPermissions
from tunedrop.rewards.sample import RewardError

ATTEMPTS = 3


def _safe(url: str) -> str:
    parts = urlsplit(url)
    # Plain HTTP would also reach the metadata services, which return the job's credentials.
    if parts.scheme != "https" and (parts.scheme, parts.hostname) not in {("http", "127.0.0.1"), ("http", "localhost")}:
        raise ValueError("must be https:// (http:// only on 127.0.0.1)")
    return url


SafeUrl = Annotated[str, AfterValidator(_safe)]


def host_allowed(url: str, permissions: RewardPermissions) -> bool:
    """Return whether a stack lets rewards call a URL's host, named with or without its port."""
    parts = urlsplit(url)
    return not {parts.netloc, parts.hostname}.isdisjoint(permissions.hosts)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow no redirect: a redirect could leave https, or send the samples to another host."""


def json_bytes(payload: Any) -> bytes:
    """Return a payload as JSON. A Parquet column may hold dates, which become text."""
    return json.dumps(payload, default=str).encode()


def post(url: SafeUrl, payload: Any, timeout: float) -> Any:
    """Return the JSON that an endpoint answers to a POST of a payload, within `timeout` seconds.

    After status 429 or 5xx, or a connection that fails or times out, it tries again, ATTEMPTS times in all. Raises
    RewardError if the endpoint cannot be called, or does not answer with JSON.
    """
    opener = urllib.request.build_opener(_NoRedirect)
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    request = urllib.request.Request(url, json_bytes(payload), headers)  # noqa: S310 - a SafeUrl
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with opener.open(request, timeout=timeout) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            reason, temporary = f"status {error.code}: {error.read(200)!r}", error.code == 429 or error.code >= 500
        except (OSError, urllib.error.URLError) as error:
            reason, temporary = str(error), True
        except ValueError:
            raise RewardError(f"the response of {url} is not JSON") from None
        if not temporary or attempt == ATTEMPTS:
            break
        time.sleep(0.1 * 4**attempt)
    raise RewardError(f"{url} cannot be called: {reason}")
