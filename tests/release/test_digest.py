"""The digest of a launch plan changes with the code that a job runs, and with no other code of the repository."""

import shutil
from pathlib import Path

import pytest

import trainer
import tunedrop
from release import plan as launch_plans
from release.target import Target

REPOSITORY = Path(trainer.__file__).parents[1]
SHIPPED = {"trainer": trainer, "functions/tunedrop": tunedrop}
NOT_SHIPPED = ["functions/pipeline", "release", "tunedrop_cli", "local_app"]
TARGET = Target(
    "artifacts", "arn:aws:iam::123456789012:role/jobs", "763104351884.dkr.ecr.eu-central-1.amazonaws.com/pytorch:2.13"
)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the repository's packages, from which the release takes what it ships."""
    monkeypatch.setenv("SAGEMAKER_VALIDATE_ROLE", "false")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    for package in [*SHIPPED, *NOT_SHIPPED]:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / package, tmp_path / "copy" / package, ignore=ignored)
    for package, module in SHIPPED.items():
        monkeypatch.setattr(module, "__path__", [str(tmp_path / "copy" / package)])
    return tmp_path / "copy"


def digest(folder: Path) -> str:
    return launch_plans.build_plan(TARGET, "eu-central-1", folder)["digest"]


def change(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\n# changed\n")


def test_only_code_that_a_job_runs_changes_the_digest(copy, tmp_path):
    first = digest(tmp_path / "first")
    for package in NOT_SHIPPED:
        files = [path for path in (copy / package).rglob("*") if path.is_file()]
        assert files
        for file in files:
            change(file)
    assert digest(tmp_path / "others") == first
    change(copy / "trainer/job.py")
    second = digest(tmp_path / "trainer")
    change(copy / "functions/tunedrop/inference_tests.py")
    assert len({first, second, digest(tmp_path / "tunedrop")}) == 3


def test_a_job_gets_the_trainer_and_the_contract_alone(tmp_path):
    launch_plans.stage(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"trainer", "tunedrop", "requirements.txt"}
