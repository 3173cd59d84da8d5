"""The functions' roles are minimal: what a run of everything calls is allowed, and nothing else is.

The handlers run over moto, which allows everything; each HTTP request that they send is then held against the template's
policies, by the code that enforces IAM in the local app.
"""

from collections.abc import Iterator

import pytest
from botocore.client import BaseClient
from fake_stack import TABLE
from permissions import (
    ACCOUNT,
    KEY,
    REGION,
    Permission,
    allows,
    known_names,
    needless,
    of_bedrock,
    of_request,
    of_sagemaker,
    policies,
)
from world import WON

from pipeline.aws import connect
from pipeline.runs.deployments import Stage
from pipeline.runs.states import RunState
from pipeline.runs.table import RUN

WON_AGAIN = [{**each, "champion": each["base"]} for each in WON]
ROLES = {
    "validate_dataset": "ValidateDatasetRole",
    "start_training": "StartTrainingRole",
    "test_model": "TestModelRole",
    "publish_results": "PublishResultsRole",
    "reconcile": "ReconcileRole",
    "deploy_model": "DeployModelRole",
}
IN_MEMORY = {"sagemaker", "sagemaker-runtime", "application-autoscaling"}  # the services that send no request here


def made_by_lambda(role: str) -> list[Permission]:
    """What Lambda, X-Ray and KMS do in a function's name, which no code of ours calls and no emulator does.

    https://docs.aws.amazon.com/lambda/latest/dg/lambda-intro-execution-role.html
    """
    logs = known_names()[f"{role.removesuffix('Role')}Logs.Arn"].removesuffix("*") + "log-stream:2026/01/01/[$LATEST]0123"
    return [
        Permission(role, "logs:CreateLogStream", logs),
        Permission(role, "logs:PutLogEvents", logs),
        # The on-failure destination.
        Permission(role, "sqs:SendMessage", f"arn:aws:sqs:{REGION}:{ACCOUNT}:dead-letters"),
        Permission(role, "xray:PutTraceSegments", "*"),
        Permission(role, "xray:PutTelemetryRecords", "*"),
        # Objects, items and messages under the customer's key.
        Permission(role, "kms:Decrypt", KEY),
        Permission(role, "kms:GenerateDataKey", KEY),
    ]


@pytest.fixture
def recorded(world) -> Iterator[set[Permission]]:
    """Everything that the handlers need from here on, by the requests that they send (to SageMaker: that they make)."""
    found: set[Permission] = set()
    role, url = "", ""
    connect.cache_clear()
    events = connect(TABLE)._session.events
    handle, make_api_call = world.handle, BaseClient._make_api_call

    def call(client, operation, arguments):
        model = client.meta.service_model
        if role and model.service_name in IN_MEMORY:
            found.update(of_sagemaker(role, operation, arguments))
        if role and model.service_name in {"bedrock", "bedrock-runtime"}:
            found.update(of_bedrock(role, operation, arguments))
        if role and model.service_name == "cloudwatch":
            request = client._serializer.serialize_to_request(arguments, model.operation_model(operation))
            url = f"https://monitoring.{REGION}.amazonaws.com{request['url_path']}"
            found.update(of_request(role, request["method"], url, request["headers"], request["body"]))
        return make_api_call(client, operation, arguments)

    def send(request, **_):
        nonlocal url
        url = request.url
        if role and ".sagemaker." not in url:
            found.update(of_request(role, request.method, request.url, request.headers, request.body))

    def answered(http_response, **_):
        # S3 says that a key is not there only to who may list the bucket.
        if role and http_response.status_code == 404:
            found.update(of_request(role, "GET", f"{url.partition('.com/')[0]}.com/", {}))

    def handling(function, event):
        nonlocal role
        role = ROLES[function]
        try:
            return handle(function, event)
        finally:
            role = ""

    events.register_first("before-send", send)
    events.register("after-call.s3.GetObject", answered)
    world.handle = handling
    with pytest.MonkeyPatch.context() as patch:  # undone before the world's own
        patch.setattr(BaseClient, "_make_api_call", call)
        yield found
    connect.cache_clear()


