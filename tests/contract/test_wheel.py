"""The contract is a wheel of its own: a reward Lambda installs it without the application and without AWS's SDK."""

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from local_app.stack import PROJECT

LAMBDA = """
import json, sys
from tunedrop.rewards import RewardSpec, build_rewards
from tunedrop.rewards.serve import lambda_handler_for

handler = lambda_handler_for(build_rewards([RewardSpec(type="exact_match"), RewardSpec(type="xml_format", weight=0.2)]))
print(json.dumps(handler(json.load(sys.stdin), None)))
print(sorted({"boto3", "botocore", "torch", "pipeline", "trainer"} & sys.modules.keys()))
"""


def test_the_contracts_wheel_serves_a_reward_lambda_in_a_fresh_environment(tmp_path: Path) -> None:
    source = shutil.copytree(PROJECT / "functions", tmp_path / "functions")  # pip builds beside the sources
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("tunedrop-*.whl")
    venv.create(environment := tmp_path / "venv", with_pip=False)
    python = environment / "bin/python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--only-binary=:all:", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    sample = {
        "id": "1",
        "messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}],
        "reference_answer": "4",
    }
    done = subprocess.run(
        [python, "-I", "-c", LAMBDA], input=json.dumps([sample]), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answer, heavy = done.stdout.splitlines()
    (result,) = json.loads(answer)
    assert (result["id"], result["aggregate_reward_score"]) == ("1", 1.0)
    assert heavy == "[]"
