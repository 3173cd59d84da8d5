"""The training image: a job's installation does not change its packages, and all files name the same image."""

import json
import re
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import botocore.session
import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

from release.prices import inference_image

ROOT = Path(__file__).parents[2]
IMAGE = tomllib.loads((ROOT / "requirements/training_image.toml").read_text())
NAME = f"{IMAGE['repository']}:{IMAGE['tag']}"
LOCK = ROOT / "trainer/requirements.lock"
DOCKERFILE = (ROOT / "trainer/Dockerfile").read_text()


def pins(path: Path) -> dict[str, str]:
    return {
        canonicalize_name(name): each for name, each in re.findall(r"^([\w.-]+)==([^\s\\]+)", path.read_text(), re.MULTILINE)
    }


# ---- what pip does in the image --------------------------------------------------------------------------------------


def image_of(folder: Path, **changes: str) -> Path:
    """An environment with the image's packages in it, as far as pip looks at them; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for name, installed in (IMAGE["packages"] | changes).items():
        about = site / f"{name.replace('-', '_')}-{installed}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {installed}\n")
    return folder / "bin/python"


def pip_install(python: Path) -> subprocess.CompletedProcess[str]:
    """What a job's `pip install -r requirements.txt` would do in this environment, on the image's Python."""
    platforms = ["manylinux2014_x86_64", *(f"manylinux_2_{glibc}_x86_64" for glibc in range(17, 35))]
    target = ["--python-version", IMAGE["python"], *(f"--platform={each}" for each in platforms), "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--dry-run", "--quiet", "--report=-", *target]
    return subprocess.run([*command, "-r", LOCK], capture_output=True, text=True, check=False, timeout=120)


def test_a_job_installs_the_lock_and_exchanges_nothing_that_the_image_is_built_of(tmp_path):
    done = pip_install(image_of(tmp_path))
    assert done.returncode == 0, done.stderr
    result = [each["metadata"] for each in json.loads(done.stdout)["install"]]
    installed = {canonicalize_name(each["name"]): each["version"] for each in result}
    locked = pins(LOCK)
    assert {"transformers", "trl", "peft", "datasets", "pyarrow", "tokenizers"} <= installed.keys()
    assert installed.items() <= locked.items()
    kept = re.compile(r"torch.*|triton|numpy|nvidia-.*|cuda-.*")
    assert not [name for name in locked if kept.fullmatch(name)]
    assert {"torch", "torchvision", "triton", "numpy"} <= {name for name in IMAGE["packages"] if kept.fullmatch(name)}


def test_what_the_lock_does_not_have_is_never_installed_whatever_a_package_asks_for(tmp_path):
    """accelerate wants torch 2.0 or newer; PyPI has it."""
    done = pip_install(image_of(tmp_path, torch="1.13.1"))
    assert done.returncode
    assert re.search(r"torch>=2[\d.]* from .* \(from accelerate==", done.stderr)


def test_the_lock_has_every_direct_requirement_and_is_what_is_tested_here():
    direct, locked = pins(ROOT / "trainer/requirements.txt"), pins(LOCK)
    assert direct.items() <= locked.items()
    assert locked == {name: version(name) for name in locked}
    assert LOCK.read_text().count("--hash=sha256:") > len(locked)
    assert len(re.findall(r"^[\w.-]+==\S+ \\\n +--hash=", LOCK.read_text(), re.MULTILINE)) == len(locked)


# ---- what names the image --------------------------------------------------------------------------------------------


def test_the_dockerfile_builds_on_the_image_of_any_region():
    (base,) = re.findall(r"^FROM (\S+)$", DOCKERFILE, re.MULTILINE)
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKERFILE, re.MULTILINE))
    assert base == "${REGISTRY}.dkr.ecr.${REGION}.${DNS_SUFFIX}/" + NAME
    assert arguments == {"REGISTRY": "763104351884", "REGION": "us-east-1", "DNS_SUFFIX": "amazonaws.com"}


def test_the_dockerfile_installs_what_a_job_installs_and_ends_with_all_its_imports():
    (copied, run) = re.findall(r"^(?:COPY|RUN) ((?:.*\\\n)*.*)$", DOCKERFILE, re.MULTILINE)
    *files, folder = copied.split()
    assert all((ROOT / "trainer" / file).is_file() for file in files)
    assert [step.split() for step in run.replace("\\\n", "").split("&&")] == [
        ["python", "-m", "pip", "install", "--no-cache-dir", "--requirement", f"{folder}{LOCK.name}"],
        ["python", f"{folder}packages.py"],
        ["rm", "-r", folder.rstrip("/")],
    ]
    assert {LOCK.name, "packages.py"} == set(files)


def test_the_image_is_one_that_the_sdk_knows_and_its_torch_the_one_tested_here():
    from sagemaker.core import image_uris

    framework, tag_version = "pytorch-amzn2023", IMAGE["tag"].partition("-")[0]
    # The instance type only says that there is a GPU.
    uri = image_uris.retrieve(
        framework, "us-east-1", version=tag_version, instance_type="ml.g5.xlarge", image_scope="training"
    )
    assert uri.endswith(f".amazonaws.com/{NAME}")
    assert f"-cu{IMAGE['cuda'].replace('.', '')}-" in IMAGE["tag"]
    assert Version(version("torch")).base_version == Version(IMAGE["packages"]["torch"]).base_version


@pytest.mark.parametrize("file", ["template.yaml", "trainer/Dockerfile"])
def test_one_image_is_named_everywhere(file):
    named = re.findall(r"\bpytorch(?:-training)?:[\w.-]+", (ROOT / file).read_text())
    assert set(named) == {NAME}


def test_the_endpoint_in_the_docs_has_a_driver_for_the_image_that_serves():
    """SageMaker's service model says which CUDA each AMI's driver is for, and the image's tag which it is made for."""
    variant = botocore.session.get_session().get_service_model("sagemaker").shape_for("ProductionVariant")
    result = variant.members["InferenceAmiVersion"].documentation
    amis = dict(re.findall(r"<dt>([\w-]+)</dt>.*?CUDA version: (\d+\.\d+)", result))
    assert amis["al2-ami-sagemaker-inference-gpu-3-1"] == "12.4"  # a driver of 550
    (named,) = re.findall(r"InferenceAmiVersion=([\w-]+)", (ROOT / "docs/serving.md").read_text())
    image = inference_image("us-east-1")
    assert image is not None
    (cuda,) = re.findall(r"-cu(\d\d)\d-", image)
    assert int(cuda) <= float(amis[named])


def test_the_image_is_still_patched():
    end = IMAGE["end_of_patch"]
    assert datetime.now(UTC).date() <= end, (
        f"AWS no longer patches {NAME} since {end}: put a newer image into requirements/training_image.toml, "
        "see https://aws.github.io/deep-learning-containers/reference/support_policy/"
    )