def run_everything(world) -> None:
    """Take runs through every handler, and through each thing that `reconcile` does when events are lost."""
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        world.put(f"models/base/{name}", b"{}")
    rejected = world.drop("training_data/rejected.jsonl", b'{"question": "a"}\n')
    published = world.tested(world.trained(world.drop()))
    assert published.state == RunState.PUBLISHED

    # The next run of the line starts from its champion; a person decides about the champion in the registry.
    world.put("training_data/cars.yaml", b"start_from: champion")
    challenger = world.trained(world.drop())
    world.tested(challenger)
    package = str(published.model_package)
    event = world.load_event("publish_results.package_approved")
    event["detail"]["ModelPackageArn"] = package
    world.aws.sagemaker.update_model_package(ModelPackageArn=package, ModelApprovalStatus="Rejected")
    world.handle("publish_results", event)
    world.aws.sagemaker.update_model_package(ModelPackageArn=package, ModelApprovalStatus="Approved")
    failed = world.start(world.drop("training_data/failed.jsonl"))
    world.handle("test_model", world.job_event("test_model.train_failed", failed.train_job))
    untested = world.trained(world.drop("training_data/untested.jsonl"))
    world.handle("publish_results", world.job_event("publish_results.test_failed", untested.test_job))
    world.quota = 0
    waiting = world.start(world.drop("training_data/waiting.jsonl"))
    assert waiting.state == RunState.WAITING
    world.quota = None
    world.handle("start_training", world.load_event("start_training.job_ended"))
    limited = world.run(waiting.run_id)
    world.save_training(limited)  # the job was stopped at its limit, with a model; there is no room for its tests at first
    ended = world.job_event("test_model.train_at_limit", limited.train_job)
    world.quota = 0
    world.handle("test_model", ended)
    world.quota = None
    world.handle("start_training", world.load_event("start_training.job_ended"))
    world.tested(world.run(limited.run_id))

    stopped = stop(world, world.start(world.drop("training_data/stopped.jsonl")))
    world.handle("test_model", world.job_event("test_model.train_stopped", stopped.train_job))
    stopped = stop(world, world.trained(world.drop("training_data/stopped-in-tests.jsonl")))
    world.handle("publish_results", world.job_event("publish_results.test_stopped", stopped.test_job))

    # Cancelled while its test job is created.
    late = world.start(world.drop("training_data/late.jsonl"))
    world.save_training(late)

    def cancelled(create):
        answer = create()
        set_item(world, late.run_id, state=RunState.CANCELLED, open=RunState.CANCELLED)
        return answer

    ended = world.job_event("test_model.train_completed", late.train_job)
    world.next_call("CreateTrainingJob", cancelled)
    world.handle("test_model", ended)
    test_job = late.train_job.replace("-train-", "-test-")
    assert world.jobs[test_job]["TrainingJobStatus"] == "Stopping"
    world.handle("publish_results", world.job_event("publish_results.test_stopped", test_job))

    # From here on no event arrives.
    world.drop("training_data/silent.jsonl")
    training = world.start(world.drop("training_data/training.jsonl"))
    world.save_training(training)
    world.quota = 1
    waiting = world.start(world.drop("training_data/waiting-again.jsonl"))
    assert waiting.state == RunState.WAITING
    world.quota = None
    world.job_event("test_model.train_completed", training.train_job)
    for run in (rejected, published, failed):  # whose ends nobody was told of
        set_item(world, run.run_id, open=world.run(run.run_id).state)
    reconcile(world)
    assert "Dataset Validated" in world.event_types
    assert world.run(waiting.run_id).state == RunState.TRAINING
    set_item(world, waiting.run_id, state=RunState.CANCELLED, open=RunState.CANCELLED)
    testing = world.run(training.run_id)
    assert testing.state == RunState.TESTING
    world.job_event("publish_results.test_completed", testing.test_job)
    world.save_tests(testing, [outcome(n) for n in range(30)])
    world.groups.clear()  # the first package makes the group, whoever registers it
    reconcile(world)
    assert world.run(testing.run_id).state == RunState.PUBLISHED
    assert world.jobs[world.run(waiting.run_id).train_job]["TrainingJobStatus"] == "Stopping"


