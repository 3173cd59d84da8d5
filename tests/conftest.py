"""What all tests share: the real events, and a world without the developer's own AWS account."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import quick_aws
import strict_model

ROOT = Path(__file__).parents[1]
EVENTS = ROOT / "events"
# Read when pipeline.observability is imported, which tests do before any fixture.
os.environ["POWERTOOLS_METRICS_NAMESPACE"] = "tunedrop"


strict_model.install()
quick_aws.quick_botocore()


@pytest.fixture(autouse=True)
def strict_requests(request: pytest.FixtureRequest) -> Iterator[None]:
    """No request breaks its service's model, but for those of a test that is about that."""
    strict_model.broken.clear()
    yield
    if not request.node.get_closest_marker("breaks_the_model"):
        assert strict_model.broken == []


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials that no account accepts."""
    endpoints = [name for name in os.environ if name.startswith("AWS_ENDPOINT_URL")]
    for name in (*endpoints, "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.fixture
def load_event() -> Callable[[str], dict[str, Any]]:
    """Read `events/<name>.json`."""
    return lambda name: json.loads((EVENTS / f"{name}.json").read_text())


@pytest.fixture
def say(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Have a figure that a test found printed at the end, by whichever process the test ran in."""
    return lambda text: record_property("said", text)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the number of checked requests from a worker to the process that prints it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["calls"] = dict(strict_model.calls)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take a worker's number over."""
    strict_model.calls.update(Counter(getattr(node, "workeroutput", {}).get("calls", {})))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests had to `say`, and how many requests were held against the service models."""
    checked, operations = strict_model.calls.total(), len(strict_model.calls)
    terminalreporter.write_line(f"{checked:,} requests of {operations} operations fit their services' models")
    for report in [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]:
        for name, text in report.user_properties:
            if name == "said" and report.when == "call":
                terminalreporter.write_line(str(text))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium. The environment of `make test-python` has no playwright."""
    from browser import CHROMIUM_FLAGS, chromium
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=CHROMIUM_FLAGS)
        yield browser
        browser.close()
