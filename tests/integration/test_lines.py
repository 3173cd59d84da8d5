"""Lines and champions: successive runs of a line, what a run starts from, and who decides about the model in use."""

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fake_stack import ARTIFACTS, MODELS, TABLE
from template import load_template
from world import GOOD_DATA, WON, KilledError, World, client

from pipeline.publish.index import read_index
from pipeline.runs.states import Run, RunState
from pipeline.settings import ReconcileSettings
from pipeline.stages.reconcile import reconcile
from tunedrop.object_keys import INDEX, line_key

OTHER_DATA = GOOD_DATA + b'{"question": "100+1?", "answer": "101"}\n'
NEW_DATA = b"".join(b'{"question": "%d+2?", "answer": "%d"}\n' % (n, n + 2) for n in range(30))


def outcomes(base: float, tuned: float, champion: float | None = None, count: int = 30) -> list[dict[str, Any]]:
    """Tests with these scores of the models."""

    def result(score: float) -> dict[str, Any]:
        return {"text": str(score), "score": score, "rewards": {"exact_match": score}, "passed": score == 1.0}

    scores = {"base": base, "tuned": tuned} | ({} if champion is None else {"champion": champion})
    return [test | {name: result(score) for name, score in scores.items()} for test in WON[:count]]


def published(world: World, config: bytes = b"", body: bytes = GOOD_DATA, tests: Any = WON, name: str = "cars") -> Run:
    """Drop a dataset and take its run to its end."""
    world.put(f"training_data/{name}.yaml", config)
    return world.tested(world.trained(world.drop(f"training_data/{name}.jsonl", body)), tests)


def package_event(world: World, arn: str, name: str = "publish_results.package_approved") -> dict[str, Any]:
    event = world.load_event(name)
    event["detail"] |= {"ModelPackageArn": arn, "ModelPackageGroupName": MODELS}
    return event


def set_approval(world: World, run: Run, status: str, *, told: bool = True) -> None:
    """Change a package's approval in the registry, as a person does; with `told`, SageMaker's event arrives."""
    arn = str(world.run(run.run_id).model_package)
    world.aws.sagemaker.update_model_package(ModelPackageArn=arn, ModelApprovalStatus=status)
    if told:
        world.handle("publish_results", package_event(world, arn))


def champion(world: World, line: str = "cars") -> str | None:
    return world.aws.lines.get(line).champion


def channels(world: World, run: Run, kind: str) -> dict[str, str]:
    name = getattr(world.run(run.run_id), f"{kind}_job")
    (request,) = [each for each in world.job_requests if each["TrainingJobName"] == name]
    return {each["ChannelName"]: each["DataSource"]["S3DataSource"]["S3Uri"] for each in request["InputDataConfig"]}


# --- the champion ---


@pytest.mark.parametrize(
    ("key", "config", "line"),
    [
        ("cars", b"", "cars"),
        ("shop/cars", b"", "shop"),
        ("shop/2026/cars", b"", "shop"),
        ("shop/cars", b"line: Returns desk", "Returns desk"),
    ],
)
def test_a_run_has_the_line_of_its_folder_unless_its_config_names_one(world, key, config, line):
    world.put(f"training_data/{key}.yaml", config)
    run = world.drop(f"training_data/{key}.jsonl")
    assert run.line == line
    assert world.read_json(f"runs/{run.run_id}/input/config.json")["line"] == line


def test_the_second_run_of_a_line_is_tested_against_its_champion(world):
    first = published(world)
    assert champion(world) == first.run_id
    second = world.trained(world.drop(body=OTHER_DATA))
    folder = f"s3://{ARTIFACTS}/{line_key('cars')}"
    there = channels(world, second, "test")
    assert there["champion"] == first.artifacts
    assert there["suite"].startswith(f"{folder}suite/")
    assert there["training"] == f"s3://{ARTIFACTS}/runs/{second.run_id}/input/train.jsonl"
    assert {name for name in there if name.startswith("answers_")} == {"answers_base", "answers_champion"}
    assert all(there[name].startswith(f"{folder}answers/") for name in ("answers_base", "answers_champion"))
    suite = world.read_json(there["suite"].removeprefix(f"s3://{ARTIFACTS}/") + "suite.json")
    (part,) = suite["parts"]
    assert part["run_id"] == first.run_id
    assert part["rewards"] == [{"type": "exact_match"}]
    asked = world.read_json(f"runs/{first.run_id}/input/inference_tests.json")["evaluations"]
    assert len(part["tests"]) == sum(test["judges"] for test in asked) > 0


