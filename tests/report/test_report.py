"""`report.html` in a browser, with 200 tests."""

import made_up
import pytest
from made_up import HOSTILE, made_index, made_report, made_suite, made_tests, with_champion
from msgspec import structs
from playwright.sync_api import expect

from pipeline.publish.statistics import outcome
from tunedrop.inference_tests import ModelResult

TESTS = made_tests(200)
LARGE = made_report(TESTS)
THREE = with_champion(TESTS)
SUITE = made_suite(120)
LINE = made_report(THREE, suite=SUITE, tries=3)


def cards(page):
    return page.locator("#answers .card:visible")


def test_size_and_what_it_says():
    assert len(LARGE.encode()) < 2 * 1024**2
    assert made_report(made_tests(200)) == LARGE
    for words in (
        "could not be scored",
        "ENTROPY_COLLAPSE",
        "Estimate before the start",
        "Could it be learnt?",
        "Prompts before and after each phase",
        "Warm start",
        "Loss of supervised fine-tuning",
        "Groups that teach",
        "0.0071 nats on average",
        "aws s3api get-object",
    ):
        assert words in LARGE
    assert LARGE.count("<svg") == 7


def test_answers_that_a_limit_cut_and_tests_that_do_not_judge_are_marked():
    assert LARGE.count("cut after 9 tokens") == sum(test.base.cut + test.tuned.cut for test in TESTS) > 0
    assert "Without cut answers" in LARGE
    assert "answers cut by the limit of tokens" in LARGE
    assert LARGE.count(">does not judge<") == 1
    whole = [structs.replace(test, base=structs.replace(test.base, cut=False)) for test in TESTS]
    assert "cut after" not in made_report(whole)
    assert "Without cut answers" not in made_report(whole)


@pytest.mark.parametrize(("choosing", "own_tests"), [(25, False), (100, True)])
def test_only_a_test_file_of_its_own_is_a_part_of_a_repeated_run(choosing, own_tests):
    """Held-out rows as a test file would be tests that repeat rows."""
    receipt = {"rows": 1000, "heldout": 100, "choosing": choosing, "columns": {}, "stats": {}, "source": {"sha256": ""}}
    page = made_report(made_tests(3), receipt=receipt | {"warnings": [], "fixes": [], "cost": {}})
    assert ("--tests tests.json" in page) == own_tests


def test_long_answers_are_cut_so_that_the_page_stays_small():
    tuned = ModelResult(text="w " * 20_000, score=0.0)
    long = [
        structs.replace(test, reference="r" * 50_000, tuned=tuned, champion=tuned) for test in with_champion(made_tests(800))
    ]
    suite = [structs.replace(test, run_id="r-1", champion=ModelResult(text="w " * 20_000, score=1.0)) for test in long]
    page = made_report(long, suite=suite)
    assert len(page.encode()) < 2 * 1024**2
    assert "(truncated; inference.json has the full text)" in page
    assert "Only the 500 tests with the largest change are shown" in page
    assert "Only the first 100 of 800 tests are shown" in page


def test_filters_and_search(opened):
    page = opened(LARGE)
    expect(cards(page)).to_have_count(200)
    for name in ("won", "tied", "lost", "failed"):
        count = sum(test.outcome == name for test in TESTS)
        page.get_by_role("button", name=f"{name.capitalize()} {count}").click()
        expect(cards(page)).to_have_count(count)
    cut = sum(test.cut for test in TESTS)
    assert cut
    page.get_by_role("button", name=f"Cut {cut}").click()
    expect(cards(page)).to_have_count(cut)
    page.get_by_role("button", name="Lost").click()
    page.get_by_label("Tag").select_option("<b>safety</b>")
    expect(cards(page)).to_have_count(sum(test.outcome == "lost" and "<b>safety</b>" in test.tags for test in TESTS))
    page.get_by_role("button", name="All").click()
    page.get_by_label("Tag").select_option("")
    page.get_by_label("Search", exact=True).fill("CASE-17")
    expect(cards(page)).to_have_count(11)  # case-17 and case-170 to case-179
    expect(page.locator("#shown")).to_have_text("11 shown")


