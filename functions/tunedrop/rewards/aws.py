"""What rewards ask AWS for: its clients, and the tokens of the hosts that they call."""

import json
import re
from collections.abc import Callable, Iterable
from threading import Lock
from typing import Any

from tunedrop.rewards.sample import RewardError

Clients = Callable[[str], Any]
_HOST = re.compile(r"[a-zA-Z0-9.-]+(:[0-9]+)?")  # as in the stack parameter RewardHttpHosts
# A bearer token (https://www.rfc-editor.org/rfc/rfc6750#section-2.1), too long to be a part of a response by chance.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{8,}=*")
_FORM = (
    "the secret of RewardHttpSecretArn must be a JSON object: each key HOST or HOST:PORT, each value a token of at least 8 "
    "of A-Z, a-z, 0-9 and -._~+/, which may end in ="
)


def aws_client(client: Clients | None, service: str) -> Any:
    """Return the client of an AWS service. Raises RewardError where rewards have no AWS client."""
    if client is None:
        raise RewardError(f"the reward calls AWS ({service}), but has no AWS client here")
    return client(service)


class HostTokens:
    """The tokens of hosts: a secret of AWS Secrets Manager with the ARN `secret`, a JSON object of host → token.

    The secret is read once, when a token is first needed. No error tells its value.
    """

    def __init__(self, client: Clients | None, secret: str):
        self._client = client
        self._secret = secret
        self._lock = Lock()  # a reward sends several requests at a time
        self._found: dict[str, str] | str | None = None

    def token(self, names: Iterable[str]) -> str | None:
        """Return the token of the first of a host's names that has one, None without one.

        Raises RewardError if the secret cannot be read, or is not a JSON object of hosts and tokens.
        """
        with self._lock:
            if self._found is None:
                self._found = self._read()
        if isinstance(self._found, str):
            raise RewardError(self._found)
        return next((self._found[name] for name in names if name in self._found), None)

    def _read(self) -> dict[str, str] | str:
        """Return the tokens, or the reason why there are none. The reason, unlike an exception, keeps no part of the value.

        https://docs.aws.amazon.com/secretsmanager/latest/apireference/API_GetSecretValue.html
        """
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            response = aws_client(self._client, "secretsmanager").get_secret_value(SecretId=self._secret)
        except (BotoCoreError, ClientError) as error:
            return f"the secret of RewardHttpSecretArn cannot be read: {error}"
        try:
            found = json.loads(response.get("SecretString", ""))
        except ValueError:
            return _FORM
        return found if _is_form(found) else _FORM


def _is_form(found: Any) -> bool:
    """Return whether a value is an object of hosts and tokens."""
    return isinstance(found, dict) and all(
        _HOST.fullmatch(host) and isinstance(token, str) and _TOKEN.fullmatch(token) for host, token in found.items()
    )
