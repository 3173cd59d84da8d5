"""Approved means serving: a champion's model answers under its line's name, and a wrong one never stays there.

The looks of deploy_model over endpoints in memory (`fake_serving`). tests/sagemaker has the same over real processes.
"""

import io
import json
from datetime import datetime, timedelta

import msgspec
import pytest
from botocore.exceptions import ClientError, ReadTimeoutError
from fake_serving import rings_now, tuned_answer
from fake_stack import ARTIFACTS, PREFIX
from world import GOOD_DATA, WON

from pipeline.notify import events
from pipeline.runs import clock
from pipeline.runs.deployments import Stage
from pipeline.serving.served import adapter_fits
from pipeline.settings import DeploySettings
from pipeline.stages.deploy_model import look_at_all, undeploy
from tunedrop.object_keys import component_name, endpoint_name

COMPONENT = f"{PREFIX}-cars"


@pytest.fixture(autouse=True)
def time(monkeypatch):
    """A clock that moves by a minute with each look."""
    now = [datetime.fromisoformat("2026-01-01T00:00:00.000000+00:00")]
    monkeypatch.setattr(clock, "now", lambda: now[0].isoformat(timespec="microseconds"))
    return now


@pytest.fixture
def look(world, time):
    """Look until nothing goes on, at most so many times; return how many looks it took."""

    def look(most: int = 100) -> int:
        for number in range(most):
            time[0] += timedelta(minutes=1)
            if not look_at_all(DeploySettings.from_environment(), world.aws):
                return number
        return most

    return look


def approved(world, body: bytes = GOOD_DATA, config: bytes = b"", name: str = "cars"):
    """Publish a run that its line's gate approves; return it."""
    if config:
        world.put(f"training_data/{name}.yaml", config)
    run = world.trained(world.drop(f"training_data/{name}.jsonl", body))
    tests = [{**each, "champion": each["base"]} for each in WON]
    run = world.tested(run, tests)
    assert world.aws.lines.get(run.line).champion == run.run_id
    return run


def archive(run) -> str:
    return f"{run.artifacts.rstrip('/')}/adapter.tar.gz"


def announced(world) -> list[str]:
    kinds = {events.DEPLOYED, events.DEPLOYMENT_FAILED, events.ROLLED_BACK}
    return [kind for kind in world.event_types if kind in kinds]


def base_answers(content: str, question: str) -> str:
    return WON[0]["base"]["text"]


def test_a_champion_answers_under_its_lines_name(world, look):
    run = approved(world)
    assert look() > 3
    deployment = world.aws.deployments.get("cars")
    endpoint = endpoint_name(PREFIX, "base", run.base, "ml.g5.xlarge")
    assert (deployment.stage, deployment.run, deployment.endpoint) == (Stage.IDLE, run.run_id, endpoint)
    assert world.serving.serving(COMPONENT) == archive(run)
    assert set(world.serving.components) == {COMPONENT, endpoint}
    assert deployment.answered == "20 of 20 answers were those of the tested model"
    assert announced(world) == [events.DEPLOYED]
    config = world.serving.configs[endpoint]
    assert config["ProductionVariants"][0]["ManagedInstanceScaling"]["MinInstanceCount"] == 0
    assert config["ExecutionRoleArn"].endswith("ServingRole")
    model = world.serving.models[endpoint]["PrimaryContainer"]
    assert model["ModelDataSource"]["S3DataSource"]["S3Uri"].endswith("/models/base/")
    assert set(world.serving.alarms) == {
        *(f"{COMPONENT}-{name}" for name in ("failed-requests", "slow-answers", "wake")),
        *(f"{endpoint}-{name}" for name in ("idle", "wake")),
    }
    assert look() == 0


def test_no_user_asks_a_model_before_it_is_proved(world, look):
    first = approved(world)
    look()
    second = approved(world, GOOD_DATA * 2)
    seen = []

    def ask(content: str, question: str) -> str:
        seen.append((content, world.serving.serving(COMPONENT)))
        return tuned_answer(content, question)

    world.serving.ask = ask
    look()
    tried = [served for content, served in seen if content == archive(second)]
    assert tried[:20] == [archive(first)] * 20
    assert tried[20:] == [archive(second)] * 20
    assert world.aws.deployments.get("cars").run == second.run_id


