"""The targets of supervised fine-tuning: the form that is taught is the form that is rewarded."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reward_cases import CASES

from local_app.stack import PROJECT
from pipeline.validation.fine_tuning import check_fine_tuning
from tunedrop.config.parse import load_run_config, parse_run_config
from tunedrop.dataset.readers import suffix_of
from tunedrop.dataset.rows import Records
from tunedrop.forms import asked_form
from tunedrop.rewards import REWARDS, Reward, build_rewards
from tunedrop.rewards.sample import final_answer, make_samples
from tunedrop.targets import NO_REASONING, Targets, needs_reasoning, reasoning_of, targets

XML = [{"type": "numeric"}, {"type": "xml_format"}]
THINK = [{"type": "numeric"}, {"type": "think_format"}]
BOXED = r"Reason step by step, and put the final answer within \boxed{}."
REASONING = "2 and 2 are 4."
# Each reward for a form, in each of its modes.
FORMS = [
    {"type": name, "mode": mode, **more}
    for name, several in (("xml_format", [{}, {"tags": ["plan", "answer"]}, {"tags": ["answer"]}]), ("think_format", [{}]))
    for mode in ("strict", "soft", "partial")
    for more in several
]


def row(answer: str = "4", system: str | None = None, **columns: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system else []
    return {"id": "r", "prompt": [*messages, {"role": "user", "content": "2 + 2?"}], "answer": answer} | columns


def made(rewards: list[dict[str, Any]], *rows: dict[str, Any], **more: Any) -> Targets:
    config = parse_run_config({"model": "m", "rewards": rewards})
    return targets(config, build_rewards(config.rewards), rows, **more)


def earned(rewards: list[Reward], row: dict[str, Any], text: str) -> Iterator[float | None]:
    columns = {name: [value] for name, value in row.items() if name != "prompt"}
    for each in rewards:
        yield each.score_samples(make_samples([row["prompt"]], [[{"role": "assistant", "content": text}]], columns))[0]


# Rows as datasets hold a worked solution.
WORKED = [
    row(reasoning=REASONING),
    row(rationale=REASONING),
    row(solution=REASONING),
    row(f"{REASONING}\n#### 4"),
    row(rf"{REASONING} So we have \boxed{{4}}"),
    row(f"{REASONING}\nThe answer is: 4"),
    row(f"<think>{REASONING}</think> 4"),
    row(f"<reasoning>\n{REASONING}\n</reasoning>\n<answer>\n4\n</answer>"),
]


@pytest.mark.parametrize("worked", WORKED, ids=lambda each: each["answer"][:30])
@pytest.mark.parametrize("form", FORMS, ids=lambda each: "-".join(map(str, each.values())))
def test_the_form_taught_is_the_form_rewarded(form, worked):
    config = parse_run_config({"model": "m", "rewards": [{"type": "numeric"}, form]})
    rewards = build_rewards(config.rewards)
    found = targets(config, rewards, [worked])
    (text,) = found.texts
    assert text is not None
    assert list(earned(rewards, worked, text)) == [1.0, 1.0]
    assert final_answer(text) == "4"
    assert found.reasoned == [True]
    assert REASONING in text or form.get("tags") == ["answer"]


@pytest.mark.parametrize("worked", WORKED[:6], ids=lambda each: each["answer"][:30])
def test_a_boxed_answer_comes_after_its_reasoning(worked):
    (text,) = made([{"type": "math"}], worked | {"prompt": row(system=BOXED)["prompt"]}).texts
    assert text is not None
    assert text.startswith(REASONING)
    assert r"\boxed{4}" in text


def test_every_reward_with_a_form_is_taught():
    """A new reward with the trait `form` has to be in FORMS."""
    assert {name for name, kind in REWARDS.items() if kind.form} == {form["type"] for form in FORMS}


@pytest.mark.parametrize(
    ("rewards", "system"),
    [(XML, None), (THINK, None), ([{"type": "math"}], BOXED), ([{"type": "exact_match"}], "<think></think>")],
)
def test_a_bare_answer_is_never_taught_where_reasoning_is_asked(rewards, system):
    found = made(rewards, row(system=system))
    assert (found.texts, found.left_out) == ([None], {NO_REASONING: 1})


@pytest.mark.parametrize(
    ("rewards", "columns", "text"),
    [
        ([{"type": "numeric"}], row("4"), "4"),
        ([{"type": "numeric"}], row("2 + 2\n#### 4"), "2 + 2\n#### 4"),  # the dataset's own form
        ([{"type": "numeric"}], row("4", reasoning="2 + 2"), "2 + 2\nThe answer is: 4"),
        ([{"type": "exact_match", "normalize": False}], row("4.", reasoning="2 + 2"), "4."),  # nothing else earns it
        ([{"type": "numeric"}, {"type": "xml_format", "tags": ["answer"]}], row("4"), "<answer>\n4\n</answer>"),
    ],
)
def test_without_a_form_for_reasoning_the_best_text_that_earns_full_marks_is_taught(rewards, columns, text):
    assert made(rewards, columns).texts == [text]


def test_auto_teaches_reasoning_only():
    found = made([{"type": "numeric"}], row("4"), row("4", reasoning="2 + 2"), reasoned_only=True)
    assert found.texts == [None, "2 + 2\nThe answer is: 4"]
    assert found.summary() == {"rows": 2, "usable": 1, "with_reasoning": 1, "left_out": {NO_REASONING: 1}}


@pytest.mark.parametrize(
    ("rewards", "columns", "reward"),
    [
        (XML, row("4", reasoning="the tag <answer>"), "xml_format"),
        (THINK, row("4", reasoning="I </think> so"), "think_format"),
        ([*XML, {"type": "length", "maximum": 3}], row("4", reasoning="one two three four five"), "length"),
        ([*XML, {"type": "json_valid", "kind": "object"}], row("4", reasoning="so"), "json_valid"),
        ([{"type": "regex", "pattern": "z"}], row("4"), "regex"),
    ],
)
def test_a_row_whose_text_does_not_earn_full_marks_is_left_out_and_counted(rewards, columns, reward):
    found = made(rewards, columns, row("4", reasoning=REASONING))
    assert found.texts[0] is None
    assert found.left_out[reward] >= 1


def test_penalties_and_services_do_not_judge():
    text = " ".join(["carry the one"] * 20)
    assert made(
        [*XML, {"type": "repetition_penalty"}, {"type": "overlong_penalty", "maximum": 5}], row(reasoning=text)
    ).usable
    never_positive = {name for name, cases in CASES.items() if all((case[3] or 0.0) <= 0 for case in cases)}
    assert never_positive == {name for name, kind in REWARDS.items() if kind.penalty}


def test_what_the_chat_template_begins_is_not_repeated():
    soft = [{"type": "numeric"}, {"type": "think_format", "mode": "soft"}]
    (text,) = made(soft, row(reasoning=REASONING), begun="<think>").texts
    assert text == f"{REASONING}\n</think>\n4"
    assert made(THINK, row(reasoning=REASONING), begun="<think>").left_out == {"think_format": 1}


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FORMS), st.sampled_from(["exact_match", "contains", "similarity"]), WORDS, WORDS, st.booleans())
def test_whatever_rows_hold_a_target_earns_full_marks_or_is_left_out(form, kind, answer, reasoning, boxed):
    if not answer.strip():
        return
    config = parse_run_config({"model": "m", "rewards": [{"type": kind}, form]})
    rewards, given_row = build_rewards(config.rewards), row(answer, reasoning=reasoning, system=BOXED if boxed else None)
    found = targets(config, rewards, [given_row])
    assert found.usable + found.left_out.total() == 1
    for text in found.texts:
        if text is not None:
            bare = next(earned(rewards, given_row, answer)) or 0.0
            first, second = earned(rewards, given_row, text)
            assert second == 1.0
            assert first is None or (first >= bare - 1e-9 and first > 0)
            assert reasoning_of(given_row) or not needs_reasoning(asked_form(config, given_row))


# ---- the receipt --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "columns", "codes", "plan"),
    [
        (
            {},
            {"reasoning": REASONING},
            [],
            "the run begins with supervised fine-tuning, on 1 of 1 sampled rows, if the base",
        ),
        ({}, {}, [], "no warm start: no row has reasoning"),
        ({"warm_start": {"policy": "never"}}, {"reasoning": "x"}, [], "no warm start: warm_start.policy is never"),
        ({"learnability": {"samples": 0}}, {"reasoning": "x"}, [], "no warm start: learnability.samples is 0"),
        (
            {"warm_start": {"policy": "always"}},
            {"reasoning": "x"},
            [],
            "the run begins with supervised fine-tuning, on 1 of",
        ),
        ({"warm_start": {"policy": "always"}}, {}, ["NO_REASONING"], ""),
        ({"method": "sft"}, {}, ["NO_REASONING"], ""),
        ({"method": "sft"}, {"reasoning": "<answer>"}, ["NO_TARGETS"], ""),
        ({"method": "sft"}, {"reasoning": "x"}, [], "the run is supervised fine-tuning alone, on 1 of 1 sampled rows"),
    ],
)
def test_the_receipt_says_what_a_warm_start_would_do(values, columns, codes, plan):
    config = parse_run_config({"model": "m", "rewards": XML} | values)
    section = check_fine_tuning(config, build_rewards(config.rewards), [row(**columns)])
    assert [problem.code for problem in section.problems] == codes
    assert section.receipt["warm_start"]["plan"].startswith(plan)
    for problem in section.problems:
        assert problem.key in {"method", "warm_start.policy"}
        assert problem.hint


def test_a_run_of_answers_alone_can_be_trained_by_sft():
    config = parse_run_config({"model": "m", "rewards": [{"type": "exact_match"}], "method": "sft"})
    section = check_fine_tuning(config, build_rewards(config.rewards), [row("Paris")])
    assert (section.problems, section.receipt["warm_start"]["usable"]) == ([], 1)


SAMPLES = sorted((PROJECT / "tunedrop_cli/sample").glob("*.jsonl"))


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_the_demo_has_no_warm_start(path: Path):
    """None of the samples has reasoning, so that `auto` cannot begin."""
    config = load_run_config(path.with_suffix(".yaml").read_bytes(), default_model="m")
    with path.open("rb") as file:
        rows = [row for batch in Records(config).batches(file, suffix_of(path.name)) for row in batch.rows]
    assert rows
    found = targets(config, build_rewards(config.rewards), rows, reasoned_only=True)
    assert found.usable == 0, json.dumps(found.summary())
