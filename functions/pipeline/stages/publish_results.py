"""A test job ended: judge the tuned model, write the report, register the model, and tell everyone."""

import re
from typing import Any

import msgspec
from botocore.exceptions import ClientError
from pydantic import Field

from pipeline.aws import Aws, error_code
from pipeline.jobs.launch import TrainingJob, run_of_job, wait_again
from pipeline.jobs.plan import instance_type_of, load_plan
from pipeline.jobs.price import job_price, on_demand_prices
from pipeline.notify import events
from pipeline.notify.announcements import AnnounceSettings, announce_failure, notify
from pipeline.notify.events import RunEvent
from pipeline.observability import logger
from pipeline.publish.report import IndexedRun, indexed_run, read_index, render_index, render_report
from pipeline.publish.statistics import Comparison, evaluate
from pipeline.runs.table import Run, RunState
from tunedrop import object_keys
from tunedrop.config.model import RunConfig
from tunedrop.inference_tests import Outcome

# How many reasons, and tags or rewards, an event names.
MOST_REASONS, MOST_GROUPS = 20, 50
UNREGISTRABLE = re.compile(r"[^\w .:/=+\-@]")  # in a model package's CustomerMetadataProperties
# How the registry says what the gate decided.
APPROVAL = {"APPROVED": "Approved", "PENDING": "PendingManualApproval", "REJECTED": "Rejected"}


class PublishSettings(AnnounceSettings):
    """The environment of publish_results."""

    model_package_group: str
    # How long the link to the report in notifications works; 0: no link. The function's credentials must live as long.
    report_link_hours: int = Field(ge=0, le=168)


def testing_ended(name: str, settings: PublishSettings, aws: Aws) -> Run | None:
    """Publish a run if its test job has ended; return it, or None if the job runs, or is of no current attempt."""
    found = run_of_job(name, settings, aws)
    if found is None or not found[1].final:
        return None
    run, job = found
    if run.state == RunState.TRAINED:
        # The job ended before the move that followed its creation was written: write that move first.
        run = aws.runs.move(run, RunState.TESTING, test_job=name, reason=None, not_before=None)
    if run.state == RunState.TESTING:
        run = _after_tests(run, job, settings, aws)
    if run.state == RunState.TESTED:
        run = publish(run, settings, aws)
    if run.state == RunState.PUBLISHED:
        announce(run, settings, aws)
    elif run.failed:
        announce_failure(run, settings, aws)
    return run


def _after_tests(run: Run, job: TrainingJob, settings: PublishSettings, aws: Aws) -> Run:
    """Decide what the end of a test job means for its run, and move it there."""
    if job.TrainingJobStatus == "Completed":
        return aws.runs.move(run, RunState.TESTED)
    if job.no_capacity:  # the training is not lost: only the tests are tried again
        return wait_again(run, RunState.TRAINED, job.no_capacity, settings, aws)
    if job.TrainingJobStatus == "Stopped" and not job.at_limit:
        return aws.runs.move(run, RunState.CANCELLED, reason="the inference tests were stopped")
    reason = f"the inference tests {job.TrainingJobStatus.lower()}: {job.FailureReason or job.SecondaryStatus}"
    return aws.runs.move(run, RunState.TESTING_FAILED, reason=reason[:1024])