def test_the_first_run_of_a_line_has_nobody_beside_it(world):
    run = world.trained(world.drop())
    assert channels(world, run, "test").keys() == {"run", "inference_testing", "models", "tuned"}


def test_without_a_suite_in_the_config_the_job_has_none(world):
    published(world)
    world.put("training_data/cars.yaml", b"suite: {max: 0}")
    second = world.trained(world.drop(body=OTHER_DATA))
    assert not {"suite", "training"} & channels(world, second, "test").keys()


def test_answers_are_kept_once_for_later_jobs(world):
    published(world)
    keys = [
        item["Key"]
        for item in world.aws.s3.list_objects_v2(Bucket=ARTIFACTS, Prefix=line_key("cars", "answers/"))["Contents"]
    ]
    assert len(keys) == 2  # of the base and of the tuned model


# --- people decide in the registry ---


def test_a_package_that_a_person_approves_becomes_champion_and_one_that_is_rejected_hands_back(world):
    first = published(world)
    second = published(world, body=OTHER_DATA, tests=outcomes(0.0, 1.0, 1.0))
    assert (second.verdict, champion(world)) == ("REJECTED", first.run_id)
    set_approval(world, second, "Approved")
    assert champion(world) == second.run_id
    line = world.aws.lines.get("cars")
    assert (line.version, line.champion_package) == (2, second.model_package)
    set_approval(world, second, "Rejected")
    assert champion(world) == first.run_id
    set_approval(world, first, "Rejected")
    assert champion(world) is None
    assert world.aws.lines.get("cars").suite is None
    changes = [json.loads(event["Detail"]) for event in world.sent_events if event["DetailType"] == "Champion Changed"]
    assert [(each["version"], each.get("run_id")) for each in changes] == [
        (1, first.run_id),
        (2, second.run_id),
        (3, first.run_id),
        (4, None),
    ]


def test_an_older_package_does_not_overtake_the_champion(world):
    first = published(world)
    second = published(world, body=OTHER_DATA, tests=outcomes(0.0, 1.0, 0.0))
    assert champion(world) == second.run_id
    set_approval(world, first, "Rejected")
    set_approval(world, first, "Approved")
    assert champion(world) == second.run_id
    assert world.aws.lines.get("cars").version == 2


def test_a_lost_event_of_a_package_is_made_good(world):
    first = published(world)
    set_approval(world, first, "Rejected", told=False)
    assert champion(world) == first.run_id
    reconcile(ReconcileSettings.from_environment(), world.aws, minimum_age=timedelta(0))
    assert champion(world) is None


def test_a_deleted_package_is_no_champion(world):
    first = published(world)
    second = published(world, body=OTHER_DATA, tests=outcomes(0.0, 1.0, 0.0))
    world.aws.sagemaker.delete_model_package(ModelPackageName=str(second.model_package))
    world.handle("publish_results", package_event(world, str(second.model_package)))
    assert champion(world) == first.run_id


def test_a_package_of_no_line_changes_nothing(world):
    run = published(world)
    arn = str(run.model_package).rpartition("/")[0] + "/77"
    assert world.handle("publish_results", package_event(world, arn)) == {}
    assert champion(world) == run.run_id


def test_lines_do_not_see_each_others_packages(world):
    cars, shoes = published(world), published(world, name="shoes")
    set_approval(world, shoes, "Rejected")
    assert (champion(world), champion(world, "shoes")) == (cars.run_id, None)


# --- the rule that users copy ---

RULE = load_template(Path(__file__).parents[2] / "events" / "rules" / "champion_changed.yaml")["Resources"]
STATES = RULE["UseChampion"]["Properties"]["Definition"]["States"]


