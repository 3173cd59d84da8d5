# ruff: noqa: N802, N803 - methods and arguments have AWS's names
"""SageMaker's endpoints and components, their scaling and alarms, and Bedrock's imports, as far as deploy_model sees them.

moto has no inference components and no imports. What is created, updated or deleted settles at the next look (`describe`).
The emulator (local_app/sagemaker) has real processes; this one is for searches with thousands of looks.
"""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from botocore.exceptions import ClientError

from pipeline.runs import clock

ACCOUNT = "arn:aws:sagemaker:us-east-1:123456789012"
BEDROCK = "arn:aws:bedrock:us-east-1:123456789012"
SETTLING = {"Creating", "Updating", "Deleting"}


def tuned_answer(content: str, question: str) -> str:
    """Answer `n+1?`, the questions of `world.WON`, as the tuned model: any adapter or merged model, but not the base."""
    return str(int(question.strip("<b>/?").split("+")[0]) + 1)


@dataclass
class FakeServing:
    """The account's endpoints. Tests change `ask`, `failing` and `ringing`."""

    endpoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    components: dict[str, dict[str, Any]] = field(default_factory=dict)
    alarms: dict[str, dict[str, Any]] = field(default_factory=dict)
    policies: dict[str, dict[str, Any]] = field(default_factory=dict)
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)  # import jobs, which are never deleted, by name
    imported: dict[str, dict[str, Any]] = field(default_factory=dict)  # Bedrock's models by ARN
    most_imported: int = 3  # the account's quota
    other_format: bool = False  # Bedrock's models answer as those imported before OpenAI's API
    failing: dict[str, str] = field(default_factory=dict)  # what will not be ready, and why, by its name or what it serves
    ringing: dict[str, datetime] = field(default_factory=dict)  # alarms in ALARM, and since when
    ask: Callable[[str, str], str] = tuned_answer  # what the model of a content answers to a question

    def answer(self, operation: str, arguments: dict[str, Any]) -> Any:
        """Answer a call. Raises ClientError."""
        try:
            return getattr(self, f"_{operation}")(**arguments)
        except ClientError as error:
            error.operation_name = operation
            raise

    @classmethod
    def has(cls, operation: str) -> bool:
        """Return whether the operation is one of these."""
        return hasattr(cls, f"_{operation}")

    def serving(self, component: str) -> str | None:
        """Return what a component serves now: an adapter's archive or a model's name."""
        found = self.components.get(component)
        return found["content"] if found else None

    # --- models, configurations, endpoints ---

    def _CreateModel(self, ModelName: str, **rest: Any) -> dict[str, Any]:
        return self._create(self.models, ModelName, rest, "Model")

    def _DescribeModel(self, ModelName: str) -> dict[str, Any]:
        return self._get(self.models, ModelName)

    def _DeleteModel(self, ModelName: str) -> dict[str, Any]:
        self._get(self.models, ModelName)
        del self.models[ModelName]
        return {}

    def _CreateEndpointConfig(self, EndpointConfigName: str, **rest: Any) -> dict[str, Any]:
        return self._create(self.configs, EndpointConfigName, rest, "EndpointConfig")

    def _DescribeEndpointConfig(self, EndpointConfigName: str) -> dict[str, Any]:
        return self._get(self.configs, EndpointConfigName)

    def _DeleteEndpointConfig(self, EndpointConfigName: str) -> dict[str, Any]:
        self._get(self.configs, EndpointConfigName)
        del self.configs[EndpointConfigName]
        return {}

    def _CreateEndpoint(self, EndpointName: str, EndpointConfigName: str, **rest: Any) -> dict[str, Any]:
        self._get(self.configs, EndpointConfigName)
        return self._create(self.endpoints, EndpointName, {"EndpointStatus": "Creating"}, "Endpoint")

    def _DescribeEndpoint(self, EndpointName: str) -> dict[str, Any]:
        found = self._get(self.endpoints, EndpointName)
        answer = dict(found)
        if found["EndpointStatus"] == "Deleting":
            del self.endpoints[EndpointName]
        elif reason := self.failing.get(EndpointName):
            found |= {"EndpointStatus": "Failed", "FailureReason": reason}
        else:
            found["EndpointStatus"] = "InService"
        return answer

    def _DeleteEndpoint(self, EndpointName: str) -> dict[str, Any]:
        found = self._get(self.endpoints, EndpointName)
        if found["EndpointStatus"] in SETTLING:
            raise _refusal(f"Cannot update in-progress endpoint {EndpointName}")
        found["EndpointStatus"] = "Deleting"
        return {}

    # --- components ---

    def _CreateInferenceComponent(
        self, InferenceComponentName: str, EndpointName: str, Specification: dict[str, Any], **rest: Any
    ) -> dict[str, Any]:
        if self._get(self.endpoints, EndpointName)["EndpointStatus"] != "InService":
            raise _refusal(f"the endpoint {EndpointName} is not in service")
        base = Specification.get("BaseInferenceComponentName")
        self._get(self.components, base) if base else self._get(self.models, Specification["ModelName"])
        component = {
            "EndpointName": EndpointName,
            "InferenceComponentStatus": "Creating",
            "Specification": Specification,
            "content": None,
            **({} if base else {"RuntimeConfig": {"DesiredCopyCount": 1, "CurrentCopyCount": 0}}),
        }
        return self._create(self.components, InferenceComponentName, component, "InferenceComponent")

    def _DescribeInferenceComponent(self, InferenceComponentName: str) -> dict[str, Any]:
        found = self._get(self.components, InferenceComponentName)
        answer: dict[str, Any] = json.loads(json.dumps(found))
        content = _content(found["Specification"])
        reason = self.failing.get(InferenceComponentName) or self.failing.get(content)
        if found["InferenceComponentStatus"] == "Deleting":
            del self.components[InferenceComponentName]
        elif found["InferenceComponentStatus"] == "Creating" and reason:
            found |= {"InferenceComponentStatus": "Failed", "FailureReason": reason}
        elif found["InferenceComponentStatus"] == "Updating" and reason:  # what it served before comes back
            found |= {"InferenceComponentStatus": "InService", "FailureReason": reason, "Specification": found.pop("former")}
        elif found["InferenceComponentStatus"] in SETTLING:
            found |= {"InferenceComponentStatus": "InService", "content": content}
        if "RuntimeConfig" in found:
            found["RuntimeConfig"]["CurrentCopyCount"] = found["RuntimeConfig"]["DesiredCopyCount"]
        return answer

    def _UpdateInferenceComponent(
        self, InferenceComponentName: str, Specification: dict[str, Any], **rest: Any
    ) -> dict[str, Any]:
        found = self._still(InferenceComponentName)
        found |= {
            "former": found["Specification"],
            "Specification": found["Specification"] | Specification,
            "InferenceComponentStatus": "Updating",
        }
        return {"InferenceComponentArn": f"{ACCOUNT}:inference-component/{InferenceComponentName}"}

    def _UpdateInferenceComponentRuntimeConfig(
        self, InferenceComponentName: str, DesiredRuntimeConfig: dict[str, Any]
    ) -> dict[str, Any]:
        found = self._still(InferenceComponentName)
        found["RuntimeConfig"]["DesiredCopyCount"] = DesiredRuntimeConfig["CopyCount"]
        found["InferenceComponentStatus"] = "Updating"
        return {"InferenceComponentArn": f"{ACCOUNT}:inference-component/{InferenceComponentName}"}

    def _DeleteInferenceComponent(self, InferenceComponentName: str) -> dict[str, Any]:
        self._still(InferenceComponentName)["InferenceComponentStatus"] = "Deleting"
        return {}

    def _InvokeEndpoint(self, EndpointName: str, InferenceComponentName: str, Body: bytes, **rest: Any) -> dict[str, Any]:
        found = self._get(self.components, InferenceComponentName)
        base = found["Specification"].get("BaseInferenceComponentName", InferenceComponentName)
        if found["content"] is None or self.components[base]["RuntimeConfig"]["CurrentCopyCount"] == 0:
            raise _refusal(f"Inference Component has no capacity to process this request: {InferenceComponentName}")
        text = self.ask(found["content"], json.loads(Body)["messages"][-1]["content"])
        return {"Body": io.BytesIO(json.dumps({"choices": [{"message": {"content": text}}]}).encode())}

    # --- Bedrock ---

    def _CreateModelImportJob(self, jobName: str, clientRequestToken: str, **rest: Any) -> dict[str, Any]:
        if len(self.imported) >= self.most_imported:
            raise _bedrock_refusal("ServiceQuotaExceededException", "too many imported models")
        if jobName in self.jobs:
            raise _bedrock_refusal("ConflictException", f"the job {jobName} exists")
        self.jobs[jobName] = rest | {"jobName": jobName, "status": "InProgress"}
        return {"jobArn": f"{BEDROCK}:model-import-job/{_id(jobName)}"}

    def _GetModelImportJob(self, jobIdentifier: str) -> dict[str, Any]:
        if jobIdentifier not in self.jobs:
            raise _bedrock_refusal("ResourceNotFoundException", f"no job {jobIdentifier}")
        found = self.jobs[jobIdentifier]
        answer = dict(found)
        source = found["modelDataSource"]["s3DataSource"]["s3Uri"]
        if found["status"] == "InProgress" and (reason := self.failing.get(source)):
            found |= {"status": "Failed", "failureMessage": reason}
        elif found["status"] == "InProgress":
            model = f"{BEDROCK}:imported-model/{_id(jobIdentifier)}"
            found |= {"status": "Completed", "importedModelArn": model}
            self.imported[model] = {"modelName": found["importedModelName"], "content": source, "cold": True}
        return answer

    def _GetImportedModel(self, modelIdentifier: str) -> dict[str, Any]:
        return {"modelArn": modelIdentifier, "modelName": self._imported(modelIdentifier)["modelName"]}

    def _DeleteImportedModel(self, modelIdentifier: str) -> dict[str, Any]:
        self._imported(modelIdentifier)
        del self.imported[modelIdentifier]
        return {}

    def _InvokeModel(self, modelId: str, body: bytes, **rest: Any) -> dict[str, Any]:
        """Answer; the first request after the import finds no copy (a second one, some seconds later, does)."""
        found = self._imported(modelId)
        if found["cold"]:
            found["cold"] = False
            raise _bedrock_refusal("ModelNotReadyException", "Model is not ready for inference. Wait and try again.")
        text = self.ask(found["content"], json.loads(body)["messages"][-1]["content"])
        completion = {"outputs": [{"text": text}]} if self.other_format else {"choices": [{"message": {"content": text}}]}
        return {"body": io.BytesIO(json.dumps(completion).encode())}

    def _imported(self, model: str) -> dict[str, Any]:
        if model not in self.imported:
            raise _bedrock_refusal("ResourceNotFoundException", f"no model {model}")
        return self.imported[model]

    # --- scaling and alarms ---

    def _RegisterScalableTarget(self, ResourceId: str, **rest: Any) -> dict[str, Any]:
        self._get(self.components, ResourceId.removeprefix("inference-component/"))
        self.targets[ResourceId] = rest
        return {}

    def _DeregisterScalableTarget(self, ResourceId: str, **rest: Any) -> dict[str, Any]:
        if self.targets.pop(ResourceId, None) is None:
            raise ClientError({"Error": {"Code": "ObjectNotFoundException", "Message": "no target"}}, "")
        self.policies = {name: each for name, each in self.policies.items() if each["ResourceId"] != ResourceId}
        return {}

    def _PutScalingPolicy(self, PolicyName: str, **rest: Any) -> dict[str, Any]:
        if rest["ResourceId"] not in self.targets:
            raise ClientError({"Error": {"Code": "ObjectNotFoundException", "Message": "no target"}}, "")
        self.policies[PolicyName] = rest
        return {"PolicyARN": f"arn:aws:autoscaling:us-east-1:123456789012:scalingPolicy:{PolicyName}"}

    def _PutMetricAlarm(self, AlarmName: str, **rest: Any) -> dict[str, Any]:
        self.alarms[AlarmName] = rest
        return {}

    def _DeleteAlarms(self, AlarmNames: list[str]) -> dict[str, Any]:
        for name in AlarmNames:
            self.alarms.pop(name, None)
        return {}

    def _DescribeAlarms(self, AlarmNames: list[str], StateValue: str) -> dict[str, Any]:
        found = [name for name in AlarmNames if name in self.ringing]
        return {
            "MetricAlarms": [
                {"AlarmName": name, "StateReason": "3 of 3 datapoints", "StateUpdatedTimestamp": self.ringing[name]}
                for name in found
            ]
        }

    # --- what they share ---

    def _create(self, there: dict[str, dict[str, Any]], name: str, what: dict[str, Any], kind: str) -> dict[str, Any]:
        if name in there:
            raise _refusal(f"Cannot create already existing {kind} {name}")
        there[name] = what
        return {f"{kind}Arn": f"{ACCOUNT}:{kind.lower()}/{name}"}

    def _get(self, there: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
        if name not in there:
            raise _refusal(f"Could not find {name}")
        return there[name]

    def _still(self, name: str) -> dict[str, Any]:
        found = self._get(self.components, name)
        if found["InferenceComponentStatus"] in SETTLING:
            raise _refusal(f"{name} is {found['InferenceComponentStatus']}")
        return found


def rings_now() -> datetime:
    """Return the time for an alarm that begins to ring now."""
    return datetime.fromisoformat(clock.now())


def _content(specification: dict[str, Any]) -> str:
    content: str = specification.get("ModelName") or specification["Container"]["ArtifactUrl"]
    return content


def _id(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def _bedrock_refusal(code: str, message: str) -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": message}}, "")


def _refusal(message: str) -> ClientError:
    return ClientError({"Error": {"Code": "ValidationException", "Message": message}}, "")
