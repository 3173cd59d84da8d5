"""Which of a run's rollouts its report shows, and how they fit into the page."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from msgspec import structs

from tunedrop import rollouts
from tunedrop.rollouts import Answer, Group, Index, Part, spread

# The most parts that are read: the steps of the slider, those with an alert among them, and the evaluations of the panel.
MOST_STEPS, MOST_EVALUATIONS = 60, 12
MOST_GROUPS = 500  # of steps
# The most characters of a text, and the least before whole groups are left out.
MOST_CHARACTERS, LEAST_CHARACTERS = 8_000, 250


def read_groups(read: Callable[[str], bytes | None], alerts: Sequence[dict[str, Any]]) -> tuple[Index, list[Group]] | None:
    """Return the index of a run's rollouts and the groups that a report may show; None for a run without rollouts.

    `read` returns the bytes of a file of the folder, or None. The steps are evenly spread over the run, and so are the
    groups of a step; an alert's step is there in any case, with the groups that the alert names.
    """
    index = rollouts.read_index(read)
    if index is None:
        return None
    named = {(link["step"], link["prompt_id"]) for alert in alerts for link in alert.get("rollouts", [])}
    evidence = {step for step, _ in named} | {alert["step"] for alert in alerts}
    steps = [part for part in index.parts if part.kind == "step"]
    of_alerts = [part for part in steps if part.step in evidence][:MOST_STEPS]
    others = [part for part in steps if part.step not in evidence]
    panel = spread([part for part in index.parts if part.kind == "panel"], MOST_EVALUATIONS)
    chosen = sorted([*of_alerts, *spread(others, MOST_STEPS - len(of_alerts))], key=lambda part: part.step)

    def groups(part: Part) -> list[Group]:
        raw = read(part.name)
        return [] if raw is None else rollouts.decode(raw)

    found = [group for part in panel for group in groups(part)]
    for part in chosen:
        of_part = groups(part)
        first = [group for group in of_part if (group.step, group.prompt_id) in named]
        rest = [group for group in of_part if (group.step, group.prompt_id) not in named]
        found += first + spread(rest, max(1, MOST_GROUPS // len(chosen) - len(first)))
    return index, found


def fitted(groups: Sequence[Group], most: int) -> bytes:
    """Return groups as a JSON array of at most `most` bytes, or an empty one.

    It has no `<`, and cannot end a script element. Long texts are cut first, with `…` at their end. If the texts are short
    and it is still too much, groups are left out: evenly spread ones of the steps, and whole prompts of the panel.
    """
    characters, kept = MOST_CHARACTERS, list(groups)
    while True:
        # Only "</script" and "<!--" can end the text of a script element. Text without "<" contains neither.
        raw = msgspec.json.encode([_cut(group, characters) for group in kept]).replace(b"<", b"\\u003c")
        if len(raw) <= most or not kept:
            return raw
        if characters > LEAST_CHARACTERS:
            characters = max(LEAST_CHARACTERS, characters // 2)
        else:
            kept = _fewer(kept)


def _cut(group: Group, characters: int) -> Group:
    def text(whole: str) -> str:
        return whole if len(whole) <= characters else whole[:characters] + "…"

    def answer(whole: Answer) -> Answer:
        return structs.replace(whole, text=text(whole.text))

    return structs.replace(
        group,
        prompt=[{"role": each.get("role", ""), "content": text(str(each.get("content") or ""))} for each in group.prompt],
        reference=None if group.reference is None else text(group.reference),
        answers=[answer(each) for each in group.answers],
    )


def _fewer(groups: Sequence[Group]) -> list[Group]:
    """Return two thirds of the groups of the steps, and the groups of two thirds of the panel's prompts."""
    steps = [group for group in groups if not group.panel]
    prompts = list(dict.fromkeys(group.prompt_id for group in groups if group.panel))
    asked = set(prompts[: len(prompts) * 2 // 3])
    return [group for group in groups if group.panel and group.prompt_id in asked] + spread(steps, len(steps) * 2 // 3)
