"""The handlers, driven by the events of `events/`, from an upload to a published result and to every other end."""

import json
from datetime import timedelta

import pytest
from fake_stack import ARTIFACTS, PLAN

from pipeline.runs.states import RunState, inputs_digest
from pipeline.settings import ReconcileSettings
from pipeline.stages.reconcile import reconcile

UPLOAD = "training_data/cars.jsonl"


def test_from_upload_to_published(world):
    world.put("training_data/cars.yaml", b"rewards: [{type: exact_match}]\ncompute: {spot: false}\n")
    run = world.drop()
    assert run.state == RunState.VALIDATED
    receipt = world.read_json(f"runs/{run.run_id}/validation.json")
    assert receipt["ok"]
    assert (receipt["rows"], receipt["heldout"], receipt["inference_tests"]) == (30, 3, 3)
    assert receipt["columns"] == {"prompt": "question", "answer": "answer"}

    run = world.trained(run)
    assert run.state == RunState.TESTING
    run = world.tested(run)
    assert run.state == RunState.PUBLISHED
    assert run.open is None

    result = world.read_json(f"runs/{run.run_id}/result.json")
    assert result["verdict"] == "APPROVED"
    assert result["comparison"]["lift"] == 1.0
    report = world.aws.read("artifact-bucket", f"runs/{run.run_id}/report.html").decode()
    assert "<script>alert" not in report
    assert "&lt;script&gt;alert(1)" in report
    assert "<svg" in report
    package = world.aws.sagemaker.describe_model_package(ModelPackageName=result["model_package"])
    assert package["ModelApprovalStatus"] == "Approved"
    happened = ["Dataset Validated", "Training Started", "Inference Tests Started", "Results Published", "Champion Changed"]
    assert world.event_types == happened
    detail, changed = (json.loads(event["Detail"]) for event in world.sent_events[-2:])
    assert changed == {
        "id": "cars/1",
        "line": "cars",
        "version": 1,
        "run_id": run.run_id,
        "model_package": result["model_package"],
        "report": detail["report"],
        "result": detail["result"],
    }
    assert detail["verdict"] == "APPROVED"
    assert detail["report"] == f"s3://artifact-bucket/runs/{run.run_id}/report.html"
    (message,) = world.notifications
    assert message["Subject"] == "APPROVED: cars, score 0.00 -> 1.00"
    assert message["MessageAttributes"]["verdict"]["StringValue"] == "APPROVED"


def test_the_job_request_is_the_plan_with_the_run_filled_in(world):
    world.put(
        "training_data/cars.yaml", b"compute: {max_runtime: 2h, instance_type: ml.g5.xlarge}\nsystem_prompt: It's $(me)\n"
    )
    run = world.trained(world.drop())
    train, test = world.job_requests
    folder = f"s3://artifact-bucket/runs/{run.run_id}"
    assert train["TrainingJobName"] == f"tunedrop-train-{run.run_id}-1"
    assert train["AlgorithmSpecification"]["ContainerArguments"] == ["-c", "exec python -m trainer.job train"]
    assert test["AlgorithmSpecification"]["ContainerArguments"] == ["-c", "exec python -m trainer.job test"]
    assert train["HyperParameters"] == {"run-id": run.run_id, "max-runtime": "7200"}
    assert "It's" not in json.dumps(train)  # user text travels in the config channel only
    assert "It's $(me)" in json.dumps(world.read_json(f"runs/{run.run_id}/input/config.json"))
    channels = {c["ChannelName"]: c["DataSource"]["S3DataSource"]["S3Uri"] for c in train["InputDataConfig"]}
    assert channels == {
        "training": f"{folder}/input/",
        "run": f"{folder}/input/config.json",
        "inference_testing": f"{folder}/input/inference_tests.json",
        "models": "s3://data-bucket/models/base/",
    }
    assert {c["ChannelName"] for c in test["InputDataConfig"]} == {"run", "inference_testing", "models", "tuned"}
    assert train["StoppingCondition"] == {"MaxRuntimeInSeconds": 7200, "MaxWaitTimeInSeconds": 14400}
    assert train["ResourceConfig"]["InstanceType"] == "ml.g5.xlarge"
    assert train["CheckpointConfig"]["S3Uri"] == f"{folder}/checkpoints/"
    assert test["OutputDataConfig"] == {"S3OutputPath": f"{folder}/inference/", "CompressionType": "NONE"}
    assert "CheckpointConfig" not in test


