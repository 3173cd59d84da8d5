"""Measures the first paint of a report with 200 tests and of an index of 500 runs, beside an empty page's.

.venv/bin/python -m benchmarks.report
"""

import statistics
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.report.conftest import CHROMIUM_FLAGS, chromium

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/support"))
from made_up import made_index, made_report, made_tests

TRIES = 5
PAINT = """() => new Promise((done) => new PerformanceObserver((list) =>
    list.getEntriesByName("first-contentful-paint").forEach((paint) => done(paint.startTime))
).observe({ type: "paint", buffered: true }))"""


def main() -> None:
    """Print the size and the median first paint of each page."""
    pages = {
        "empty page": "<!doctype html><title>x</title><p>x",
        "report, 200 tests": made_report(made_tests(200)),
        "index, 500 runs": made_index(500),
    }
    paints: dict[str, float] = {}
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=chromium(), args=CHROMIUM_FLAGS)
        for name, html in pages.items():
            file = Path(folder) / "page.html"
            file.write_text(html)
            tries = []
            for _ in range(TRIES):
                page = browser.new_page()
                page.goto(file.as_uri())
                tries.append(page.evaluate(PAINT))
                page.close()
            paints[name] = statistics.median(tries)
            print(f"{name:20} {len(html.encode()) / 1024:7.0f} KB  first paint {paints[name]:6.0f} ms")
        browser.close()
    print(f"report / empty page: {paints['report, 200 tests'] / paints['empty page']:.1f}")


if __name__ == "__main__":
    main()
