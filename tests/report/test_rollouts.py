"""The section about rollouts, the charts and the sentences of `report.html` in a browser, with 500 stored groups."""

import json
import re

import pytest
from made_up import HOSTILE, ROLLOUTS_INDEX, made_report, made_rollouts, made_tests
from msgspec import structs
from playwright.sync_api import Locator, Page, expect

from tunedrop.rollouts import Group

GROUPS = made_rollouts(500)
STEPS = [group for group in GROUPS if not group.panel]
PANEL = [group for group in GROUPS if group.panel]
PAGE = made_report(made_tests(5))
SLIDER, FILTER, SEARCH, KIND = "Step", "Filter", "Search rollouts", "Kind of rollouts"


def groups(page: Page) -> Locator:
    return page.locator("#groups > article")


def at_step(step: int) -> list[Group]:
    return [group for group in STEPS if group.step == step]


def expect_groups(page: Page, expected: list[Group]) -> None:
    """The page says how many groups there are, and shows at most 20."""
    expect(page.locator("#found")).to_have_text(f"{len(expected)} {'group' if len(expected) == 1 else 'groups'}")
    expect(groups(page)).to_have_count(min(len(expected), 20))
    shown = groups(page).locator("header b").all_text_contents()
    assert shown == [group.prompt_id for group in expected[:20]]


def test_the_report_says_what_it_shows_and_where_the_rest_is():
    assert "2,400 groups of answers in 300 steps. This page shows 500 of them, evenly spread over the steps" in PAGE
    assert "rollouts/ in S3 has 1.23 MB of them" in PAGE
    long = made_report(made_tests(200), rollouts=(ROLLOUTS_INDEX, made_rollouts(500, characters=3000)))
    assert len(long.encode()) <= 2_000_000
    assert 'id="rollouts"' not in made_report(made_tests(5), rollouts=None)


def test_the_slider_goes_through_the_steps_with_keys_too(opened):
    page = opened(PAGE)
    expect_groups(page, at_step(10))
    slider = page.get_by_label(SLIDER, exact=True)
    slider.focus()
    page.keyboard.press("ArrowRight")
    expect_groups(page, at_step(20))
    assert slider.get_attribute("aria-valuetext") == "step 20"
    page.keyboard.press("End")
    expect_groups(page, at_step(500))
    expect(page.locator("#step-name")).to_have_text("step 500 of 500")
    page.get_by_label("Every step").check()
    expect_groups(page, STEPS)
    page.get_by_role("button", name="Show more").click()
    expect(groups(page)).to_have_count(40)


def test_answers_are_sorted_and_each_part_of_a_reward_is_a_bar(opened):
    page = opened(PAGE)
    group = at_step(10)[0]
    replies = groups(page).first.locator(".reply")
    best_first = sorted(group.answers, key=lambda answer: -(answer.score or 0))
    expect(replies).to_have_count(8)
    for reply, answer in zip(replies.all(), best_first, strict=True):
        expect(reply.locator(".text")).to_have_text(answer.text)
        head = reply.locator("div").first
        expect(head).to_contain_text(f"reward {answer.score:.3f} · advantage {answer.advantage:.2f} · {answer.tokens} token")
        assert ("cut by the limit" in (head.text_content() or "")) == answer.cut
        assert reply.locator(".reward").all_text_contents() == [
            f"{name}{'–' if value is None else f'{value:.3f}'}" for name, value in answer.rewards.items()
        ]
        expect(reply).to_contain_text("-0.500 sampled, -0.600 in the loss")
    widths = (
        replies.locator(".reward:first-of-type, .text + .reward")
        .locator("i")
        .evaluate_all("bars => bars.map(bar => bar.getBoundingClientRect().width)")
    )
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[-1]


def test_filters(opened):
    page = opened(PAGE)
    choose = page.get_by_label(FILTER).select_option
    choose("cut")
    expect_groups(page, [group for group in STEPS if any(answer.cut for answer in group.answers)])
    choose("top")
    by_reward = sorted(STEPS, key=lambda group: group.mean)
    expect_groups(page, by_reward[::-1][:50])
    choose("bottom")
    expect_groups(page, by_reward[:50])
    choose(label="Evidence of JUDGE_DISAGREES, step 90")
    expect_groups(page, [group for group in STEPS if group.prompt_id in {"row-85", "row-87"}])
    expect(groups(page).first).to_contain_text("evidence of JUDGE_DISAGREES")
    choose(label="Evidence of ENTROPY_COLLAPSE, step 88")  # no group of this step was kept
    expect_groups(page, [])


def test_an_alert_links_to_its_evidence(opened):
    page = opened(PAGE)
    page.locator(".alert", has_text="JUDGE_DISAGREES").get_by_role("link").click()
    expect_groups(page, [group for group in STEPS if group.prompt_id in {"row-85", "row-87"}])
    assert page.url.endswith("#rollouts")


