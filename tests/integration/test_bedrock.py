# ruff: noqa: F401, F811 - the fixtures of test_deployments
"""Approved means serving on Bedrock, too: a model is imported, proved before a user knows it, and deleted when left."""

from datetime import datetime

import pytest
from fake_serving import tuned_answer
from fake_stack import PREFIX
from world import GOOD_DATA

from pipeline.notify import events
from pipeline.runs import clock
from pipeline.runs.deployments import Stage
from pipeline.runs.states import RunState
from pipeline.serving.bedrock import MOST_CHARACTERS
from pipeline.stages.deploy_model import undeploy

from .test_deployments import COMPONENT, announced, approved, archive, base_answers, look, time

ON_BEDROCK = b"serve: {target: bedrock}"


def merged(run) -> str:
    return f"{run.artifacts.rstrip('/')}/merged/"


def contents(world) -> list[str]:
    """What Bedrock has imported and not deleted."""
    return sorted(model["content"] for model in world.serving.imported.values())


def nothing_of_sagemaker(world) -> bool:
    serving = world.serving
    return not any((serving.endpoints, serving.configs, serving.components, serving.models, serving.alarms, serving.targets))


def test_a_champion_is_imported_and_answers_by_its_arn(world, look):
    run = approved(world, config=ON_BEDROCK)
    look()
    deployment = world.aws.deployments.get("cars")
    assert (deployment.stage, deployment.run, deployment.answered) == (
        *(Stage.IDLE, run.run_id),
        "20 of 20 answers were those of the tested model",
    )
    assert (deployment.endpoint, deployment.instance_type, deployment.imported) == (None, None, None)
    assert list(world.serving.imported) == [deployment.component]
    assert contents(world) == [merged(run)]
    assert nothing_of_sagemaker(world)
    (job,) = world.serving.jobs.values()
    assert job["jobName"] == job["importedModelName"] == f"{COMPONENT}-{run.run_id.rpartition('-')[2][:8]}-1"
    assert job["roleArn"].endswith("role/ImportRole")
    assert job["importedModelKmsKeyId"].startswith("arn:aws:kms:")
    assert announced(world) == [events.DEPLOYED]
    assert look() == 0


def test_no_user_knows_a_model_before_it_is_proved_and_the_former_one_stays_until_then(world, look):
    first = approved(world, config=ON_BEDROCK)
    look()
    former = world.aws.deployments.get("cars").component
    second = approved(world, GOOD_DATA * 2, ON_BEDROCK)
    seen = set()

    def ask(content: str, question: str) -> str:
        seen.add((content, world.aws.deployments.get("cars").component, former in world.serving.imported))
        return tuned_answer(content, question)

    world.serving.ask = ask
    look()
    assert seen == {(merged(second), former, True)}
    deployment = world.aws.deployments.get("cars")
    assert (deployment.run, deployment.component != former) == (second.run_id, True)
    assert contents(world) == [merged(second)]
    assert first.run_id != second.run_id


@pytest.mark.parametrize("former", [b"", ON_BEDROCK, None])
@pytest.mark.parametrize("trouble", ["answers", "import"])
def test_a_model_that_fails_on_bedrock_leaves_the_former_one(world, look, former, trouble):
    first = None if former is None else approved(world, config=former)
    look()
    before = world.aws.deployments.get("cars")
    wrong = approved(world, GOOD_DATA * 2, ON_BEDROCK)
    if trouble == "answers":
        world.serving.ask = lambda content, question: (
            base_answers(content, question) if content == merged(wrong) else tuned_answer(content, question)
        )
        reason = "does not answer as the tested model: 0 of 20 answers"
    else:
        world.serving.failing[merged(wrong)] = "the model's architecture is not supported"
        reason = "failed: the model's architecture is not supported"
    look()
    deployment = world.aws.deployments.get("cars")
    assert reason in deployment.refused[wrong.run_id]
    assert (deployment.run, deployment.component) == (first and first.run_id, before.component)
    assert contents(world) == ([merged(first)] if first and former else [])
    assert world.serving.serving(COMPONENT) == (archive(first) if first and not former else None)
    assert announced(world)[-1] == events.DEPLOYMENT_FAILED
    assert look() == 0


