"""The browser that opens the pages."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page


class Opened:
    """A page in the browser, and what it complained about."""

    def __init__(self, browser: Browser, file: Path, html: str, **options: Any):
        file.write_text(html)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page: Page = browser.new_page(**options)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Any]:
    """Open a page; in the end it has complained about nothing and asked for nothing but itself."""
    pages: list[Opened] = []

    def open_page(html: str, **options: Any) -> Page:
        pages.append(Opened(browser, tmp_path / "page.html", html, **options))
        return pages[-1].page

    yield open_page
    for each in pages:
        assert each.complaints == []
        assert each.requests == [(tmp_path / "page.html").as_uri()]
        assert each.page.title() not in {"pwned", "1"}
        each.page.close()
