"""`index.html`: the page of all published runs. The page contains its runs as JSON, and no other file stores them."""

from collections.abc import Sequence
from typing import Any

import msgspec
from botocore.exceptions import ClientError
from msgspec import structs

from pipeline.aws import Aws, error_code
from pipeline.publish.page import render_page
from tunedrop import object_keys
from tunedrop.rollouts import spread

SPARKLINE_POINTS = 24


class IndexedRun(msgspec.Struct, frozen=True, kw_only=True):
    """A published run on `index.html`. Scores are rounded to 4 digits; `reward` has points of the training curve.

    `start` is the run whose adapter the training started from, `champion` the run of the line's model in use that the tuned
    model was compared with, and `champion_lift` the lift over it. Pages from before lines lack these fields: the line is
    that of the dataset then.
    """

    run_id: str
    dataset: str
    attempt: int
    verdict: str
    model: str
    published: str
    tests: int
    base: float
    tuned: float
    lift: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    rows: int
    steps: int | None
    seconds: float | None
    usd: float | None
    learning_rate: float | None
    rewards: list[str]
    reward: list[float]
    line: str = ""
    start: str | None = None
    champion: str | None = None
    champion_lift: float | None = None


_DATA = '<script type="application/json" id="data">'


def indexed_run(result: dict[str, Any], metrics: list[dict[str, Any]], published: str, rows: int) -> IndexedRun:
    """Return the summary of a run's `result.json`, with a few points of its reward curve."""
    comparison, start, champion = result["comparison"], result["start"], result["champion"]
    seconds = [job["seconds"] for job in result["cost"]["jobs"].values()]
    return IndexedRun(
        run_id=result["run_id"],
        dataset=result["dataset"],
        attempt=result["attempt"],
        verdict=result["verdict"],
        model=result["config"]["model"],
        published=published,
        base=round(comparison["base_score"], 4),
        tuned=round(comparison["tuned_score"], 4),
        lift=round(comparison["lift"], 4),
        low=round(comparison["lift_low"], 4),
        high=round(comparison["lift_high"], 4),
        **{name: comparison[name] for name in ("tests", "wins", "ties", "losses")},
        rows=rows,
        steps=result["training"].get("steps"),
        seconds=None if None in seconds else sum(seconds),
        usd=result["cost"]["usd"],
        learning_rate=result["config"]["grpo"].get("learning_rate"),
        rewards=[reward["name"] or reward["type"] for reward in result["config"]["rewards"]],
        reward=spread([round(point["reward"], 4) for point in metrics if "reward" in point], SPARKLINE_POINTS),
        line=result["line"],
        start=start["run_id"] if start else None,
        champion=champion["run_id"] if champion else None,
        champion_lift=round(champion["comparison"]["lift"], 4) if champion else None,
    )


def render_index(runs: Sequence[IndexedRun]) -> str:
    """Return the page of all runs. The page contains them as JSON, which `read_index` reads."""
    from markupsafe import Markup

    # Only "</script" and "<!--" can end the text of a script element. Text without "<" contains neither.
    data = msgspec.json.encode(list(runs)).decode().replace("<", r"\u003c")
    return render_page("index", data=Markup(data))  # noqa: S704 - JSON without "<"


def read_index(page: str) -> list[IndexedRun]:
    """Return the runs of a page from `render_index`. Raises ValueError for any other page."""
    _, found, rest = page.partition(_DATA)
    if not found:
        raise ValueError(
            f"{object_keys.INDEX} contains no data about runs: delete it, and the next publication creates a new page"
        )
    runs = msgspec.json.decode(rest.partition("</script>")[0], type=list[IndexedRun])
    return [run if run.line else structs.replace(run, line=object_keys.line_of(run.dataset)) for run in runs]


def add_to_index(aws: Aws, bucket: str, run: IndexedRun) -> None:
    """Add a run to the page of all runs, or replace it there. Idempotent, and safe beside other writers.

    The write is conditional on the page's ETag. If another writer has changed the page, this function reads the page again
    and retries. One of several simultaneous writers always succeeds.
    """
    while True:
        try:
            stored = aws.s3.get_object(Bucket=bucket, Key=object_keys.INDEX)
        except aws.s3.exceptions.NoSuchKey:
            page, runs, condition = "", [], {"IfNoneMatch": "*"}
        else:
            page = stored["Body"].read().decode()
            runs, condition = read_index(page), {"IfMatch": stored["ETag"]}
        others = [each for each in runs if each.run_id != run.run_id]
        new = render_index(sorted([*others, run], key=lambda each: (each.published, each.run_id), reverse=True))
        if new == page:
            return
        try:
            aws.s3.put_object(
                Bucket=bucket, Key=object_keys.INDEX, Body=new.encode(), ContentType="text/html; charset=utf-8", **condition
            )
        except ClientError as error:
            if error_code(error) not in {"PreconditionFailed", "ConditionalRequestConflict"}:
                raise
        else:
            return
