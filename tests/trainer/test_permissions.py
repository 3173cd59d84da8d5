"""Permissions of a job's rewards: from the environment that the launch plan wrote, and the channel with Python files."""

import pytest

from trainer.permissions import job_permissions
from tunedrop.rewards import NO_PERMISSIONS, REWARD_ENVIRONMENT


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in (*REWARD_ENVIRONMENT, "SM_CHANNEL_REWARDS"):
        monkeypatch.delenv(name, raising=False)


def test_an_empty_environment_allows_nothing():
    given = job_permissions()
    assert (given.functions, given.judge_model, given.hosts, given.allow_code, given.python_folder) == (
        (NO_PERMISSIONS.functions, NO_PERMISSIONS.judge_model, NO_PERMISSIONS.hosts, False, None)
    )


def test_the_environment_and_the_channel_grant_permissions(monkeypatch, tmp_path):
    monkeypatch.setenv("SM_CHANNEL_REWARDS", str(tmp_path))
    assert job_permissions().python_folder is None
    for name, value in {"REWARD_FUNCTION_ARNS": "a,b", "ALLOW_CODE_REWARDS": "true", "ALLOW_PYTHON_REWARDS": "true"}.items():
        monkeypatch.setenv(name, value)
    given = job_permissions()
    assert (given.functions, given.allow_code, given.python_folder) == (("a", "b"), True, tmp_path)


def test_clients_use_the_jobs_region_and_are_created_once(monkeypatch):
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    client = job_permissions().client
    assert client is not None
    assert client("lambda").meta.region_name == "eu-central-1"
    assert client("lambda") is client("lambda")
