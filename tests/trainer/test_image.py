"""What is installed into AWS's training container leaves its Python and its torch alone, and the image is the pinned one."""

import re
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "trainer/Dockerfile").read_text()
PINS = [Requirement(line) for line in (ROOT / "trainer/requirements.txt").read_text().splitlines() if line[:1].isalpha()]
TAG = re.compile(r"pytorch-training:([\d.]+)-gpu-py(\d)(\d+)")


def needed(name: str, seen: set[str]) -> set[str]:
    """The names of a package and of all that it needs in the container, by its own metadata."""
    if name not in seen:
        seen.add(name)
        for text in distribution(name).requires or []:
            requirement = Requirement(text)
            in_container = {"extra": "", "python_version": "3.12", "python_full_version": "3.12.0"}
            if requirement.marker is None or requirement.marker.evaluate(in_container):
                if requirement.name == "torch":
                    assert Version(TAG.search(DOCKERFILE)[1]) in requirement.specifier, f"{name} wants {requirement}"
                else:
                    needed(requirement.name, seen)
    return seen


@pytest.mark.parametrize("pin", PINS, ids=lambda pin: pin.name)
def test_a_requirement_fits_the_containers_python_and_torch(pin):
    """The versions are those that are installed here, so that their metadata is at hand without a network."""
    assert Version(distribution(pin.name).version) in pin.specifier
    python = ".".join(TAG.search(DOCKERFILE).groups()[1:])
    for name in needed(pin.name, set()):
        asked = distribution(name).metadata["Requires-Python"]
        assert Version(f"{python}.0") in SpecifierSet(asked or ""), f"{name} wants Python {asked}"


def test_nothing_is_pinned_that_the_container_brings():
    assert not {pin.name for pin in PINS} & {"torch", "torchvision", "torchaudio", "triton"}
    assert all(re.fullmatch(r"==[\d.]+", str(pin.specifier)) for pin in PINS)


def test_the_image_is_built_on_the_one_that_the_stack_starts_without_it():
    default = TAG.search((ROOT / "template.yaml").read_text())
    assert default[0] == TAG.search(DOCKERFILE)[0]