def publish(run: Run, settings: PublishSettings, aws: Aws) -> Run:
    """Write the report, register the model package, and write `result.json` and the index of all runs, in this order.

    `result.json` is the commit mark; the index names only runs that have one. Everything is made of what the jobs left
    behind, so that doing it twice writes the same bytes.
    """
    bucket = settings.artifact_bucket
    assert run.artifacts is not None
    trained = run.artifacts.removeprefix(f"s3://{bucket}/").rstrip("/")
    tested = object_keys.run_key(run.run_id, f"inference/{run.test_job}/output/model")
    config = RunConfig.model_validate_json(_read(aws, bucket, object_keys.run_key(run.run_id, "input/config.json")))
    inference = msgspec.json.decode(_read(aws, bucket, f"{tested}/inference.json"))
    training = msgspec.json.decode(_read(aws, bucket, f"{trained}/training.json"))
    metrics = _lines(_read(aws, bucket, f"{trained}/metrics.jsonl"))
    receipt = msgspec.json.decode(_read(aws, bucket, object_keys.run_key(run.run_id, "validation.json")))
    plan = load_plan(aws, bucket, run.plan)
    tests = msgspec.convert(inference["tests"], list[Outcome])
    jobs = {
        kind: aws.sagemaker.describe_training_job(TrainingJobName=job)
        for kind, job in (("train", run.train_job), ("test", run.test_job))
    }
    result = _result(run, config, training, plan, jobs, settings) | msgspec.to_builtins(evaluate(tests, config))
    result["base_model_license"] = inference.get("base_model_license")
    # The verdict is what most readers look for: at the top level.
    result |= {"verdict": result["verdict"]["status"], "reasons": result["verdict"]["reasons"]}
    html = render_report(
        result,
        receipt=receipt,
        metrics=metrics,
        tests=tests,
        probe=msgspec.convert(inference.get("probe", []), list[Outcome]),
        alerts=_lines(aws.read(bucket, f"{trained}/alerts.jsonl") or b""),
    )
    _write(aws, bucket, object_keys.run_key(run.run_id, "report.html"), html.encode(), "text/html; charset=utf-8")
    quality = msgspec.json.format(msgspec.json.encode(model_quality(result)))
    _write(aws, bucket, object_keys.run_key(run.run_id, "model_quality.json"), quality, "application/json")
    result["model_package"] = _register(run, trained, result, plan, settings, aws)
    body = msgspec.json.format(msgspec.json.encode(result))
    _write(aws, bucket, object_keys.run_key(run.run_id, "result.json"), body, "application/json")
    add_to_index(aws, bucket, indexed_run(result, metrics, run.updated, run.rows))
    return aws.runs.move(run, RunState.PUBLISHED, verdict=result["verdict"], model_package=result["model_package"])


def _read(aws: Aws, bucket: str, key: str) -> bytes:
    raw = aws.read(bucket, key)
    if raw is None:
        raise FileNotFoundError(f"s3://{bucket}/{key}")
    return raw


def _lines(raw: bytes) -> list[Any]:
    return [msgspec.json.decode(line) for line in raw.splitlines()]


def _write(aws: Aws, bucket: str, key: str, body: bytes, kind: str, **condition: str) -> None:
    aws.s3.put_object(Bucket=bucket, Key=key, Body=body, ContentType=kind, **condition)


def _result(
    run: Run,
    config: RunConfig,
    training: dict[str, Any],
    plan: dict[str, Any],
    jobs: dict[str, dict[str, Any]],
    settings: PublishSettings,
) -> dict[str, Any]:
    """Return the content of `result.json`, but for the evaluation and the model package."""
    folder = f"s3://{settings.artifact_bucket}/{object_keys.run_key(run.run_id)}"
    assert run.artifacts is not None
    trained, tested = run.artifacts.rstrip("/"), f"{folder}inference/{run.test_job}/output/model"
    return {
        "run_id": run.run_id,
        "dataset": run.dataset,
        "attempt": run.attempt,
        "arrived": run.arrived,
        "bounded": run.bounded,
        "training": training,
        "jobs": {"train": run.train_job, "test": run.test_job},
        "cost": cost(jobs, on_demand_prices(plan)),
        "source": f"s3://{settings.data_bucket}/{run.key}",
        "source_version": run.version_id,
        "trainer": run.plan,
        "config": config.model_dump(mode="json"),
        "artifacts": {
            "report": folder + "report.html",
            "merged_model": f"{trained}/merged/",
            "adapter": f"{trained}/adapter/",
            "receipt": folder + "validation.json",
            "input": folder + "input/",
            "metrics": f"{trained}/metrics.jsonl",
            "inference": f"{tested}/inference.json",
            "base_evaluation": f"{tested}/evaluation_base.jsonl",
            "tuned_evaluation": f"{tested}/evaluation_tuned.jsonl",
            "model_quality": folder + "model_quality.json",
            "all_runs": f"s3://{settings.artifact_bucket}/{object_keys.INDEX}",
        },
    }


