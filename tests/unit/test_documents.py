"""The documents name only files, modules and headings that exist."""

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_everything_that_a_document_names_exists(document: Path) -> None:
    """Compare links, paths and modules with the repository."""
    assert [*missing_links(document), *missing_files(document), *missing_modules(document)] == []