def test_differences_are_by_word_and_can_be_turned_off(opened):
    before, after = "the quick brown fox jumps over a dog", f"the quick brown cat jumps over a dog {HOSTILE}"
    tests = [
        structs.replace(test, base=ModelResult(text=before, score=0.0), tuned=ModelResult(text=after, score=1.0))
        for test in TESTS
    ]
    card = opened(made_report(tests)).locator(".card").first
    card.scroll_into_view_if_needed()
    expect(card.locator("ins").first).to_have_text("cat")
    assert card.locator("del").all_text_contents() == ["fox"]
    assert card.locator("ins").all_text_contents() == ["cat", f" {HOSTILE}"]
    card.page.get_by_label("Show differences").uncheck()
    expect(card.locator("ins, del")).to_have_count(0)
    assert card.locator(".answer").all_text_contents() == [before, after]


# --- a line with a champion ---


def test_a_first_run_says_nothing_of_a_champion():
    for words in ("champion", "suite", "starting from", "#line"):
        assert words not in LARGE.partition("<body>")[2].partition("<h2>Reproduce")[0]
    assert "· line faq" in LARGE


def test_a_line_says_where_it_comes_from_and_how_often_its_tests_were_asked():
    assert LINE.count('<a href="../faq-00000000000b/report.html">') >= 3
    assert "These tests have judged 3 models since that champion" in LINE
    assert "99.17 % interval" in LINE
    assert "95 % interval" not in LINE
    assert "This is the first model that these tests judge" in made_report(THREE, suite=SUITE)
    assert "The line&#39;s suite" not in made_report(THREE)


def test_the_champion_stands_beside_base_and_tuned_model(opened):
    page = opened(LINE)
    scores = page.locator("#compared table").first.locator("tr", has_text="mean score").locator("td").all_text_contents()
    assert len(scores) == 3
    assert scores[1] != scores[0]
    card = page.locator("#answers .card", has=page.locator("b", has_text="case-11")).first
    assert card.locator(".answer").count() == 3
    test = THREE[11]
    pills = card.locator("header .pill").all_text_contents()[:2]
    assert pills == [f"{outcome(test, 'base')} against base", f"{outcome(test, 'champion')} against champion"]


def test_filters_and_differences_follow_the_model_that_is_compared(opened):
    page = opened(LINE)
    answers = page.locator("#answers .card:visible")
    for other in ("base", "champion", "base"):
        page.get_by_label("Compared with").select_option(other)
        for name in ("won", "tied", "lost", "failed"):
            count = sum(outcome(test, other) == name for test in THREE)
            page.get_by_role("button", name=f"{name.capitalize()} {count}", exact=True).click()
            expect(answers).to_have_count(count)
        page.get_by_role("button", name="All").click()
        card = answers.first
        card.scroll_into_view_if_needed()
        expect(card.locator(f'[data-of="{other}"] del').first).to_be_attached()
        others = {"base", "champion"} - {other}
        expect(card.locator(f'[data-of="{others.pop()}"] del')).to_have_count(0)
    cut = sum(any(each.cut for each in (test.base, test.champion, test.tuned) if each) for test in THREE)
    page.get_by_role("button", name=f"Cut {cut}").click()
    expect(answers).to_have_count(cut)


