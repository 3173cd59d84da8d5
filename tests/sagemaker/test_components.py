"""The servers behind inference components: updates under load, copies, adapters, deaths and restarts."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from components import CONTAINER, Serving, is_alive

ROLLING = {"MaximumBatchSize": {"Type": "COPY_COUNT", "Value": 1}, "WaitIntervalInSeconds": 0}


@contextmanager
def load(serving: Serving, name: str) -> Iterator[list[str]]:
    """Ask a component again and again, three at a time; the versions that answered, in order. A failure fails the test."""
    answers: list[str] = []
    end = threading.Event()

    def ask() -> None:
        while not end.is_set():
            answers.append(serving.ask(name, sleep=0.02)["version"])

    with ThreadPoolExecutor(3) as pool:
        askers = [pool.submit(ask) for _ in range(3)]
        try:
            serving.local.until(lambda: len(answers) > 5)
            yield answers
        finally:
            seen = len(answers)
            serving.local.until(lambda: len(answers) > seen + 5 or any(asker.done() for asker in askers))
            end.set()
    for asker in askers:
        asker.result()


# ---- adapters ------------------------------------------------------------------------------------------------------------


def test_another_adapter_answers_after_an_update_and_no_request_fails(hosted: Callable[..., Serving]) -> None:
    """https://docs.aws.amazon.com/sagemaker/latest/dg/realtime-endpoints-adapt.html"""
    serving = hosted()
    serving.base(copies=2)
    serving.adapter("line", "one")
    with ThreadPoolExecutor(1) as pool, load(serving, "line") as answers:
        under_way = pool.submit(serving.ask, "line", sleep=1.5)
        time.sleep(0.2)
        settled = serving.update("line", Specification={"Container": {"ArtifactUrl": serving.archive("two")}})
        assert settled["InferenceComponentStatus"] == "InService"
        assert settled["Specification"]["Container"]["ArtifactUrl"] == "s3://art/adapters/two.tar.gz"
        assert settled["Specification"]["BaseInferenceComponentName"] == "base"  # the update left it out
        assert serving.ask("line")["version"] == "two"  # at once, while the old version still answers
        assert under_way.result()["version"] == "one"
    # Requests of two copies overtake each other by one at most.
    changes = sum(a != b for a, b in itertools.pairwise(answers))
    assert changes <= 5, answers
    assert (answers[0], answers[-1]) == ("one", "two")
    assert serving.ask("base")["version"] == "base"


@pytest.mark.parametrize("copies", [1, 0])
def test_an_adapter_that_cannot_be_loaded_fails_and_the_former_serves_on(
    hosted: Callable[..., Serving], copies: int
) -> None:
    serving = hosted()
    serving.base(copies=copies)
    serving.adapter("line", "one")
    serving.adapter("refused", "broken", wait=False)
    broken = serving.settled("refused")
    update = serving.update("line", Specification={"Container": {"ArtifactUrl": serving.archive("broken")}})
    if copies:
        assert broken["InferenceComponentStatus"] == "Failed"
        assert "Failed to load the adapter: the container answered HTTP 400" in broken["FailureReason"]
        assert (update["InferenceComponentStatus"], "HTTP 400" in update["FailureReason"]) == ("InService", True)
        assert update["Specification"]["Container"]["ArtifactUrl"] == "s3://art/adapters/one.tar.gz"
        assert serving.ask("line")["version"] == "one"
        good = serving.update("line", Specification={"Container": {"ArtifactUrl": serving.archive("two")}})
        assert "FailureReason" not in good
        assert serving.ask("line")["version"] == "two"
        serving.gone("refused")
        serving.adapter("refused", "three")
        assert serving.ask("refused")["version"] == "three"
    else:  # without a copy nothing refuses it: its requests fail as soon as there is one
        assert serving.scale("base", 1)["RuntimeConfig"]["CurrentCopyCount"] == 1
        assert serving.ask("base")["version"] == "base"
        with pytest.raises(ClientError, match=r"Received client error \(404\)") as error:
            serving.ask("line")
        assert error.value.response["OriginalStatusCode"] == 404


