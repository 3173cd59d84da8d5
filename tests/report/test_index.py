"""`index.html` in a browser, with 500 runs, and how it is kept."""

import msgspec
import pytest
from made_up import HOSTILE, made_index, made_line, made_run
from msgspec import structs, to_builtins
from playwright.sync_api import expect

from pipeline.publish.index import read_index, render_index

RUNS = [made_run(number) for number in range(500)]
PAGE = made_index(500)


def rows(page):
    return page.locator("#runs tbody tr")


def column(page, number):
    return [text.strip() for text in page.locator(f"#runs tbody tr td:nth-child({number})").all_text_contents()]


def test_the_page_gives_its_runs_back():
    assert read_index(PAGE) == RUNS
    assert read_index(render_index([])) == []
    assert "<script>document.title" not in PAGE
    with pytest.raises(ValueError, match="delete it"):
        read_index("<html></html>")


def test_filters(opened):
    page = opened(PAGE)
    expect(rows(page)).to_have_count(500)
    assert page.locator("#runs svg path").count() == 500
    page.get_by_label("Verdict").select_option("APPROVED")
    expect(rows(page)).to_have_count(sum(run.verdict == "APPROVED" for run in RUNS))
    page.get_by_label("Dataset").select_option(HOSTILE)
    expected = sum(run.verdict == "APPROVED" and run.dataset == HOSTILE for run in RUNS)
    expect(rows(page)).to_have_count(expected)
    expect(page.locator("#shown")).to_have_text(f"{expected} of 500")
    page.get_by_label("Verdict").select_option("")
    page.get_by_label("Dataset").select_option("")
    page.get_by_label("Search").fill("0000001F3")
    expect(rows(page)).to_have_count(1)
    assert page.locator("#runs a").get_attribute("href") == f"cars-{499:012x}/report.html"


def test_sorting(opened):
    page = opened(PAGE)
    newest = sorted(RUNS, key=lambda run: run.published, reverse=True)
    assert column(page, 12)[:3] == [run.published[:16].replace("T", " ") for run in newest[:3]]
    page.get_by_role("button", name="lift").click()
    lifts = [float(text) for text in column(page, 6)]
    assert lifts == sorted(lifts, reverse=True)
    page.get_by_role("button", name="lift").click()
    assert [float(text) for text in column(page, 6)] == sorted(lifts)
    page.get_by_role("button", name="cost").click()
    costs = column(page, 11)
    assert costs[0] == "$49.90"
    assert costs[-100:] == [""] * 100  # runs without a price come last, whichever way


LINES = [*RUNS[:20], *made_line(6)]


def test_lines_are_filtered_and_show_what_started_from_what(opened):
    page = opened(render_index(LINES))
    expect(page.locator("#chain")).to_be_hidden()
    page.get_by_label("Line").select_option("faq & more")
    expect(rows(page)).to_have_count(6)
    expect(page.locator("#chain h2")).to_have_text("Line faq & more")
    assert page.locator("#chain > ul > li > a").all_text_contents() == [f"faq-{number:012x}" for number in (0, 2, 4)]
    assert page.locator("#chain ul ul > li > a").all_text_contents() == [f"faq-{number:012x}" for number in (1, 3, 5)]
    assert page.locator("#chain a").first.get_attribute("href") == f"faq-{0:012x}/report.html"
    assert f"+0.100 over the champion faq-{4:012x}" in page.locator("#chain li li").last.inner_text()
    page.get_by_label("Line").select_option("")
    expect(page.locator("#chain")).to_be_hidden()
    page.get_by_role("button", name="over champion").click()
    assert column(page, 8)[:7] == ["+0.100"] * 5 + [""] * 2
    page.get_by_label("Search").fill("faq & more")
    expect(rows(page)).to_have_count(6)


def test_without_lines_the_page_has_no_column_of_lines(opened):
    page = opened(PAGE)
    expect(page.get_by_label("Line", exact=True)).to_be_hidden()
    assert page.get_by_role("button", name="over champion").count() == 0


def test_a_run_that_started_from_one_that_is_not_listed_is_a_root(opened):
    page = opened(render_index(made_line(4)[1:]))
    page.get_by_label("Line").select_option("faq & more")
    expect(page.locator("#chain > ul > li")).to_have_count(2)
    assert f"started from faq-{0:012x}" in page.locator("#chain li").first.inner_text()


def test_a_page_from_before_lines_is_read():
    """The page is the only store of its runs: those of an older release keep their place, each in its dataset's line."""
    new = {"line", "start", "champion", "champion_lift"}
    old = [{name: value for name, value in to_builtins(run).items() if name not in new} for run in RUNS[:3]]
    old[1]["dataset"] = "faq/old"
    page = render_index([]).replace(">[]<", f">{msgspec.json.encode(old).decode().replace('<', chr(92) + 'u003c')}<")
    runs = read_index(page)
    assert [run.line for run in runs] == ["cars", "faq", HOSTILE.partition("/")[0]]
    assert [
        structs.replace(run, line=before.line, dataset=before.dataset) for run, before in zip(runs, RUNS, strict=False)
    ] == RUNS[:3]


def test_two_runs_are_compared(opened):
    page = opened(PAGE)
    boxes = page.locator("#runs input")
    boxes.nth(0).check()
    expect(page.locator("#compare")).to_be_hidden()
    boxes.nth(1).check()
    expect(page.locator("#compare")).to_be_visible()
    assert "learning rate" in page.locator("#compare tr.differs").all_text_contents().__str__()
    boxes.nth(2).check()  # takes the place of the first
    assert not boxes.nth(0).is_checked()
    page.get_by_role("button", name="Close").click()
    expect(page.locator("#compare")).to_be_hidden()


def test_an_empty_index_and_a_phone(opened):
    page = opened(render_index([]), viewport={"width": 390, "height": 700}, color_scheme="dark")
    expect(page.locator("#summary")).to_have_text("0 published, 0 approved")
    page = opened(PAGE, viewport={"width": 390, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
