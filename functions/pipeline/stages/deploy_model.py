"""Let each line's champion answer under the line's name, and bring the former model back if it does not.

SageMaker sends no event when an inference component is ready. A deployment therefore goes on by looks: each look does what
is due in the deployment's stage, by what Describe… answers, and ends. Events and a schedule begin a look; repeating one
changes nothing.

    PREPARING   endpoint, base model and scaling
    TRYING      the adapter under the name <component>-next, where no user asks, and the identity test there
    SWITCHING   the model under the line's name, the identity test, then quiet alarms for the bake time
    RETURNING   after a failure, or if the champion changes meanwhile: the former model under the line's name, if there is
                one, and the candidate deleted
    REMOVING    after `tunedrop undeploy`, or without a champion: nothing under the line's name

On Bedrock, PREPARING imports the merged model. TRYING has the identity test, at the new model's ARN, which no user knows.
SWITCHING gives the line that ARN. The former model is deleted after the announcement of the new one.
"""

import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import NamedTuple

import msgspec
from botocore.exceptions import ClientError

from pipeline.aws import Aws, error_code
from pipeline.notify import events
from pipeline.notify.deployments import announce_deployment
from pipeline.observability import logger
from pipeline.publish.evidence import read
from pipeline.runs import clock
from pipeline.runs.deployments import Deployment, Stage, StaleDeploymentError
from pipeline.runs.lines import Line
from pipeline.serving import bedrock, components, endpoint, identity, scaling
from pipeline.serving.served import Served, candidate_name, merged_name, read_config, served
from pipeline.serving.waiting import DeploymentFailedError, NotYetError
from pipeline.settings import DeploySettings
from tunedrop import object_keys
from tunedrop.inference_tests import Outcome

# The longest stages: RETURNING follows, and REMOVING after that. An endpoint and a large model take long; an adapter takes
# seconds. SWITCHING may take the bake time as well.
LONGEST = {
    Stage.PREPARING: timedelta(hours=2),
    Stage.TRYING: timedelta(minutes=30),
    Stage.SWITCHING: timedelta(hours=1),
    Stage.RETURNING: timedelta(hours=2),
}
GIVEN_UP = set(LONGEST) - {Stage.RETURNING}  # stages that end when AWS says that their target cannot be served
PAUSE_SECONDS = 5.0
# A look ends before: it is the function's timeout.
HELD = timedelta(minutes=5)
# SageMaker takes an update back that fails. It is tried again, since the reason may be the service's own.
MOST_UPDATES = 2


class Look(NamedTuple):
    """What a look at a line needs."""

    line: Line
    settings: DeploySettings
    aws: Aws


def look_until(deadline: float, settings: DeploySettings, aws: Aws, sleep: Callable[[float], None] = time.sleep) -> None:
    """Look at every line, and again while something goes on, until `deadline`, a time of the monotonic clock.

    An error of one line does not hide the others: it is raised after them.
    """
    while look_at_all(settings, aws) and time.monotonic() + PAUSE_SECONDS < deadline:
        sleep(PAUSE_SECONDS)


def look_at_all(settings: DeploySettings, aws: Aws) -> bool:
    """Look at every line; return whether something goes on."""
    names = {line.line for line in aws.lines.all()} | {deployment.line for deployment in aws.deployments.all()}
    errors: list[Exception] = []
    going_on = False
    for name in sorted(names):
        try:
            going_on |= look_at(name, settings, aws)
        except StaleDeploymentError as error:
            logger.info("another look was faster", detail=str(error))
        except Exception as error:  # noqa: BLE001 - raised after the other lines
            logger.exception("a line could not be deployed", line=name)
            errors.append(error)
    if errors:
        raise errors[0]
    return going_on


def look_at(name: str, settings: DeploySettings, aws: Aws) -> bool:
    """Do what is due for a line; return whether something goes on. Raises StaleDeploymentError."""
    deployment, line = aws.deployments.get(name), aws.lines.get(name)
    if not _due(deployment, line):
        return False
    if deployment.busy and deployment.busy > clock.now():
        return True
    died, look = deployment.busy is not None, Look(line, settings, aws)
    deployment = held = aws.deployments.write(deployment, busy=clock.ago(-HELD))
    try:
        if died and _late(deployment, settings):
            raise DeploymentFailedError("the last look did not come to its end")
        while following := _STEPS[deployment.stage](deployment, look):
            deployment = following
    except StaleDeploymentError:
        raise
    except Exception as error:  # noqa: BLE001 - raised again, unless the target is given up
        _go_on(deployment, error, look)
        return True
    finally:
        aws.deployments.release(held)
    return False


