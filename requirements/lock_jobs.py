"""Lock what a job installs: writes trainer/requirements.lock from trainer/requirements.txt.

    python requirements/lock_jobs.py        # after a change of either, app.lock or training_image.toml; `pip install uv`

A job starts with ModelTrainer's `pip install -r requirements.txt`, whose options are not ours. Hashes are: where one line of
a requirements file has one, pip installs nothing that has none
(https://pip.pypa.io/en/stable/topics/secure-installs/#hash-checking-mode). So what the lock leaves out can be neither
exchanged nor added in the container, whatever appears on PyPI and whatever a package asks for: above all torch, triton,
torchvision and numpy, which are the image's. The lock has what the image lacks, the few packages that it has in a version
that the trainer cannot use, and what trainer/requirements.txt names.

Versions are the image's where they fit, else those of app.lock: what is tested here is what runs there.
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
# Written by requirements/lock_jobs.py from trainer/requirements.txt: all that a job adds to its image. Hashes are what keeps
# pip from installing anything else.
"""
# What must stay as the image has it: built for its CUDA, its network and each other.
KEPT = re.compile(r"torch|torchvision|torchaudio|triton|numpy|nvidia-.*|cuda-.*")


def normal(name: str) -> str:
    """Return a package's name as indexes write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def in_the_image() -> dict[str, str]:
    """Return the image's packages and versions, without the label of torch's CUDA build (`+cu130`)."""
    return {normal(name): version.partition("+")[0] for name, version in IMAGE["packages"].items()}


def pins(lines: str) -> dict[str, str]:
    """Return the versions that a requirements file pins, by package."""
    found = re.findall(r"^([A-Za-z0-9._-]+)(?:\[.*\])?==([^\s;\\]+)", lines, re.MULTILINE)
    return {normal(name): version for name, version in found}


def lock() -> str:
    """Return the lock's content, resolved on PyPI by uv for the image's Python on x86_64."""
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
    """Return uv's lock of trainer/requirements.txt, of the preferred versions as far as they fit each other."""
    constraints = "".join(f"{name}=={version}\n" for name, version in in_the_image().items() if KEPT.fullmatch(name))
    with tempfile.TemporaryDirectory() as scratch:
        constrained, resolved = Path(scratch, "constraints.txt"), Path(scratch, "resolved.txt")
        constrained.write_text(constraints)
        # uv keeps to what its output file has already, where it can.
        resolved.write_text("".join(f"{name}=={version}\n" for name, version in preferred.items()))
        asked = [str(HERE.parent / "trainer/requirements.txt"), "--constraint", str(constrained)]
        platform = ["--python-version", IMAGE["python"], "--python-platform", "x86_64-manylinux_2_28"]
        output = ["--output-file", str(resolved), "--quiet", "--no-header", "--no-annotate", "--generate-hashes"]
        subprocess.run(["uv", "pip", "compile", *asked, *platform, *output], check=True)  # noqa: S603, S607 - our own command
        return resolved.read_text()


if __name__ == "__main__":
    LOCK.write_text(lock())