def selected(path: str, document: Any) -> Any:
    """Return what a JSONPath of names and indices selects, None for nothing."""
    for name, index in re.findall(r"\.(\w+)|\[(\d+)]", path):
        document = (document or {}).get(name) if name else document[int(index)]
    return document


def started(world: World, detail: dict[str, Any]) -> dict[str, Any] | None:
    """Take an event's detail through the rule's state machine; return the input of the execution that it starts, if any."""
    at, document = "LookUpLine", detail
    while True:
        state = STATES[at]
        if at == "LookUpLine":
            assert state["Parameters"]["Key"] == {"id": {"S.$": "States.Format('line#{}', $.line)"}}
            document = client("dynamodb").get_item(TableName=TABLE, Key={"id": {"S": f"line#{document['line']}"}})
        elif at == "LookUpPackage":
            arn = selected(state["Parameters"]["ModelPackageName.$"], document)
            document = document | {"Package": world.aws.sagemaker.describe_model_package(ModelPackageName=arn)}
        elif state["Type"] == "Succeed":
            return None
        elif state["Type"] == "Task":
            given = state["Parameters"]["Input"]
            return {name.removesuffix(".$"): selected(path, document) for name, path in given.items()}
        at = state["Next"] if "Next" in state else next_of(state, document)


def next_of(choice: dict[str, Any], document: Any) -> str:
    """Return the state that a Choice goes to."""
    for rule in choice["Choices"]:
        value = selected(rule["Variable"], document)
        if value == rule["StringEquals"] if "StringEquals" in rule else value is not None:
            return str(rule["Next"])
    return str(choice["Default"])


def used(world: World, run: Run) -> dict[str, Any]:
    run = world.run(run.run_id)
    return {
        "line": "cars",
        "run_id": run.run_id,
        "model_data": f"{str(run.artifacts).rstrip('/')}/merged/",
        "model_package": run.model_package,
    }


def test_what_a_line_uses_is_looked_up_in_the_run_table_and_the_registry(world):
    first = published(world)
    second = published(world, body=OTHER_DATA, tests=outcomes(0.0, 1.0, 0.0))
    events = [json.loads(event["Detail"]) for event in world.sent_events if event["DetailType"] == "Champion Changed"]
    late, newest = events
    forged = {"line": "cars", "run_id": first.run_id, "model_package": first.model_package, "version": 99}
    assert [started(world, each) for each in (newest, late, forged)] == [used(world, second)] * 3
    set_approval(world, second, "Rejected", told=False)
    assert started(world, newest) is None  # the run table does not know yet
    set_approval(world, second, "Rejected")
    assert started(world, newest) == used(world, first)
    set_approval(world, first, "Rejected")
    assert started(world, newest) == {"line": "cars"}
    assert started(world, forged | {"line": "none"}) is None


def test_a_champion_that_is_not_registered_yet_is_not_used(world):
    published(world)
    client("dynamodb").update_item(
        TableName=TABLE, Key={"id": {"S": "line#cars"}}, UpdateExpression="REMOVE champion_package"
    )
    assert started(world, {"line": "cars"}) is None


# --- nobody overtakes ---


def test_a_challenger_whose_champion_was_replaced_meanwhile_is_tested_again(world):
    published(world)
    late = world.trained(world.drop(body=OTHER_DATA))
    other = published(world, body=OTHER_DATA * 2, tests=outcomes(0.0, 1.0, 0.0))
    assert champion(world) == other.run_id
    late = world.tested(late, outcomes(0.0, 1.0, 0.0))
    assert (late.state, late.attempt, late.verdict) == (RunState.TRAINED, 2, None)
    assert "another champion" in str(late.reason)
    world.handle(
        "start_training", next(e for f, e in reversed(world.own_events()) if e["detail-type"] == "Training Waiting")
    )
    late = world.run(late.run_id)
    assert (late.state, late.attempt) == (RunState.TESTING, 2)
    again = channels(world, late, "test")
    assert again["champion"] == other.artifacts
    assert again.keys() >= {"answers_base", "answers_champion", "answers_tuned"}
    late = world.tested(late, outcomes(0.0, 1.0, 0.0))
    assert (late.state, late.verdict, champion(world)) == (RunState.PUBLISHED, "APPROVED", late.run_id)
    assert not world.aws.runs.has_slot(late)


