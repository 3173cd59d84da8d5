"""The messages to the topic's subscribers, in one format for each protocol.

An e-mail is a short text. `http`, `sqs`, `lambda` and `firehose` subscribers receive the event's detail as JSON. `https`
subscribers receive a custom notification for Amazon Q Developer in chat applications, which posts it to Slack or Teams. Its
`additionalContext` contains the figures
(https://docs.aws.amazon.com/chatbot/latest/adminguide/custom-notifs.html).
"""

from typing import Any, NamedTuple

import msgspec

from pipeline.notify import events
from pipeline.notify.events import RunEvent
from pipeline.runs.states import Run
from tunedrop.object_keys import line_of
from tunedrop.plain import one_line, without_markup

PROGRAMS = ("http", "sqs", "lambda", "firehose")
SUBJECT_CHARACTERS = 99  # SNS: ASCII without line breaks, fewer than 100 characters
# The most characters of a reason. SNS accepts 256 KB for a message in all its formats.
MOST_CHARACTERS = 2_000
# The most bytes of an event's detail: a message has it once for each kind of program.
MOST_BYTES = 32_000


class Message(NamedTuple):
    """What a message says, in any format.

    `headline` and `subject` are its first two lines. `detail` is for programs. `attributes`, for filter policies, have
    `id`, `run_id`, `dataset` and `verdict`.
    """

    event_type: str
    headline: str
    subject: str
    reasons: list[str]
    figures: dict[str, str]
    links: dict[str, str]
    attributes: dict[str, str]
    detail: dict[str, Any]

    def publication(self) -> dict[str, Any]:
        """Return the arguments of SNS's Publish."""
        text = [self.headline, self.subject, "", *self.reasons]
        text += ["", *(f"{name}: {value}" for name, value in self.figures.items())] if self.figures else []
        text += ["", *(f"{name}: {uri}" for name, uri in self.links.items())]
        program = msgspec.json.encode(self.detail).decode()
        chat = msgspec.json.encode(self._card()).decode()
        forms = {"default": "\n".join(text), "sms": self.headline, "https": chat} | dict.fromkeys(PROGRAMS, program)
        return {
            "Subject": self.headline.encode("ascii", "replace")
            .decode()[:SUBJECT_CHARACTERS]
            .translate(dict.fromkeys(range(32), " ")),
            "Message": msgspec.json.encode(forms).decode(),
            "MessageStructure": "json",
            # SNS refuses an empty value: that of a name without printable characters.
            "MessageAttributes": {
                name: {"DataType": "String", "StringValue": value} for name, value in self.attributes.items() if value
            },
        }

    def _card(self) -> dict[str, Any]:
        """Return a custom notification for chat channels, version 1.0 of its schema."""
        lines = [*map(without_markup, self.reasons), *(f"*{name}*: {value}" for name, value in self.figures.items())]
        return {
            "version": "1.0",
            "source": "custom",
            "id": self.attributes["id"],
            "content": {
                "textType": "client-markdown",
                "title": without_markup(self.headline),
                "description": "\n".join(lines)[: 2 * MOST_CHARACTERS],
                "nextSteps": [
                    f"<{uri}|Open the {name}>" if uri.startswith(("https:", "http:")) else f"{name}: {uri}"
                    for name, uri in self.links.items()
                ],
                "keywords": [without_markup(self.attributes["dataset"]), self.attributes["verdict"]],
            },
            "metadata": {
                "threadId": self.attributes["run_id"],
                "summary": without_markup(self.headline),
                "eventType": self.event_type,
                "additionalContext": {
                    name: without_markup(value) for name, value in (self.attributes | self.figures).items()
                },
            },
        }


def outcome_of(event: RunEvent) -> str:
    """Return the attribute `verdict` of filter policies: the gate's, FAILED, CANCELLED, WAITING or DATASET_REJECTED."""
    if event.detail_type == events.PUBLISHED:
        return str(event.extra["verdict"])
    if event.detail_type == events.REJECTED:
        return "DATASET_REJECTED"
    if event.detail_type == events.WAITING:
        return "WAITING"
    return "CANCELLED" if event.run.state == "CANCELLED" else "FAILED"


