"""`result.json`: what a run measured, cost and produced, and what other documents take from it."""

from typing import Any

import msgspec

from pipeline.jobs.price import instance_type_of, job_price, on_demand_prices
from pipeline.publish.comparison import Comparison
from pipeline.publish.evidence import Evidence
from pipeline.runs.states import Run
from pipeline.settings import Settings
from tunedrop import object_keys
from tunedrop.rollouts import FOLDER

# The most reasons, and the most tags or rewards, in an event.
MOST_REASONS, MOST_GROUPS = 20, 50
# What an event has of a result as it is.
KEPT = "start champion tries confidence verdict comparison ended passed cut cost model_package".split()


def run_result(run: Run, evidence: Evidence, settings: Settings) -> dict[str, Any]:
    """Return `result.json`, without the model package, which is registered later."""
    folder = f"s3://{settings.artifact_bucket}/{object_keys.run_key(run.run_id)}"
    trained, tested = (f"s3://{settings.artifact_bucket}/{key}" for key in (evidence.trained, evidence.tested))
    evaluation = msgspec.to_builtins(evidence.evaluation(run.tries))
    if evaluation.get("champion"):
        evaluation["champion"] = {"run_id": evidence.champion} | evaluation["champion"]
    verdict = evaluation.pop("verdict")
    return {
        "run_id": run.run_id,
        "dataset": run.dataset,
        "line": run.line,
        "start": {"run_id": run.start} if run.start else None,
        "attempt": run.attempt,
        "arrived": run.arrived,
        "bounded": run.bounded,
        "training": evidence.training,
        "jobs": {"train": run.train_job, "test": run.test_job},
        "cost": cost(evidence.jobs, on_demand_prices(evidence.plan)),
        "source": f"s3://{settings.data_bucket}/{run.key}",
        "source_version": run.version_id,
        "trainer": run.plan,
        "config": evidence.config.model_dump(mode="json"),
        "artifacts": {
            "report": folder + "report.html",
            "merged_model": f"{trained}/merged/",
            "adapter": f"{trained}/adapter/",
            "adapter_archive": f"{trained}/adapter.tar.gz",
            "receipt": folder + "validation.json",
            "input": folder + "input/",
            "metrics": f"{trained}/metrics.jsonl",
            "rollouts": f"{trained}/{FOLDER}/",
            "inference": f"{tested}/inference.json",
            "base_evaluation": f"{tested}/evaluation_base.jsonl",
            "tuned_evaluation": f"{tested}/evaluation_tuned.jsonl",
            "model_quality": folder + "model_quality.json",
            "all_runs": f"s3://{settings.artifact_bucket}/{object_keys.INDEX}",
        },
        **evaluation,
        "base_model_license": evidence.inference.get("base_model_license"),
        "verdict": verdict["status"],
        "reasons": verdict["reasons"],
    }


def cost(jobs: dict[str, dict[str, Any]], prices: dict[str, float]) -> dict[str, Any]:
    """Return time and cost of the jobs, from DescribeTrainingJob's answers and USD an hour by instance type.

    SageMaker bills `BillableTimeInSeconds` times the instances at the on-demand price; spot savings shorten that time
    (https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_DescribeTrainingJob.html). None means unknown.
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
    """Return a run's scores as model quality statistics for SageMaker's registry and Model Monitor.

    The width of a lift's interval gives the standard deviation of the lift: a 95 % interval is 3.92 deviations wide
    (https://docs.aws.amazon.com/sagemaker/latest/dg/model-monitor-model-quality-metrics.html).
    """
    everything = {"reward": result["comparison"]}
    everything |= {f"reward.{name}": each for name, each in result["by_reward"].items()}
    everything |= {f"tag.{name}": each for name, each in result["by_tag"].items()}
    width = Comparison.deviations(result["confidence"])
    metrics: dict[str, dict[str, Any]] = {}
    for name, each in everything.items():
        deviation = (each["lift_high"] - each["lift_low"]) / width
        metrics |= {
            f"base.{name}": {"value": each["base_score"], "standard_deviation": "NaN"},
            f"tuned.{name}": {"value": each["tuned_score"], "standard_deviation": "NaN"},
            f"lift.{name}": {"value": each["lift"], "standard_deviation": deviation},
        }
    return {"version": 0.0, "dataset": {"item_count": result["comparison"]["tests"]}, "regression_metrics": metrics}


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result's part of an event: the long lists are cut, since an event has at most 256 KB."""
    kept = {key: result[key] for key in KEPT}
    if champion := result["champion"]:
        kept["champion"] = {key: champion[key] for key in ("run_id", "comparison", "ended", "suite")}
    reasons = [reason[:1000] for reason in result["reasons"]]
    if len(reasons) > MOST_REASONS:
        reasons = [*reasons[:MOST_REASONS], f"… and {len(reasons) - MOST_REASONS} more, in the report."]
    groups = {key: dict(list(result[key].items())[:MOST_GROUPS]) for key in ("by_tag", "by_reward")}
    return kept | {"reasons": reasons} | groups