def test_search_finds_prompts_and_answers(opened):
    page = opened(PAGE)
    page.get_by_label(SEARCH).fill("ROW-21")
    expect_groups(page, [])  # not in the first step
    page.get_by_label("Every step").check()
    expect_groups(page, [group for group in STEPS if group.prompt_id in {"row-21", *(f"row-21{n}" for n in range(10))}])
    word = STEPS[7].answers[3].text.split(HOSTILE)[0][:40].upper()
    page.get_by_label(SEARCH).fill(word)
    expect(groups(page).locator("header b").filter(has_text=re.compile(r"^row-7$"))).to_be_visible()


def test_the_panels_answers_are_compared_with_the_evaluation_before_by_word(opened):
    first, second = (
        [structs.replace(group.answers[0], text=text, score=score, rewards={"exact_match": score})]
        for group, text, score in (
            (PANEL[0], f"one two three {HOSTILE}", 0.25),
            (PANEL[8], f"one four three {HOSTILE}", 0.75),
        )
    )
    few = [structs.replace(PANEL[0], answers=first), structs.replace(PANEL[8], answers=second)]
    page = opened(made_report(made_tests(5), rollouts=(ROLLOUTS_INDEX, [*few, *STEPS[:3]])))
    page.get_by_label(KIND).select_option("panel")
    card = groups(page)
    expect(card).to_have_count(1)  # the last evaluation
    expect(card).to_contain_text("reward by evaluation: 0.250 → 0.750")
    assert card.locator("del").all_text_contents() == ["two"]
    assert card.locator("ins").all_text_contents() == ["four"]
    texts = [f"one two three {HOSTILE}", f"one four three {HOSTILE}"]
    assert card.locator(".reply .text").all_text_contents() == texts
    page.get_by_label("Show changes").uncheck()
    expect(card.locator("ins, del")).to_have_count(0)
    assert card.locator(".reply .text").all_text_contents() == texts
    page.get_by_label(SLIDER, exact=True).fill("0")
    expect(card.locator(".reply")).to_have_count(1)  # before the first evaluation there is none


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_on_a_phone_and_no_answer_is_markup(opened, scheme):
    page = opened(PAGE, viewport={"width": 390, "height": 800}, color_scheme=scheme)
    page.get_by_label("Every step").check()
    expect(groups(page)).to_have_count(20)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("img").count() == 0
    assert page.locator("#groups script").count() == 0
    assert HOSTILE in (groups(page).first.text_content() or "")


def test_data_of_a_script_element_is_json(opened):
    page = opened(PAGE)
    assert len(json.loads(page.locator("#all-rollouts").text_content() or "")) == len(GROUPS)


# --- charts ---


def test_a_chart_has_the_values_of_each_step_by_pointer_and_by_keys(opened):
    page = opened(PAGE)
    chart = page.locator("figure", has_text="Reward").first
    drawing, text = chart.locator("svg"), chart.locator("output")
    expect(text).to_contain_text("training from 0.00333 at step 1 to 1 at step 300")
    drawing.focus()
    expect(text).to_have_text(
        "step 300 · training 1 · held-out rows 0.75 · exact_match 1 · length 1 · evaluation on held-out rows"
    )
    page.keyboard.press("Home")
    expect(text).to_contain_text("step 1 · training 0.003333")
    page.keyboard.press("ArrowRight")
    expect(text).not_to_contain_text("step 1 ·")
    box = drawing.bounding_box()
    assert box is not None
    drawing.hover(position={"x": box["width"] * 0.9, "y": box["height"] / 2})
    expect(text).to_contain_text("step 27")
    expect(chart.locator(".at")).not_to_have_attribute("visibility", "hidden")


def test_alerts_evaluations_and_the_saved_model_are_marked_and_named(opened):
    page = opened(PAGE)
    first, *others = page.locator(".charts svg").all()
    assert first.locator("path").count() == first.locator("path.guide").count()  # supervised fine-tuning: other steps
    for chart in others:
        assert chart.locator("path.evaluation").count() == 10
        assert chart.locator("path.saved").count() == 1
        assert chart.locator("path.alert").count() == 2
        assert ". " in (chart.get_attribute("aria-label") or "")
    chart = page.locator("figure", has_text="Reward").first
    assert "alert JUDGE_DISAGREES" in (chart.get_attribute("data-hover") or "")
    assert chart.locator("circle").count() == 10  # the held-out reward, beside that of the training


# --- words ---


def test_each_section_begins_with_a_sentence_and_the_raw_figures_are_a_click_away(opened):
    page = opened(PAGE)
    for section in ("compared", "answers", "training", "rollouts", "proofs", "cost", "data"):
        first = page.locator(f"#{section} > h2 + p")
        assert (first.text_content() or "").strip().endswith((".", "?")), section
    assert "nonzero" not in page.locator("main").inner_text()
    assert "20.93257713317871" not in page.locator("main").inner_text()
    page.locator("#proofs summary").click()
    expect(page.locator("#proofs pre")).to_contain_text("20.93257713317871")
