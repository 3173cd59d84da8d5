"""Bedrock's Custom Model Import: jobs, imported models, their processes, invocations and permissions."""

from __future__ import annotations

import json
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, EventStreamError
from components import CONTAINER, is_alive

from local_app.sagemaker import imports
from local_app.sagemaker.api import ServiceError
from local_app.sagemaker.permissions import RequiredPermission
from local_app.sagemaker.server import serve as serve_http
from local_app.sagemaker.services import Services
from local_app.sagemaker.store import Store
from pipeline.validation.bedrock import ARCHITECTURES

from .conftest import Local, launch, sagemaker_client

BEDROCK = "arn:aws:bedrock:us-east-1:000000000000"
ROLE = "arn:aws:iam::000000000000:role/ImportRole"
FILES = {
    "config.json": json.dumps({"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 8192}),
    "model.safetensors": "weights",
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "version": "tuned",
}


class Importing:
    """Imports models into an emulator, and asks them."""

    def __init__(self, local: Local) -> None:
        self.local, self.s3, self.client = local, local.s3, sagemaker_client(local.url, "bedrock")
        self.runtime = boto3.client(
            "bedrock-runtime", endpoint_url=local.url, config=Config(retries={"total_max_attempts": 1})
        )

    def files(self, name: str, files: dict[str, str] = FILES) -> str:
        for file, content in files.items():
            self.s3.put_object(Bucket="art", Key=f"imports/{name}/merged/{file}", Body=content)
        return f"s3://art/imports/{name}/merged"

    def create(self, name: str, files: dict[str, str] = FILES, **changes: Any) -> str:
        source = {"s3DataSource": {"s3Uri": self.files(name, files)}}
        request = {"jobName": name, "importedModelName": f"{name}-model", "roleArn": ROLE, "modelDataSource": source}
        arn: str = self.client.create_model_import_job(**request | changes)["jobArn"]
        return arn

    def ended(self, name: str) -> Any:
        def final() -> Any:
            time.sleep(0.1)
            job = self.client.get_model_import_job(jobIdentifier=name)
            return job if job["status"] != "InProgress" else None

        return self.local.until(final)

    def imported(self, name: str, files: dict[str, str] = FILES, **changes: Any) -> str:
        self.create(name, files, **changes)
        job = self.ended(name)
        assert job["status"] == "Completed", job
        arn: str = job["importedModelArn"]
        return arn

    def ask(self, model: str, **body: Any) -> Any:
        answer = self.runtime.invoke_model(modelId=model, contentType="application/json", body=json.dumps(body))
        assert answer["contentType"] == "application/json"
        return json.loads(answer["body"].read())

    def ready(self, model: str) -> Any:
        """Wake a model, or wait for its process to start again, and return its first answer."""

        def answered() -> Any:
            try:
                return self.ask(model)
            except (self.runtime.exceptions.ModelNotReadyException, self.runtime.exceptions.ModelErrorException):
                return None

        return self.local.until(answered)


@pytest.fixture
def importing(start: Callable[..., Local]) -> Importing:
    return Importing(start(server_command=CONTAINER))


@pytest.fixture(scope="module")
def shared(endpoint: str, s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Importing]:
    """An emulator for the tests that leave no model behind, and whose names are their own."""
    local = launch(endpoint, s3, tmp_path_factory.mktemp("imports") / "state", server_command=CONTAINER)
    yield Importing(local)
    local.close()


# ---- jobs and models -----------------------------------------------------------------------------------------------------


def test_a_model_is_imported_described_listed_and_deleted(shared: Importing, s3: Any) -> None:
    s3.put_object(Bucket="art", Key="imports/whole/merged-2/config.json", Body="of a neighbour")
    tags = [{"key": "tunedrop:prefix", "value": "tunedrop"}]
    key = "arn:aws:kms:us-east-1:000000000000:key/11111111-2222-3333-4444-555555555555"
    job_arn = shared.create("whole", jobTags=tags, importedModelTags=tags, importedModelKmsKeyId=key)
    job = shared.ended(job_arn)
    assert (job["status"], job["jobName"], job["importedModelName"]) == ("Completed", "whole", "whole-model")
    assert job["creationTime"] <= job["endTime"] == job["lastModifiedTime"]
    assert job["importedModelKmsKeyArn"] == key
    for identifier in (job["importedModelArn"], "whole-model"):
        model = shared.client.get_imported_model(modelIdentifier=identifier)
        assert (model["modelName"], model["modelArchitecture"], model["jobName"]) == (
            *("whole-model", "LlamaForCausalLM"),
            "whole",
        )
        assert model["modelDataSource"]["s3DataSource"]["s3Uri"] == "s3://art/imports/whole/merged"
        assert "tags" not in model
    folder = shared.local.folder / "imported" / job["importedModelArn"].rpartition("/")[2]
    assert {file.name for file in (folder / "model").iterdir()} == FILES.keys()
    shared.client.delete_imported_model(modelIdentifier="whole-model")
    assert not folder.exists()
    with pytest.raises(shared.client.exceptions.ResourceNotFoundException):
        shared.client.get_imported_model(modelIdentifier="whole-model")
    with pytest.raises(shared.client.exceptions.ResourceNotFoundException):
        shared.client.delete_imported_model(modelIdentifier="whole-model")
    assert shared.ended("whole")["importedModelArn"] == job["importedModelArn"]


def test_lists_are_filtered_and_paged_and_a_fourth_model_is_over_the_quota(importing: Importing) -> None:
    names = ["one", "two", "other"]
    for name in names:
        importing.imported(name)
    listed = importing.client.list_imported_models
    first = listed(maxResults=2, sortBy="CreationTime", sortOrder="Descending")
    rest = listed(maxResults=2, sortBy="CreationTime", sortOrder="Descending", nextToken=first["nextToken"])
    pages = [[model["modelName"] for model in page["modelSummaries"]] for page in (first, rest)]
    assert pages == [["other-model", "two-model"], ["one-model"]]
    jobs = importing.client.list_model_import_jobs
    assert [job["jobName"] for job in jobs(nameContains="o")["modelImportJobSummaries"]] == names
    assert jobs(statusEquals="Failed")["modelImportJobSummaries"] == []
    created = jobs()["modelImportJobSummaries"][1]["creationTime"]
    assert [job["jobName"] for job in jobs(creationTimeAfter=created)["modelImportJobSummaries"]] == ["other"]
    with pytest.raises(importing.client.exceptions.ServiceQuotaExceededException, match="limit of 3 imported models"):
        importing.create("four")
    importing.client.delete_imported_model(modelIdentifier="two-model")
    importing.create("four")


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("no-weights", "model.safetensors", None, "there is no *.safetensors"),
        ("no-tokenizer", "tokenizer.json", None, "there is no tokenizer.json and no tokenizer.model"),
        ("no-json", "config.json", "{", "config.json cannot be read"),
        ("gemma", "config.json", '{"architectures": ["Gemma3ForCausalLM"]}', "its architecture is Gemma3ForCausalLM"),
        (
            "long",
            "config.json",
            json.dumps({"architectures": [*ARCHITECTURES][:1], "max_position_embeddings": 262144}),
            "262144",
        ),
    ],
)
def test_a_folder_that_is_no_model_for_bedrock_fails_its_job(
    shared: Importing, name: str, file: str, content: str | None, message: str
) -> None:
    files = {key: text for key, text in (FILES | {file: content}).items() if text is not None}
    shared.create(name, files)
    job = shared.ended(name)
    assert (job["status"], message in job["failureMessage"], "endTime" in job) == ("Failed", True, True), job
    assert "importedModelArn" not in job
    assert not (shared.local.folder / "imported" / job["jobArn"].rpartition("/")[2]).exists()


