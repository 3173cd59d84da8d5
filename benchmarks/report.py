"""Measures how fast a report with 200 tests and 500 groups of rollouts, and an index of 500 runs, open beside an empty page.

The first paint shows the top of a page. A page is ready when its scripts have run.

.venv/bin/python -m benchmarks.report
"""

import statistics
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/support"))
from browser import CHROMIUM_FLAGS, chromium
from made_up import made_index, made_report, made_tests

TRIES = 5
PAINT = """() => new Promise((done) => new PerformanceObserver((list) =>
    list.getEntriesByName("first-contentful-paint").forEach((paint) => done(paint.startTime))
).observe({ type: "paint", buffered: true }))"""


READY = "() => performance.getEntriesByType('navigation')[0].loadEventEnd"


def main() -> None:
    """Print the size of each page, and the medians of its first paint and of the time until it is ready."""
    pages = {
        "empty page": "<!doctype html><title>x</title><p>x",
        "report": made_report(made_tests(200)),
        "index, 500 runs": made_index(500),
    }
    paints: dict[str, float] = {}
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=chromium(), args=CHROMIUM_FLAGS)
        for name, html in pages.items():
            file = Path(folder) / "page.html"
            file.write_text(html)
            tries, ready = [], []
            for _ in range(TRIES):
                page = browser.new_page()
                page.goto(file.as_uri())
                tries.append(page.evaluate(PAINT))
                ready.append(page.evaluate(READY))
                page.close()
            paints[name] = statistics.median(tries)
            size = len(html.encode()) / 1024
            print(f"{name:20} {size:7.0f} KB  first paint {paints[name]:6.0f} ms  ready {statistics.median(ready):6.0f} ms")
        browser.close()
    print(f"report / empty page: {paints['report'] / paints['empty page']:.1f}")


if __name__ == "__main__":
    main()