def undeploy(name: str, requested: datetime, aws: Aws) -> None:
    """Take down what answers under a line's name, until the line has another champion. Raises StaleDeploymentError.

    A request from before the deployment meant an earlier one and changes nothing; events carry whole seconds.
    """
    deployment, line = aws.deployments.get(name), aws.lines.get(name)
    if deployment.begun is None or deployment.stage == Stage.REMOVING:
        return
    if requested < datetime.fromisoformat(deployment.begun).replace(microsecond=0):
        logger.info("ignored a request to take down an earlier deployment", line=name)
        return
    aws.deployments.write(deployment, stage=Stage.REMOVING, removed=line.version, reason="undeployed")


def _due(deployment: Deployment, line: Line) -> bool:
    """Return whether a line's deployment goes on, or is to begin."""
    if deployment.stage != Stage.IDLE or deployment.event or deployment.unused:
        return True
    skipped = line.version in {deployment.refused_version, deployment.removed}
    return line.settled and not skipped and line.champion != deployment.run


def _go_on(deployment: Deployment, error: Exception, look: Look) -> None:
    """Wait for what is not ready, or give the target up.

    Raises an error that the next look may not meet, and any error of a stage without limit.
    """
    line, reason, late = look.line, str(error), _late(deployment, look.settings)
    if isinstance(error, NotYetError):
        logger.info("a deployment goes on", line=line.line, stage=deployment.stage, detail=reason)
        if not late:
            return
    elif not (late or (_refused(error) and deployment.stage in GIVEN_UP)):
        raise error
    if late:
        reason += f", after {_longest(deployment.stage, look.settings)}"
    if deployment.stage == Stage.RETURNING:
        reason = f"the model of {deployment.run} did not come back: {reason}"
        look.aws.deployments.write(deployment, stage=Stage.REMOVING, removed=line.version, reason=reason)
        return
    target = str(deployment.target)
    event = events.ROLLED_BACK if deployment.stage == Stage.SWITCHING and deployment.run else events.DEPLOYMENT_FAILED
    look.aws.deployments.write(
        deployment,
        stage=Stage.RETURNING,
        refused=deployment.refused | {target: reason},
        refused_version=line.version if line.champion == target else deployment.refused_version,
        reason=reason,
        event=event,
    )


def _refused(error: Exception) -> bool:
    """Return whether the next look would get the same answer: a model that failed, or a quota of the account."""
    return isinstance(error, DeploymentFailedError) or (
        isinstance(error, ClientError) and error_code(error) == "ResourceLimitExceeded"
    )


def _late(deployment: Deployment, settings: DeploySettings) -> bool:
    """Return whether a deployment has been in its stage for too long."""
    return deployment.stage in LONGEST and _age(deployment.since) >= _longest(deployment.stage, settings)


def _longest(stage: Stage, settings: DeploySettings) -> timedelta:
    return LONGEST[stage] + (_bake(settings) if stage == Stage.SWITCHING else timedelta())


def _bake(settings: DeploySettings) -> timedelta:
    return timedelta(minutes=settings.endpoint_bake_minutes)


def _rest(deployment: Deployment, look: Look) -> Deployment | None:
    """IDLE: announce the last change, delete what the line has left, begin what the champion asks for."""
    if deployment.event:
        announce_deployment(deployment, deployment.event, look.settings, look.aws)
        return look.aws.deployments.write(deployment, event=None)
    if deployment.unused:
        others = [each for each in look.aws.deployments.all() if each.line != deployment.line]
        for name in deployment.unused:
            if name.startswith("arn:"):
                bedrock.remove_model(name, look.aws)
            elif name != deployment.endpoint and not any(_uses(each, name) for each in others):
                endpoint.tear_down(name, look.aws)
        return look.aws.deployments.write(deployment, unused=[])
    if not _due(deployment, look.line):
        return None
    if look.line.champion is None:
        return look.aws.deployments.write(
            deployment, stage=Stage.REMOVING, reason=f"the line {look.line.line} has no champion"
        )
    config = read_config(look.line.champion, look.settings.artifact_bucket, look.aws)
    if config.serve.enabled:
        wanted = served(look.line.champion, None, look.settings, look.aws)
        return look.aws.deployments.write(
            deployment,
            stage=Stage.PREPARING,
            target=look.line.champion,
            imported=bedrock.import_name(wanted, deployment.number + 1) if wanted.on_bedrock else None,
            unused=[] if wanted.on_bedrock or wanted.endpoint == deployment.endpoint else [wanted.endpoint],
            answered=None,
            reason=None,
        )
    reason = f"the config of {look.line.champion} has serve.enabled: false"
    return look.aws.deployments.write(deployment, stage=Stage.REMOVING, removed=look.line.version, reason=reason)


