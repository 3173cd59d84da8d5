"""What `sam build` makes: all that the functions need, nothing that they do not, below Lambda's limit, for Lambda's Python.

`built` is for this machine's Python, with which the local app runs the functions; `for_aws` is what goes to AWS.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from template import load_template, of_type

from local_app.build import Build, build
from local_app.stack import PROJECT

HANDLERS = ("validate_dataset", "start_training", "test_model", "publish_results", "reconcile", "deploy_model")
# What the layer of validate_dataset is for. Nothing of it may cost a cold start.
ON_DEMAND = ("math_verify", "sympy", "rapidfuzz", "jsonschema", "tokenizers", "arro3")
REWARDS: list[dict[str, Any]] = [
    {"type": "math"},
    {"type": "similarity"},
    {"type": "rouge"},
    {"type": "json_schema", "schema": {"type": "integer"}},
    {"type": "numeric"},
    {"type": "code_tests", "tests": ["assert len('ab') == 2"]},
]
RUNTIME = load_template()["Globals"]["Function"]["Runtime"]


@pytest.fixture(scope="module")
def built() -> Build:
    return build()


@pytest.fixture(scope="module")
def for_aws(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """`sam build` as `make deploy` runs it, where the PATH has no Python at all and pip is one of this Python."""
    folder, commands = tmp_path_factory.mktemp("for_aws"), tmp_path_factory.mktemp("commands")
    for name in ("make", "sh", "cp", "find", "rm"):
        (commands / name).symlink_to(shutil.which(name) or name)
    environment = {name: value for name, value in os.environ.items() if name != "LAMBDA_PYTHON"}
    environment |= {"PATH": str(commands), "PIP": f"{sys.executable} -m pip", "SAM_CLI_TELEMETRY": "0"}
    command: list[str | Path] = [PROJECT / ".venv-sam/bin/sam", "build", "--no-cached", "--build-dir", folder]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Build(folder, digest="")


def in_lambda(built: Build, function: str, program: str) -> str:
    """Run a program with the standard library, the function and its layers, and nothing else, as Lambda does."""
    code = f"import sys; sys.path[:0] = {built.paths(function)!r}\n{program}"
    environment = {"POWERTOOLS_SERVICE_NAME": "test", "AWS_DEFAULT_REGION": "us-east-1", "PATH": os.defpath}
    done = subprocess.run(
        [sys.executable, "-B", "-S", "-I", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def size(folder: str | Path) -> int:
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


# ---- what the functions find -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", HANDLERS)
def test_a_function_has_all_that_its_handler_imports_and_no_other_handler(built: Build, function: str) -> None:
    program = f"import {function}.app; assert callable({function}.app.handler)\n"
    program += "import arro3.io, yaml\n"
    program += "print(*{m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)}, sep='\\n')"
    found = in_lambda(built, function, program).splitlines()
    own = (*built.paths(function), sys.base_prefix)
    assert [file for file in found if not file.startswith(own)] == []
    assert sorted(path.name for path in Path(built.paths(function)[0]).iterdir()) == sorted(
        [function, "pipeline", "tunedrop"]
    )


def test_a_cold_start_loads_nothing_of_the_validation_layer(built: Build) -> None:
    program = f"import validate_dataset.app\nprint([name for name in {ON_DEMAND!r} if name in sys.modules])"
    assert in_lambda(built, "validate_dataset", program) == "[]\n"


def test_the_rewards_of_a_config_find_what_they_need(built: Build) -> None:
    program = (
        "import json\n"
        "from tunedrop.rewards import RewardPermissions\n"
        "from pipeline.validation.preflight import check_rewards\n"
        "from tunedrop.rewards import build_rewards\n"
        "from tunedrop.config.parse import parse_run_config\n"
        f"config = parse_run_config({{'model': 'm', 'rewards': {REWARDS!r}}})\n"
        "rows = [{'id': str(n), 'prompt': [{'role': 'user', 'content': 'Which?'}], 'answer': str(n)} for n in range(9)]\n"
        "rewards = build_rewards(config.rewards, RewardPermissions(allow_code=True))\n"
        "found = check_rewards(rewards, rows, config, [], trained_rows=9)\n"
        "print(json.dumps([[str(problem) for problem in found.problems], found.warnings, found.receipt]))"
    )
    problems, warnings, receipt = json.loads(in_lambda(built, "validate_dataset", program))
    assert (problems, warnings) == ([], [])
    assert receipt["by_reward"].keys() == {reward["type"] for reward in REWARDS}
    assert receipt["answers"][0]["mean"] == len(REWARDS)


# ---- what goes to AWS ------------------------------------------------------------------------------------------------


def test_every_binary_is_for_lambdas_python_and_platform(for_aws: Build) -> None:
    """Amazon Linux 2023 has glibc 2.34 (https://docs.aws.amazon.com/linux/al2023/ug/core-glibc.html)."""
    version = RUNTIME.removeprefix("python").replace(".", "")
    layers = [Path(path) for path in for_aws.paths("validate_dataset")[1:]]
    libraries = [file.name for layer in layers for file in layer.rglob("*.so*") if ".libs" not in file.parent.name]
    assert len(libraries) > 5
    assert [n for n in libraries if not n.endswith((f".cpython-{version}-x86_64-linux-gnu.so", ".abi3.so"))] == []
    for wheel in [file for layer in layers for file in layer.glob("*.dist-info/WHEEL")]:
        tags = re.findall(r"^Tag: (\S+)$", wheel.read_text(), re.MULTILINE)
        platforms = {tag.split("-")[2] for tag in tags}
        glibc = [int(minor) for name in platforms for minor in re.findall(r"manylinux_2_(\d+)_x86_64", name)]
        assert "any" in platforms or "manylinux2014_x86_64" in platforms or min(glibc) <= 34, f"{wheel}: {tags}"


def test_a_function_and_its_layers_stay_below_lambdas_limit(for_aws: Build) -> None:
    """Lambda takes 250 MB unzipped, layers included (https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html)."""
    for function in HANDLERS:
        code, *layers = map(size, for_aws.paths(function))
        assert code <= 2e6, function
        assert all(layer > 10e6 for layer in layers)  # they have been built
        assert code + sum(layers) <= 220e6, f"{function}: {(code + sum(layers)) / 1e6:.0f} MB"


def test_functions_and_layers_name_one_python() -> None:
    (made_for,) = re.findall(r"^LAMBDA_PYTHON \?= (\S+)$", (PROJECT / "layers/Makefile").read_text(), re.MULTILINE)
    layers = of_type(load_template(), "AWS::Serverless::LayerVersion").values()
    assert [RUNTIME, *(layer["CompatibleRuntimes"] for layer in layers)] == [f"python{made_for}", *[[RUNTIME]] * 2]


def test_no_layer_lies_over_another(for_aws: Build) -> None:
    dependencies, validation = ({path.name for path in Path(p).iterdir()} for p in for_aws.paths("validate_dataset")[1:])
    assert dependencies & validation <= {"bin"}  # commands, which no function runs
