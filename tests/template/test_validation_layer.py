"""The layer of validate_dataset: small enough beside the function, enough for every reward, and loaded only on demand."""

import json
import os
import subprocess
import sys
from pathlib import Path

from local_app.stack import Build

# What the layer is for. Nothing of it may cost a cold start.
ON_DEMAND = ("math_verify", "sympy", "rapidfuzz", "jsonschema", "tokenizers", "arro3")
REWARDS = [
    {"type": "math"},
    {"type": "similarity"},
    {"type": "rouge"},
    {"type": "json_schema", "schema": {"type": "integer"}},
    {"type": "numeric"},
    {"type": "code_tests", "tests": ["assert True"]},
]


def in_lambda(built: Build, program: str) -> str:
    """Run a program with the standard library, the function and its layer, and nothing else, as Lambda does."""
    paths = [str(built.code), str(built.layer / "python")]
    code = f"import sys; sys.path[:0] = {paths!r}\n{program}"
    environment = {"POWERTOOLS_SERVICE_NAME": "test", "AWS_DEFAULT_REGION": "us-east-1", "PATH": os.defpath}
    done = subprocess.run(
        [sys.executable, "-B", "-S", "-I", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_function_and_layer_together_stay_below_lambdas_limit(built: Build) -> None:
    code, layer = size(built.code), size(built.layer)
    assert layer > 10e6  # it has been built
    assert code + layer <= 220e6, f"{code / 1e6:.0f} + {layer / 1e6:.0f} MB"


def test_a_cold_start_loads_nothing_of_it(built: Build) -> None:
    program = f"import validate_dataset.app\nprint([name for name in {ON_DEMAND!r} if name in sys.modules])"
    assert in_lambda(built, program) == "[]\n"


def test_the_rewards_of_a_config_find_what_they_need(built: Build) -> None:
    program = (
        "import json\n"
        "from tunedrop.rewards import Deployment\n"
        "from tunedrop.preflight import check_rewards\n"
        "from tunedrop.rewards import build_rewards\n"
        "from tunedrop.run_config import parse_run_config\n"
        f"config = parse_run_config({{'model': 'm', 'rewards': {REWARDS!r}}})\n"
        "rows = [{'id': str(n), 'prompt': [{'role': 'user', 'content': 'Which?'}], 'answer': str(n)} for n in range(9)]\n"
        "rewards = build_rewards(config.rewards, Deployment(allow_code=True))\n"
        "found = check_rewards(rewards, rows, config, [], trained_rows=9)\n"
        "print(json.dumps([[str(problem) for problem in found.problems], found.warnings, found.receipt]))"
    )
    problems, warnings, receipt = json.loads(in_lambda(built, program))
    assert (problems, warnings) == ([], [])
    assert receipt["by_reward"].keys() == {reward["type"] for reward in REWARDS}
    assert receipt["answers"][0]["mean"] == len(REWARDS)