def _prepare(deployment: Deployment, look: Look) -> Deployment | None:
    """PREPARING: endpoint, base model and scaling, or the import into Bedrock."""
    if look.line.champion != deployment.target:
        return look.aws.deployments.write(deployment, stage=Stage.RETURNING)
    wanted = served(str(deployment.target), None, look.settings, look.aws)
    if wanted.on_bedrock:
        bedrock.import_model(str(deployment.imported), wanted, look.settings, look.aws)
        return look.aws.deployments.write(deployment, stage=Stage.TRYING)
    endpoint.prepare(wanted, look.settings, look.aws)
    return look.aws.deployments.write(deployment, stage=Stage.TRYING if wanted.adapter else Stage.SWITCHING)


def _try(deployment: Deployment, look: Look) -> Deployment | None:
    """TRYING: the adapter, or Bedrock's model, where no user asks."""
    if look.line.champion != deployment.target:
        return look.aws.deployments.write(deployment, stage=Stage.RETURNING)
    wanted = served(str(deployment.target), None, look.settings, look.aws)
    if wanted.on_bedrock:
        model = bedrock.import_model(str(deployment.imported), wanted, look.settings, look.aws)
        answered = _prove(wanted, model, look.settings, look.aws)
        return look.aws.deployments.write(deployment, stage=Stage.SWITCHING, answered=answered)
    endpoint.serve(wanted, wanted.candidate, look.settings, look.aws)
    _prove(wanted, wanted.candidate, look.settings, look.aws)
    return look.aws.deployments.write(deployment, stage=Stage.SWITCHING)


def _switch(deployment: Deployment, look: Look) -> Deployment | None:
    """SWITCHING: the model under the line's name, until it is proved and its alarms are quiet."""

    def before(reason: str) -> None:
        nonlocal deployment
        if deployment.updates == MOST_UPDATES:
            raise DeploymentFailedError(f"{MOST_UPDATES} updates of {wanted.component} failed: {reason}")
        deployment = look.aws.deployments.write(deployment, updates=deployment.updates + 1)

    if look.line.champion != deployment.target:
        return look.aws.deployments.write(deployment, stage=Stage.RETURNING)
    wanted = served(str(deployment.target), None, look.settings, look.aws)
    if wanted.on_bedrock:
        return _switch_on_bedrock(deployment, wanted, look)
    endpoint.serve(wanted, wanted.component, look.settings, look.aws, before)
    if deployment.answered is None:
        if wanted.adapter is None:
            scaling.scale(wanted.component, look.settings, look.aws)
        answered = _prove(wanted, wanted.component, look.settings, look.aws)
        return look.aws.deployments.write(deployment, answered=answered, proved=clock.now())
    if alarm := scaling.ringing(wanted.component, datetime.fromisoformat(deployment.since), look.aws):
        raise DeploymentFailedError(alarm)
    if _age(deployment.proved or deployment.since) < _bake(look.settings):
        raise NotYetError(f"the alarms of {wanted.component} are quiet")
    _remove(wanted.candidate, look.aws)
    if deployment.run and deployment.run != wanted.run_id:
        endpoint.delete_model(merged_name(wanted.component, deployment.run), look.aws)
    answers = {"endpoint": wanted.endpoint, "component": wanted.component, "instance_type": wanted.instance_type}
    return _deployed(deployment, wanted, answers, look.aws)


def _switch_on_bedrock(deployment: Deployment, wanted: Served, look: Look) -> Deployment:
    """SWITCHING to Bedrock: the line has the new model's ARN; a component that it leaves is deleted before."""
    model = bedrock.import_model(str(deployment.imported), wanted, look.settings, look.aws)
    if deployment.run and not deployment.on_bedrock:
        _remove(wanted.component, look.aws)
        endpoint.delete_model(merged_name(wanted.component, deployment.run), look.aws)
    return _deployed(deployment, wanted, {"endpoint": None, "component": model, "instance_type": None}, look.aws)