def deploy_everything(world) -> None:
    """Let an adapter be served, then a merged model, two on Bedrock, an adapter again, one that is refused, and none."""
    bedrock = (b"serve: {target: bedrock}", b"serve: {target: bedrock}\nlora: {r: 2}")
    for config in (b"", b"lora: {r: 2}", b"lora: {r: 128}", *bedrock, b"lora: {r: 8}"):
        world.put("training_data/served.yaml", config)
        run = world.trained(world.drop("training_data/served.jsonl"))
        world.tested(run, WON_AGAIN)
        look(world)
        assert world.aws.deployments.get("served").run == run.run_id
    world.put("training_data/served.yaml", b"lora: {r: 4}")
    refused = world.trained(world.drop("training_data/served.jsonl"))
    world.tested(refused, WON_AGAIN)
    world.serving.ask = lambda content, question: "?"
    base = world.serving.components[str(world.aws.deployments.get("served").endpoint)]
    base["RuntimeConfig"] = {"DesiredCopyCount": 0, "CurrentCopyCount": 0}
    look(world)
    assert refused.run_id in world.aws.deployments.get("served").refused
    for each in world.aws.deployments.all():  # other lines' champions are served as well
        event = world.load_event("deploy_model.undeploy_requested")
        event["detail"]["line"] = each.line
        world.handle("deploy_model", event | {"time": "2099-01-01T00:00:00Z"})
    look(world)
    assert not world.serving.endpoints


def look(world) -> None:
    """Have the schedule invoke deploy_model until nothing goes on."""
    while True:
        world.handle("deploy_model", world.load_event("deploy_model.scheduled"))
        if all(each.stage == Stage.IDLE and not each.unused for each in world.aws.deployments.all()):
            return


def stop(world, run):
    request = world.load_event("start_training.stop_requested")
    request["detail"]["run_id"] = run.run_id
    world.handle("start_training", request | {"time": "2099-01-01T00:00:00Z"})
    assert world.run(run.run_id).state == RunState.CANCELLED
    return run


def outcome(n: int) -> dict[str, object]:
    case = {"id": f"t{n}", "prompt": [{"role": "user", "content": "?"}], "reference": "!", "tags": [], "weight": 1.0}
    answers = {name: {"text": "!", "score": 1.0, "rewards": {"exact_match": 1.0}} for name in ("base", "tuned")}
    return case | {"must_pass": False} | answers


def set_item(world, run_id: str, **values: str) -> None:
    names = {f"#{name}": name for name in values}
    world.aws.runs._table.update_item(
        Key={"id": RUN + run_id},
        UpdateExpression="SET " + ", ".join(f"#{name} = :{name}" for name in values),
        ExpressionAttributeNames=names,
        ExpressionAttributeValues={f":{name}": str(value) for name, value in values.items()},
    )


def reconcile(world) -> None:
    for item in world.aws.runs._table.scan()["Items"]:
        if item["id"].startswith(RUN):
            set_item(world, item["id"].removeprefix(RUN), updated="2026-01-01T00:00:00.000000+00:00")
    world.handle("reconcile", world.load_event("reconcile.scheduled"))


def test_every_call_is_allowed_and_every_permission_is_needed(world, recorded, monkeypatch):
    monkeypatch.setenv("ENDPOINT_BAKE_MINUTES", "0")
    run_everything(world)
    deploy_everything(world)
    assert {permission.role for permission in recorded} == set(ROLES.values())
    given = policies()
    for role in ROLES.values():
        needed = [permission for permission in recorded if permission.role == role] + made_by_lambda(role)
        denied = [permission for permission in needed if not allows(given[role], permission)]
        assert denied == [], role
    # A managed policy is one for all: what it gives must be needed by somebody, not by each.
    shared = [s for s in given["ReconcileRole"] if all(s in given[role] for role in ROLES.values())]
    by_all = [Permission("Shared", p.action, p.resource, p.context) for p in recorded]
    by_all += [permission for role in ROLES.values() for permission in made_by_lambda(role)]
    for role in ROLES.values():
        own = [statement for statement in given[role] if statement not in shared]
        needed = [permission for permission in recorded if permission.role == role] + made_by_lambda(role)
        assert needless(own, [p for p in needed if not allows(shared, p)]) == [], role
    assert needless(shared, [p for p in by_all if allows(shared, p)]) == []


def test_a_permission_too_many_is_found():
    read = {"Effect": "Allow", "Action": ["s3:GetObject", "s3:DeleteObject"], "Resource": "arn:aws:s3:::b/*"}
    write = {"Effect": "Allow", "Action": "s3:PutObject", "Resource": "arn:aws:s3:::b/*"}
    needed = [Permission("Role", "s3:GetObject", "arn:aws:s3:::b/key")]
    assert [found.partition(" of ")[0] for found in needless([read], needed)] == ["Action s3:DeleteObject"]
    assert len(needless([read, write], needed)) == 2
    assert not allows([write], needed[0])
