"""A twin of the jobs' container: the image's Python and all its Python packages, in which a released plan runs as it is.

Not in it: CUDA's system libraries; flash-attn and transformer-engine, which the image's Dockerfile builds with CUDA's
compiler; and SageMaker's own training toolkit, which ModelTrainer's entry point does not use.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_model

from local_app.sagemaker import jobs
from local_app.sagemaker.sandbox import Namespaces
from release.plan import build_plan
from release.target import Target

from .conftest import ROLE, Local

ROOT = Path(__file__).parents[2]
IMAGE = tomllib.loads((ROOT / "requirements/training_image.toml").read_text())
LOCK = ROOT / "trainer/requirements.lock"
# Source distributions: the first two have no wheels; the others are SageMaker's toolkit, which needs a compiler.
WITHOUT_WHEEL = ("antlr4-python3-runtime", "deepspeed")
LEFT_OUT = ("inotify-simple", "sagemaker-pytorch-training", "sagemaker-training")
CORE_TESTS = ("tests/trainer/test_shared_prefix.py", "tests/trainer/test_train.py")


class InTwin(Namespaces):
    """A job's process with the twin's Python on its PATH, and a pip that may install there, as in a container."""

    def __init__(self, python: Path):
        super().__init__()
        self._bin = python.parent

    def command(self, job: Any, ml: Path, environment: dict[str, str], *, network: bool) -> tuple[list[str], dict[str, str]]:
        command, variables = super().command(job, ml, environment, network=network)
        for name in ("PIP_NO_INDEX", "PIP_CONFIG_FILE"):
            del variables[name]
        variables |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        return command, variables | {"PATH": f"{self._bin}:/usr/local/bin:/usr/bin:/bin"}


def interpreter() -> str:
    """A Python of the image's version on this machine."""
    wanted = IMAGE["python"]
    candidates = [sys.executable, f"python{wanted}", *map(str, Path.home().glob(f".pyenv/versions/{wanted}.*/bin/python"))]
    for candidate in candidates:
        program = "import sys; print('%d.%d' % sys.version_info[:2])"
        # pyenv's shims are on the PATH for versions that are switched off, and fail.
        if path := shutil.which(candidate):
            told = subprocess.run([path, "-c", program], capture_output=True, text=True, check=False)
            if told.stdout.strip() == wanted:
                return path
    pytest.fail(f"The container's twin needs Python {wanted}, which the image has: put python{wanted} on the PATH.")


