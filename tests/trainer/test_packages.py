"""A job imports all packages before its work. A failed import is reported with versions and a remedy."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest

from trainer import job as entry
from trainer import packages

ROOT = Path(__file__).parents[2]
OURS = {"trainer": ROOT / "trainer", "tunedrop": ROOT / "functions/tunedrop"}


def source(module: str) -> Path | None:
    top, *rest = module.split(".")
    place = OURS[top].joinpath(*rest)
    return next((path for path in (place / "__init__.py", place.with_suffix(".py")) if path.exists()), None)


def imported(node: ast.AST) -> Iterator[str]:
    """All that a module imports when it runs, at its head or later."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.module  # no relative import
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
            yield child.module
        elif not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from imported(child)


def foreign(start: str) -> set[str]:
    """The packages, not ours, that a module and all that it imports of ours import."""
    seen, found, waiting = set(), set(), [start]
    while waiting:
        module = waiting.pop()
        path = source(module)
        if path is None or module in seen:
            continue
        seen.add(module)
        names = set(imported(ast.parse(path.read_text()))) | {module.rpartition(".")[0] or module}
        ours = {name for name in names if name.partition(".")[0] in OURS}
        waiting += ours
        found |= {name.partition(".")[0] for name in names - ours} - sys.stdlib_module_names
    return found


@pytest.mark.parametrize(
    ("stage", "module"), [("train", "trainer.train"), ("test", "trainer.test_model"), ("proofs", "trainer.proofs")]
)
def test_every_package_that_a_stage_imports_is_tried_first(stage, module):
    tried = {name.partition(".")[0] for name in (*packages.HEADS, *packages.STAGES[stage])}
    tried |= {"mlflow"}  # `trainer.trackers` tries it first in a job whose environment names a server
    wanted = {"pydantic" if name == "pydantic_core" else name for name in foreign(module)}
    assert len(wanted) >= 5
    assert wanted <= tried


def test_all_that_is_tried_is_pinned_or_the_images():
    """What the lock leaves to the image is what the image is built of."""
    names = {name.partition(".")[0] for name in packages.HEADS + sum(packages.STAGES.values(), ())}
    known = packages_distributions()
    direct = (ROOT / "trainer/requirements.txt").read_text().lower()
    assert {name for name in names if f"\n{known[name][0].lower()}==" not in direct} <= {
        "torch",
        "numpy",
        "pyarrow",
        "botocore",
        "arro3",
        "huggingface_hub",  # transformers needs it, and the lock has it
        "jsonschema_specifications",  # jsonschema needs these two
        "referencing",
        "safetensors",  # transformers and peft need it, and the lock has it
    }


def test_importing_says_how_long_it_took_and_hides_what_needs_a_driver():
    assert packages.import_all(packages.STAGES["proofs"]) < 60
    with pytest.raises(ImportError):
        __import__(packages.UNUSED)


def broken(folder: Path, name: str, error: str) -> Path:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(f"raise {error}\n")
    return folder


@pytest.mark.parametrize(
    "error", ["ImportError('pyarrow requires NumPy 2.0 or newer')", "ValueError('numpy.dtype size changed')"]
)
def test_the_reason_names_package_versions_and_what_to_do(tmp_path, monkeypatch, error):
    monkeypatch.syspath_prepend(broken(tmp_path, "does_not_fit", error))
    with pytest.raises(packages.PackageError) as raised:
        packages.import_all(["json", "does_not_fit"])
    result = entry.describe(raised.value)
    assert result.startswith(f"The container cannot import does_not_fit: {error.partition('(')[0]}: ")
    for name in ("numpy", "pyarrow", "torch"):
        assert f"{name} {version(name)}" in result
    assert "leave TrainingImageUri empty, or build an image with trainer/Dockerfile" in result
    assert "Traceback" not in result
    assert len(result) < entry.REASON_CHARACTERS


@pytest.mark.parametrize("name", ["datasets", "yaml"])
def test_a_job_ends_with_the_reason_before_its_work(tmp_path, name):
    """`yaml` is imported by the heads of our modules, `datasets` by a training when it comes to its rows."""
    environment = os.environ | {
        "PYTHONPATH": str(broken(tmp_path, name, "ImportError('pyarrow requires NumPy 2.0 or newer')")),
        "SM_OUTPUT_FAILURE": str(tmp_path / "failure"),
        "SM_HPS": "{}",
    }
    command = [sys.executable, "-m", "trainer.job", "train"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    reason = f"The container cannot import {name}: ImportError: pyarrow requires NumPy 2.0 or newer. It has Python 3."
    assert (tmp_path / "failure").read_text().startswith(reason)
    assert f"The job failed: {reason}" in done.stderr


def test_an_image_without_a_package_fails_its_build(tmp_path):
    """packages.py alone, as trainer/Dockerfile copies it."""
    (tmp_path / "packages.py").write_text(Path(packages.__file__).read_text())
    command = [sys.executable, "-I", "-S", "packages.py"]  # a Python without any package
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "The container cannot import msgspec: ModuleNotFoundError: No module named 'msgspec'. It has"
    )
    assert "no numpy" in done.stderr
