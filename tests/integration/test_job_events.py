"""An event of a job is a doorbell: whatever is in it beside the job's name, DescribeTrainingJob decides."""

from typing import Any

import pytest
from aws_lambda_powertools.utilities.parser import parse
from botocore.exceptions import ClientError
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from world import sample_event

from pipeline.notify.events import JobStateChange
from pipeline.runs.states import RunState

# What the world makes of each end of a job: function, `events/` file, state and attempt of the run then.
ENDS = [
    ("test_model", "test_model.train_completed", RunState.TESTING, 1),
    ("test_model", "test_model.train_at_limit", RunState.TESTING, 1),
    ("test_model", "test_model.train_failed", RunState.TRAINING_FAILED, 1),
    ("test_model", "test_model.train_stopped", RunState.CANCELLED, 1),
    ("test_model", "test_model.train_no_capacity", RunState.WAITING, 2),
    ("publish_results", "publish_results.test_failed", RunState.TESTING_FAILED, 1),
    ("publish_results", "publish_results.test_stopped", RunState.CANCELLED, 1),
]
# A field of the detail: as it is, absent, null, empty, or of another type.
STRANGE = st.sampled_from(["as it is", "absent", None, "", [], {}, 0, "Starting", ["x"], {"a": 1}, True])
# The schema registry's and CDK's fields that AWS's sample does not have
# (docs.aws.amazon.com/cdk/api/v2/python/aws_cdk.mixins_preview.aws_sagemaker.events/SageMakerTrainingJobStateChange.html).
MORE = [
    "ModelArtifacts",
    "FailureReason",
    "InputDataConfig",
    "FinalMetricDataList",
    "BillableTimeInSeconds",
    "EventMetadata",
]
FIELDS = sorted({*sample_event("j", "Completed")["detail"], *MORE} - {"TrainingJobName"})


def ended(world, function, name):
    """A run whose job ended so, and the event of AWS's own sample for it."""
    run = world.start(world.drop())
    world.save_training(run)
    if function == "publish_results":
        run = world.trained(run)
    job = run.test_job or run.train_job
    return run, world.job_event(name, job)


@pytest.mark.parametrize(("function", "name", "state", "attempt"), ENDS, ids=[each[1] for each in ENDS])
def test_awss_own_sample_has_the_outcome_of_the_description(world, function, name, state, attempt):
    run, event = ended(world, function, name)
    world.handle(function, event)
    run = world.run(run.run_id)
    assert (run.state, run.attempt) == (state, attempt)


@pytest.mark.parametrize("said", ["Completed", "Failed", "Stopped"])
def test_a_job_that_runs_still_is_left_alone_whatever_the_event_says(world, said):
    run = world.start(world.drop())
    assert world.handle("test_model", sample_event(run.train_job, said)) == {}
    assert world.run(run.run_id) == run


def test_what_names_no_job_goes_to_the_dead_letter_queue(world):
    run, event = ended(world, "test_model", "test_model.train_completed")
    names: list[Any] = [None, "", 7, [], {}]
    for name in names:
        event["detail"]["TrainingJobName"] = name
        if name == "":  # a name, but no job's of this stack
            assert world.handle("test_model", event) == {}
            continue
        with pytest.raises(ValidationError):
            world.handle("test_model", event)
    del event["detail"]["TrainingJobName"]
    with pytest.raises(ValidationError):
        world.handle("test_model", event)
    assert world.run(run.run_id).state == RunState.TRAINING


def test_a_job_that_sagemaker_does_not_know_is_an_error(world):
    run = world.start(world.drop())
    world.next_call("DescribeTrainingJob", lambda _: (_ for _ in ()).throw(not_found()))
    with pytest.raises(LookupError, match=f"SageMaker has no training job '{run.train_job}'"):
        world.handle("test_model", sample_event(run.train_job, "Completed"))


def not_found():
    return ClientError({"Error": {"Code": "ValidationException", "Message": "Requested resource not found."}}, "Describe")


@given(st.dictionaries(st.sampled_from(FIELDS), STRANGE))
def test_nothing_is_read_but_the_name(changes):
    """Each field absent, null, empty or of another type, many at a time."""
    event = strange(sample_event("tunedrop-train-cars-0123456789ab-1", "Completed"), changes)
    read = parse(event, model=JobStateChange)
    assert read.model_dump() == {"detail": {"TrainingJobName": "tunedrop-train-cars-0123456789ab-1"}}


def strange(event, changes):
    detail = {name: value for name, value in event["detail"].items() if changes.get(name) != "absent"}
    return event | {
        "detail": detail | {name: value for name, value in changes.items() if value not in ("as it is", "absent")}
    }


@pytest.mark.parametrize("value", ["absent", None, {}, "Failed"])
@pytest.mark.parametrize(("function", "name", "state", "attempt"), ENDS, ids=[each[1] for each in ENDS])
def test_a_detail_of_strange_fields_has_the_outcome_of_the_description(world, function, name, state, attempt, value):
    run, event = ended(world, function, name)
    world.handle(function, strange(event, dict.fromkeys(FIELDS, value)))
    run = world.run(run.run_id)
    assert (run.state, run.attempt) == (state, attempt)
