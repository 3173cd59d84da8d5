"""Every package of the locks that is installed here has a licence that is accepted. Nothing is downloaded."""

import re
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# For what is deployed. The terms of MPL and LGPL apply to a library's own code, which is installed unchanged and as files of
# its own.
ACCEPTED = {
    *("Apache-2.0", "MIT", "MIT-0", "MIT-CMU", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "ISC", "Zlib", "CC0-1.0", "BSL-1.0"),
    *("PSF-2.0", "CNRI-Python", "MPL-2.0", "LGPL-2.1"),
}
# For tools of this machine, none of which is deployed.
ACCEPTED_FOR_TOOLS = ACCEPTED | {"Artistic-1.0", "EPL-2.0", "LGPL-3.0-or-later"}
DEPLOYED = [*sorted((ROOT / "layers").glob("*.lock")), ROOT / "trainer/requirements.lock"]
# SPDX's names of what classifiers and older fields say.
SPDX = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "GNU Lesser General Public License v3 or later (LGPLv3+)": "LGPL-3.0-or-later",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "MIT No Attribution License (MIT-0)": "MIT-0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
# What the files of packages say whose metadata names no licence, or several for one to choose.
READ = {
    "asyncssh": "EPL-2.0",
    "cookiecutter": "BSD-3-Clause",
    "huey": "MIT",
    "junit-xml": "MIT",
    "psycopg2-binary": "LGPL-3.0-or-later",
    "sagemaker-train": "Apache-2.0",
    "skops": "MIT",
    "text-unidecode": "Artistic-1.0",
}
ENVIRONMENTS = {"here": None, "sam": ROOT / ".venv-sam", "lint": ROOT / ".venv-lint"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(lock: Path) -> set[str]:
    return {normal(name) for name in re.findall(r"^([A-Za-z0-9._-]+)==", lock.read_text(), re.MULTILINE)}


def licence(package: Distribution) -> str:
    """Return a package's licence as an expression of SPDX."""
    metadata = package.metadata
    if (name := normal(metadata["Name"])) in READ:
        return READ[name]
    if "License-Expression" in metadata:
        return metadata["License-Expression"]
    classifiers = metadata.get_all("Classifier") or []
    stated = [each.split(" :: ")[-1] for each in classifiers if each.startswith("License :: ")]
    stated = stated or (metadata.get_all("License") or ["no licence"])[0].strip().splitlines()[:1]
    return " AND ".join(SPDX.get(each, each) for each in stated)


def is_accepted(expression: str, accepted: set[str]) -> bool:
    """Whether every part of an expression is accepted, of alternatives one. An exception (WITH) only adds permissions."""
    parts = re.split(r" AND ", re.sub(r"[()]| WITH [\w.-]+", "", expression))
    return all(any(choice.strip() in accepted for choice in part.split(" OR ")) for part in parts)


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_every_locked_package_has_an_accepted_licence(environment: str) -> None:
    folder = ENVIRONMENTS[environment]
    places = None if folder is None else [str(place) for place in folder.glob("lib/python3*/site-packages")]
    if places == []:
        pytest.skip(f"{folder} is not installed")
    locks = (ROOT / "requirements").glob("*.lock") if folder is None else [ROOT / f"requirements/{environment}.lock"]
    deployed = set().union(*map(locked, DEPLOYED)) if folder is None else set()
    names = set().union(*map(locked, locks)) | deployed
    found = {
        normal(package.metadata["Name"]): licence(package)
        for package in (distributions() if places is None else distributions(path=places))
        if normal(package.metadata["Name"]) in names
    }
    assert len(found) > 30
    refused = {
        name: expression
        for name, expression in found.items()
        if not is_accepted(expression, ACCEPTED if name in deployed else ACCEPTED_FOR_TOOLS)
    }
    assert refused == {}


@pytest.mark.parametrize(
    ("expression", "accepted"),
    [
        ("MIT", True),
        ("GPL-3.0-only", False),
        ("MIT AND GPL-3.0-only", False),
        ("MPL-2.0 AND (Apache-2.0 OR GPL-2.0)", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("no licence", False),
    ],
)
def test_what_is_accepted(expression: str, accepted: bool) -> None:
    assert is_accepted(expression, ACCEPTED) == accepted


def test_every_lock_has_hashes() -> None:
    """pip refuses a lock in which one package has none (`--require-hashes`)."""
    locks = [*(ROOT / "requirements").glob("*.lock"), *DEPLOYED]
    for lock in locks:
        requirements = re.split(r"^(?=\S+==)", lock.read_text(), flags=re.MULTILINE)[1:]
        assert requirements
        assert [each.partition(" ")[0] for each in requirements if "--hash=sha256:" not in each] == [], lock.name
