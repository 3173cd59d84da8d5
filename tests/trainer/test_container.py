"""A job whose torch cannot use the GPUs ends at once with the reason."""

import sys
from types import SimpleNamespace

import pytest

from trainer import container, test_model, train
from trainer.job import JobError

TOO_OLD = "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver."


def torch_that(*, available: bool, error: str = "", capability: tuple[int, int] = (8, 6), cuda: str | None = "13.0"):
    def init() -> None:
        if error:
            raise RuntimeError(error)

    return SimpleNamespace(
        __version__="2.13.0+cu130",
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(
            init=init,
            is_available=lambda: available,
            get_arch_list=lambda: ["sm_75", "sm_80", "sm_90a", "sm_100f", "sm_120", "compute_120"],
            get_device_capability=lambda: capability,
            get_device_name=lambda: "Tesla V100-SXM2-16GB",
        ),
    )


@pytest.fixture
def instance(monkeypatch, tmp_path):
    """Make the job's instance: SM_NUM_GPUS, its torch, and what NVIDIA's driver says of itself in /proc."""

    def make(count: int, torch: SimpleNamespace, driver: str = "") -> None:
        monkeypatch.setenv("SM_NUM_GPUS", str(count))
        monkeypatch.setitem(sys.modules, "torch", torch)
        monkeypatch.setattr(container, "DRIVER", tmp_path / "version")
        if driver:
            container.DRIVER.write_text(f"NVRM version: {driver} Fri Nov  7 02:05:31 UTC 2025\nGCC version:  gcc 7.3.1\n")

    return make


# As open and as closed kernel modules have it.
@pytest.mark.parametrize(
    "driver",
    [
        "NVIDIA UNIX x86_64 Kernel Module  550.163.01 ",
        "NVIDIA UNIX Open Kernel Module for x86_64  550.163.01  Release Build  (dvs-builder) ",
    ],
)
def test_a_driver_that_is_too_old_is_named(instance, driver):
    instance(4, torch_that(available=False, error=TOO_OLD), driver)
    with pytest.raises(JobError) as raised:
        container.check_gpus()
    result = str(raised.value)
    assert result.startswith(
        "The instance has 4 GPU(s), but torch can use none: The NVIDIA driver on your system is too old"
    )
    assert (
        "torch 2.13.0+cu130 is built for CUDA 13.0, which needs driver 580.65.06 or newer. NVIDIA's driver is 550.163.01."
        in result
    )


def test_no_driver_and_no_cuda_are_said(instance):
    instance(1, torch_that(available=False))
    with pytest.raises(JobError, match=r"can use none: torch gives no reason\. .* NVIDIA's driver is missing"):
        container.check_gpus()
    instance(1, torch_that(available=False, cuda=None))
    with pytest.raises(JobError, match=r"built without CUDA, and NVIDIA's driver is missing: choose an image for GPUs"):
        container.check_gpus()


def test_a_gpu_that_is_too_old_is_named(instance):
    instance(1, torch_that(available=True, capability=(7, 0)))
    with pytest.raises(JobError, match=r"a Tesla V100-SXM2-16GB of compute capability 7\.0, .* is built for 7\.5 and newer"):
        container.check_gpus()


@pytest.mark.parametrize("capability", [(7, 5), (8, 6), (12, 0)])
def test_gpus_that_torch_can_use_are_fine(instance, capability):
    instance(8, torch_that(available=True, capability=capability))
    container.check_gpus()


def test_a_job_without_gpus_does_not_ask(instance):
    instance(0, SimpleNamespace())
    container.check_gpus()


@pytest.mark.parametrize("stage", [train, test_model])
def test_both_jobs_ask_first(job, monkeypatch, stage):
    """This machine's own torch, on an instance that has a GPU as far as nvidia-smi can tell; no config, no rows."""
    import torch

    if torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("SM_NUM_GPUS", "1")
    with pytest.raises(SystemExit):
        stage.main(*([[]] if stage is train else []))
    assert job.failure().startswith("The instance has 1 GPU(s), but torch can use none: ")