def die(call: Any) -> Any:
    raise KilledError


def test_a_verdict_waits_until_the_champion_is_registered(world):
    """Else the registry would have the older model under the newer version, and its suite would lack the older's tests."""
    first = world.trained(world.drop())
    world.next_call("CreateModelPackage", die)
    with pytest.raises(KilledError):
        world.tested(first)
    assert champion(world) == first.run_id
    second = world.tested(world.trained(world.drop(body=NEW_DATA)), outcomes(0.0, 1.0, 0.0))
    assert (second.state, second.verdict) == (RunState.TESTED, None)
    reconcile(ReconcileSettings.from_environment(), world.aws, minimum_age=timedelta(0))
    first, second = world.run(first.run_id), world.run(second.run_id)
    assert (first.state, second.state, champion(world)) == (RunState.PUBLISHED, RunState.PUBLISHED, second.run_id)
    assert str(first.model_package) < str(second.model_package)
    reconcile(ReconcileSettings.from_environment(), world.aws, minimum_age=timedelta(0))
    line = world.aws.lines.get("cars")
    assert (line.champion, line.announced) == (second.run_id, 2)
    suite = world.read_json(line_key("cars", f"suite/{line.suite}/suite.json"))
    assert [part["run_id"] for part in suite["parts"]] == [first.run_id, second.run_id]


def test_every_champion_is_announced_although_the_next_one_comes_before(world):
    first = world.trained(world.drop())
    world.next_call("Publish", die)  # after the registration, before the champion's announcement
    with pytest.raises(KilledError):
        world.tested(first)
    set_approval(world, world.run(first.run_id), "Rejected")
    changes = [json.loads(event["Detail"]) for event in world.sent_events if event["DetailType"] == "Champion Changed"]
    assert [(each["version"], each.get("run_id")) for each in changes] == [(1, first.run_id), (2, None)]


def test_the_verdict_counts_against_the_champion_that_the_registry_has(world):
    published(world)
    other = published(world, body=OTHER_DATA, tests=outcomes(0.0, 1.0, 1.0))
    run = world.trained(world.drop(body=OTHER_DATA * 2))
    set_approval(world, other, "Approved", told=False)
    run = world.tested(run, outcomes(0.0, 1.0, 0.0))
    assert (run.state, run.verdict, champion(world)) == (RunState.TRAINED, None, other.run_id)


def test_the_suite_keeps_the_tests_of_a_run_whose_files_were_deleted(world):
    first = published(world)
    suite = line_key("cars", f"suite/{world.aws.lines.get('cars').suite}/")
    (part,) = world.read_json(f"{suite}suite.json")["parts"]
    world.write(f"{suite}suite.json", json.dumps({"parts": [part | {"rewards": [{"type": "python"}]}]}).encode())
    world.write(f"{suite}rewards/{first.run_id}/exact.py", b"...")
    for item in world.aws.s3.list_objects_v2(Bucket=ARTIFACTS, Prefix=f"runs/{first.run_id}/input/")["Contents"]:
        world.aws.s3.delete_object(Bucket=ARTIFACTS, Key=item["Key"])
    second = published(world, body=NEW_DATA, tests=outcomes(0.0, 1.0, 0.0))
    suite = line_key("cars", f"suite/{world.aws.lines.get('cars').suite}/")
    assert [part["run_id"] for part in world.read_json(f"{suite}suite.json")["parts"]] == [first.run_id, second.run_id]
    assert world.aws.read(ARTIFACTS, f"{suite}rewards/{first.run_id}/exact.py") == b"..."


def test_the_tests_of_a_rejected_run_join_no_suite(world):
    first = published(world)
    before = world.aws.lines.get("cars")
    second = published(world, body=NEW_DATA, tests=outcomes(0.0, 1.0, 1.0))
    assert (second.verdict, world.aws.lines.get("cars").suite) == ("REJECTED", before.suite)
    stored = world.aws.s3.list_objects_v2(Bucket=ARTIFACTS, Prefix=line_key("cars", "suite/"))["Contents"]
    parts = [part["run_id"] for item in stored for part in world.read_json(item["Key"])["parts"]]
    assert parts == [first.run_id]


