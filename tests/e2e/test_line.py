"""A line of three drops with a real model: approved, better than the champion, and one that forgets: `make soak`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos import bring_up
from local_app import base_model
from local_app.stack import PROJECT
from tunedrop_cli.deployment import Deployment

pytestmark = pytest.mark.soak

SAMPLE = PROJECT / "tunedrop_cli/sample"
WORDINGS = ("What is {} + {}?", "How much is {} plus {}?", "{} + {} = ?")
START = "line: numbers\nstart_from: champion\ntests: {max_completion_length: 96}\n"


class Line:
    """A local app, and the runs that were dropped there."""

    def __init__(self, folder: Path):
        self.folder, self.stack = folder, bring_up(folder / "state")
        self.deployment = Deployment.local(self.stack)
        self.model = base_model.fetch(PROJECT / ".tunedrop/models")

    def tunedrop(self, *arguments: str | Path) -> str:
        command = [str(Path(sys.executable).with_name("tunedrop")), "--state", str(self.stack.folder), *map(str, arguments)]
        done = subprocess.run(command, check=False, cwd=self.folder, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def drop(self, name: str, rows: str, tests: list[dict[str, str]], config: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Drop a dataset, wait for its end, and return its result and what its test job wrote."""
        files = {f"{name}.jsonl": rows, f"{name}.yaml": config, f"{name}.tests.json": json.dumps({"evaluations": tests})}
        for file, content in files.items():
            (self.folder / file).write_text(content)
        data, options, questions = (self.folder / file for file in files)
        self.tunedrop("drop", data, "--config", options, "--tests", questions, "--model", self.model, "--wait")
        run = self.deployment.find(name)
        result: dict[str, Any] = self.deployment.read_json(run, "result.json")
        job: dict[str, Any] = self.deployment.read_json(run, f"inference/{run.test_job}/output/model/inference.json")
        return result, job


@pytest.fixture
def line(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    line = Line(tmp_path)
    yield line
    line.stack.down()


def test_a_line_of_three_drops(line, say):
    counting = (SAMPLE / "counting.yaml").read_text()
    asked = json.loads((SAMPLE / "counting.tests.json").read_text())["evaluations"]
    first, _ = line.drop("counting", (SAMPLE / "counting.jsonl").read_text(), asked, counting + "line: numbers\n")
    assert (first["verdict"], first["start"], first["champion"]) == ("APPROVED", None, None)

    # The second improves the champion, with a suite too small for the default of 0.02.
    sums = json.loads((SAMPLE / "additions.tests.json").read_text())["evaluations"]
    pairs = [re.findall(r"\d+", each["prompt"]) for each in sums]
    tests = [{"prompt": words.format(a, b), "description": str(int(a) + int(b))} for a, b in pairs for words in WORDINGS]
    config = (SAMPLE / "additions.yaml").read_text() + START + "gate: {champion: {max_loss: 0.2}}\n"
    second, job = line.drop("additions", (SAMPLE / "additions.jsonl").read_text(), tests, config)
    say(f"the second drop: {second['verdict']}, {second['reasons']}")
    assert second["start"]["run_id"] == second["champion"]["run_id"] == first["run_id"]
    assert second["verdict"] == "APPROVED"
    assert len(job["suite"]) == len(asked)
    assert second["champion"]["suite"]["lift_low"] > -0.2

    # The third learns to count down. Half of its rows have wrong answers: they teach that the number before is the next one.
    # Supervised fine-tuning learns mistakes faithfully.
    numbers = [n * 37 % 89 + 11 for n in range(89)]
    right = [{"question": f"What is one less than {n}?", "answer": str(n - 1)} for n in numbers[:59]]
    wrong = [json.loads(row) for row in (SAMPLE / "counting.jsonl").read_text().splitlines()]
    wrong = [row | {"answer": str(int(row["answer"]) - 2)} for row in wrong]
    rows = right + wrong
    tests = [{"prompt": f"What is one less than {n}?", "description": str(n - 1)} for n in numbers[59:]]
    taught = "method: sft\nsft: {learning_rate: 5.0e-4, num_train_epochs: 6, rows_per_step: 16}\n"
    third, job = line.drop("less", "".join(json.dumps(row) + "\n" for row in rows), tests, counting + START + taught)
    say(f"the third drop: {third['verdict']}, {third['reasons']}; asked {job['asked']}")
    assert third["champion"]["run_id"] == second["run_id"]
    assert third["verdict"] == "REJECTED"
    assert any("suite" in reason for reason in third["reasons"])
    lost = [test for test in job["suite"] if test["tuned"]["score"] < test["champion"]["score"]]
    assert {test["run_id"] for test in lost} & {first["run_id"], second["run_id"]}
    # Base and champion answered the suite before; only this run's own tests are new to them.
    assert job["asked"]["base"]["asked"] == job["asked"]["champion"]["asked"] == len(tests)
    assert job["asked"]["tuned"]["asked"] > len(tests) + len(job["suite"])
    shown = line.tunedrop("show", "numbers")
    assert re.search(rf"{second['run_id']} .*← champion", shown)
