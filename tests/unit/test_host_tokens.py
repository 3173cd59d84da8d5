"""Tokens of hosts: which host gets which token, what a secret must be, and where no token may appear."""

import json
import logging
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from answering_server import Server, answering_server, chat

from tunedrop.rewards import Reward, RewardError, RewardPermissions, RewardSpec, reward_permissions
from tunedrop.rewards.endpoint import post

ARN = "arn:aws:secretsmanager:us-east-1:123456789012:secret:judges-AbCdEf"
TOKEN = "CaNaRy/0123+4567=="
OTHER = "oThEr.0123456789"
ESCAPED = {
    "as it is": TOKEN,
    "as PHP writes JSON": TOKEN.replace("/", r"\/"),
    "as .NET writes JSON": TOKEN.replace("+", r"\u002B"),
    "as in a URL": TOKEN.replace("/", "%2F").replace("+", "%2b").replace("=", "%3D"),
}


@pytest.fixture
def permissions(server: Server, clients: Callable[[str], Any]) -> Callable[[Any], RewardPermissions]:
    """Make the permissions of a job whose secret has a value, or whose Secrets Manager answers (status, body)."""

    def make(secret: Any) -> RewardPermissions:
        answer = secret if isinstance(secret, tuple) else (200, {"SecretString": json.dumps(secret)})
        endpoint = getattr(server, "reply", lambda body: chat("<score>5</score>"))

        def reply(body: Any) -> tuple[int, dict[str, str], Any]:
            return (answer[0], {}, answer[1]) if "SecretId" in body else endpoint(body)

        server.reply = reply
        return reward_permissions({"REWARD_HTTP_HOSTS": "127.0.0.1,localhost", "REWARD_HTTP_SECRET_ARN": ARN}, clients)

    return make


def sent(server: Server) -> list[str | None]:
    """Return the authorizations of the requests to the endpoint."""
    return [given for body, given in zip(server.asked, server.authorized, strict=True) if "SecretId" not in body]


def reads(server: Server) -> list[Any]:
    """Return the requests to Secrets Manager."""
    return [body for body in server.asked if "SecretId" in body]


def results(samples: Any) -> tuple[int, dict[str, str], Any]:
    return 200, {}, [{"id": each["id"], "aggregate_reward_score": 0.5} for each in samples]


REWARDS: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "http": ({"batch_size": 1}, results),
    "judge": ({"model": "m"}, lambda _: chat("<score>5</score>")),
    "judge_group": ({"model": "m"}, lambda _: chat('{"ranking": ["A", "B"]}')),
}


@pytest.mark.parametrize("kind", REWARDS)
def test_every_reward_that_calls_a_host_sends_its_token_and_reads_the_secret_once(server, permissions, kind):
    given, server.reply = REWARDS[kind]
    reward = Reward(RewardSpec(type=kind, url=server.url, **given), permissions({"127.0.0.1": TOKEN}))
    assert reads(server) == []
    for _ in range(2):
        assert len(reward(["a", "b", "c"], ["x", "y", "z"], answer=["1", "2", "3"])) == 3
    assert sent(server) == [f"Bearer {TOKEN}"] * 6
    assert reads(server) == [{"SecretId": ARN}]


HOSTS = [
    # the hosts of the secret, where PORT is the server's; the host that is called; the token that it gets
    ({"127.0.0.1": TOKEN}, "127.0.0.1", TOKEN),
    ({"127.0.0.1:PORT": TOKEN}, "127.0.0.1", TOKEN),
    ({"127.0.0.1": OTHER, "127.0.0.1:PORT": TOKEN}, "127.0.0.1", TOKEN),
    ({"localhost": OTHER, "127.0.0.1": TOKEN}, "127.0.0.1", TOKEN),
    ({"127.0.0.1": OTHER, "localhost": TOKEN}, "localhost", TOKEN),
    ({"127.0.0.1:1": TOKEN}, "127.0.0.1", None),
    ({"localhost": TOKEN}, "127.0.0.1", None),
    ({"0.0.1": TOKEN, "127.0.0.10": TOKEN, "127.0.0": TOKEN}, "127.0.0.1", None),
    ({}, "127.0.0.1", None),
]


@pytest.mark.parametrize(("hosts", "called", "token"), HOSTS)
def test_a_host_gets_its_own_token_and_no_other(server, permissions, hosts, called, token):
    allowed = permissions({host.replace("PORT", str(server.server_port)): each for host, each in hosts.items()})
    post(server.url.replace("127.0.0.1", called), {}, 1, allowed)
    assert sent(server) == [token and f"Bearer {token}"]