def test_a_run_that_ended_for_its_budget_is_tested_published_and_marked_bounded(world):
    run = world.start(world.drop())
    world.save_training(run)
    prefix = world.artifacts(run.train_job).removeprefix("s3://artifact-bucket/")
    told = world.read_json(f"{prefix}training.json") | {
        "bounded": "max_cost_usd",
        "checkpoint": {"step": 3, "heldout_reward": 0.5},
    }
    world.write(f"{prefix}training.json", json.dumps(told).encode())
    world.handle("test_model", world.job_event("test_model.train_completed", run.train_job))
    run = world.tested(world.run(run.run_id))
    assert (run.state, run.bounded) == (RunState.PUBLISHED, True)
    result = world.read_json(f"runs/{run.run_id}/result.json")
    assert (result["bounded"], result["training"]["bounded"]) == (True, "max_cost_usd")
    assert "limit" in world.aws.read("artifact-bucket", f"runs/{run.run_id}/report.html").decode()


def test_one_event_five_times_and_the_same_bytes_twice_are_one_run_and_one_job(world):
    event = world.upload_event(UPLOAD)
    answers = [world.handle("validate_dataset", event) for _ in range(5)]
    assert len({answer["run_id"] for answer in answers}) == 1
    run = world.run(answers[0]["run_id"])
    for _ in range(5):
        run = world.start(run)
    assert world.drop().run_id == run.run_id
    world.start(run)
    for _ in range(5):
        world.trained(run)
    for _ in range(5):
        run = world.tested(world.run(run.run_id))
    assert [request["TrainingJobName"] for request in world.job_requests] == [run.train_job, run.test_job]
    assert run.state == RunState.PUBLISHED
    assert len({json.loads(event["Detail"])["id"] for event in world.sent_events}) == 5


@pytest.mark.parametrize("change", ["row", "config", "test", "model", "trainer"])
def test_any_change_of_content_is_a_new_run(world, change):
    first = world.drop()
    body = b'{"question": "0+1?", "answer": "one"}\n' + b"".join(
        b'{"question": "%d+1?", "answer": "%d"}\n' % (n, n + 1) for n in range(1, 30)
    )
    if change == "config":
        world.put("training_data/cars.yaml", b"grpo: {beta: 0.01}")
    elif change == "test":
        world.put("inference_test/cars.json", b'{"evaluations": [{"id": "a", "prompt": "b", "description": "c"}]}')
    elif change == "model":
        world.put("models/base/model.safetensors", b"y")
    elif change == "trainer":
        world.write("launch_plans/beef.json", world.aws.read(ARTIFACTS, f"launch_plans/{PLAN}.json"))
        world.write("launch_plans/current.json", b'{"digest": "beef"}')
    second = world.drop(body=body) if change == "row" else world.drop()
    assert second.run_id != first.run_id


def test_two_datasets_whose_digests_begin_alike_are_two_runs(world, monkeypatch):
    """The second one must not overwrite the first one's input while its job reads it."""
    name = "pipeline.stages.validate_dataset.inputs_digest"
    monkeypatch.setattr(name, lambda *inputs: 12 * "0" + inputs_digest(*inputs)[12:])
    first = world.drop()
    before = world.aws.read(ARTIFACTS, f"runs/{first.run_id}/input/train.jsonl")
    second = world.drop(body=b"".join(b'{"question": "%d?", "answer": "x"}\n' % n for n in range(30)))
    assert first.run_id.endswith("-000000000000")
    assert not second.run_id.endswith("-000000000000")
    assert (first.state, second.state) == (RunState.VALIDATED, RunState.VALIDATED)
    assert world.aws.read(ARTIFACTS, f"runs/{first.run_id}/input/train.jsonl") == before
    assert world.drop().run_id == first.run_id