def test_a_folder_that_the_role_cannot_read_fails_its_job(shared: Importing) -> None:
    shared.create("nowhere", modelDataSource={"s3DataSource": {"s3Uri": "s3://not-there/merged/"}})
    assert "Failed to download model data" in shared.ended("nowhere")["failureMessage"]
    shared.create("empty", modelDataSource={"s3DataSource": {"s3Uri": "s3://art/not-there/"}})
    assert "No S3 objects found under s3://art/not-there/" in shared.ended("empty")["failureMessage"]


def test_a_role_that_cannot_be_assumed_is_refused(shared: Importing, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Any:
        raise ClientError({"Error": {"Code": "AccessDenied", "Message": "not you"}}, "AssumeRole")

    monkeypatch.setattr(Services, "credentials", property(refuse))
    with pytest.raises(ClientError, match=r"ValidationException.*Could not assume provided IAM role"):
        shared.create("role")


def test_names_and_tokens_are_used_once(shared: Importing) -> None:
    arn = shared.create("once", {"config.json": "{}"}, clientRequestToken="again-1")
    assert shared.create("once", clientRequestToken="again-1") == arn
    shared.ended("once")
    assert shared.create("twice", clientRequestToken="again-1") == arn
    with pytest.raises(shared.client.exceptions.ConflictException, match="job name once is already in use") as error:
        shared.create("once")
    assert error.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400
    model = shared.imported("first")
    with pytest.raises(shared.client.exceptions.ConflictException, match="model name first-model"):
        shared.create("second", importedModelName="first-model")
    shared.client.delete_imported_model(modelIdentifier=model)


@pytest.mark.breaks_the_model
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda each: each.create("-bad"), "at 'jobName' failed"),
        (lambda each: each.create("bad", importedModelName="a--b"), "at 'importedModelName' failed"),
        (lambda each: each.create("bad", importedModelKmsKeyId="alias/mine"), "importedModelKmsKeyId that is an ARN"),
        (lambda each: each.client.list_imported_models(maxResults=1001), "less than or equal to 1000"),
        (lambda each: each.client.list_imported_models(nextToken="x"), "nextToken|NextToken"),
        (lambda each: each.runtime.invoke_model(modelId="a.b-v1", body=b"{}"), "It has no foundation models"),
        (
            lambda each: each.runtime.invoke_model(
                modelId=f"{BEDROCK}:imported-model/{'0' * 12}", body=b"{}", trace="ENABLED"
            ),
            "does not have trace",
        ),
    ],
)
def test_what_a_request_may_not_be(shared: Importing, call: Callable[[Importing], Any], message: str) -> None:
    with pytest.raises(ClientError, match=message) as error:
        call(shared)
    answer = error.value.response
    assert (answer["Error"]["Code"], answer["ResponseMetadata"]["HTTPStatusCode"]) == ("ValidationException", 400)


