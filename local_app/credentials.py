"""The root credentials of the local AWS account, and requests that are signed with them.

Each state folder has credentials of its own, in a file that only its user may read. Both emulators verify the signature
of every request, so another user of this machine, or a job, can do nothing without these credentials.
"""

import configparser
import io
import json
import os
import ssl
import urllib.request
from pathlib import Path
from typing import NamedTuple

from local_app.common import REGION, Json

FILE = "credentials"
# The service in the signatures of requests to the emulators' own paths, `/_tunedrop/…`.
OWN_SERVICE = "tunedrop"
_TIMEOUT_SECONDS = 30.0


class Credentials(NamedTuple):
    """An access key."""

    access_key_id: str
    secret_access_key: str

    @classmethod
    def of_environment(cls) -> "Credentials":
        """Return the credentials in this process's environment. Raises KeyError without them."""
        return cls(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which AWS's SDKs, the AWS CLI and SAM use these credentials."""
        return {"AWS_ACCESS_KEY_ID": self.access_key_id, "AWS_SECRET_ACCESS_KEY": self.secret_access_key}


def root_credentials(folder: Path) -> Credentials:
    """Return the root credentials of a state folder, made at random at the first call.

    The file has the format of AWS's shared credentials file
    (https://docs.aws.amazon.com/sdkref/latest/guide/file-format.html).
    """
    import secrets

    file = folder / FILE
    if not file.exists():
        made = Credentials(f"AKIA{secrets.token_hex(8).upper()}", secrets.token_urlsafe(30))
        _write_private(file, made)
    config = configparser.ConfigParser(interpolation=None)
    config.read(file)
    profile = config["default"]
    return Credentials(profile["aws_access_key_id"], profile["aws_secret_access_key"])


def _write_private(file: Path, credentials: Credentials) -> None:
    config, text = configparser.ConfigParser(interpolation=None), io.StringIO()
    config["default"] = {
        "aws_access_key_id": credentials.access_key_id,
        "aws_secret_access_key": credentials.secret_access_key,
    }
    config.write(text)
    draft = file.with_suffix(".draft")
    draft.unlink(missing_ok=True)
    draft.touch(0o600)
    draft.write_text(text.getvalue())
    draft.replace(file)


def post_signed(url: str, credentials: Credentials, body: bytes, authority: str | None = None) -> Json:
    """POST a JSON document to an emulator's own path and return the JSON response.

    `authority` is the file of the CA certificate for an https URL. Raises urllib.error.HTTPError for a status that is not
    2xx, and OSError without a server.
    """
    from botocore.auth import SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials as BotocoreCredentials

    signed = AWSRequest("POST", url, {"Content-Type": "application/json"}, body)
    SigV4Auth(BotocoreCredentials(*credentials), OWN_SERVICE, REGION).add_auth(signed)
    request = urllib.request.Request(url, signed.body, dict(signed.headers.items()), method="POST")  # noqa: S310 - ours
    context = ssl.create_default_context(cafile=authority) if url.startswith("https:") else None
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS, context=context) as response:  # noqa: S310
        return dict(json.loads(response.read() or b"{}"))
