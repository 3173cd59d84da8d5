"""Only `local_app.aws.hooks` and `hooks_s3` use private names of MiniStack."""

import ast
from pathlib import Path

import pytest

from local_app.stack import PROJECT

FOLDER = PROJECT / "local_app/aws"


def private_names(path: Path) -> set[str]:
    """Return the private attributes that a module uses of modules that it imports from MiniStack."""
    tree = ast.parse(path.read_text())
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ministack")
        for alias in node.names
    }
    return {name for name in imported if name.startswith("_")} | {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr.startswith("_")
        if node.value.id in imported
    }


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_private_names_of_ministack_are_in_the_hooks(path: Path) -> None:
    assert (private_names(path) != set()) == (path.name in {"hooks.py", "hooks_s3.py"})