@pytest.mark.parametrize("champions", [1, 2])
def test_another_model_than_the_tested_one_never_gets_the_lines_name(world, look, champions):
    first = approved(world) if champions == 2 else None
    look()
    wrong = approved(world, GOOD_DATA * 2)
    world.serving.ask = lambda content, question: (
        base_answers(content, question) if content == archive(wrong) else tuned_answer(content, question)
    )
    look()
    deployment = world.aws.deployments.get("cars")
    assert deployment.run == (first and first.run_id)
    assert world.serving.serving(COMPONENT) == (first and archive(first))
    assert f"{COMPONENT}-next" not in world.serving.components
    reason = deployment.refused[wrong.run_id]
    assert reason.startswith(f"{COMPONENT}-next does not answer as the tested model: 0 of 20 answers were")
    assert announced(world)[-1] == events.DEPLOYMENT_FAILED
    looks = look()
    assert looks == 0  # it is not tried again
    if first is None:
        assert not world.serving.endpoints  # nobody pays for an endpoint that serves nothing


def test_a_person_has_a_refused_model_tried_again(world, look):
    run = approved(world)
    world.serving.ask = base_answers
    look()
    world.serving.ask = tuned_answer
    assert look() == 0
    for status in ("Rejected", "Approved"):
        world.aws.sagemaker.update_model_package(ModelPackageArn=run.model_package, ModelApprovalStatus=status)
        event = world.load_event("publish_results.package_approved")
        event["detail"]["ModelPackageArn"] = run.model_package
        world.handle("publish_results", event)
    look()
    assert world.aws.deployments.get("cars").run == run.run_id


def changes(world, look, second) -> None:
    """Look until the line's name has the second model."""
    for _ in range(30):
        look(1)
        if world.aws.deployments.get("cars").stage == Stage.SWITCHING and world.serving.serving(COMPONENT) == archive(
            second
        ):
            return
    raise AssertionError("the line's name never got the second model")


@pytest.mark.parametrize("trouble", ["alarm", "update", "server", "answers"])
def test_the_former_model_comes_back(world, look, trouble):
    first = approved(world)
    look()
    second = approved(world, GOOD_DATA * 2)
    if trouble == "update":
        while world.aws.deployments.get("cars").stage != Stage.SWITCHING:
            look(1)
        world.serving.failing[archive(second)] = "the adapter could not be loaded"
        reason = "2 updates of tunedrop-cars failed: the adapter could not be loaded"
    else:
        changes(world, look, second)
    if trouble == "alarm":
        while world.aws.deployments.get("cars").answered is None:
            look(1)
        world.serving.ringing[f"{COMPONENT}-failed-requests"] = rings_now()
        reason = f"the alarm {COMPONENT}-failed-requests rings: 3 of 3 datapoints"
    if trouble == "server":
        world.serving.components[COMPONENT] |= {"InferenceComponentStatus": "Failed", "FailureReason": "the container died"}
        reason = f"the inference component {COMPONENT} failed: the container died"
    if trouble == "answers":
        world.serving.ask = lambda content, question: (
            base_answers(content, question) if content == archive(second) else tuned_answer(content, question)
        )
        reason = f"{COMPONENT} does not answer as the tested model: 0 of 20 answers"
    look()
    deployment = world.aws.deployments.get("cars")
    assert deployment.refused[second.run_id].startswith(reason)
    assert (deployment.stage, deployment.run) == (Stage.IDLE, first.run_id)
    assert world.serving.serving(COMPONENT) == archive(first)
    assert f"{COMPONENT}-next" not in world.serving.components
    assert announced(world) == [events.DEPLOYED, events.ROLLED_BACK]


def test_a_champion_that_is_rejected_while_its_alarms_are_watched_goes_at_once(world, look):
    first = approved(world)
    look()
    second = approved(world, GOOD_DATA * 2)
    changes(world, look, second)
    world.aws.sagemaker.update_model_package(ModelPackageArn=second.model_package, ModelApprovalStatus="Rejected")
    event = world.load_event("publish_results.package_approved")
    event["detail"]["ModelPackageArn"] = second.model_package
    world.handle("publish_results", event)
    assert look() < 8  # the whole deployment of the former model would take longer
    assert world.serving.serving(COMPONENT) == archive(first)
    assert announced(world) == [events.DEPLOYED]


