"""A run in MLflow: on a server with a URL, or on SageMaker's managed MLflow, which an ARN names.

The job's environment may have MLflow's own variables, such as MLFLOW_EXPERIMENT_NAME. The plugin `sagemaker-mlflow` signs
the requests to an ARN (https://docs.aws.amazon.com/sagemaker/latest/dg/mlflow-track-experiments.html).
"""

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.tracker_page import Facts, Status, files

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

# Limits of a request (https://mlflow.org/docs/latest/api_reference/rest-api.html#log-batch). Old servers take values of 500.
MOST_METRICS, MOST_PARAMS, PARAM_CHARACTERS = 1000, 100, 500
PLUGIN = "sagemaker_mlflow"
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # `trainer.trackers` tries again, at the next step
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
STEPS = {"": "epoch", "sft/": "sft/epoch"}  # a figure that each point has, by the prefix of its phase


class MlflowRun:
    """See `trainer.tracker_page.Page`. The run of the same key goes on if there is one."""

    def __init__(self, facts: Facts):
        from mlflow import MlflowClient, get_tracking_uri

        uri = get_tracking_uri()
        if not uri.startswith("arn:"):  # the plugin warns of every request that is not for an ARN
            logging.getLogger("mlflow.tracking.request_header.registry").setLevel(logging.ERROR)
        self._client = MlflowClient()
        self._metrics: list[Metric] = []
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or facts.project
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        run = self._earlier(experiment_id, facts) or self._new(experiment_id, facts)
        self._id: str = run.info.run_id
        self.steps = {prefix: self._last(figure) for prefix, figure in STEPS.items()}
        page = f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{self._id}"
        self.about: dict[str, str | None] = {
            "url": page if uri.startswith(("http://", "https://")) else None,
            "server": uri,
            "experiment": name,
            "run": run.info.run_name,
            "run_id": self._id,
            "artifacts": run.info.artifact_uri,
        }

    def _earlier(self, experiment_id: str, facts: Facts) -> "Run | None":
        """Return the run that an earlier process of this run began, as running again."""
        found = self._client.search_runs([experiment_id], f"tags.tunedrop.key = '{facts.key}'", max_results=1)
        if not facts.key or not found:
            return None
        run = found[0]
        self._client.update_run(run.info.run_id, status="RUNNING")
        for name, value in facts.tags.items():
            self._client.set_tag(run.info.run_id, name, value)
        return run

    def _new(self, experiment_id: str, facts: Facts) -> "Run":
        from mlflow.entities import Param

        tags = facts.tags | ({"tunedrop.key": facts.key} if facts.key else {})
        run = self._client.create_run(experiment_id, tags=tags, run_name=facts.key or None)
        params = [Param(name, value[:PARAM_CHARACTERS]) for name, value in flat(facts.config)]
        for first in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(run.info.run_id, params=params[first : first + MOST_PARAMS])
        return run

    def _last(self, figure: str) -> int:
        return max((each.step for each in self._client.get_metric_history(self._id, figure)), default=-1)

    def write(self, figures: Mapping[str, float], step: int) -> None:
        """Take the figures of a step. MLflow allows some characters in a name."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for name, value in figures.items():
            self._metrics.append(Metric(re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII), value, now, step))

    def flush(self) -> None:
        """Send the figures that were taken."""
        while self._metrics:
            self._client.log_batch(self._id, metrics=self._metrics[:MOST_METRICS])
            del self._metrics[:MOST_METRICS]

    def close(self, status: Status, folder: Path | None) -> None:
        """Send the files of a folder, if there is one, and end the run, even if the files are refused."""
        try:
            for path, target in files(folder) if folder else ():
                self._client.log_artifact(self._id, str(path), target or None)
        finally:
            self._client.set_terminated(self._id, status)


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield a config's values as texts, under names such as `grpo.beta`. Lists are JSON."""
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, str) else json.dumps(value)