def test_an_adapter_that_ends_the_server_is_not_loaded_again(hosted: Callable[..., Serving]) -> None:
    serving = hosted()
    serving.base()
    serving.adapter("line", "one")
    update = serving.update("line", Specification={"Container": {"ArtifactUrl": serving.archive("deadly")}})
    assert "the container ended meanwhile" in update["FailureReason"]

    def answers_as_before() -> bool:
        try:
            return bool(serving.ask("line")["version"] == "one")
        except ClientError:  # the server starts again
            return False

    serving.local.until(answers_as_before)


def test_an_archive_that_is_none_fails_its_component(hosted: Callable[..., Serving]) -> None:
    serving = hosted()
    serving.base(copies=0)
    serving.s3.put_object(Bucket="art", Key="adapters/text.tar.gz", Body="no archive")
    serving.client.create_inference_component(
        InferenceComponentName="line",
        EndpointName="ep",
        Specification={
            "BaseInferenceComponentName": "base",
            "Container": {"ArtifactUrl": "s3://art/adapters/text.tar.gz"},
        },
    )
    assert "Failed to download model data" in serving.settled("line")["FailureReason"]


# ---- updates of a component with a model ---------------------------------------------------------------------------------


def test_a_rolling_update_replaces_the_copies_and_no_request_fails(hosted: Callable[..., Serving]) -> None:
    """ "For each step, SageMaker AI provisions capacity on the new endpoint fleet, routes traffic to that fleet, and
    terminates capacity on the old endpoint fleet."
    https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_InferenceComponentRollingUpdatePolicy.html
    """
    serving = hosted()
    serving.base(model=serving.model("first", "first"), copies=2)
    old = {serving.ask("base")["pid"] for _ in range(2)}
    with load(serving, "base") as answers:
        settled = serving.update(
            "base",
            Specification={"ModelName": serving.model("second", "second")},
            DeploymentConfig={"RollingUpdatePolicy": ROLLING},
        )
        assert settled["Specification"]["ModelName"] == "second"
        assert settled["LastDeploymentConfig"] == {"RollingUpdatePolicy": ROLLING}
        assert settled["RuntimeConfig"] == {"DesiredCopyCount": 2, "CurrentCopyCount": 2}
        assert serving.ask("base")["version"] == "second"
    assert (answers[0], answers[-1]) == ("first", "second")
    serving.local.until(lambda: not any(map(is_alive, old)))


@pytest.mark.parametrize("failure", [{"CRASH": "1"}, {"UNHEALTHY": "1"}])
def test_a_version_that_does_not_become_healthy_is_taken_back(
    hosted: Callable[..., Serving], failure: dict[str, str]
) -> None:
    serving = hosted(startup_limit=2)
    serving.base(model=serving.model("first", "first"))
    with load(serving, "base") as answers:
        settled = serving.update("base", Specification={"ModelName": serving.model("second", "second", **failure)})
    assert settled["InferenceComponentStatus"] == "InService"
    assert "did not pass the ping health check" in settled["FailureReason"]
    assert settled["Specification"]["ModelName"] == "first"
    assert set(answers) == {"first"}


def test_an_alarm_during_the_wait_takes_the_update_back(hosted: Callable[..., Serving], endpoint: str) -> None:
    """AutoRollbackConfig: "If any alarms are tripped during a deployment, SageMaker rolls back the deployment."
    https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_AutoRollbackConfig.html
    """
    serving = hosted()
    cloudwatch = boto3.client("cloudwatch", endpoint_url=endpoint)
    cloudwatch.put_metric_alarm(
        AlarmName="trouble",
        Namespace="Custom",
        MetricName="Errors",
        Statistic="Sum",
        Period=60,
        EvaluationPeriods=1,
        Threshold=1,
        ComparisonOperator="GreaterThanThreshold",
    )
    cloudwatch.set_alarm_state(AlarmName="trouble", StateValue="OK", StateReason="test")
    serving.base(model=serving.model("first", "first"))
    serving.model("second", "second")
    with load(serving, "base") as answers:
        serving.client.update_inference_component(
            InferenceComponentName="base",
            Specification={"ModelName": "second"},
            DeploymentConfig={
                "RollingUpdatePolicy": ROLLING | {"WaitIntervalInSeconds": 60},
                "AutoRollbackConfiguration": {"Alarms": [{"AlarmName": "trouble"}]},
            },
        )
        serving.local.until(lambda: answers[-1] == "second")
        assert serving.describe("base")["InferenceComponentStatus"] == "Updating"
        cloudwatch.set_alarm_state(AlarmName="trouble", StateValue="ALARM", StateReason="test")
        settled = serving.settled("base")
        assert "these alarms are in the state ALARM: trouble" in settled["FailureReason"]
        assert settled["Specification"]["ModelName"] == "first"
        assert serving.ask("base")["version"] == "first"
    assert answers[-1] == "first"