def test_an_alarm_that_rang_before_takes_nothing_back(world, look):
    approved(world)
    look()
    world.serving.ringing[f"{COMPONENT}-slow-answers"] = rings_now()
    second = approved(world, GOOD_DATA * 2)
    look()
    assert world.aws.deployments.get("cars").run == second.run_id


def test_a_sleeping_endpoint_is_woken_for_a_deployment(world, look):
    approved(world)
    look()
    endpoint = world.aws.deployments.get("cars").endpoint
    world.serving.components[endpoint]["RuntimeConfig"] = {"DesiredCopyCount": 0, "CurrentCopyCount": 0}
    second = approved(world, GOOD_DATA * 2)
    look()
    assert world.aws.deployments.get("cars").run == second.run_id


def test_the_rejected_champions_predecessor_comes_back_and_then_nothing(world, look):
    first = approved(world)
    look()
    second = approved(world, GOOD_DATA * 2)
    look()
    for run, left in ((second, archive(first)), (first, None)):
        world.aws.sagemaker.update_model_package(ModelPackageArn=run.model_package, ModelApprovalStatus="Rejected")
        event = world.load_event("publish_results.package_approved")
        event["detail"]["ModelPackageArn"] = run.model_package
        world.handle("publish_results", event)
        look()
        assert world.serving.serving(COMPONENT) == left
    assert not world.serving.endpoints
    assert not world.serving.components
    assert not world.serving.models
    assert not world.serving.alarms
    assert announced(world) == [*[events.DEPLOYED] * 3, events.ROLLED_BACK]


def test_lines_share_the_endpoint_of_their_base_model_until_the_last_one_leaves(world, look):
    approved(world)
    approved(world, GOOD_DATA * 2, name="taxis")
    look()
    (endpoint,) = world.serving.endpoints
    assert set(world.serving.components) == {endpoint, COMPONENT, component_name(PREFIX, "taxis")}
    undeploy("cars", datetime.fromisoformat(clock.now()), world.aws)
    look()
    assert set(world.serving.components) == {endpoint, component_name(PREFIX, "taxis")}
    undeploy("taxis", datetime.fromisoformat(clock.now()), world.aws)
    look()
    assert not world.serving.endpoints
    assert look() == 0  # it stays down
    third = approved(world, GOOD_DATA * 3)
    look()
    assert world.aws.deployments.get("cars").run == third.run_id


def test_a_line_that_moves_to_another_instance_type_leaves_nothing_behind(world, look):
    approved(world)
    look()
    moved = approved(world, GOOD_DATA * 2, b"serve: {instance_type: ml.g6.xlarge}")
    look()
    deployment = world.aws.deployments.get("cars")
    assert (deployment.run, deployment.instance_type) == (moved.run_id, "ml.g6.xlarge")
    assert list(world.serving.endpoints) == [deployment.endpoint]
    assert world.serving.components[COMPONENT]["EndpointName"] == deployment.endpoint


def test_an_adapter_that_vllm_cannot_serve_is_served_merged(world, look):
    run = approved(world, config=b"lora: {r: 128}")
    look()
    name = f"{COMPONENT}-{run.run_id.rpartition('-')[2]}"
    assert world.serving.serving(COMPONENT) == name
    assert world.serving.models[name]["PrimaryContainer"] == {"ModelPackageName": run.model_package}
    assert set(world.serving.components) == {COMPONENT}
    second = approved(world, GOOD_DATA * 2, b"lora: {r: 128}")
    look()
    assert list(world.serving.models) == [f"{COMPONENT}-{second.run_id.rpartition('-')[2]}"]
    back = approved(world, GOOD_DATA * 3, b"lora: {r: 16}")
    look()
    assert world.serving.serving(COMPONENT) == archive(back)
    assert list(world.serving.models) == [world.aws.deployments.get("cars").endpoint]


def test_an_adapter_that_rounding_takes_away_is_served_merged(world, look):
    run = world.start(world.drop())
    world.save_training(run)
    key = f"{world.artifacts(run.train_job).removeprefix('s3://artifact-bucket/')}training.json"
    training = world.read_json(key)
    training["proofs"]["adapter_served"]["kept"] = 0.7
    world.write(key, json.dumps(training).encode())
    world.handle("test_model", world.job_event("test_model.train_completed", run.train_job))
    run = world.tested(world.run(run.run_id), [{**each, "champion": each["base"]} for each in WON])
    look()
    assert world.aws.deployments.get("cars").run == run.run_id
    assert list(world.serving.models) == [f"{COMPONENT}-{run.run_id.rpartition('-')[2]}"]


