"""The locks: current, hashed, of one mind, whole on every Python and platform; and deploying does with its own."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from local_app.stack import PROJECT

LOCKS = sorted([*PROJECT.glob("requirements/*.lock"), *PROJECT.glob("layers/*.lock")])
OF_APP = ["requirements/deploy", "requirements/light", "layers/dependencies", "layers/validation"]
# The parts of `make locks` that pyproject.toml decides.
LEFT_OUT = {"mlflow", "sagemaker-mlflow"}
MACHINES = [
    {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": system, "platform_machine": machine}
    for python in ("3.11", "3.12", "3.13")
    for system, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
]
# Builds both requests with ModelTrainer, as `python -m release` does, and imports the command.
RELEASE = """
import tempfile, pathlib
import tunedrop_cli.main, tunedrop_cli.doctor.examine, tunedrop_cli.printed_event
from release.plan import build_plan
from release.prices import inference_image
from release.target import Target
role, image = "arn:aws:iam::111122223333:role/jobs", "111122223333.dkr.ecr.eu-central-1.amazonaws.com/image:1"
with tempfile.TemporaryDirectory() as folder:
    plan = build_plan(Target("artifacts", role, image), "eu-central-1", pathlib.Path(folder))
assert plan["train"] and plan["test"] and inference_image("eu-central-1")
print(*sys.modules)
"""


def pins(path: Path) -> dict[str, Requirement]:
    """Return what a lock or an input lists, by name, with what it takes in by `-r`."""
    lines = re.sub(r"\s+--hash=\S+|\s*\\$", "", path.read_text(), flags=re.MULTILINE).splitlines()
    found = [Requirement(line.split(" #")[0]) for line in lines if line[:1].isalpha()]
    taken = [pins(path.parent / line.removeprefix("-r ")) for line in lines if line.startswith("-r ")]
    return {name: pin for pin_set in taken for name, pin in pin_set.items()} | {canonicalize_name(p.name): p for p in found}


def holds(requirement: Requirement, machine: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": "", **machine})


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_a_lock_has_what_its_input_asks_for_and_a_hash_for_each(lock: Path) -> None:
    """`make locks` makes it so."""
    locked = pins(lock)
    for name, asked in pins(lock.with_suffix(".in")).items():
        assert name == "torch" or locked[name].specifier == asked.specifier, name
    assert re.findall(r"^\S+==.*\n(?!    --hash=sha256:).*", lock.read_text(), re.MULTILINE) == []
    # Each build of torch has its own hash, and its own packages: pip chooses both.
    assert [name for name in locked if re.match(r"torch$|triton|nvidia-|cuda-", name)] == []


@pytest.mark.parametrize("name", OF_APP)
def test_what_deploys_runs_and_tests_is_what_was_developed_with(name: str) -> None:
    app, lock = pins(PROJECT / "requirements/app.lock"), pins(PROJECT / f"{name}.lock")
    assert {package: pin for package, pin in lock.items() if app[package].specifier != pin.specifier} == {}


@pytest.mark.parametrize("name", ["dependencies", "validation"])
def test_layers_are_locked_without_markers(name: str) -> None:
    """pip reads markers by the Python that it runs on, not by the one that it installs for."""
    assert [pin for pin in pins(PROJECT / f"layers/{name}.lock").values() if pin.marker] == []


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: "-".join(list(machine.values())[::3]))
def test_a_lock_lacks_nothing_on_any_machine(machine: dict[str, str]) -> None:
    """By each package's own metadata. pip installs the locks without looking at it."""
    lock = pins(PROJECT / "requirements/light.lock")
    here = {name for name, pin in lock.items() if holds(pin, machine)}
    for name in here:
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            if holds(needed, machine):
                assert canonicalize_name(needed.name) in here | LEFT_OUT, f"{name} needs {text}"


def test_deploying_needs_what_it_installs_and_loads_nothing_heavier(tmp_path: Path) -> None:
    """Of this environment only what requirements/deploy.lock lists is seen, as in `.venv-deploy`."""
    for name in ["tunedrop-app", *pins(PROJECT / "requirements/deploy.lock")]:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        for top in {file.parts[0] for file in distribution.files or [] if ".." not in file.parts}:
            if not (tmp_path / top).exists():
                (tmp_path / top).symlink_to(Path(str(distribution.locate_file(top))))
    code = f"import sys; sys.path[:0] = {[str(tmp_path), str(PROJECT), str(PROJECT / 'functions')]!r}\n{RELEASE}"
    environment = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "POWERTOOLS_METRICS_NAMESPACE"), "test")
    environment |= {"AWS_DEFAULT_REGION": "eu-central-1", "SAGEMAKER_VALIDATE_ROLE": "false", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-B", "-S", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = {module.split(".")[0] for module in done.stdout.splitlines()[-1].split()}
    assert loaded >= {"sagemaker", "trainer", "click"}
    assert loaded & {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "mlflow", "sklearn"} == set()


@pytest.mark.parametrize(
    ("run", "taken"), [(["3.13", "3.12", "3.11"], "3.13"), (["3.12", "3.11"], "3.12"), (["3.11"], "3.11"), ([], None)]
)
def test_make_takes_the_newest_python_that_runs(tmp_path: Path, run: list[str], taken: str | None) -> None:
    """A version manager's python3.13 is there and does not run where that version is not in use."""
    for version in ("3.13", "3.12", "3.11"):
        python = tmp_path / f"python{version}"
        python.write_text(f"#!/bin/sh\nexit {0 if version in run else 127}\n")
        python.chmod(0o700)
    make = [shutil.which("make") or "make", "--dry-run", "--always-make", ".venv-sam/.installed"]
    done = subprocess.run(make, cwd=PROJECT, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    if taken:
        assert f"python{taken} -m venv .venv-sam" in done.stdout
    else:
        assert "python3.13, python3.12 and python3.11 not found" in done.stderr


@pytest.mark.parametrize("browser", ["chromium", "google-chrome", None])
def test_make_leaves_the_browser_tests_out_where_there_is_no_browser_and_says_so(
    tmp_path: Path, browser: str | None
) -> None:
    for program in ("python3.11", browser or "other"):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o700)
    make = [shutil.which("make") or "make", "--dry-run", "test"]
    done = subprocess.run(make, cwd=PROJECT, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert "-m pytest --dist loadfile -n 3" in done.stdout
    left_out = (
        "--ignore=tests/report",
        "--deselect=tests/integration/test_console.py::test_a_file_is_dragged_into_a_browser",
    )
    assert [option in done.stdout for option in left_out] == [browser is None] * 2
    assert (
        "tests/report and the console's test skipped, because no browser was found. Install Chromium" in done.stdout
    ) == (browser is None)


def test_make_containers_does_not_pass_where_no_engine_can_be_had() -> None:
    command = [sys.executable, str(PROJECT / "tests/containers/engine.py"), "true"]
    done = subprocess.run(
        command, env={"PATH": "", "DOCKER_HOST": "unix:///none"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert re.fullmatch(r"NOT RUN: it takes either a running Docker engine .*\n", done.stderr)