def test_without_a_secret_no_token_is_sent_and_nothing_is_read(server):
    server.reply = lambda body: (200, {}, {})
    post(server.url, {}, 1, reward_permissions({"REWARD_HTTP_HOSTS": "127.0.0.1"}))
    assert (sent(server), reads(server)) == ([None], [])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_gets_a_token(server, permissions, status):
    with answering_server() as elsewhere:
        elsewhere.reply = lambda body: (200, {}, {})
        server.reply = lambda body: (status, {"Location": f"{elsewhere.url}/{server.authorized[-1]}"}, {})
        with pytest.raises(RewardError, match=f"cannot be called: status {status}") as caught:
            post(server.url, {}, 1, permissions({"127.0.0.1": TOKEN}))
    assert sent(server) == [f"Bearer {TOKEN}"]
    assert elsewhere.asked == []
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


def test_no_proxy_gets_a_token_in_plain_text(server, permissions, monkeypatch):
    server.reply = lambda body: (200, {}, {})
    allowed = permissions({"127.0.0.1": TOKEN})
    assert allowed.tokens
    allowed.tokens.token([])  # read before the proxy is set
    with answering_server() as proxy:
        proxy.reply = lambda body: (200, {}, {})
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        post(server.url, {}, 1, allowed)
    assert proxy.asked == []
    assert sent(server) == [f"Bearer {TOKEN}"]


@pytest.mark.parametrize("written", ESCAPED.values(), ids=ESCAPED)
@pytest.mark.parametrize("filler", [0, 170])  # the end of what a message quotes cuts the token
@pytest.mark.parametrize("status", [200, 400, 503])
@pytest.mark.parametrize("kind", ["http", "judge"])
def test_an_endpoint_that_repeats_the_token_does_not_reveal_it(
    server, permissions, monkeypatch, caplog, kind, status, filler, written
):
    monkeypatch.setattr("time.sleep", lambda _: None)
    caplog.set_level(logging.DEBUG, "tunedrop")
    server.reply = lambda body: (status, {}, f'{{"error": "{"." * filler}Bearer {written}"}}'.encode())
    given, _ = REWARDS[kind]
    reward = Reward(RewardSpec(type=kind, url=server.url, **given), permissions({"127.0.0.1": TOKEN}))
    with pytest.raises(RewardError) as caught:
        reward(["a"], ["x"], answer=["1"])
    said = "".join(traceback.format_exception(caught.value)) + caplog.text + repr(reward._permissions)
    assert f"Bearer {TOKEN}" in sent(server)
    assert "CaNaRy" not in said


BROKEN = {
    "no leave": (400, {"__type": "AccessDeniedException", "Message": "not authorized"}),
    "no such secret": (400, {"__type": "ResourceNotFoundException", "Message": "can't find the specified secret"}),
    "no leave for its key": (400, {"__type": "AccessDeniedException", "Message": "Access to KMS is not allowed"}),
    "bytes": (200, {"SecretBinary": "Q2FOYVJ5LXRva2Vu"}),
    "a text": (200, {"SecretString": TOKEN}),
    "a list": [TOKEN],
    "a token within": {"h": {"token": TOKEN}},
    "a number": {"h": 123456789},
    "no token": {"h": None},
    "a URL": {"https://h/v1": TOKEN},
    "a header": {"h": f"Bearer {TOKEN}"},
    "a line end": {"h": f"{TOKEN}\n"},
    "not in ASCII": {"h": f"{TOKEN}é"},
    "too short": {"h": "CaNaRy"},
    "one wrong of two": {"h": TOKEN, "i": ""},
}


@pytest.mark.parametrize("secret", BROKEN.values(), ids=BROKEN)
def test_a_broken_secret_is_said_with_its_parameter_and_without_its_value(server, permissions, secret):
    spec = RewardSpec(type="http", url=server.url, batch_size=1)
    reward = Reward(spec, permissions(secret))
    with pytest.raises(RewardError, match=r"the secret of RewardHttpSecretArn (cannot be read: |must be a JSON)") as caught:
        reward(["a"] * 8, ["x"] * 8, answer=["1"] * 8)
    assert "CaNaRy" not in "".join(traceback.format_exception(caught.value))
    assert sent(server) == []
    assert len(reads(server)) == 1


def test_a_secret_without_a_client_is_said():
    allowed = reward_permissions({"REWARD_HTTP_SECRET_ARN": ARN})
    with pytest.raises(RewardError, match=r"calls AWS \(secretsmanager\), but has no AWS client here"):
        post("https://example.com", {}, 1, allowed)