def test_what_was_lost_of_the_suite_is_shown_with_answers(opened):
    page = opened(LINE)
    lost = [
        test
        for test in SUITE
        if outcome(test, "champion") in {"lost", "failed"} or (test.must_pass and not test.tuned.passed)
    ]
    cards = page.locator("#line .card")
    expect(cards).to_have_count(len(lost))
    page.locator("#line summary", has_text=f"{len(lost)} tests of the suite").click()
    first = cards.filter(has=page.locator(".pill.lost")).first
    first.scroll_into_view_if_needed()
    assert first.locator(".answer").count() == 2
    expect(first.locator("ins, del").first).to_be_attached()
    bars = page.locator("#line .scores")
    assert [bar.get_attribute("aria-label").partition(":")[0] for bar in bars.all()] == [
        "faq-00000000000a",
        "faq-00000000000b",
    ]
    widths = bars.first.locator("i").evaluate_all("bars => bars.map(bar => bar.getBoundingClientRect().width)")
    assert 0 < widths[0] < widths[1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("html", [LARGE, LINE], ids=["first", "line"])
def test_it_can_be_read_on_a_phone(opened, html, scheme):
    page = opened(html, viewport={"width": 390, "height": 800}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    back, text = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    assert (brightness(back) > brightness(text)) == (scheme == "light")


def brightness(color):
    return sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(",")))


@pytest.mark.parametrize("width", [390, 1280])
def test_a_link_goes_to_its_section_although_cards_get_their_height_late(opened, width):
    page = opened(LARGE, viewport={"width": width, "height": 800})
    for name in ("rollouts", "compared", "data"):
        page.locator(f'nav a[href="#{name}"]').click()
        page.wait_for_function(f"() => Math.abs(document.querySelector('#{name}').getBoundingClientRect().top - 50) < 60")
        page.wait_for_timeout(700)
        assert -10 < page.evaluate(f"document.querySelector('#{name}').getBoundingClientRect().top") < 110


def test_it_can_be_printed_with_every_answer(opened):
    page = opened(made_report(made_tests(30)))
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".card ins").count() >= 29
    page.emulate_media(media="print")
    expect(page.locator("nav")).to_be_hidden()
    assert page.pdf().startswith(b"%PDF")


@pytest.mark.parametrize("html", [LARGE, LINE], ids=["first", "line"])
def test_no_text_of_a_model_or_dataset_is_markup(opened, html):
    page = opened(html)
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 3  # the page's own, and the data of the rollouts
    assert page.locator("b", has_text="safety").count() == 0


INDEX = made_index(3)


@pytest.mark.parametrize("html", [LARGE, INDEX], ids=["report", "index"])
@pytest.mark.parametrize(
    ("markup", "directive"),
    [
        ("<script>document.title = 'pwned'</script>", "script-src"),
        ("<base href='https://example.com/'>", "base-uri 'none'"),
        ("<form action='https://example.com/'><input name=q></form>", "form-action 'none'"),
        ("<img src='https://example.com/x.png'>", "img-src data:"),
        ("<iframe src='https://example.com/'></iframe>", "default-src 'none'"),
    ],
)
def test_even_markup_that_got_in_would_do_nothing(browser, tmp_path, html, markup, directive):
    (tmp_path / "page.html").write_text(html.replace("</main>", f"{markup}</main>"))
    page = browser.new_page()

    def refuses(message):
        return "Content Security Policy" in message.text and directive in message.text

    with page.expect_console_message(refuses, timeout=5_000):
        page.goto((tmp_path / "page.html").as_uri())
        assert page.title() != "pwned"
        assert page.evaluate("document.baseURI") == (tmp_path / "page.html").as_uri()
        page.evaluate("for (const form of document.forms) form.submit()")
    page.close()


def test_pages_in_trackers_are_linked_and_escaped(monkeypatch):
    page = "https://mlflow.example.com/#/experiments/1/runs/2?a=1&b=2"
    managed = {"run_id": "0" * 32, "run": "cars-0123456789ab", "experiment": f"e {HOSTILE}", "server": "arn:aws:sagemaker"}
    pages = [
        {"name": "MLflow", "url": page, "run_id": "0" * 32, "error": None},
        {"name": "MLflow", "url": None, "error": HOSTILE} | managed,
        {"name": "MLflow", "url": "javascript:alert(1)", "error": HOSTILE},
    ]
    monkeypatch.setitem(made_up.TRAINING, "trackers", pages)
    report = made_report(made_tests(3))
    assert f'<a href="{page.replace("&", "&amp;")}" rel="noreferrer">The run in MLflow</a>' in report
    assert report.count("<script") == LARGE.count("<script")