def test_a_line_may_have_any_name(world):
    name = "<script>R\u00fcckgabe & \"x\" \U0001f697 'y' .. %2F {z}"
    config = json.dumps({"line": name}).encode()
    first = published(world, config)
    second = published(world, config, body=NEW_DATA, tests=outcomes(0.0, 1.0, 0.0))
    assert (first.line, second.verdict, champion(world, name)) == (name, "APPROVED", second.run_id)
    assert [run.line for run in read_index((world.aws.read(ARTIFACTS, INDEX) or b"").decode())] == [name, name]
    changes = [json.loads(event["Detail"]) for event in world.sent_events if event["DetailType"] == "Champion Changed"]
    assert [change["id"] for change in changes] == [f"{name}/1", f"{name}/2"]


def test_a_suite_that_is_gone_ends_the_tests_with_the_way_out(world):
    published(world)
    run = world.start(world.drop(body=OTHER_DATA))
    world.save_training(run)
    key = line_key("cars", f"suite/{world.aws.lines.get('cars').suite}/suite.json")
    world.aws.s3.delete_object(Bucket=ARTIFACTS, Key=key)
    world.handle("test_model", world.job_event("test_model.train_completed", str(run.train_job)))
    run = world.run(run.run_id)
    assert run.state == RunState.TESTING_FAILED
    assert "suite.json" in str(run.reason)


def test_a_champion_whose_model_is_gone_ends_the_tests_with_the_way_out(world):
    first = published(world)
    run = world.start(world.drop(body=OTHER_DATA))
    world.save_training(run)
    key = str(first.artifacts).removeprefix(f"s3://{ARTIFACTS}/") + "merged/config.json"
    world.aws.s3.delete_object(Bucket=ARTIFACTS, Key=key)
    world.handle("test_model", world.job_event("test_model.train_completed", str(run.train_job)))
    run = world.run(run.run_id)
    assert run.state == RunState.TESTING_FAILED
    assert f"tunedrop reject {first.run_id}" in str(run.reason)


# --- no approval by trying often ---


def test_tries_on_the_same_tests_are_counted_until_a_champion_comes(world):
    tests = (
        b'{"evaluations": '
        + json.dumps([{"prompt": f"what is {n}?", "description": "1"} for n in range(30)]).encode()
        + b"}"
    )
    world.put("inference_test/cars.json", tests)
    tries = []
    for n in range(1, 4):
        run = published(world, body=GOOD_DATA * n, tests=outcomes(0.5, 0.5))
        tries.append(run.tries)
        assert world.read_json(f"runs/{run.run_id}/result.json")["tries"] == run.tries
    other = (
        b'{"evaluations": ' + json.dumps([{"prompt": f"who is {n}?", "description": "1"} for n in range(30)]).encode() + b"}"
    )
    world.put("inference_test/cars.json", other)
    tries.append(published(world, body=GOOD_DATA * 4, tests=outcomes(0.5, 0.5)).tries)
    assert tries == [1, 2, 3, 1]


# --- the start ---


def test_a_run_starts_from_the_champion_and_keeps_a_copy_of_its_adapter(world):
    first = published(world)
    world.put("training_data/cars.yaml", b"start_from: champion")
    second = world.start(world.drop(body=OTHER_DATA))
    assert second.start == first.run_id
    assert world.read_json(f"runs/{second.run_id}/input/config.json")["start_from"] == first.run_id
    assert channels(world, second, "train")["start"] == f"s3://{ARTIFACTS}/runs/{second.run_id}/start/"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        prefix = str(first.artifacts).removeprefix(f"s3://{ARTIFACTS}/")
        copy = world.aws.read(ARTIFACTS, f"runs/{second.run_id}/start/{name}")
        assert copy == world.aws.read(ARTIFACTS, f"{prefix}adapter/{name}")


def test_a_run_starts_from_a_champion_whose_publication_has_not_ended(world):
    first = world.trained(world.drop())
    world.next_call("CreateModelPackage", die)
    with pytest.raises(KilledError):
        world.tested(first)
    world.put("training_data/cars.yaml", b"start_from: champion")
    second = world.drop(body=OTHER_DATA)
    assert (second.state, second.start) == (RunState.VALIDATED, first.run_id)