def test_target_modules_that_the_model_lacks_reject_the_run(world):
    header = json.dumps(
        {"model.layers.0.self_attn.q_proj.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
    )
    weights = len(header).to_bytes(8, "little") + header.encode() + bytes(16)
    world.put("models/base/model.safetensors", weights)
    for target, state in (("q_proj", RunState.VALIDATED), ("c_attn", RunState.REJECTED)):
        world.put("training_data/cars.yaml", f"lora: {{target_modules: [{target}]}}".encode())
        run = world.drop()
        assert run.state == state
    (error,) = world.read_json(f"runs/{run.run_id}/validation.json")["errors"]
    assert (error["code"], error["key"]) == ("CONFIG_VALUE", "lora.target_modules")
    assert error["message"].endswith("the model has no module 'c_attn'")


def test_an_older_event_never_overrides_a_newer_upload(world):
    old = world.upload_event(UPLOAD, sequencer="0055AED6DCD90281E5")
    new = world.upload_event(UPLOAD, b'{"question": "a", "answer": "b"}\n' * 9, sequencer="0055AED6DCD90281E51")
    assert world.handle("validate_dataset", new)
    assert world.handle("validate_dataset", old) == {}


@pytest.mark.parametrize(
    ("name", "body", "code", "line"),
    [
        ("cars.jsonl", b'{"question":"a","answer":"b"}\n{"question":"a","answer":"b"}\n{"question": oops}\n', "BAD_JSON", 3),
        ("cars.jsonl", b'{"question":"a","answer":"b"}\n{"question":"a"}\n', "NO_ANSWER", 2),
        ("cars.jsonl", b"", "NO_ROWS", None),
        ("cars.csv", b"question,answer\n", "NO_ROWS", None),
        ("cars.jsonl", '{"question":"a","answer":"b"}'.encode("utf-16"), "ENCODING", 1),
        ("cars.parquet", b"PAR1", "BAD_PARQUET", None),
    ],
)
def test_a_broken_dataset_gets_a_receipt_and_no_job(world, name, body, code, line):
    run = world.drop(f"training_data/{name}", body)
    assert run.state == RunState.REJECTED
    assert run.open is None
    receipt = world.read_json(f"runs/{run.run_id}/validation.json")
    assert not receipt["ok"]
    assert (receipt["errors"][0]["code"], receipt["errors"][0].get("line")) == (code, line)
    assert world.event_types == ["Dataset Rejected"]
    assert len(world.notifications) == 1
    assert world.upload_state(f"training_data/{name}") == RunState.REJECTED
    assert not world.job_requests


@pytest.mark.parametrize(
    ("key", "body", "problem"),
    [
        (
            "training_data/cars.yaml",
            b"grpo: {lerning_rate: 1}",
            {"key": "grpo.lerning_rate", "hint": "did you mean 'learning_rate'?"},
        ),
        ("training_data/cars.yaml", b"lora: {r: many}", {"key": "lora.r", "code": "CONFIG_VALUE"}),
        ("training_data/cars.yaml", b"model: missing", {"key": "model", "code": "MODEL_MISSING"}),
        (
            "training_data/cars.yaml",
            b"{lora: {load_in_4bit: true}, compute: {instance_type: ml.c5.xlarge}}",
            {"key": "lora.load_in_4bit", "code": "CONFIG_INSTANCE"},
        ),
        ("training_data/cars.yaml", b"grpo: {per_device_train_batch_size: 512}", {"code": "CONFIG_STEPS"}),
        ("training_data/cars.yaml", b"rewards: [{type: judge, model: m}]", {"code": "REWARD_NOT_ALLOWED"}),
        (
            "models/base/config.json",
            b'{"max_position_embeddings": 600}',
            {"code": "CONFIG_LENGTH", "key": "max_prompt_length"},
        ),
        ("inference_test/cars.json", b'{"evaluations": [{"id": "a"}]}', {"code": "BAD_TEST", "row": 1}),
        ("inference_test/evaluations.json", b"{", {"code": "TESTS_SYNTAX"}),
    ],
)
def test_a_wrong_config_or_test_file_is_rejected_naming_what_is_wrong(world, key, body, problem):
    world.put(key, body)
    run = world.drop()
    assert run.state == RunState.REJECTED
    (error,) = world.read_json(f"runs/{run.run_id}/validation.json")["errors"]
    assert problem.items() <= error.items()
    assert world.event_types == ["Dataset Rejected"]


def test_what_is_fixed_or_unlikely_to_be_meant_is_in_the_receipt(world):
    world.put("training_data/cars.yaml", b"grpo: {generation_batch_size: 12, learning_rate: 0.01}")
    run = world.drop()
    assert run.state == RunState.VALIDATED
    receipt = world.read_json(f"runs/{run.run_id}/validation.json")
    assert any("generation_batch_size 12 → 16" in fix for fix in receipt["fixes"])
    assert any("learning_rate 0.01 is high" in warning for warning in receipt["warnings"])
    assert world.read_json(f"runs/{run.run_id}/input/config.json")["grpo"]["generation_batch_size"] == 16


@pytest.mark.parametrize(
    ("serve", "stack", "warns"),
    [
        ("{instance_type: ml.g5.xlarge}", "", True),
        ("{instance_type: ml.g5.xlarge}", "ml.g6.xlarge", False),
        ("{instance_type: ml.g5.xlarge, enabled: false}", "", False),
        ("{enabled: true}", "", False),  # the default
    ],
)
def test_how_to_serve_a_model_has_no_effect_where_none_is_served(world, monkeypatch, serve, stack, warns):
    monkeypatch.setenv("ENDPOINT_INSTANCE_TYPE", stack)
    world.put("training_data/cars.yaml", f"serve: {serve}".encode())
    run = world.drop()
    assert run.state == RunState.VALIDATED
    warnings = world.read_json(f"runs/{run.run_id}/validation.json")["warnings"]
    assert any(warning.startswith("serve has no effect") for warning in warnings) == warns


def test_mistakes_in_config_and_data_are_in_one_receipt(world):
    world.put("training_data/cars.yaml", b"modle: x")
    run = world.drop(body=b'{"question":"a"}\n')
    assert world.read_json(f"runs/{run.run_id}/validation.json")["error_counts"] == {"CONFIG_KEY": 1, "NO_ANSWER": 1}


@pytest.mark.parametrize(
    "key", ["training_data/a b+c%25 100%/größe.jsonl", "training_data/x.tar.jsonl", "training_data/日本.jsonl"]
)
def test_odd_keys(world, key):
    run = world.drop(key)
    assert run.state == RunState.VALIDATED
    assert world.read_json(f"runs/{run.run_id}/validation.json")["source"]["key"] == key


def test_objects_that_are_no_datasets_are_ignored(world):
    for key in ("notes/cars.jsonl", "training_data/.jsonl"):
        assert world.handle("validate_dataset", world.upload_event(key)) == {}
    gone = world.load_event("validate_dataset.odd_key")
    assert world.handle("validate_dataset", gone) == {}
    assert not world.sent_events


def test_a_failed_job_says_why_and_the_next_drop_is_the_next_attempt(world):
    run = world.start(world.drop())
    world.handle("test_model", world.job_event("test_model.train_failed", run.train_job))
    run = world.run(run.run_id)
    assert run.state == RunState.TRAINING_FAILED
    assert run.reason == "AlgorithmError: ValueError: reward 'numeric' raised on row-17"
    assert world.event_types[-1] == "Training Failed"
    assert run.reason in world.notifications[-1]["Message"]
    again = world.start(world.drop())
    assert (again.run_id, again.attempt, again.train_job) == (run.run_id, 2, f"tunedrop-train-{run.run_id}-2")
    assert world.job_requests[-1]["ResourceConfig"]["InstanceType"] == "ml.g5.4xlarge"  # the next of the list
    late = world.job_event("test_model.train_failed", run.train_job)  # of attempt 1
    assert world.handle("test_model", late) == {}
    assert world.run(run.run_id).state == RunState.TRAINING


def test_a_duplicate_of_the_upload_that_failed_is_no_new_attempt(world):
    event = world.upload_event(UPLOAD)
    run = world.start(world.run(world.handle("validate_dataset", event)["run_id"]))
    world.handle("test_model", world.job_event("test_model.train_failed", run.train_job))
    world.handle("validate_dataset", event)
    assert world.run(run.run_id).attempt == 1


def test_a_refused_job_ends_with_sagemakers_words(world):
    world.failing_jobs = ["ValidationException"] * 2  # for each instance type
    run = world.start(world.drop())
    assert run.state == RunState.TRAINING_FAILED
    assert run.reason.startswith("SageMaker refused the job: ValidationException for")


def test_at_most_the_given_number_of_runs_have_jobs_and_the_oldest_goes_first(world):
    runs = [world.drop(f"training_data/d{n}.jsonl") for n in range(4)]
    states = [world.start(run).state for run in runs]
    assert states == [RunState.TRAINING, RunState.TRAINING, RunState.WAITING, RunState.WAITING]
    first = world.run(runs[0].run_id)
    world.handle("test_model", world.job_event("test_model.train_failed", first.train_job))
    world.handle("start_training", world.load_event("start_training.job_ended"))
    assert [world.run(run.run_id).state for run in runs[1:]] == [RunState.TRAINING, RunState.TRAINING, RunState.WAITING]


def test_a_file_that_is_no_dataset_gets_a_receipt_and_is_announced(world):
    run = world.drop("training_data/2026/cars.xlsx", b"PK..")
    assert (run.state, run.dataset) == (RunState.REJECTED, "2026/cars")
    (error,) = world.read_json(f"runs/{run.run_id}/validation.json")["errors"]
    assert (error["code"], error["hint"]) == ("UNKNOWN_FORMAT", "save the sheet as CSV")
    assert world.event_types == ["Dataset Rejected"]
    assert world.notifications[0]["Subject"] == "Dataset rejected: 2026/cars"


@pytest.mark.parametrize("name", ["cars.yaml", "rewards.py", "2026/", "_SUCCESS", ".DS_Store"])
def test_what_lies_beside_a_dataset_is_none(world, name):
    assert world.handle("validate_dataset", world.upload_event(f"training_data/{name}", b"x")) == {}
    assert world.aws.runs.upload(f"training_data/{name}") is None


def test_other_stacks_jobs_are_ignored(world):
    for function, name in [
        ("test_model", "test_model.train_completed"),
        ("publish_results", "publish_results.test_completed"),
    ]:
        assert world.handle(function, world.load_event(name)) == {}
        foreign = world.load_event(name)
        foreign["detail"]["TrainingJobName"] = "somebody-elses-job"
        assert world.handle(function, foreign) == {}


def test_a_malformed_event_is_an_error_not_a_success(world):
    with pytest.raises(Exception, match="detail"):
        world.handle("validate_dataset", {"source": "aws.s3"})
    with pytest.raises(LookupError, match="the run table has no run"):
        world.handle("start_training", world.load_event("start_training.dataset_validated"))


def help_all(world):
    settings = ReconcileSettings.from_environment()
    reconcile(settings, world.aws, minimum_age=timedelta(0))


def test_reconcile_does_what_lost_events_should_have_done(world):
    run = world.drop()
    world.sent_events.clear()
    help_all(world)
    assert world.event_types == ["Dataset Validated"]
    run = world.start(run)
    world.save_training(run)
    world.job_event("test_model.train_completed", run.train_job)  # the job has ended, and the event is lost
    help_all(world)
    run = world.run(run.run_id)
    assert run.state == RunState.TESTING
    run = world.tested(run)
    assert run.state == RunState.PUBLISHED
    sent = len(world.sent_events)
    help_all(world)
    assert len(world.sent_events) == sent  # nothing is open any more


def test_the_scheduled_event(world):
    assert world.handle("reconcile", world.load_event("reconcile.scheduled")) == {"looked_at": 0}
