"""Locks the packages that a job installs: writes trainer/requirements.lock from trainer/requirements.txt.

    pip install uv
    python requirements/lock_jobs.py        # after a change of trainer/requirements.txt, app.lock or training_image.toml

A job starts with ModelTrainer's `pip install -r requirements.txt`, and we cannot set pip's options. But if one line of a
requirements file has a hash, pip installs only packages with hashes
(https://pip.pypa.io/en/stable/topics/secure-installs/#hash-checking-mode). pip can therefore neither add nor replace any
other package, above all the image's torch, triton, torchvision and numpy.

The lock contains the packages that the image lacks, the packages whose version in the image does not fit the trainer, and
the packages that trainer/requirements.txt names. Versions are those of the image where they fit, else those of app.lock,
with which the tests run.
"""

import re
import subprocess
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
IMAGE = tomllib.loads((HERE / "training_image.toml").read_text())
LOCK = HERE.parent / "trainer/requirements.lock"
HEADER = """\
# Written by requirements/lock_jobs.py from trainer/requirements.txt: the packages that a job adds to its image. Because of
# the hashes, pip installs no other package.
"""
# The packages that must keep the image's version: they are built for its CUDA, its network and each other.
KEPT = re.compile(r"torch|torchvision|torchaudio|triton|numpy|nvidia-.*|cuda-.*")


def normal(name: str) -> str:
    """Return a package's normalised name, as in PyPI's index."""
    return re.sub(r"[-_.]+", "-", name).lower()


def in_the_image() -> dict[str, str]:
    """Return the image's packages and versions, without the label of torch's CUDA build (`+cu130`)."""
    return {normal(name): version.partition("+")[0] for name, version in IMAGE["packages"].items()}


def pins(lines: str) -> dict[str, str]:
    """Return the pinned versions of a requirements file, by normalised package name."""
    found = re.findall(r"^([A-Za-z0-9._-]+)(?:\[.*\])?==([^\s;\\]+)", lines, re.MULTILINE)
    return {normal(name): version for name, version in found}


def lock() -> str:
    """Return the content of the lock. uv resolves it on PyPI for the image's Python on x86_64."""
    image, tested = in_the_image(), pins((HERE / "app.lock").read_text())
    fitting = pins(resolve(tested | image))
    kept = {name: version for name, version in image.items() if fitting.get(name) == version}
    entries = re.findall(r"^\S.*(?:\n +--hash.*)*", resolve(tested | kept), re.MULTILINE)
    direct = pins((HERE.parent / "trainer/requirements.txt").read_text())
    wanted = [
        f"{entry}\n"
        for entry in entries
        for name, version in pins(entry).items()
        if name in direct or image.get(name) != version
    ]
    return HEADER + "".join(wanted)


def resolve(preferred: dict[str, str]) -> str:
    """Return uv's lock of trainer/requirements.txt, with the preferred versions where they fit."""
    constraints = "".join(f"{name}=={version}\n" for name, version in in_the_image().items() if KEPT.fullmatch(name))
    with tempfile.TemporaryDirectory() as scratch:
        constrained, resolved = Path(scratch, "constraints.txt"), Path(scratch, "resolved.txt")
        constrained.write_text(constraints)
        # uv keeps the versions of an existing output file where it can.
        resolved.write_text("".join(f"{name}=={version}\n" for name, version in preferred.items()))
        sources = [str(HERE.parent / "trainer/requirements.txt"), "--constraint", str(constrained)]
        platform = ["--python-version", IMAGE["python"], "--python-platform", "x86_64-manylinux_2_28"]
        output = ["--output-file", str(resolved), "--quiet", "--no-header", "--no-annotate", "--generate-hashes"]
        subprocess.run(["uv", "pip", "compile", *sources, *platform, *output], check=True)  # noqa: S603, S607 - our own command
        return resolved.read_text()


if __name__ == "__main__":
    LOCK.write_text(lock())