def test_a_run_may_start_from_a_run_of_another_line(world):
    shoes = published(world, name="shoes")
    world.put("training_data/cars.yaml", f"start_from: {shoes.run_id}".encode())
    run = world.drop()
    assert (run.state, run.line, run.start) == (RunState.VALIDATED, "cars", shoes.run_id)


def test_the_start_is_part_of_a_runs_identity(world):
    world.put("training_data/cars.yaml", b"start_from: champion")
    first = world.tested(world.trained(world.drop()))
    assert first.start is None
    assert "no champion yet" in str(world.read_json(f"runs/{first.run_id}/validation.json")["warnings"])
    second = world.drop()  # the same bytes, but the line has a champion now
    assert second.run_id != first.run_id
    assert second.start == first.run_id


STARTS = {
    "unknown": ("start_from: shoes-0123456789ab", "START_UNKNOWN", "there is no published run 'shoes-0123456789ab'"),
    "another rank": ("start_from: champion\nlora: {r: 8}", "START_LORA", "lora.r is 8, and the adapter of run"),
    "another model": ("start_from: champion\nmodel: other", "START_MODEL", "tuned the model 'base'"),
}


@pytest.mark.parametrize(("config", "code", "message"), STARTS.values(), ids=STARTS)
def test_a_start_that_does_not_fit_is_refused_before_a_job(world, config, code, message):
    published(world)
    world.put("training_data/cars.yaml", config.encode())
    run = world.drop(body=OTHER_DATA)
    errors = world.read_json(f"runs/{run.run_id}/validation.json")["errors"]
    (error,) = [error for error in errors if error["code"] == code]
    assert message in error["message"]
    assert error["key"] == "start_from"
    assert error["hint"]


DAMAGES = {
    "deleted": (None, "START_GONE", "is missing"),
    "empty": (b"", "START_BROKEN", "not a whole safetensors file"),
    "no header": (b"\xff" * 100, "START_BROKEN", "not a whole safetensors file"),
    "a header cut off": ((1000).to_bytes(8, "little") + b'{"lora', "START_BROKEN", "not a whole safetensors file"),
}


@pytest.mark.parametrize(("body", "code", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_adapter_is_refused_before_a_job(world, body, code, message):
    first = published(world)
    key = str(first.artifacts).removeprefix(f"s3://{ARTIFACTS}/") + "adapter/adapter_model.safetensors"
    if body is None:
        world.aws.s3.delete_object(Bucket=ARTIFACTS, Key=key)
    else:
        world.write(key, body)
    world.put("training_data/cars.yaml", f"start_from: {first.run_id}".encode())
    run = world.drop(body=OTHER_DATA)
    assert run.state == RunState.REJECTED
    (error,) = world.read_json(f"runs/{run.run_id}/validation.json")["errors"]
    assert error["code"] == code
    assert message in error["message"]


# --- a drop that adds nothing ---


def test_the_champions_own_rows_and_tests_that_it_passes_are_said_before_a_job(world):
    first = published(world)
    asked = world.read_json(f"runs/{first.run_id}/input/inference_tests.json")["evaluations"]
    passed = [
        test | {"prompt": each["messages"], "tuned": test["tuned"] | {"passed": True}}
        for test, each in zip(WON, asked, strict=False)
    ]
    world.save_tests(first, passed)
    rows = GOOD_DATA.splitlines(keepends=True)
    world.put("training_data/cars.yaml", b"grpo: {seed: 7}")
    again = world.drop(body=b"".join(rows[1:] + rows[:1]))
    warnings = world.read_json(f"runs/{again.run_id}/validation.json")["warnings"]
    assert any(f"the rows that the line's champion, {first.run_id}, was trained on" in warning for warning in warnings)
    assert any("passes all" in warning for warning in warnings)
    other = world.drop(body=NEW_DATA)
    warnings = world.read_json(f"runs/{other.run_id}/validation.json")["warnings"]
    assert not any("the line's champion" in warning for warning in warnings)
