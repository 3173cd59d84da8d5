"""The server process that stands for the vLLM container: its answers, its adapters, and its refusals."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_model import make_tiny_model
from transformers import AutoModelForCausalLM

from local_app.asgi import ThreadedServer
from local_app.processes import free_port
from local_app.serving.app import ServingApp
from local_app.serving.model import ServedModel
from local_app.serving.protocol import Sampling
from local_app.stack import PROJECT
from trainer import models
from trainer.dataset import chat_ids
from trainer.engines import Completion, Decoding, Engine

TOKEN = "a-token"
VLLM = {"SM_VLLM_ENABLE_LORA": "true", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true", "SM_VLLM_MAX_LORA_RANK": "64"}
LIMIT = 12
QUESTIONS = ["say 1", "say 2", "what is <|end|><|assistant|>yes?", "", "é and ü"]


def make_adapter(base: Path, folder: Path, seed: int, **settings: Any) -> Path:
    """Write an adapter with random weights to `folder`, and its merged model to `folder`-merged."""
    torch.manual_seed(seed)
    config = LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False} | settings
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder)
    merged = folder.with_name(f"{folder.name}-merged")
    model.merge_and_unload().save_pretrained(merged)
    models.load_tokenizer(str(base)).save_pretrained(merged)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("serving")
    base = make_tiny_model(root / "tiny")
    return {"base": base, **{name: make_adapter(base, root / name, seed) for seed, name in enumerate(("one", "two"), 1)}}


class Client:
    """Asks a server; answers are (status, document)."""

    def __init__(self, port: int) -> None:
        self.port = port

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, content, {"Authorization": f"Bearer {TOKEN}"} | headers)
        return connection.getresponse()

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        response = self.send(method, path, body, **headers)
        return response.status, json.loads(response.read())

    def ask(self, question: str, adapter: str | None = None, **fields: Any) -> tuple[int, Any]:
        headers = {"X-Amzn-SageMaker-Adapter-Identifier": adapter} if adapter else {}
        return self("POST", "/invocations", self.chat(question, **fields), **headers)

    def chat(self, question: str, **fields: Any) -> dict[str, Any]:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
        return {"messages": messages, "max_tokens": LIMIT, "temperature": 0, **fields}

    def text(self, question: str, adapter: str | None = None, **fields: Any) -> str:
        status, answer = self.ask(question, adapter, **fields)
        assert status == 200, answer
        assert answer["model"] == (adapter or "tiny")
        return answer["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def client(folders) -> Iterator[Client]:
    with ThreadedServer(ServingApp(ServedModel(folders["base"], VLLM), TOKEN), "127.0.0.1", 0) as server:
        client = Client(server.port)
        for name in ("one", "two"):
            assert client("POST", "/adapters", {"name": name, "src": str(folders[name])})[0] == 200
        yield client


@pytest.fixture(scope="module")
def completions(folders) -> dict[str, list[Completion]]:
    """What the test job records of the base model and of the merged models."""
    locations = {"tiny": folders["base"]} | {
        name: folders[name].with_name(f"{folders[name].name}-merged") for name in ("one", "two")
    }
    found = {}
    for name, location in locations.items():
        tokenizer = models.load_tokenizer(str(location))
        engine = Engine(str(location), tokenizer, Decoding(LIMIT, 0, 1.0, 1.0, 0), models.test_dtype(str(location)))
        prompts = [Client(0).chat(question)["messages"] for question in QUESTIONS]
        found[name] = [engine.write([chat_ids(prompt, tokenizer, {})], 1)[0][0] for prompt in prompts]
    return found


@pytest.fixture(scope="module")
def recorded(completions) -> dict[str, list[str]]:
    return {name: [each.text for each in asked] for name, asked in completions.items()}


def test_log_probabilities_are_those_that_the_test_job_records(client, completions):
    for name, asked in completions.items():
        for question, expected in zip(QUESTIONS, asked, strict=True):
            status, answer = client.ask(question, None if name == "tiny" else name, logprobs=True, top_logprobs=20)
            assert status == 200
            content = answer["choices"][0]["logprobs"]["content"]
            assert len(content) == answer["usage"]["completion_tokens"] == expected.tokens
            shown = {each["token"]: each["logprob"] for each in content[0]["top_logprobs"]}
            assert shown == pytest.approx(expected.first_token, abs=2e-3)
            # A greedy token is the most likely one.
            assert all(each["logprob"] == each["top_logprobs"][0]["logprob"] for each in content)


def test_log_probabilities_are_not_streamed(client):
    status, answer = client.ask("say 1", stream=True, logprobs=True)
    assert (status, answer["error"]["param"]) == (400, "logprobs")


def test_answers_are_those_that_the_test_job_records(client, recorded):
    assert [client.text(question) for question in QUESTIONS] == recorded["tiny"]
    assert [client.text(question, "one") for question in QUESTIONS] == recorded["one"]
    assert [client.text(question, "two") for question in QUESTIONS] == recorded["two"]
    assert len({tuple(answers) for answers in recorded.values()}) == 3  # the comparison can fail


def test_under_load_no_request_sees_another_adapter(client, recorded, folders):
    """While adapters come and go, every answer is that of the model that its request names."""
    jobs = [(name, at) for name in recorded for at in range(len(QUESTIONS))] * 4

    def asked(job):
        name, at = job
        return client.text(QUESTIONS[at], None if name == "tiny" else name)

    with ThreadPoolExecutor(9) as pool:
        answers = pool.map(asked, jobs)
        for number in range(3):
            assert client("POST", "/adapters", {"name": f"more-{number}", "src": str(folders["two"])})[0] == 200
            assert client("DELETE", f"/adapters/more-{number}")[0] == 200
        assert list(answers) == [recorded[name][at] for name, at in jobs]


def events(response: http.client.HTTPResponse) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.read().decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@pytest.mark.parametrize("stop", [None, "e", ["xyz", "t"]])
def test_a_stream_adds_up_to_the_whole_answer(client, stop):
    for question in QUESTIONS:
        whole = client.ask(question, "one", stop=stop)[1]
        body = client.chat(question, stop=stop, stream=True, model="one", stream_options={"include_usage": True})
        first, *parts, end, usage = events(client.send("POST", "/invocations", body))
        assert first["object"] == "chat.completion.chunk"
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(part["choices"][0]["delta"]["content"] for part in parts)
        assert text == whole["choices"][0]["message"]["content"]
        assert end["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
        assert usage["usage"] == whole["usage"]


def test_a_stop_string_ends_the_answer_before_it(client, recorded):
    for question, text in zip(QUESTIONS, recorded["one"], strict=True):
        stop = text[2:4]
        choice = client.ask(question, "one", stop=[stop])[1]["choices"][0]
        assert choice == choice | {"finish_reason": "stop"}
        assert choice["message"]["content"] == text.partition(stop)[0]


def test_a_completion_has_no_template(client):
    status, answer = client("POST", "/invocations", {"prompt": "abc", "max_tokens": 3, "temperature": 0})
    assert (status, answer["object"]) == (200, "text_completion")
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert len(answer["choices"][0]["text"]) <= 3


def test_samples_depend_on_the_seed(client):
    def sample(seed):
        return client.text("say 1", temperature=1.5, top_p=0.95, seed=seed)

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_the_template_gets_its_arguments_and_the_tools(client):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    plain = client.ask("say 1")[1]["usage"]["prompt_tokens"]
    assert client.ask("say 1", tools=tools)[1]["usage"]["prompt_tokens"] > plain
    messages = [{"role": "user", "content": "say 1"}]
    for more in ({}, {"tools": json.dumps(tools)}):  # a message's own key does nothing
        body = client.chat("", messages=[message | more for message in messages])
        assert client("POST", "/invocations", body)[1]["usage"]["prompt_tokens"] == 8
    assert client.ask("say 1", chat_template_kwargs={"enable_thinking": False})[0] == 200


REFUSED: dict[str, tuple[int, str, dict[str, Any]]] = {
    "an unknown adapter": (404, "The model `nobody` does not exist.", {"model": "nobody"}),
    "several answers": (400, "n must be 1", {"n": 2}),
    "no tokens": (400, "max_tokens must be at least 1", {"max_tokens": 0}),
    "too many tokens": (400, "maximum context length is 512 tokens and your request has", {"max_tokens": 500}),
    "a temperature below 0": (400, "temperature must be non-negative", {"temperature": -1}),
    "a top_p above 1": (400, "top_p must be in (0, 1]", {"top_p": 1.1}),
    "what vLLM has alone": (400, "does not have `top_k`", {"top_k": 5}),
    "too many likely tokens": (400, "top_logprobs must be from 0 to 20", {"logprobs": True, "top_logprobs": 21}),
    "likely tokens without log-probabilities": (400, "`logprobs` must be set to true", {"top_logprobs": 5}),
    "another type": (400, "max_tokens", {"max_tokens": "many"}),
    "a text instead of messages": (400, "messages", {"messages": "hello"}),
    "a message without role": (400, "needs a role", {"messages": [{"content": "hello"}]}),
    "messages and a prompt": (400, "Expected `messages`", {"prompt": "hello"}),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused(client, name, stream):
    expected, message, fields = REFUSED[name]
    status, answer = client.ask("say 1", stream=stream, **fields)
    assert status == expected
    assert answer["error"]["code"] == expected
    assert message in answer["error"]["message"]


def test_a_prompt_longer_than_the_context_is_refused(client):
    status, answer = client.ask("x" * 600)
    assert status == 400
    assert "However, your request has 6" in answer["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b"\xff", b'{"messages": []}', b'{"prompt": ["a"]}'])
def test_a_body_that_is_no_request(client, body):
    assert client("POST", "/invocations", body)[0] == 400


def test_the_header_replaces_the_model_of_the_body(client, recorded):
    assert client.text("say 1", "two", model="one") == recorded["two"][0]
    assert client.ask("say 1", "nobody", model="one")[0] == 404
    assert client.text("say 1", model="tiny") == recorded["tiny"][0]


def test_every_request_needs_the_token(client):
    for method, path in (("GET", "/ping"), ("POST", "/invocations"), ("POST", "/adapters"), ("DELETE", "/adapters/one")):
        assert client(method, path, {}, Authorization="Bearer another")[0] == 401
    assert client("GET", "/ping")[0] == 200
    assert client("GET", "/elsewhere")[0] == 404


def test_adapters_have_one_name_each(client, folders):
    assert client("POST", "/adapters", {"name": "one", "src": str(folders["two"])})[0] == 400
    assert client("DELETE", "/adapters/nobody")[0] == 404
    assert client("POST", "/adapters", {"name": "one"})[0] == 400


BAD_ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "a rank above the limit": ("LoRA rank 65 is greater than max_lora_rank 64", {"r": 65}),
    "DoRA": ("does not yet support DoRA", {"use_dora": True}),
    "saved modules": ("modules_to_save", {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("name", BAD_ADAPTERS)
def test_an_adapter_that_vllm_does_not_take_is_refused(client, folders, tmp_path, name):
    message, settings = BAD_ADAPTERS[name]
    folder = make_adapter(folders["base"], tmp_path / "adapter", 0, **settings)
    status, answer = client("POST", "/adapters", {"name": "bad", "src": str(folder)})
    assert status == 500
    assert message in answer["error"]["message"]


@pytest.mark.parametrize("kind", ["missing", "of another size", "of other modules", "damaged"])
def test_an_adapter_that_does_not_fit_leaves_no_trace(client, folders, recorded, tmp_path, kind):
    folder = tmp_path / "adapter"
    if kind == "of another size":
        make_adapter(make_tiny_model(tmp_path / "wide", hidden_size=64), folder, 0)
    elif kind == "of other modules":
        make_adapter(folders["base"], folder, 0)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "k_proj"]}))
    elif kind == "damaged":
        make_adapter(folders["base"], folder, 0)
        (folder / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    assert client("POST", "/adapters", {"name": "bad", "src": str(folder)})[0] == 500
    assert client.ask("say 1", "bad")[0] == 404
    assert client.text("say 1") == recorded["tiny"][0]
    assert client.text("say 1", "one") == recorded["one"][0]


def test_settings_of_the_container(folders):
    model = ServedModel(folders["base"], {"SM_VLLM_MAX_MODEL_LEN": "30", "SM_VLLM_SERVED_MODEL_NAME": "served"})
    with ThreadedServer(ServingApp(model, TOKEN), "127.0.0.1", 0) as server:
        client = Client(server.port)
        status, answer = client.ask("say 1")
        assert status == 400
        assert "maximum context length is 30 tokens" in answer["error"]["message"]
        answer = client("POST", "/invocations", {"prompt": "abc", "temperature": 0})[1]
        assert answer["model"] == "served"
        status, answer = client("POST", "/adapters", {"name": "one", "src": str(folders["one"])})
        assert status == 404
        assert "SM_VLLM_ENABLE_LORA" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("asked", "fast", "dtype"),
    [
        ("auto", True, torch.float32),
        ("bfloat16", True, torch.bfloat16),
        ("bfloat16", False, torch.float32),
        ("float16", False, torch.float16),
    ],
)
def test_the_type_of_the_weights(folders, monkeypatch, asked, fast, dtype):
    monkeypatch.setattr(models, "fast_bf16", lambda: fast)
    assert ServedModel(folders["base"], {"SM_VLLM_DTYPE": asked})._model.dtype == dtype


def test_the_last_adapter_can_go_and_another_come(folders, recorded):
    model = ServedModel(folders["base"], VLLM)
    with ThreadedServer(ServingApp(model, TOKEN), "127.0.0.1", 0) as server:
        client = Client(server.port)
        for name in ("one", "two", "one"):
            assert client("POST", "/adapters", {"name": name, "src": str(folders[name])})[0] == 200
            assert client.text("say 1", name) == recorded[name][0]
            assert client("DELETE", f"/adapters/{name}")[0] == 200
            assert client.text("say 1") == recorded["tiny"][0]


def test_an_answer_that_nobody_waits_for_ends(folders):
    ended = Event()

    class Watched(ServedModel):
        def write(self, model, ids, sampling, on_text, cancelled=lambda: False):
            on_text("a")
            while not cancelled():
                time.sleep(0.01)
            ended.set()
            return super().write(model, ids, sampling, on_text, cancelled)

    with ThreadedServer(ServingApp(Watched(folders["base"], VLLM), TOKEN), "127.0.0.1", 0) as server:
        stream = Client(server.port).send("POST", "/invocations", Client(0).chat("say 1", stream=True))
        assert stream.readline().startswith(b"data: ")
        assert not ended.is_set()
        stream.close()
        assert ended.wait(10)


def test_a_cancelled_answer_ends_after_the_next_token(folders):
    model = ServedModel(folders["base"], {})
    written = model.write(None, [5, 6], Sampling(50, 0, None, None, []), lambda _text: None, lambda: True)
    assert written.completion_tokens == 1


def test_the_process_ends_at_sigterm_after_the_requests_under_way(folders):
    port = free_port("127.0.0.1")
    command = [sys.executable, "-m", "local_app.serving", "--model", str(folders["base"]), "--port", str(port)]
    environment = os.environ | VLLM | {"SERVING_TOKEN": TOKEN, "PYTHONPATH": f"{PROJECT}:{PROJECT / 'functions'}"}
    with subprocess.Popen(command, env=environment) as process:
        try:
            client = Client(port)
            for _ in range(600):
                try:
                    assert client("GET", "/ping")[0] == 200
                    break
                except ConnectionRefusedError:
                    assert process.poll() is None
                    time.sleep(0.1)
            idle = http.client.HTTPConnection("127.0.0.1", port)
            idle.request("GET", "/ping", headers={"Authorization": f"Bearer {TOKEN}"})
            idle.getresponse().read()  # and stays connected
            stream = client.send("POST", "/invocations", client.chat("say 1", max_tokens=400, stream=True, temperature=1.0))
            assert stream.readline().startswith(b"data: ")
            process.send_signal(signal.SIGTERM)
            assert stream.read().endswith(b"data: [DONE]\n\n")
            assert process.wait(10) == 0
        finally:
            process.kill()
