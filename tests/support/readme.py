"""The README's section on events: its commands, and the answers in its tables."""

import json
import re
from typing import Any, NamedTuple

from local_app.stack import PROJECT

EVENTS = (PROJECT / "README.md").read_text().split("\n## Events\n")[1].split("\n## ")[0]
# How to invoke one function, and how to take a run from one to the next.
ONE_FUNCTION, A_RUN = re.findall(r"^```\n(.*?)^```", EVENTS, re.MULTILINE | re.DOTALL)


class Row(NamedTuple):
    """A line of a table: a file of `events/`, but for those of a run's own events, its function, and what that answers."""

    event: str | None
    function: str
    answer: str


def rows() -> list[Row]:
    """Return the lines of both tables, in their order."""
    found = re.findall(r"^\| (?:`([\w.]+)\.json` \| )?`(\w+)` \| `(.+?)`", EVENTS, re.MULTILINE)
    return [Row(event or None, function, answer) for event, function, answer in found]


def fits(answer: Any, shown: str) -> bool:
    """Tell whether an answer is the one shown, in which `…` stands for anything."""
    text = json.dumps(answer, ensure_ascii=False)
    return re.fullmatch(re.escape(shown).replace("…", ".*"), text, re.DOTALL) is not None
