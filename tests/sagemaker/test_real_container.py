"""The emulator as a process with the app's own server: real weights, real adapters, kill -9 and a start after it."""

from __future__ import annotations

import json
import signal
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from botocore.exceptions import ClientError
from components import Serving
from tiny_model import make_tiny_model

QUESTION: dict[str, Any] = {"messages": [{"role": "user", "content": "What is 4 + 3?"}], "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model, and archives of two LoRA adapters with random weights, and of one that vLLM's rank limit excludes."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("files")
    found = {"model": make_tiny_model(root / "model")}
    for seed, (name, rank) in enumerate({"one": 4, "two": 4, "wide": 65}.items()):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(found["model"]), config).save_pretrained(root / name)
        found[name] = root / f"{name}.tar.gz"
        with tarfile.open(found[name], "w:gz") as archive:
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                archive.add(root / name / file, arcname=file)
    return found


def specification(uri: str) -> dict[str, Any]:
    return {"BaseInferenceComponentName": "base", "Container": {"ArtifactUrl": uri}}


def text(serving: Serving, component: str) -> str:
    answer: str = serving.ask(component, **QUESTION)["choices"][0]["message"]["content"]
    return answer


def streamed(serving: Serving, component: str) -> str:
    answer = serving.runtime.invoke_endpoint_with_response_stream(
        EndpointName="ep", InferenceComponentName=component, Body=json.dumps(QUESTION | {"stream": True})
    )
    lines = b"".join(event["PayloadPart"]["Bytes"] for event in answer["Body"]).decode().splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def servers(folder: Path) -> list[psutil.Process]:
    """The server processes of this test's components."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if f"{folder}/state/components" in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


@pytest.mark.soak  # test_components has the change, with a stand-in for the server
def test_real_servers_answer_change_over_and_survive_a_kill(
    command: Callable[..., tuple[subprocess.Popen[bytes], Any]], files: dict[str, Path], tmp_path: Path
) -> None:
    process, local = command()
    serving = Serving(local, None)
    for file in files["model"].iterdir():
        serving.s3.upload_file(str(file), "art", f"models/tiny/{file.name}")
    urls = {}
    for name in ("one", "two", "wide"):
        serving.s3.upload_file(str(files[name]), "art", f"real/{name}.tar.gz")
        urls[name] = f"s3://art/real/{name}.tar.gz"
    serving.endpoint()
    container = serving.container("s3://art/models/tiny/", SM_VLLM_MAX_LORA_RANK="64")
    serving.client.create_model(ModelName="tiny", PrimaryContainer=container)
    serving.base(model="tiny", wait=False)
    assert serving.settled("base", 90)["InferenceComponentStatus"] == "InService"
    create = serving.client.create_inference_component
    for name in ("one", "wide"):
        create(InferenceComponentName=name, EndpointName="ep", Specification=specification(urls[name]))
    assert serving.settled("one", 60)["InferenceComponentStatus"] == "InService"
    assert "LoRA rank 65 is greater than max_lora_rank 64" in serving.settled("wide", 60)["FailureReason"]
    answers = {"base": text(serving, "base"), "one": text(serving, "one")}
    assert streamed(serving, "one") == answers["one"]
    serving.client.update_inference_component(InferenceComponentName="one", Specification=specification(urls["two"]))
    assert "FailureReason" not in serving.settled("one", 60)
    answers["two"] = text(serving, "one")
    assert len(set(answers.values())) == 3
    [server] = servers(tmp_path)
    assert server.net_connections()[0].laddr.ip == "127.0.0.1"

    process.send_signal(signal.SIGKILL)
    process.wait()
    local.until(lambda: not servers(tmp_path), 5)
    _, local = command()
    again = Serving(local, None)
    assert again.describe("wide")["InferenceComponentStatus"] == "Failed"
    local.until(lambda: again.describe("base")["RuntimeConfig"]["CurrentCopyCount"] == 1, 90)
    assert (text(again, "base"), text(again, "one")) == (answers["base"], answers["two"])
    again.scale("base", 0)
    local.until(lambda: not servers(tmp_path))
    with pytest.raises(ClientError, match="has no capacity"):
        text(again, "one")