# ---- copies --------------------------------------------------------------------------------------------------------------


def test_requests_go_to_the_copy_with_the_fewest_and_copies_that_leave_answer_first(hosted: Callable[..., Serving]) -> None:
    serving = hosted()
    serving.base(copies=2)
    with ThreadPoolExecutor(8) as pool:
        pids = Counter(answer["pid"] for answer in pool.map(lambda _: serving.ask("base", sleep=0.5), range(8)))
        assert sorted(pids.values()) == [4, 4]
        under_way = [pool.submit(serving.ask, "base", sleep=1) for _ in range(4)]
        time.sleep(0.3)
        assert serving.scale("base", 0)["RuntimeConfig"] == {"DesiredCopyCount": 0, "CurrentCopyCount": 0}
        with pytest.raises(ClientError, match="has no capacity"):
            serving.ask("base")
        assert {future.result()["pid"] for future in under_way} == set(pids)
    serving.local.until(lambda: not any(map(is_alive, pids)))
    [variant] = serving.client.describe_endpoint(EndpointName="ep")["ProductionVariants"]
    assert variant["CurrentInstanceCount"] == 0
    serving.scale("base", 1)
    assert serving.ask("base")["pid"] not in pids


def test_a_server_that_dies_comes_again_with_its_adapters(hosted: Callable[..., Serving]) -> None:
    serving = hosted()
    serving.base()
    serving.adapter("line", "one")
    before = serving.ask("line")
    with pytest.raises(ClientError, match=r"ModelError.*Received server error \(0\) from primary") as error:
        serving.ask("line", die=True)
    assert error.value.response["ResponseMetadata"]["HTTPStatusCode"] == 424
    codes, answer = set(), None
    while answer is None:
        try:
            answer = serving.ask("line")
        except ClientError as refused:
            codes.add((refused.response["Error"]["Code"], refused.response["ResponseMetadata"]["HTTPStatusCode"]))
    assert codes <= {("ServiceUnavailable", 503), ("ModelError", 424)}, codes
    assert (answer["version"], answer["pid"] != before["pid"]) == ("one", True)


# ---- the emulator's end --------------------------------------------------------------------------------------------------


def test_servers_end_with_the_emulator_and_come_again_with_it(hosted: Callable[..., Serving], start: Any) -> None:
    serving = hosted()
    serving.base(copies=2)
    serving.adapter("line", "one")
    serving.update("line", Specification={"Container": {"ArtifactUrl": serving.archive("two")}})
    pids = {serving.ask("base")["pid"] for _ in range(4)}
    serving.local.close()
    assert not any(map(is_alive, pids))
    local = start(server_command=CONTAINER)
    again = Serving(local, None)
    local.until(lambda: again.describe("base")["RuntimeConfig"]["CurrentCopyCount"] == 2)
    assert {again.describe(name)["InferenceComponentStatus"] for name in ("base", "line")} == {"InService"}
    assert again.ask("line")["version"] == "two"


def test_an_update_that_a_kill_interrupts_is_finished_after_it(hosted: Callable[..., Serving], start: Any) -> None:
    serving = hosted()
    serving.base(model=serving.model("first", "first"))
    serving.client.update_inference_component(
        InferenceComponentName="base",
        Specification={"ModelName": serving.model("second", "second")},
        DeploymentConfig={"RollingUpdatePolicy": ROLLING | {"WaitIntervalInSeconds": 60}},
    )
    serving.local.until(lambda: serving.ask("base")["version"] == "second")
    serving.local.close()
    local = start(server_command=CONTAINER)
    again = Serving(local, None)
    local.until(lambda: again.describe("base")["RuntimeConfig"]["CurrentCopyCount"] > 0)
    assert again.describe("base")["InferenceComponentStatus"] == "Updating"
    local.until(lambda: again.ask("base")["version"] == "second")