def message(event: RunEvent, link: str | None = None, pages: dict[str, str] | None = None) -> dict[str, Any]:
    """Return the arguments of SNS's Publish about an event.

    `link` opens the report in a browser, and `pages` are links to the run in trackers, by their names.
    """
    outcome, run, detail = outcome_of(event), event.run, event.detail
    given = event.extra.get("reasons", [run.reason] if run.reason else [])
    attributes = {
        "id": detail["id"],
        "run_id": run.run_id,
        "dataset": one_line(run.dataset),
        "status": str(run.state),
        "verdict": outcome,
        **({"line": one_line(run.line)} if run.line else {}),  # a rejected dataset has none
    }
    if len(msgspec.json.encode(detail)) > MOST_BYTES:  # the documents in S3 have all of it
        detail = {name: value for name, value in detail.items() if name not in event.extra}
    return Message(
        event_type=event.detail_type,
        headline=_headline(event, outcome),
        subject=f"run {run.run_id}, attempt {run.attempt}",
        reasons=[one_line(reason)[:MOST_CHARACTERS] for reason in given],
        figures=_figures(event),
        links=({"report": link} if link else {})
        | {name: uri for name, uri in event.links.items() if not (link and name == "report")}
        | (pages or {}),
        attributes=attributes,
        detail={**detail, "verdict": outcome} | ({"report_link": link} if link else {}),
    ).publication()


def _headline(event: RunEvent, outcome: str) -> str:
    """Return a headline, for example `APPROVED: cars, score 0.32 -> 0.93`.

    Only the names of dataset and line may contain non-ASCII.
    """
    if event.detail_type == events.PUBLISHED:
        comparison = event.extra["comparison"]
        score = f"score {comparison['base_score']:.2f} -> {comparison['tuned_score']:.2f}"
        champion = event.extra.get("champion")
        over = f", {champion['comparison']['lift']:+.2f} over the champion" if champion else ""
        return f"{outcome}: {_name(event.run)}, {score}{over}"
    headlines = {
        "DATASET_REJECTED": "Dataset rejected",
        "CANCELLED": "Run stopped",
        "WAITING": "Run waiting for a quota increase",
    }
    return f"{headlines.get(outcome, 'Run failed')}: {_name(event.run)}"


def _name(run: Run) -> str:
    """Return the names of a run's dataset and of its line, unless the dataset's name begins with it."""
    line = f" (line {one_line(run.line)})" if run.line not in {"", line_of(run.dataset)} else ""
    return one_line(run.dataset) + line


def _figures(event: RunEvent) -> dict[str, str]:
    if event.detail_type != events.PUBLISHED:
        return {}
    comparison, cost, cut = event.extra["comparison"], event.extra["cost"]["usd"], event.extra.get("cut", {})
    champion = event.extra.get("champion")
    figures = {
        "score": f"{comparison['base_score']:.3f} (base) -> {comparison['tuned_score']:.3f} (tuned)",
        "lift": _lift(comparison),
        "tests": f"{comparison['wins']} won, {comparison['ties']} tied, {comparison['losses']} lost",
        **({"lift over the champion": _lift(champion["comparison"])} if champion else {}),
        **({"suite, against the champion": _lift(champion["suite"])} if champion and champion["suite"] else {}),
        "cost": "unknown" if cost is None else f"${cost:.2f}",
    }
    return figures | {"cut answers": f"{cut['base']} (base), {cut['tuned']} (tuned)"} if any(cut.values()) else figures


def _lift(comparison: dict[str, Any]) -> str:
    return f"{comparison['lift']:+.3f} (interval {comparison['lift_low']:+.3f} to {comparison['lift_high']:+.3f})"