def test_a_line_whose_config_says_so_is_not_served(world, look):
    approved(world, config=b"serve: {enabled: false}")
    look()
    assert not world.serving.endpoints
    assert look() == 0


def test_an_endpoint_without_capacity_is_an_answer(world, look):
    run = approved(world)
    endpoint = endpoint_name(PREFIX, "base", run.base, "ml.g5.xlarge")
    world.serving.failing[endpoint] = "InsufficientInstanceCapacity"
    look()
    deployment = world.aws.deployments.get("cars")
    assert deployment.refused == {run.run_id: f"the endpoint {endpoint} failed: InsufficientInstanceCapacity"}
    assert not world.serving.endpoints


def test_a_model_that_never_answers_is_given_up(world, look):
    run = approved(world)

    def ask(content: str, question: str) -> str:
        raise ClientError({"Error": {"Code": "ModelError", "Message": "Received server error (500)"}}, "InvokeEndpoint")

    world.serving.ask = ask
    assert look() > 30  # minutes
    deployment = world.aws.deployments.get("cars")
    reason = f"{COMPONENT}-next does not answer: ModelError: Received server error (500), after 0:30:00"
    assert deployment.refused == {run.run_id: reason}
    assert not world.serving.endpoints


def test_a_former_model_that_does_not_come_back_is_taken_down(world, look):
    first = approved(world)
    look()
    second = approved(world, GOOD_DATA * 2)
    changes(world, look, second)
    world.serving.components[COMPONENT] |= {"InferenceComponentStatus": "Failed", "FailureReason": "the container died"}
    world.serving.failing[COMPONENT] = "CUDA out of memory"
    assert look(300) > 120  # minutes
    deployment = world.aws.deployments.get("cars")
    assert (deployment.stage, deployment.run) == (Stage.IDLE, None)
    assert deployment.refused[second.run_id].endswith("the container died")
    assert deployment.reason.startswith(f"the model of {first.run_id} did not come back: ")
    assert announced(world) == [events.DEPLOYED, events.ROLLED_BACK]
    assert not world.serving.endpoints


def look_on(look) -> int:
    """Look until nothing goes on, whatever the looks raise; return how many raised something."""
    raised = 0
    for _ in range(300):
        try:
            if look(1) == 0:
                return raised
        except ClientError:
            raised += 1
    raise AssertionError("the deployment never ends")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (
            ReadTimeoutError(endpoint_url="runtime"),
            'does not answer: Read timeout on endpoint URL: "runtime", after 0:30:00',
        ),
        (b"<html>busy</html>", "answers with no chat completion: b'<html>busy</html>', after 0:30:00"),
        (b'{"error": "overloaded"}', """answers with no chat completion: b'{"error": "overloaded"}', after 0:30:00"""),
    ],
)
def test_a_model_that_answers_nothing_of_use_is_given_up(world, look, answer, reason):
    run = approved(world)

    def invoke(**arguments):
        if isinstance(answer, Exception):
            raise answer
        return {"Body": io.BytesIO(answer)}

    world.serving._InvokeEndpoint = invoke
    assert look_on(look) == 0
    assert world.aws.deployments.get("cars").refused == {run.run_id: f"{COMPONENT}-next {reason}"}
    assert not world.serving.endpoints


@pytest.mark.parametrize(
    ("operation", "code", "most"),
    [
        ("CreateEndpoint", "ResourceLimitExceeded", 0),
        ("CreateEndpoint", "AccessDeniedException", 120),
        ("CreateInferenceComponent", "ValidationException", 120),
    ],
)
def test_what_aws_refuses_for_ever_is_given_up(world, look, operation, code, most):
    run = approved(world)

    def refuse(**arguments):
        raise ClientError({"Error": {"Code": code, "Message": "no"}}, operation)

    setattr(world.serving, f"_{operation}", refuse)
    raised = look_on(look)
    assert raised <= most
    assert (raised > 0) is (most > 0)  # an error that may pass is an error of the function meanwhile
    assert f"({code}) when calling the {operation} operation: no" in world.aws.deployments.get("cars").refused[run.run_id]
    assert announced(world) == [events.DEPLOYMENT_FAILED]
    assert not world.serving.endpoints