def test_there_are_no_foundation_models_and_no_other_operations(shared: Importing) -> None:
    message = r"UnknownOperationException.*It has no foundation models"
    with pytest.raises(ClientError, match=message):
        shared.runtime.converse(modelId="a.b-v1", messages=[{"role": "user", "content": [{"text": "Hello"}]}])
    with pytest.raises(ClientError, match=message):
        shared.client.list_foundation_models()


# ---- processes and invocations -------------------------------------------------------------------------------------------


def test_a_model_wakes_answers_sleeps_and_ends_with_the_emulator(start: Callable[..., Local]) -> None:
    """https://docs.aws.amazon.com/bedrock/latest/userguide/invoke-imported-model.html"""
    importing = Importing(start(server_command=CONTAINER, idle_seconds=0.5))
    model = importing.imported("line")
    with pytest.raises(ClientError, match=r"ModelNotReadyException.*Wait and try your request again") as error:
        importing.ask(model)
    assert error.value.response["ResponseMetadata"]["HTTPStatusCode"] == 429
    answer = importing.ready(model)
    assert answer["version"] == "tuned"
    assert importing.ask(model, sleep=1.2)["pid"] == answer["pid"]  # an open request keeps the process
    importing.local.until(lambda: not is_alive(answer["pid"]))
    with pytest.raises(importing.runtime.exceptions.ModelNotReadyException):
        importing.ask(model)
    again = importing.ready(model)
    assert again["pid"] != answer["pid"]
    importing.local.close()
    assert not is_alive(again["pid"])