def _deployed(deployment: Deployment, wanted: Served, answers: Mapping[str, str | None], aws: Aws) -> Deployment:
    """Write that the target's model answers, and by what."""
    return aws.deployments.write(
        deployment,
        stage=Stage.IDLE,
        run=wanted.run_id,
        target=None,
        imported=None,
        model=wanted.model,
        unused=[place for place in deployment.places if place != answers["endpoint"]],
        deployed=clock.now(),
        reason=None,
        event=events.DEPLOYED,
        **answers,
    )


def _return(deployment: Deployment, look: Look) -> Deployment | None:
    """RETURNING: the former model under the line's name, the candidate deleted."""
    name = object_keys.component_name(look.settings.job_prefix, deployment.line)
    if deployment.run and not deployment.on_bedrock:
        former = served(deployment.run, deployment.instance_type, look.settings, look.aws)
        endpoint.prepare(former, look.settings, look.aws)
        try:
            endpoint.serve(former, name, look.settings, look.aws)
        except DeploymentFailedError:
            components.remove(name, look.aws)  # and then another one is made
    else:
        _remove(name, look.aws)
    _remove(candidate_name(name), look.aws)
    endpoint.delete_model(merged_name(name, str(deployment.target)), look.aws)
    if deployment.imported:
        bedrock.remove_import(deployment.imported, look.aws)
    return look.aws.deployments.write(deployment, stage=Stage.IDLE, imported=None)


def _take_down(deployment: Deployment, look: Look) -> Deployment | None:
    """REMOVING: nothing answers under the line's name. Its endpoint, or its model on Bedrock, goes if no line uses it.

    This reads no file of a run: a person who has deleted the files can still take the model down.
    """
    name = object_keys.component_name(look.settings.job_prefix, deployment.line)
    _remove(candidate_name(name), look.aws)
    _remove(name, look.aws)
    for run_id in {deployment.run, deployment.target} - {None}:
        endpoint.delete_model(merged_name(name, str(run_id)), look.aws)
    if deployment.imported:
        bedrock.remove_import(deployment.imported, look.aws)
    return look.aws.deployments.write(
        deployment,
        stage=Stage.IDLE,
        run=None,
        target=deployment.run,
        imported=None,
        endpoint=None,
        component=None,
        model=None,
        instance_type=None,
        deployed=None,
        unused=sorted({*deployment.unused, *deployment.places}),
        event=events.ROLLED_BACK if deployment.run else None,
    )


_STEPS = {
    Stage.IDLE: _rest,
    Stage.PREPARING: _prepare,
    Stage.TRYING: _try,
    Stage.SWITCHING: _switch,
    Stage.RETURNING: _return,
    Stage.REMOVING: _take_down,
}


def _prove(wanted: Served, component: str, settings: DeploySettings, aws: Aws) -> str:
    """Ask a component, or Bedrock's model by its ARN, the run's tests, and return what it answered.

    Raises NotYetError if it does not answer, and DeploymentFailedError if another model answers.
    """
    tested = msgspec.json.decode(read(aws, settings.artifact_bucket, wanted.tested))
    outcomes = msgspec.convert([*tested["tests"], *tested.get("probe", [])], list[Outcome])

    def ask(outcome: Outcome) -> identity.Answer:
        body = identity.question(outcome, tested["generation"], tested["chat_template_kwargs"])
        if wanted.on_bedrock:
            return bedrock.invoke(component, body, aws)
        return identity.invoke(wanted.endpoint, component, body, aws)

    shown = identity.prove(outcomes, ask)
    if not shown.proved:
        raise DeploymentFailedError(f"{component} does not answer as the tested model: {shown}")
    return str(shown)


def _remove(component: str, aws: Aws) -> None:
    """Delete a component with its alarms. Raises NotYetError until it is gone."""
    scaling.forget(component, aws)
    components.remove(component, aws)


def _uses(deployment: Deployment, name: str) -> bool:
    """Return whether a line's endpoint is this one, or will be."""
    return deployment.endpoint == name or (deployment.stage != Stage.IDLE and name in deployment.unused)


def _age(since: str) -> timedelta:
    return datetime.fromisoformat(clock.now()) - datetime.fromisoformat(since)
