"""Runs the SAM CLI: builds the functions and layers for this machine, and deploys them."""

import hashlib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from local_app.common import PROJECT, StackError
from local_app.processes import end_of, locked


@dataclass(frozen=True)
class Build:
    """The output of `sam build` in `folder`: the template to deploy, and each function and layer by its logical id."""

    folder: Path
    digest: str

    @property
    def template(self) -> Path:
        """The template to deploy. It names the folders of the functions and layers."""
        return self.folder / "template.yaml"

    def paths(self, function: str) -> list[str]:
        """Return Lambda's `sys.path` of a function, for example `validate_dataset`: its code, then its layers."""
        template = yaml.safe_load(self.template.read_text())
        name = "".join(part.title() for part in function.split("_")) + "Function"
        layers = [*template["Globals"]["Function"]["Layers"], *template["Resources"][name]["Properties"].get("Layers", [])]
        return [str(self.folder / name), *(str(self.folder / layer["Ref"] / "python") for layer in layers)]


def build(progress: Callable[[str], None] = lambda _line: None, log: Path = PROJECT / ".aws-sam/local.log") -> Build:
    """Run `sam build`, unless the template, functions/ and layers/ are unchanged since the last build.

    The functions run here with this Python, so the layers are built for this Python. `sam build` alone builds for Lambda's.
    """
    python = "{}.{}".format(*sys.version_info)
    folder = PROJECT / ".aws-sam" / "local"
    built = Build(folder, _source_digest(python))
    stamp = folder / "built"
    folder.parent.mkdir(exist_ok=True)
    with locked(folder.parent / "local.lock"):
        if stamp.exists() and stamp.read_text() == built.digest:
            progress("functions: unchanged since the last build")
            return built
        progress("functions: sam build")
        sam(["build"], {**os.environ, "LAMBDA_PYTHON": python, "PIP": f"{shlex.quote(sys.executable)} -m pip"}, log)
        stamp.write_text(built.digest)
    return built


def _source_digest(python: str) -> str:
    digest = hashlib.sha256(python.encode())
    folders = (PROJECT / "functions", PROJECT / "layers")
    sources = [p for f in folders for p in f.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    for file in [PROJECT / "template.yaml", PROJECT / "samconfig.toml", *sorted(sources)]:
        digest.update(f"{file.relative_to(PROJECT)}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def sam(arguments: list[str], environment: Mapping[str, str], log: Path) -> None:
    """Run `sam` from its own virtual environment, with the settings of samconfig.toml's `local`. Raises StackError."""
    program = PROJECT / ".venv-sam" / "bin" / "sam"
    if not program.exists():
        raise StackError(f"The SAM CLI is missing ({program}). Install it with `make install`.")
    config = ["--config-file", str(PROJECT / "samconfig.toml"), "--config-env", "local"]
    command = [str(program), *arguments[:1], *config, *arguments[1:]]
    with log.open("ab") as output:
        done = subprocess.run(  # noqa: S603 - our own command
            command,
            cwd=PROJECT,
            env={**environment, "SAM_CLI_TELEMETRY": "0"},
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode != 0:
        raise StackError(f"`sam {arguments[0]}` failed. The end of {log}:\n{end_of(log)}")