def cost(jobs: dict[str, dict[str, Any]], prices: dict[str, float]) -> dict[str, Any]:
    """Return what the jobs took and cost, from DescribeTrainingJob's answers and USD an hour by instance type.

    SageMaker bills `BillableTimeInSeconds` times the instances at the on-demand price; what spot saves is in the seconds
    (https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_DescribeTrainingJob.html). None is not known.
    """
    described = {}
    for kind, job in jobs.items():
        resources = job["ResourceConfig"]
        seconds = job.get("BillableTimeInSeconds")
        usd = job_price(seconds, resources, prices)
        described[kind] = {
            "name": job["TrainingJobName"],
            "instance_type": instance_type_of(resources),
            "instance_count": resources.get("InstanceCount", 1),
            "spot": job.get("EnableManagedSpotTraining", False),
            "seconds": job.get("TrainingTimeInSeconds"),
            "billable_seconds": seconds,
            "usd": None if usd is None else round(usd, 4),
        }
    known = [job["usd"] for job in described.values()]
    return {"jobs": described, "usd": None if None in known else round(sum(known), 4)}


def model_quality(result: dict[str, Any]) -> dict[str, Any]:
    """Return a run's scores as the model quality statistics that SageMaker's registry and Model Monitor read.

    The standard deviation of a mean is estimated from its interval, as wide as 3.92 of them at 95 %
    (https://docs.aws.amazon.com/sagemaker/latest/dg/model-monitor-model-quality-metrics.html).
    """
    everything = {"reward": result["comparison"]}
    everything |= {f"reward.{name}": each for name, each in result["by_reward"].items()}
    everything |= {f"tag.{name}": each for name, each in result["by_tag"].items()}
    width = Comparison.deviations(result["config"]["gate"]["confidence"])
    metrics: dict[str, dict[str, Any]] = {}
    for name, each in everything.items():
        deviation = (each["lift_high"] - each["lift_low"]) / width
        metrics |= {
            f"base.{name}": {"value": each["base_score"], "standard_deviation": "NaN"},
            f"tuned.{name}": {"value": each["tuned_score"], "standard_deviation": "NaN"},
            f"lift.{name}": {"value": each["lift"], "standard_deviation": deviation},
        }
    return {"version": 0.0, "dataset": {"item_count": result["comparison"]["tests"]}, "regression_metrics": metrics}


def _register(
    run: Run, trained: str, result: dict[str, Any], plan: dict[str, Any], settings: PublishSettings, aws: Aws
) -> str:
    """Register the merged model in the model package group, once per attempt, and return the package's ARN.

    The client token makes a second registration answer with the first one's package
    (https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_CreateModelPackage.html).
    """
    comparison, artifacts = result["comparison"], result["artifacts"]
    description = f"{run.model} tuned with GRPO + LoRA on {run.dataset}: {' '.join(result['reasons'])}"
    limit = result["config"]["max_seq_length"]
    properties = {
        "run_id": run.run_id,
        "attempt": str(run.attempt),
        "verdict": result["verdict"],
        "base_model": run.model,
        "base_model_license": result["base_model_license"] or "not stated",
        "base_score": f"{comparison['base_score']:.6f}",
        "tuned_score": f"{comparison['tuned_score']:.6f}",
        "lift_low": f"{comparison['lift_low']:.6f}",
        "trainer": run.plan,
        "data": result["source"],
        "data_version": run.version_id,
        "config": f"{artifacts['input']}config.json",
        "adapter": artifacts["adapter"],
        "report": artifacts["report"],
    }
    _create_group(settings.model_package_group, aws)
    answer = aws.sagemaker.create_model_package(
        ModelPackageGroupName=settings.model_package_group,
        ModelPackageDescription=" ".join(description.split())[:1024],
        ModelApprovalStatus=APPROVAL[result["verdict"]],
        ClientToken=f"{run.run_id}-{run.attempt}"[-36:],  # the end is what differs between runs of long names
        Domain="NATURAL_LANGUAGE_PROCESSING",
        Task="TEXT_GENERATION",
        InferenceSpecification={
            "Containers": [
                ({"Image": plan["inference_image"]} if plan["inference_image"] else {})
                | {
                    # vLLM behind SageMaker's /invocations: every SM_VLLM_* is one of its flags.
                    "Environment": {"SM_VLLM_MODEL": "/opt/ml/model"}
                    | ({"SM_VLLM_MAX_MODEL_LEN": str(limit)} if limit else {}),
                    "ModelDataSource": {
                        "S3DataSource": {
                            "S3Uri": f"s3://{settings.artifact_bucket}/{trained}/merged/",
                            "S3DataType": "S3Prefix",
                            "CompressionType": "None",
                        }
                    },
                }
            ],
            "SupportedContentTypes": ["application/json"],
            "SupportedResponseMIMETypes": ["application/json"],
        },
        ModelMetrics={
            "ModelQuality": {"Statistics": {"ContentType": "application/json", "S3Uri": artifacts["model_quality"]}}
        },
        # Of 256 characters at most, and not every character: keys of datasets have others.
        CustomerMetadataProperties={name: UNREGISTRABLE.sub("_", value)[:256] for name, value in properties.items()},
    )
    return str(answer["ModelPackageArn"])


