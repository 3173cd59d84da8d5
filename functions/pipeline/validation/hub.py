"""Pins a base model on the Hugging Face hub: a name there is a moving branch, and only a commit identifies a model."""

import re
from collections.abc import Mapping
from urllib.parse import quote

import msgspec

from tunedrop.problems import Problem

HUB = "https://huggingface.co"
COMMIT = re.compile(r"[0-9a-f]{40}")
SECONDS, ATTEMPTS = 10.0, 3
MOST_BYTES = 1024**2
WAYS_OUT = (
    'name the commit, as `org/name@COMMIT` (the model\'s page, "Files", "History", shows it), or upload the model\'s files: '
    "`tunedrop drop --model DIR`"
)


def pin_model(model: str, environment: Mapping[str, str]) -> tuple[str, list[Problem]]:
    """Return `org/name@commit` for a model of the hub, `org/name` or `org/name@revision`; without one, the problem.

    A folder's name, and a model that names its commit, stay as they are, without a request. `environment` is the jobs': its
    `HF_ENDPOINT` and `HF_TOKEN` apply here too. The request is that of huggingface_hub's `HfApi.model_info`.
    """
    name, _, revision = model.partition("@")
    if "/" not in name or COMMIT.fullmatch(revision):
        return model, []
    endpoint = environment.get("HF_ENDPOINT", HUB).rstrip("/")
    url = f"{endpoint}/api/models/{name}/revision/{quote(revision or 'main', safe='')}?expand=sha"
    status, body = _get(url, environment.get("HF_TOKEN"))
    if status in {401, 403, 404}:
        message = (
            f"{endpoint} answers {status} for the model '{model}': there is none of this name and revision, or it is private"
        )
        return model, [Problem("MODEL_MISSING", message, f"correct the name, or {WAYS_OUT}", key="model")]
    commit = _commit(body) if status == 200 else None
    if commit is None:
        said = f"answers {status}" if status else body.decode(errors="replace")
        message = f"'{model}' is no fixed model, and its commit cannot be looked up: {endpoint} {said}"
        return model, [Problem("MODEL_NOT_PINNED", message, WAYS_OUT, key="model")]
    return f"{name}@{commit}", []


def _get(url: str, token: str | None) -> tuple[int, bytes]:
    """Return the status and the beginning of the body of a GET request; 0 and the reason without an answer."""
    import urllib3  # late: only models of the hub need it

    # urllib3 repeats connections that fail, and follows redirects, without the token on another host.
    retries = urllib3.Retry(
        total=ATTEMPTS, backoff_factor=0.5, status_forcelist=[429, 500, 502, 503, 504], raise_on_status=False
    )
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib3.PoolManager() as pool:
            answer = pool.request("GET", url, headers=headers, timeout=SECONDS, retries=retries, preload_content=False)
            return answer.status, answer.read(MOST_BYTES)
    except urllib3.exceptions.HTTPError as error:
        reason = getattr(error, "reason", None) or error
        return 0, f"cannot be reached ({type(reason).__name__})".encode()


def _commit(body: bytes) -> str | None:
    """Return the commit in a model's description."""
    try:
        commit = msgspec.json.decode(body, type=dict[str, object]).get("sha")
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return commit if isinstance(commit, str) and COMMIT.fullmatch(commit) else None
