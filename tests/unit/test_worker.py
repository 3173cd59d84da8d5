"""The processes that read what cannot be trusted."""

import json

from tunedrop.sandboxed_process import Worker


def test_a_worker_gets_no_credentials_but_finds_its_libraries(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/var/lang/lib")
    file = tmp_path / "worker.py"
    file.write_text("import json, os, msgspec\nprint(json.dumps(dict(os.environ)), flush=True)\n")
    worker = Worker(file, seconds=30)
    assert worker.process.stdout is not None
    try:
        environment = json.loads(worker.process.stdout.readline())
    finally:
        worker.close()
    assert environment["LD_LIBRARY_PATH"] == "/var/lang/lib"
    assert not [name for name in environment if name.startswith("AWS")]


def test_a_worker_is_ended_when_its_time_is_over(tmp_path):
    file = tmp_path / "worker.py"
    file.write_text("while True: pass\n")
    worker = Worker(file, seconds=0.2)
    assert worker.process.stdout is not None
    try:
        assert worker.process.stdout.read() == b""
        assert worker.process.wait() < 0
    finally:
        worker.close()
