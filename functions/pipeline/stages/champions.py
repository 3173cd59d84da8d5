"""The champion of a line: the newest approved model package, by the registry, where people may change the approval."""

from pipeline.aws import Aws
from pipeline.notify import events
from pipeline.observability import logger
from pipeline.publish.registry import approved_packages, version_of
from pipeline.publish.suites import store_suite
from pipeline.runs.lines import Line
from pipeline.settings import PublishSettings, Settings
from tunedrop import event_bus
from tunedrop.object_keys import run_key


def package_changed(arn: str, settings: PublishSettings, aws: Aws) -> None:
    """Settle the line of a model package. A package that the stack did not publish changes nothing."""
    lines = [line for line in aws.lines.all() if version_of(arn) in line.packages]
    if not lines:
        logger.info("ignored a model package of no line", package=arn)
    for line in lines:
        settle(line.line, settings, aws)


def settle_lines(settings: PublishSettings, aws: Aws) -> None:
    """Settle every line: the events of model packages may be lost. An error of one line does not hide the others."""
    errors: list[Exception] = []
    for line in aws.lines.all():
        try:
            settle(line.line, settings, aws)
        except Exception as error:  # noqa: BLE001 - raised after the other lines
            logger.exception("a line could not be settled", line=line.line)
            errors.append(error)
    if errors:
        raise errors[0]


def settle(name: str, settings: PublishSettings, aws: Aws) -> None:
    """Make the run of the newest approved model package the line's champion, and announce a change.

    A champion that is not registered yet stays: its publication goes on, and the package's event comes after it. The present
    champion is announced before the next one takes its place: no version of a line goes without its announcement.
    """
    line = aws.lines.get(name)
    if not line.settled:
        return
    announce_champion(line, settings, aws)
    approved = approved_packages(line, settings, aws)
    newest = approved[-1] if approved else None
    if newest != line.champion_package:
        runs = [line.packages[version_of(arn)] for arn in approved]
        suite = store_suite(line, runs, settings.artifact_bucket, aws) if runs else None
        aws.lines.set_champion(line, runs[-1] if runs else None, newest, suite)
        announce_champion(aws.lines.get(name), settings, aws)


def announce_champion(line: Line, settings: Settings, aws: Aws) -> None:
    """Announce a line's champion once. A champion that is not registered yet is announced after its registration."""
    if line.announced < line.version and line.settled:
        event_bus.put(aws.events, event_bus.entry(settings.event_bus, events.CHAMPION_CHANGED, _detail(line, settings)))
        aws.lines.mark_announced(line)


def _detail(line: Line, settings: Settings) -> dict[str, object]:
    """Return the event's detail. Without `run_id`, the line has no champion any more, and the base model is in use."""
    detail: dict[str, object] = {"id": f"{line.line}/{line.version}", "line": line.line, "version": line.version}
    if line.champion:
        folder = f"s3://{settings.artifact_bucket}/{run_key(line.champion)}"
        detail |= {
            "run_id": line.champion,
            "model_package": line.champion_package,
            "report": f"{folder}report.html",
            "result": f"{folder}result.json",
        }
    return detail
