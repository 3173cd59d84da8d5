"""The documents name only files, modules and headings that exist."""

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = sorted(
    path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in {"build"} and not path.name.startswith(".")
)
ROOMS = [ROOT / folder for folder in FOLDERS]
MODULES = {file.name for room in ROOMS for file in room.rglob("*.py")}
DEPLOYED = {"trainer/", "inference_test/"}  # folders of the buckets, not of the repository


def missing_links(document: Path) -> Iterator[str]:
    """Yield the relative links whose file, or whose heading in a Markdown file, does not exist."""
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"\w+:", target):
            continue
        name, _, heading = target.partition("#")
        file = document.parent / name if name else document
        if not file.exists() or (heading and heading not in headings(file)):
            yield target


def headings(document: Path) -> set[str]:
    """Return the anchors that GitHub makes of a document's headings."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def missing_files(document: Path) -> Iterator[str]:
    """Yield the files and folders of the repository that the document names and that do not exist."""
    text = document.read_text()
    for path in re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*[\w/]", text):
        if path not in DEPLOYED and not (ROOT / path).exists():
            yield path
    for name in re.findall(r"`(\w+\.py)`", text):
        if name not in MODULES:
            yield name


def missing_modules(document: Path) -> Iterator[str]:
    """Yield the modules of this repository that the document runs with `python -m` and that do not exist."""
    for module in re.findall(r"python[\d.]* -m ([\w.]+)", document.read_text()):
        package = module.partition(".")[0]
        known = find_spec(package) if package not in FOLDERS else any(ROOT.glob(f"{module.replace('.', '/')}*"))
        if not known:
            yield module


def test_the_documents_python_runs_and_their_dotted_names_exist() -> None:
    """Run each Python example in a namespace of its own, and import each dotted name between backticks as it is written."""
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    rooms = "|".join({*FOLDERS, "tunedrop", "pipeline"} - {"functions", "tests"})
    names = re.findall(rf"`((?:{rooms})(?:\.\w+)+)", text)
    assert len(examples) >= 4
    assert len(names) >= 2
    program = (
        f"import pkgutil\nfor name in {names}: pkgutil.resolve_name(name)\nfor example in {examples}: exec(example, {{}})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'functions'}", "AWS_DEFAULT_REGION": "us-east-1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def missing_tests(document: Path) -> Iterator[str]:
    """Yield the tests that the document names, as `tests/FILE.py::NAME`, and that do not exist."""
    for file, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", document.read_text()):
        if not (ROOT / file).exists() or not re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE):
            yield f"{file}::{name}"


def test_every_line_of_the_threat_model_names_its_test() -> None:
    """Each row of a table with the column `test` names one."""
    text = (ROOT / "SECURITY.md").read_text()
    tables = re.findall(r"^\| line .* test \|\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert len(tables) == 2
    rows = [row for table in tables for row in table.splitlines()]
    assert [row for row in rows if "::test_" not in row.split("|")[3]] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_everything_that_a_document_names_exists(document: Path) -> None:
    """Compare links, paths, modules and tests with the repository."""
    missing = [*missing_links(document), *missing_files(document), *missing_modules(document), *missing_tests(document)]
    assert missing == []
