"""A job loads a model of the hub at its commit, from a folder of its own."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MAIN, OLD = "a" * 40, "b" * 40
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "README.md": b"---\nlicense: mit\n---\n",
    "model.bin": b"pickle",
}


def content(file: str, commit: str) -> bytes:
    return json.dumps({"commit": commit}).encode() if file == "config.json" else FILES[file]


def oid(body: bytes) -> str:
    """Return git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


LOCATE = "import sys; from trainer.models import locate; print(locate(sys.argv[1]))"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def answer(self) -> None:
        parts = self.path.partition("?")[0].split("/")
        match parts[1:]:
            case ["api", "models", "org", "tiny" | "pickled", "revision", revision]:
                self.send(json.dumps({"id": "org/model", "sha": {"main": MAIN}[revision]}).encode())
            case ["api", "models", "org", "tiny" | "pickled" as name, "tree", commit]:
                names = [file for file in FILES if name == "tiny" or not file.endswith(".safetensors")]
                contents = {file: content(file, commit) for file in names}
                tree = [
                    {"type": "file", "path": file, "size": len(body), "oid": oid(body)} for file, body in contents.items()
                ]
                self.send(json.dumps(tree).encode())
            case ["org", "tiny" | "pickled", "resolve", commit, file]:
                body = content(file, commit)
                self.send(body, {"ETag": f'"{oid(body)}"', "X-Repo-Commit": commit})
            case _:
                self.send_error(404)

    def send(self, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub_url() -> Iterator[str]:
    """A hub with the models `org/tiny`, in two commits, and `org/pickled`, without safetensors."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def locate(model: str, hub_url: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'functions'}", "HF_ENDPOINT": hub_url, "HF_HOME": str(home)}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", LOCATE, model]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("model", "commit"), [(f"org/tiny@{OLD}", OLD), (f"org/tiny@{MAIN}", MAIN), ("org/tiny", MAIN)])
def test_a_model_is_downloaded_at_its_commit_and_without_pickles(
    hub_url: str, tmp_path: Path, model: str, commit: str
) -> None:
    done = locate(model, hub_url, tmp_path)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert json.loads((folder / "config.json").read_bytes()) == {"commit": commit}


@pytest.mark.parametrize(
    ("model", "reason"), [("org/none", "cannot be downloaded"), ("org/pickled", "has no *.safetensors")]
)
def test_a_model_that_cannot_be_loaded_ends_the_job_with_the_reason(
    hub_url: str, tmp_path: Path, model: str, reason: str
) -> None:
    done = locate(model, hub_url, tmp_path)
    assert "JobError" in done.stderr
    assert f"The model '{model}' {reason}" in done.stderr