def test_a_stage_whose_looks_die_is_given_up(world, look, time):
    """The function's timeout ends a look without an exception, and the line stays held."""
    run = approved(world)
    while world.aws.deployments.get("cars").stage != Stage.TRYING:
        look(1)
    world.aws.deployments.write(world.aws.deployments.get("cars"), busy=clock.now())
    time[0] += timedelta(minutes=31)
    look()
    assert world.aws.deployments.get("cars").refused == {run.run_id: "the last look did not come to its end, after 0:30:00"}


@pytest.mark.parametrize("minutes", [5, 120])  # 120: longer than the stage may take without them
def test_the_bake_time_begins_when_the_lines_name_is_proved(world, look, time, monkeypatch, minutes):
    monkeypatch.setenv("ENDPOINT_BAKE_MINUTES", str(minutes))
    run = approved(world)
    while world.aws.deployments.get("cars").stage != Stage.SWITCHING:
        look(1)
    time[0] += timedelta(minutes=30)  # the update takes long
    look(2000)
    deployment = world.aws.deployments.get("cars")
    assert deployment.run == run.run_id
    baked = datetime.fromisoformat(deployment.deployed) - datetime.fromisoformat(deployment.proved)
    assert timedelta(minutes=minutes) <= baked <= timedelta(minutes=minutes + 2)


@pytest.mark.parametrize("config", [b"", b"lora: {r: 128}"])
def test_a_run_without_its_files_can_be_taken_down(world, look, config):
    run = approved(world, config=config)
    look()
    found = world.aws.s3.list_objects_v2(Bucket=ARTIFACTS, Prefix=f"runs/{run.run_id}/")["Contents"]
    for each in found:
        world.aws.s3.delete_object(Bucket=ARTIFACTS, Key=each["Key"])
    undeploy("cars", datetime.fromisoformat(clock.now()), world.aws)
    look()
    serving = world.serving
    assert not any([serving.endpoints, serving.components, serving.models, serving.alarms])
    assert announced(world)[-1] == events.ROLLED_BACK


def test_a_line_has_another_lines_name_and_the_end_of_a_candidates(world, look):
    first = approved(world, name="cars-next")
    look()
    approved(world, GOOD_DATA * 2)
    look()
    own = component_name(PREFIX, "cars-next")
    assert world.serving.serving(own) == archive(first)
    assert set(world.serving.components) == {own, COMPONENT, world.aws.deployments.get("cars").endpoint}


LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


@pytest.mark.parametrize(
    ("lora", "fits"),
    [
        ({}, True),
        ({"r": 64, "use_rslora": True, "lora_dropout": 0.1}, True),
        ({"bias": "none", "init_lora_weights": True, "use_dora": False}, True),  # PEFT's defaults
        ({"r": 65}, False),
        ({"use_dora": True}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"init_lora_weights": "pissa"}, False),
        ({"rank_pattern": {"q_proj": 4}}, False),
    ],
)
def test_which_adapters_vllm_serves(lora, fits):
    assert adapter_fits(LORA | lora) is fits


def test_a_second_look_does_not_disturb_the_first(world, look):
    """While a look asks the identity test's questions, another invocation looks too."""
    run = approved(world)
    settings = DeploySettings.from_environment()
    meanwhile: list[bool] = []

    def ask(content: str, question: str) -> str:
        if len(meanwhile) < 3:
            meanwhile.append(look_at_all(settings, world.aws))
        return tuned_answer(content, question)

    world.serving.ask = ask
    look()
    assert len(meanwhile) >= 3  # the questions are asked by several threads
    assert all(meanwhile)
    assert world.aws.deployments.get("cars").run == run.run_id
    assert announced(world) == [events.DEPLOYED]


def test_what_is_asked_is_what_the_test_job_asked(world, look):
    bodies = []
    ask = world.serving._InvokeEndpoint

    def invoke(**arguments):
        bodies.append(json.loads(arguments["Body"]))
        return ask(**arguments)

    world.serving._InvokeEndpoint = invoke
    run = approved(world)
    look()
    tested = json.loads(world.aws.read(ARTIFACTS, f"runs/{run.run_id}/inference/{run.test_job}/output/model/inference.json"))
    prompts = [msgspec.json.encode(each["prompt"]) for each in tested["tests"]]
    assert len(bodies) == 40
    assert all(msgspec.json.encode(body["messages"]) in prompts for body in bodies)
    assert {(body["temperature"], body["max_tokens"]) for body in bodies} == {(0, 64)}
