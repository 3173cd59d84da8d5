"""The verdict of a tested run, written once: in one transaction with the line's champion."""

from pipeline.aws import Aws
from pipeline.jobs.answers import answers_prefix
from pipeline.jobs.launch import wait_for_test
from pipeline.observability import logger
from pipeline.publish.evidence import Evidence
from pipeline.publish.registry import approved_packages, version_of
from pipeline.publish.suites import questions_of_run, store_suite
from pipeline.runs.lines import Line, StaleLineError
from pipeline.runs.states import Run
from pipeline.settings import PublishSettings
from tunedrop.suite import overlap

# Tests are the same as earlier ones if more than this share of their questions were asked before.
SAME_TESTS = 0.5
ANOTHER_CHAMPION = "the line has another champion since the tests began: the model is tested against it"


def decide(run: Run, evidence: Evidence, settings: PublishSettings, aws: Aws) -> Run:
    """Decide about a tested run and return it with its verdict.

    If the line has another champion than the one in the tests, the run is tested again instead: it is returned in TRAINED.
    While the champion is not registered or not announced, the run is returned without a verdict, and `reconcile` comes back
    to it: packages are registered in the order of their verdicts, since the newest one is the champion's.
    """
    keep_answers(run, evidence, settings.artifact_bucket, aws)
    line = aws.lines.get(run.line)
    try:
        if line.version != evidence.line_version:
            raise StaleLineError
        if not line.settled or line.announced < line.version:
            logger.info("the verdict waits for the publication of the line's champion", champion=line.champion)
            return run
        line = aws.lines.add_try(line, run.run_id)
        tries = _tries(line, run, settings.artifact_bucket, aws)
        verdict = evidence.evaluation(tries).verdict.status
        suite = None
        if verdict == "APPROVED":
            earlier = [line.packages[version_of(arn)] for arn in approved_packages(line, settings, aws)]
            suite = store_suite(line, [*earlier, run.run_id], settings.artifact_bucket, aws)
        return aws.lines.decide(run, line, verdict, tries, suite)
    except StaleLineError:
        return wait_for_test(run, ANOTHER_CHAMPION, settings, aws)


def _tries(line: Line, run: Run, bucket: str, aws: Aws) -> int:
    """Return how many models were judged on a run's tests since the line's last champion, this run's included."""
    asked = questions_of_run(run.run_id, bucket, aws)
    earlier = line.tries[: line.tries.index(run.run_id)]
    return 1 + sum(overlap(asked, set(questions_of_run(each, bucket, aws))) > SAME_TESTS for each in earlier)


def keep_answers(run: Run, evidence: Evidence, bucket: str, aws: Aws) -> None:
    """Keep the answers that a test job generated, for later test jobs of the line. Idempotent."""
    models = {"base": run.base, "tuned": str(run.train_job)}
    if evidence.champion and (champion := aws.runs.get(evidence.champion)):
        models["champion"] = str(champion.train_job)
    for name, identity in models.items():
        source = f"{evidence.tested}/answers_{name}.jsonl"
        if evidence.inference.get("asked", {}).get(name, {}).get("asked"):
            target = f"{answers_prefix(run.line, identity, run.plan)}{run.test_job}.jsonl"
            aws.s3.copy_object(Bucket=bucket, Key=target, CopySource={"Bucket": bucket, "Key": source})
