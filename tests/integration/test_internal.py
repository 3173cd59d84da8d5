"""What no code expects: the user gets a receipt, the operator an alarm, and nothing is tried for ever."""

import pytest

from pipeline.runs.states import RunState
from pipeline.stages.validate_dataset import InternalError
from tunedrop.sandboxed_process import WorkerKilledError


def fail(error):
    def function(*_, **__):
        raise error

    return function


@pytest.mark.parametrize("where", ["load_run_config", "read_rows", "check_rewards", "estimate"])
@pytest.mark.parametrize("error", [KeyError("secret"), RecursionError(), MemoryError(), AssertionError("secret")], ids=repr)
def test_an_exception_becomes_a_receipt_and_one_error(world, monkeypatch, where, error):
    monkeypatch.setattr(f"pipeline.validation.validate.{where}", fail(error))
    event = world.upload_event("training_data/cars.jsonl")
    with pytest.raises(InternalError):  # Lambda's metric of errors, which turns on the alarm
        world.handle("validate_dataset", event)
    run = world.run(world.aws.runs.upload("training_data/cars.jsonl")["run_id"])
    assert (run.state, run.open) == (RunState.REJECTED, None)
    assert world.event_types == ["Dataset Rejected"]
    receipt = world.read_json(f"runs/{run.run_id}/validation.json")
    (problem,) = receipt["errors"]
    assert problem["code"] == "INTERNAL"
    assert type(error).__name__ in problem["message"]
    assert "line " in problem["message"]
    assert "secret" not in str(receipt)
    assert world.handle("validate_dataset", event) == {"run_id": run.run_id, "status": "REJECTED"}  # Lambda's next try
    assert world.event_types == ["Dataset Rejected"]


@pytest.mark.parametrize("error", [WorkerKilledError("killed"), OSError("no space")], ids=repr)
def test_a_fault_of_the_machine_is_tried_again(world, monkeypatch, error):
    event = world.upload_event("training_data/cars.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.validation.validate.read_rows", fail(error))
        with pytest.raises(type(error)):
            world.handle("validate_dataset", event)
    assert world.event_types == []
    assert world.handle("validate_dataset", event)["status"] == "VALIDATED"
