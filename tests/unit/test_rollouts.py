"""Rollouts as files, and what of them fits into a report."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import HOSTILE, made_rollouts
from msgspec import structs

from pipeline.publish.shown_rollouts import MOST_GROUPS, MOST_STEPS, fitted, read_groups
from tunedrop import rollouts
from tunedrop.rollouts import Answer, Group, Index

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)


def group(step: int = 1, prompt_id: str = "r", *, text: str = "a", panel: bool = False) -> Group:
    answer = Answer(text=text, score=1.0, rewards={"a": 1.0}, tokens=1, cut=False)
    return Group(step=step, prompt_id=prompt_id, prompt=[{"role": "user", "content": text}], answers=[answer], panel=panel)


@given(st.lists(st.tuples(TEXT, st.none() | st.floats(allow_nan=False, allow_infinity=False), st.booleans())))
def test_a_part_gives_its_groups_back(made):
    groups = [
        Group(
            step=7,
            prompt_id=text,
            prompt=[{"role": "user", "content": text}],
            answers=[Answer(text=text, score=score, rewards={text: score}, tokens=3, cut=cut, advantage=score)],
            panel=cut,
        )
        for text, score, cut in made
    ]
    raw = rollouts.encode(groups)
    assert rollouts.decode(raw) == groups
    assert rollouts.encode(groups) == raw


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [
        (0, 3, []),
        (3, 0, []),
        (3, 1, [0]),
        (5, 2, [0, 4]),
        (5, 3, [0, 2, 4]),
        (3, 3, [0, 1, 2]),
        (2, 9, [0, 1]),
    ],
)
def test_items_are_spread_evenly(count, most, expected):
    assert rollouts.spread(range(count), most) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("step-000012.jsonl.gz", ("step", 12)),
        ("panel-1234567.jsonl.gz", ("panel", 1_234_567)),
        ("index.json", None),
        ("step-000012.jsonl.gz.new", None),
        ("step-12.jsonl.gz", None),
    ],
)
def test_only_parts_are_parts(name, expected):
    part = rollouts.part_of(name, 9)
    assert (part and (part.kind, part.step)) == expected
    if part:
        assert rollouts.part_name(part.kind, part.step) == name


# --- in a report ---


@given(
    st.lists(st.builds(group, st.integers(1, 5), TEXT, text=TEXT, panel=st.booleans()), max_size=30), st.integers(2, 3000)
)
@settings(max_examples=50)
def test_what_is_shown_fits_and_cannot_end_a_script_element(groups, most):
    raw = fitted(groups, most)
    assert len(raw) <= most
    assert b"<" not in raw
    shown = msgspec.json.decode(raw, type=list[Group])
    assert {(each.step, each.prompt_id) for each in shown} <= {(each.step, each.prompt_id) for each in groups}


def test_what_fits_is_shown_whole():
    groups = made_rollouts(60)
    assert json.loads(fitted(groups, 10**7)) == json.loads(msgspec.json.encode(groups))
    assert HOSTILE in json.loads(fitted(groups, 10**7))[0]["prompt"][1]["content"]


def test_long_texts_are_cut_before_groups_are_left_out():
    groups = made_rollouts(100, characters=20_000)
    shown = msgspec.json.decode(fitted(groups, 600_000), type=list[Group])
    assert len(shown) == len(groups)
    assert all(answer.text.endswith("…") for each in shown for answer in each.answers)
    few = msgspec.json.decode(fitted(groups, 60_000), type=list[Group])
    panel = [each.prompt_id for each in few if each.panel]
    assert all(panel.count(name) == 10 for name in panel)  # of each prompt that stays, every evaluation
    steps = [each.step for each in few if not each.panel]
    assert (min(steps), max(steps)) == (groups[80].step, groups[-1].step)


class Folder:
    """A folder of rollouts, with a part for each step."""

    def __init__(self, steps: int, per_step: int = 3):
        self.files = {
            rollouts.part_name("step", step): rollouts.encode([group(step, f"r{n}") for n in range(per_step)])
            for step in range(1, steps + 1)
        }
        for step in (1, steps):
            self.files[rollouts.part_name("panel", step)] = rollouts.encode([group(step, "h", panel=True)])
        parts = [part for name, raw in self.files.items() if (part := rollouts.part_of(name, len(raw)))]
        self.files[rollouts.INDEX] = msgspec.json.encode(Index(max_mb=1.0, parts=parts))
        self.read: list[str] = []

    def __call__(self, name: str) -> bytes | None:
        self.read.append(name)
        return self.files.get(name)


def test_a_run_without_rollouts_has_none():
    assert read_groups(lambda _: None, []) is None


@pytest.mark.parametrize(("steps", "per_step"), [(3, 2), (1000, 3), (100, 64)])
def test_steps_are_spread_over_the_run_and_few_parts_are_read(steps, per_step):
    folder = Folder(steps, per_step)
    found = read_groups(folder, [])
    assert found is not None
    of_steps = [each for each in found[1] if not each.panel]
    assert len({each.step for each in of_steps}) == min(steps, MOST_STEPS)
    assert {1, steps} <= {each.step for each in of_steps}
    assert len(of_steps) <= MOST_GROUPS
    assert sum(each.panel for each in found[1]) == 2
    assert len(folder.read) <= MOST_STEPS + 3


def test_the_evidence_of_an_alert_is_there_first():
    alerts: list[dict[str, Any]] = [
        {"code": "A", "step": 501},
        {"code": "B", "step": 700, "rollouts": [{"step": 333, "prompt_id": "r63"}]},
    ]
    found = read_groups(Folder(1000, 64), alerts)
    assert found is not None
    assert {501, 333, 700} <= {each.step for each in found[1]}
    assert next(each for each in found[1] if each.step == 333).prompt_id == "r63"


def test_a_part_that_is_missing_is_left_out():
    folder = Folder(3)
    del folder.files[rollouts.part_name("step", 2)]
    found = read_groups(folder, [])
    assert found is not None
    assert {each.step for each in found[1]} == {1, 3}


def test_the_mean_of_a_group_is_that_of_its_scored_answers():
    scored, unscored = group().answers[0], structs.replace(group().answers[0], score=None)
    assert structs.replace(group(), answers=[scored, unscored]).mean == 1.0
    assert structs.replace(group(), answers=[unscored]).mean == 0.0
