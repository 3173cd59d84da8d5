"""The rooms of the source tree and their imports, as CONTRIBUTING.md describes them."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from local_app.stack import PROJECT

FUNCTIONS = ("validate_dataset", "start_training", "test_model", "publish_results", "reconcile", "deploy_model")
# Each room, its folder, and the rooms that its modules may import.
ROOMS: dict[str, tuple[str, set[str]]] = {
    "tunedrop": ("functions/tunedrop", set()),
    "pipeline": ("functions/pipeline", {"tunedrop"}),
    **{name: (f"functions/{name}", {"pipeline", "tunedrop"}) for name in FUNCTIONS},
    "trainer": ("trainer", {"tunedrop"}),
    "release": ("release", {"trainer", "tunedrop"}),
    "local_app": ("local_app", {"pipeline", "release", "tunedrop"}),
    "tunedrop_cli": ("tunedrop_cli", {"local_app", "pipeline", "release", "tunedrop"}),
}
# Packages that run in processes of their own and may import more than their room.
MORE = {"local_app.serving": {"trainer"}}
# The modules of local_app that the command may import: they start the emulators as processes and import none.
FOR_THE_COMMAND = {"local_app.stack", "local_app.base_model"}
# Where code runs that must stay small: third-party packages that a room may never import.
FORBIDDEN = {
    "tunedrop": {"torch", "transformers", "boto3", "aws_lambda_powertools", "sagemaker"},
    "pipeline": {"torch", "transformers", "sagemaker", "datasets"},
}
LONGEST = 400  # lines, unless the module's docstring has the reason


def modules(room: str) -> Iterator[tuple[str, Path]]:
    """Yield the dotted name and the file of each module in a room."""
    folder = PROJECT / ROOMS[room][0]
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        yield ".".join(parts).removesuffix(".__init__"), path


def imports(path: Path) -> set[str]:
    """Return the dotted names that a module imports, at its top or inside a function; names of `from` imports included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_the_rooms_below_it_alone(room: str) -> None:
    allowed = {room} | ROOMS[room][1]
    for name, path in modules(room):
        tops = {imported.partition(".")[0] for imported in imports(path)}
        assert tops & ROOMS.keys() <= allowed | MORE.get(name.rpartition(".")[0], set()), name
        assert not tops & FORBIDDEN.get(room, set()), name


def test_the_command_imports_no_emulator() -> None:
    reached, waiting = set[str](), [path for _, path in modules("tunedrop_cli")]
    files = dict(modules("local_app"))
    while waiting:
        for imported in imports(waiting.pop()) & files.keys() - reached:
            reached.add(imported)
            waiting.append(files[imported])
    emulators = {
        name for name in reached if name.startswith(("local_app.aws.", "local_app.sagemaker.", "local_app.serving."))
    }
    assert emulators == set()
    direct = {name for _, path in modules("tunedrop_cli") for name in imports(path) if name in files}
    assert direct - {"local_app"} <= FOR_THE_COMMAND


def test_modules_import_each_other_in_no_circle() -> None:
    files = {name: path for room in ROOMS for name, path in modules(room)}
    below = {name: imports(path) & files.keys() - {name} for name, path in files.items()}
    while leaves := {name for name, others in below.items() if not others}:
        below = {name: others - leaves for name, others in below.items() if name not in leaves}
    assert below == {}


def test_the_contract_imports_without_aws_and_torch() -> None:
    """Importing every module of the contract loads neither AWS's SDK nor torch: jobs and reward Lambdas import it."""
    names = [name for name, _ in modules("tunedrop") if not name.endswith("_worker")]
    program = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
    program += "print(sorted({'boto3', 'botocore', 'torch', 'transformers', 'arro3.core'} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(PROJECT / "functions")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("room", ROOMS)
def test_a_long_module_says_why(room: str) -> None:
    for name, path in modules(room):
        if len(path.read_text().splitlines()) > LONGEST:
            assert "One module because" in (ast.get_docstring(ast.parse(path.read_text())) or ""), name


def test_every_package_of_a_room_is_installed():
    installed = set(tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    packages = {name.rpartition(".")[0] or name for room in ROOMS.keys() - set(FUNCTIONS) for name, _ in modules(room)}
    assert packages == installed