def test_a_line_moves_to_bedrock_and_back_and_leaves_nothing_behind(world, look):
    approved(world)
    look()
    second = approved(world, GOOD_DATA * 2, ON_BEDROCK)
    look()
    assert contents(world) == [merged(second)]
    assert nothing_of_sagemaker(world)
    third = approved(world, GOOD_DATA * 3, b"serve: {target: sagemaker}")
    look()
    deployment = world.aws.deployments.get("cars")
    assert (deployment.run, deployment.component, deployment.on_bedrock) == (third.run_id, COMPONENT, False)
    assert world.serving.serving(COMPONENT) == archive(third)
    assert contents(world) == []
    assert announced(world) == [events.DEPLOYED] * 3


def test_a_move_back_to_sagemaker_that_fails_leaves_bedrocks_model(world, look):
    first = approved(world, config=ON_BEDROCK)
    look()
    wrong = approved(world, GOOD_DATA * 2, b"serve: {target: sagemaker}")
    world.serving.ask = lambda content, question: "!" if content == archive(wrong) else tuned_answer(content, question)
    look()
    assert world.aws.deployments.get("cars").run == first.run_id
    assert contents(world) == [merged(first)]
    assert nothing_of_sagemaker(world)


@pytest.mark.parametrize("looks", [*range(6), 100])
def test_a_line_is_undeployed_at_any_time_and_imported_again_under_another_name(world, look, looks):
    run = approved(world, config=ON_BEDROCK)
    look(looks)
    undeploy("cars", datetime.fromisoformat(clock.now()), world.aws)
    look()
    if looks == 0:  # there was nothing yet
        assert world.aws.deployments.get("cars").run == run.run_id
        return
    assert contents(world) == []
    assert world.aws.deployments.get("cars").run is None
    again = approved(world, GOOD_DATA * 2, ON_BEDROCK)
    look()
    assert contents(world) == [merged(again)]


def test_a_model_that_comes_back_is_imported_again(world, look):
    first = approved(world, config=ON_BEDROCK)
    look()
    second = approved(world, GOOD_DATA * 2, ON_BEDROCK)
    look()
    world.aws.sagemaker.update_model_package(ModelPackageArn=second.model_package, ModelApprovalStatus="Rejected")
    event = world.load_event("publish_results.package_approved")
    event["detail"]["ModelPackageArn"] = second.model_package
    world.handle("publish_results", event)
    look()
    assert world.aws.deployments.get("cars").run == first.run_id
    assert contents(world) == [merged(first)]
    assert len(world.serving.jobs) == 3


def test_an_import_waits_for_the_quota(world, look):
    world.serving.most_imported = 0
    run = approved(world, config=ON_BEDROCK)
    look(5)
    assert world.aws.deployments.get("cars").stage == Stage.PREPARING
    world.serving.most_imported = 1
    look()
    assert world.aws.deployments.get("cars").run == run.run_id


def test_an_import_that_the_quota_never_lets_in_is_given_up(world, look):
    world.serving.most_imported = 0
    run = approved(world, config=ON_BEDROCK)
    look(150)
    reason = world.aws.deployments.get("cars").refused[run.run_id]
    assert reason.endswith("ServiceQuotaExceededException: too many imported models, after 2:00:00")


def test_a_model_that_answers_in_another_format_is_refused(world, look):
    world.serving.other_format = True
    run = approved(world, config=ON_BEDROCK)
    look()
    deployment = world.aws.deployments.get("cars")
    assert 'answers with no chat completion: b\'{"outputs"' in deployment.refused[run.run_id]
    assert contents(world) == []


def test_names_of_imports_fit(world, look):
    name = "many_words " * 20
    run = approved(world, config=ON_BEDROCK, name=name)
    look()
    (job,) = world.serving.jobs
    assert len(job) <= MOST_CHARACTERS
    assert job.startswith(PREFIX)
    assert world.aws.deployments.get(run.line).run == run.run_id


def test_a_model_that_bedrock_cannot_import_is_refused_before_it_is_trained(world):
    world.put("training_data/cars.yaml", ON_BEDROCK)
    world.put("models/base/config.json", b'{"architectures": ["Gemma3ForCausalLM"]}')
    run = world.drop()
    assert run.state == RunState.REJECTED
    (problem,) = world.read_json(f"runs/{run.run_id}/validation.json")["errors"]
    assert (problem["code"], problem["key"]) == ("SERVE_TARGET", "serve.target")