def run(*command: Any, **options: Any) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def freeze(python: Path) -> dict[str, str]:
    listed = json.loads(run(python, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"))
    return {each["name"].lower().replace("_", "-"): each["version"] for each in listed}


@pytest.fixture
def twin(tmp_path: Path) -> Iterator[Path]:
    """The twin's Python. It needs 6 GB on disk, which the fixture frees at the end."""
    folder = tmp_path / "twin"
    run(interpreter(), "-m", "venv", folder)
    python = folder / "bin/python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # PyPI's torch is the build that the image has from PyTorch's own index, with its label (+cu130).
    pins = {name: f"{name}=={version.partition('+')[0]}" for name, version in IMAGE["packages"].items()}
    wheels = [pin for name, pin in pins.items() if name not in WITHOUT_WHEEL + LEFT_OUT]
    run(*pip, "--only-binary=:all:", *wheels)
    run(*pip, "--no-build-isolation", *(pins[name] for name in WITHOUT_WHEEL))
    yield python
    shutil.rmtree(folder)


def train_and_test(local: Local, model: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Run the plan's two jobs on a tiny model and return the training's record."""
    for file in model.iterdir():
        local.s3.upload_file(str(file), "art", f"models/tiny/{file.name}")
    grpo = {"max_steps": 3, "num_generations": 8, "per_device_train_batch_size": 16, "max_completion_length": 6}
    config = {"model": "tiny", "rewards": [{"type": "contains", "text": "e"}], "grpo": grpo, "lora": {"r": 4}}
    rows = [{"id": f"r{i}", "prompt": [{"role": "user", "content": f"say {i}"}], "answer": str(i)} for i in range(12)]
    tests = {
        "evaluations": [{"id": "t1", "prompt": "say 7", "description": "7", "checks": [{"type": "contains", "text": "e"}]}]
    }
    for key, content in {
        "runs/twin/config.json": json.dumps(config),
        "runs/twin/rows/train.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "runs/twin/inference_tests.json": json.dumps(tests),
    }.items():
        local.s3.put_object(Bucket="art", Key=key, Body=content)
    given = {"run": "runs/twin/config.json", "models": "models/tiny/"}
    channels = {
        "train": given | {"training": "runs/twin/rows/"},
        "test": given | {"inference_testing": "runs/twin/inference_tests.json", "tuned": "runs/train/output/model/"},
    }

    def ended(kind: str) -> bool:
        return local.describe(kind)["TrainingJobStatus"] != "InProgress"

    for kind, sources in channels.items():
        request = plan[kind] | {"TrainingJobName": kind, "CheckpointConfig": {"S3Uri": f"s3://art/checkpoints/{kind}"}}
        request["InputDataConfig"] += [local.channel(name, f"s3://art/{key}") for name, key in sources.items()]
        local.client.create_training_job(**request)
        local.until(partial(ended, kind), seconds=600)
        job = local.describe(kind)
        assert job["TrainingJobStatus"] == "Completed", job.get("FailureReason")
    scored = json.loads(local.text("runs/test/output/model/inference.json"))
    assert {"base", "tuned"} <= scored["tests"][0].keys()
    assert local.keys("runs/train/output/model/merged/model.safetensors")
    told: dict[str, Any] = json.loads(local.text("runs/train/output/model/training.json"))
    return told


@pytest.mark.soak
def test_a_released_plan_runs_in_a_twin_of_the_container(
    start: Callable[..., Local],
    twin: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    say: Callable[[str], None],
) -> None:
    """ModelTrainer's own start-up script, with its `pip install` from PyPI; then the trainer's core tests."""
    image = freeze(twin)
    monkeypatch.setenv("SAGEMAKER_VALIDATE_ROLE", "false")  # as `python -m release` sets it
    target = Target("art", ROLE, f"763104351884.dkr.ecr.us-east-1.amazonaws.com/{IMAGE['repository']}:{IMAGE['tag']}")
    plan = build_plan(target, "us-east-1", files := tmp_path / "plan")
    monkeypatch.setattr(jobs, "find_sandbox", lambda _private: InTwin(twin))
    local = start()
    for path in (path for path in files.rglob("*") if path.is_file()):
        local.s3.upload_file(str(path), "art", f"trainer/{plan['digest']}/{path.relative_to(files)}")
    told = train_and_test(local, tiny_model.make_tiny_model(tmp_path / "tiny"), plan)

    installed = freeze(twin)
    changed = {name: version for name, version in installed.items() if image.get(name) != version}
    locked = dict(re.findall(r"^([\w.-]+)==([^\s\\]+)", LOCK.read_text().lower(), re.MULTILINE))
    assert changed.items() <= locked.items()
    assert image.keys() <= installed.keys()
    for name in ("torch", "torchvision", "triton", "numpy"):
        assert installed[name] == image[name] == IMAGE["packages"][name].partition("+")[0]
    assert (told["steps"], told["ended"]) == (3, "complete")
    assert told["versions"]["torch"].partition("+")[0] == image["torch"]
    log = (tmp_path / "state/jobs/train/job.log").read_text()
    assert f"Python {IMAGE['python']}." in log
    assert "Successfully installed" in log
    # The second job finds what the first one installed, as in an image that was built with trainer/Dockerfile.
    assert "Successfully installed" not in (tmp_path / "state/jobs/test/job.log").read_text()

    began = time.monotonic()
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/functions", "OMP_NUM_THREADS": "1"}
    passed = run(twin, "-m", "pytest", "-v", "-p", "no:cacheprovider", *CORE_TESTS, cwd=ROOT, env=environment)
    core = re.findall(r"(\d+) passed", passed.splitlines()[-1])[0]
    python = re.findall(r"Python 3[.][0-9.]+", log)[0]
    versions = ", ".join(
        f"{name} {installed[name]}" for name in ("torch", "numpy", "pandas", "pyarrow", "transformers", "trl")
    )
    say(
        f"the container's twin: {python}, {versions}; {len(image)} packages of the image, {len(changed)} by a job's pip "
        f"install; a plan's training {told['seconds']:.0f} s; {core} core tests {time.monotonic() - began:.0f} s"
    )