def test_answers_errors_streams_and_their_metrics(shared: Importing, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared.imported("asked")
    pid = shared.ready(model)["pid"]
    with pytest.raises(shared.runtime.exceptions.ValidationException):
        shared.ask(model, status=400)
    with pytest.raises(shared.runtime.exceptions.ModelErrorException) as error:
        shared.ask(model, status=500)
    assert (error.value.response["originalStatusCode"], error.value.response["resourceName"]) == (500, model)
    answer = shared.runtime.invoke_model_with_response_stream(
        modelId=model,
        contentType="application/json",
        body=json.dumps({"stream": True, "documents": 1, "parts": 2, "pause": 0}),
    )
    assert answer["contentType"] == "text/event-stream"
    assert [json.loads(event["chunk"]["bytes"]) for event in answer["body"]] == [
        {"part": "tuned 0\n"},
        {"part": "tuned 1\n"},
    ]
    monkeypatch.setattr("local_app.sagemaker.passing.RESPONSE_SECONDS", 0.2)
    with pytest.raises(shared.runtime.exceptions.ModelTimeoutException):
        shared.ask(model, sleep=0.5)
    broken = shared.runtime.invoke_model_with_response_stream(
        modelId=model, body=json.dumps({"stream": True, "documents": 1, "parts": 99, "pause": 0.1})
    )
    events = iter(broken["body"])
    next(events)
    psutil.Process(pid).kill()
    with pytest.raises(EventStreamError, match="modelStreamErrorException"):
        list(events)

    def count(name: str) -> float | None:
        found = shared.local.emulator.bedrock_metrics.statistics(name, {"ModelId": model}, 0, 2**40)
        return found.get("Sum") if found else None

    names = ("Invocations", "InvocationClientErrors", "InvocationServerErrors")
    shared.local.until(lambda: [count(name) for name in names] == [2, 1, 3])
    again = shared.ready(model)["pid"]  # its process has started again
    assert again != pid
    shared.client.delete_imported_model(modelIdentifier=model)
    assert not is_alive(again)
    with pytest.raises(shared.runtime.exceptions.ResourceNotFoundException):
        shared.ask(model)


def test_kill_9_leaves_no_process_and_an_import_goes_on_after_a_restart(
    command: Callable[..., tuple[subprocess.Popen[bytes], Local]], tmp_path: Path
) -> None:
    process, local = command()
    importing = Importing(local)
    model = importing.imported("stays")
    with pytest.raises(importing.runtime.exceptions.ModelNotReadyException):
        importing.ask(model)  # the app's own server starts, with files that are no model

    def servers() -> list[psutil.Process]:
        lines = [(each, " ".join(each.info["cmdline"] or [])) for each in psutil.process_iter(["cmdline"])]
        return [each for each, line in lines if f"{tmp_path}/state/imported" in line and is_alive(each.pid)]

    local.until(servers)
    process.send_signal(signal.SIGKILL)
    process.wait()
    local.until(lambda: not servers(), 5)
    with closing(Store(tmp_path / "state/state.sqlite")) as store, store.transaction():
        job = next(each for each in store.all(imports.KIND) if each["jobName"] == "stays")
        unfinished = {key: job[key] for key in job.keys() - {"endTime", "importedModelArn"}}
        identifier = "a" * 12
        changes = {"jobName": "late", "jobArn": f"{BEDROCK}:model-import-job/{identifier}", "importedModelName": "late"}
        store.put(imports.KIND, "late", unfinished | changes | {"status": "InProgress"})
    (tmp_path / "state/imported" / f"{identifier}.part").mkdir()
    _, local = command()
    importing = Importing(local)
    assert importing.ended("late")["importedModelArn"] == f"{BEDROCK}:imported-model/{identifier}"
    names = {each["modelName"] for each in importing.client.list_imported_models()["modelSummaries"]}
    assert names == {"late", "stays-model"}
    assert not servers()  # until somebody asks


# ---- permissions ---------------------------------------------------------------------------------------------------------


def test_each_request_is_signed_and_needs_its_permission(shared: Importing) -> None:
    """https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazonbedrock.html"""
    model = shared.imported("mine", importedModelTags=[{"key": "tunedrop:prefix", "value": "tunedrop"}])
    asked: list[tuple[str, str, list[RequiredPermission]]] = []

    def authorize(signed: dict[str, Any], permissions: list[RequiredPermission]) -> None:
        assert signed["headers"]["authorization"].startswith("AWS4-HMAC-SHA256 ")
        asked.append((signed["method"], signed["path"], permissions))
        raise ServiceError("AccessDeniedException", f"not authorized to perform: {permissions[0].action}")

    with serve_http(shared.local.emulator, authorize=authorize) as server:
        url = f"http://127.0.0.1:{server.port}"
        client, runtime = (boto3.client(name, endpoint_url=url) for name in ("bedrock", "bedrock-runtime"))
        calls: dict[str, Callable[[], Any]] = {
            "GetImportedModel": lambda: client.get_imported_model(modelIdentifier="mine-model"),
            "ListImportedModels": lambda: client.list_imported_models(maxResults=5),
            "DeleteImportedModel": lambda: client.delete_imported_model(modelIdentifier=model),
            "GetModelImportJob": lambda: client.get_model_import_job(jobIdentifier="mine"),
            "InvokeModel": lambda: runtime.invoke_model(modelId=model, body=b"{}"),
            "InvokeModelWithResponseStream": lambda: runtime.invoke_model_with_response_stream(modelId=model, body=b"{}"),
        }
        for operation, call in calls.items():
            with pytest.raises(ClientError, match=f"AccessDenied.*not authorized to perform: bedrock:{operation}") as error:
                call()
            assert error.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
        request = urllib.request.Request(f"{url}/imported-models", headers={"Origin": "https://evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(request)
    quoted = model.replace(":", "%3A").replace("/", "%2F")
    context = {"aws:ResourceTag/tunedrop:prefix": "tunedrop"}
    assert asked[0] == (
        *("GET", "/imported-models/mine-model"),
        [RequiredPermission("bedrock:GetImportedModel", model, context)],
    )
    assert asked[1][2] == [RequiredPermission("bedrock:ListImportedModels", "*")]
    assert asked[4] == (
        *("POST", f"/model/{quoted}/invoke"),
        [RequiredPermission("bedrock:InvokeModel", model, context)],
    )
    shared.client.delete_imported_model(modelIdentifier=model)