def _create_group(name: str, aws: Aws) -> None:
    """Make the model package group, unless it is there. Not every region's CloudFormation can.

    It comes before the package, as in the SageMaker SDK: what CreateModelPackage answers without a group is in no document.
    How AWS says that a group is there has changed; these are the codes of the SDK's `_is_resource_already_exists_error`.
    What else a ValidationException may mean shows with the package.
    """
    try:
        aws.sagemaker.create_model_package_group(
            ModelPackageGroupName=name,
            ModelPackageGroupDescription="Models tuned by Tunedrop, one version per published run.",
        )
    except ClientError as error:
        if error_code(error) not in {"ValidationException", "ResourceInUse"}:
            raise
        logger.info("the model package group was not made", detail=str(error))


def add_to_index(aws: Aws, bucket: str, run: IndexedRun) -> None:
    """Put a run into the page of all runs, whoever else does at the same time.

    The page is written on the condition that it is still the one that was read; otherwise it is read again. Of those who
    try at once one always succeeds. A run that is there already, as it is, changes nothing.
    """
    while True:
        try:
            there = aws.s3.get_object(Bucket=bucket, Key=object_keys.INDEX)
        except aws.s3.exceptions.NoSuchKey:
            page, runs, condition = "", [], {"IfNoneMatch": "*"}
        else:
            page = there["Body"].read().decode()
            runs, condition = read_index(page), {"IfMatch": there["ETag"]}
        others = [each for each in runs if each.run_id != run.run_id]
        new = render_index(sorted([*others, run], key=lambda each: (each.published, each.run_id), reverse=True))
        if new == page:
            return
        try:
            _write(aws, bucket, object_keys.INDEX, new.encode(), "text/html; charset=utf-8", **condition)
        except ClientError as error:
            if error_code(error) not in {"PreconditionFailed", "ConditionalRequestConflict"}:
                raise
        else:
            return


def announce(run: Run, settings: PublishSettings, aws: Aws) -> None:
    """Give a published run's place back, say that its results are there and close it; nothing if that has been done."""
    if run.open is None:
        return
    aws.runs.release(run)
    report = object_keys.run_key(run.run_id, "report.html")
    folder = f"s3://{settings.artifact_bucket}/{object_keys.run_key(run.run_id)}"
    result = msgspec.json.decode(_read(aws, settings.artifact_bucket, object_keys.run_key(run.run_id, "result.json")))
    event = RunEvent(
        detail_type=events.PUBLISHED,
        run=run,
        links={
            "report": f"s3://{settings.artifact_bucket}/{report}",
            "result": folder + "result.json",
            "model": result["artifacts"]["merged_model"],
        },
        extra=summary(result),
    )
    events.put_event(aws.events, settings.event_bus, event)
    if result["config"]["notify"]["sns"]:
        link = None
        if settings.report_link_hours:
            link = aws.s3.generate_presigned_url(
                "get_object",
                Params={"Bucket": settings.artifact_bucket, "Key": report},
                ExpiresIn=settings.report_link_hours * 3600,
            )
        notify(aws, settings.topic_arn, event, link)
    aws.runs.close(run)


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Return what an event says of a result: all but the long lists, since an event has 256 KB at most."""
    kept = {key: result[key] for key in ("verdict", "comparison", "passed", "cost", "model_package")}
    reasons = [reason[:1000] for reason in result["reasons"]]
    if len(reasons) > MOST_REASONS:
        reasons = [*reasons[:MOST_REASONS], f"… and {len(reasons) - MOST_REASONS} more, in the report."]
    groups = {key: dict(list(result[key].items())[:MOST_GROUPS]) for key in ("by_tag", "by_reward")}
    return kept | {"reasons": reasons} | groups
