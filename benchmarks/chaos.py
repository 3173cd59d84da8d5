"""Kills processes of the running local application at random, and asserts that no run is lost.

    .venv/bin/python -m benchmarks.chaos --minutes 10

Starts the application in a new folder and drops tiny datasets with a tiny model. At random intervals, kills (SIGKILL) a
function's process, a job's process, or the whole application, which then starts again from its folder. At the end, every
dataset must have a run that was published, or that failed with a reason. A job whose process is killed fails, as on AWS.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from string import ascii_lowercase

import psutil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support")]

from tiny_model import make_tiny_model  # noqa: E402 - after the path

from local_app.stack import STACK_NAME, Stack  # noqa: E402
from pipeline.runs.states import FINAL, Run, RunState  # noqa: E402
from tunedrop_cli.deployment import Deployment  # noqa: E402

CONFIG = """model: tiny
rewards: [{type: similarity}]
lora: {r: 4, lora_alpha: 8}
grpo: {max_steps: 2, num_generations: 4, per_device_train_batch_size: 8, max_completion_length: 8, learning_rate: 1e-2}
max_prompt_length: 200
"""
KINDS = ("function", "job", "application")


class Chaos:
    """A local application whose processes are killed. `killed` counts kills by kind, `redriven` events by function."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.killed: Counter[str] = Counter()
        self.redriven: Counter[str] = Counter()
        self.dropped: list[str] = []

    def drop(self, model: Path | None = None) -> None:
        """Drop another dataset, after uploading its base model if there is one."""
        folder = self.stack.folder / "datasets"
        folder.mkdir(exist_ok=True)
        name = f"d{len(self.dropped):03}"
        # With long answers, completions of a group differ in similarity, and the group's rewards have a gradient.
        answers = [ascii_lowercase[n:] + ascii_lowercase[:n] for n in range(12)]
        rows = [f'{{"question": "Say {name} from {text[0]}", "answer": "{text}"}}\n' for text in answers]
        data, config = folder / f"{name}.jsonl", folder / f"{name}.yaml"
        data.write_text("".join(rows))
        config.write_text(CONFIG)
        deployment = Deployment.local(self.stack)
        if model is not None:
            deployment.upload_model(model)
        deployment.upload(data, config)
        self.dropped.append(name)

    def processes(self, kind: str) -> list[psutil.Process]:
        """Return the processes of a kind: of functions, of jobs (only the trainers), or of the whole application."""
        found = self.stack.processes()
        if kind == "application":
            return found
        servers = [
            process
            for process in found
            if any(part.startswith("local_app.") and part.endswith(".server") for part in _command(process))
        ]
        aws = next((p for p in servers if "local_app.aws.server" in _command(p)), None)
        sagemaker = next((p for p in servers if "local_app.sagemaker.server" in _command(p)), None)
        parent = {"function": aws, "job": sagemaker}[kind]
        children = parent.children(recursive=True) if parent else []
        # A job's innermost process is the trainer; its parents only set up the namespace.
        return [child for child in children if kind == "function" or "trainer.job" in " ".join(_command(child))]

    def kill(self, kind: str) -> bool:
        """Kill one process of a kind, or kill and restart the whole application. Returns False if no process was found."""
        found = self.processes(kind)
        if not found:
            return False
        for process in found if kind == "application" else [random.choice(found)]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.killed[kind] += 1
        if kind == "application":
            psutil.wait_procs(found, timeout=10)
            self.stack.up()
        return True

    def runs(self) -> dict[str, Run]:
        """Return the newest run of each dropped dataset, by dataset."""
        return {run.dataset: run for run in reversed(Deployment.local(self.stack).all_runs()) if run.dataset in self.dropped}

    def settle(self, timeout: float) -> dict[str, Run]:
        """Wait until every dropped dataset has a run whose end has been announced, and return these runs.

        Redrives the dead-letter queue, as its alarm asks an operator to do: an event whose function was killed three times
        in a row is there. Raises AssertionError after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            runs = self.runs()
            if set(self.dropped) == runs.keys() and all(run.open is None for run in runs.values()):
                return runs
            if time.monotonic() > deadline:
                left = {name: runs[name].state if name in runs else "no run" for name in self.dropped}
                raise AssertionError(f"not ended after {timeout:.0f} s: {left}")
            for function in Deployment.local(self.stack).redrive():
                self.redriven[function] += 1
            time.sleep(1)


def _command(process: psutil.Process) -> list[str]:
    try:
        command: list[str] = process.cmdline()
    except psutil.Error:
        return []
    return command


def check(runs: dict[str, Run]) -> Counter[str]:
    """Assert that every run was published, or failed with a reason; return the number of runs by state."""
    for run in runs.values():
        assert run.state in FINAL
        assert run.state == RunState.PUBLISHED or run.reason, run
        assert run.state in {RunState.PUBLISHED, RunState.TRAINING_FAILED, RunState.TESTING_FAILED}, run
    return Counter(run.state.lower() for run in runs.values())


def bring_up(folder: Path, parameters: Mapping[str, str] | None = None) -> Stack:
    """Start an application and store its launch plan; `parameters` are the template's."""
    stack = Stack(folder, parameters=parameters)
    stack.up()
    release = [sys.executable, "-m", "release", "--stack", STACK_NAME, "--region", stack.region]
    subprocess.run(release, env=stack.environment, check=True, capture_output=True)
    return stack


def chaos(folder: Path, minutes: float, pause: float, seed: int) -> tuple[Counter[str], Counter[str], int]:
    """Kill for some minutes, every `pause` seconds on average; return the kills, the ends, and the number of datasets."""
    random.seed(seed)
    stack = bring_up(folder / "app", {"MaxConcurrentJobs": "2"})
    try:
        app = Chaos(stack)
        app.drop(make_tiny_model(folder / "tiny"))
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            time.sleep(random.uniform(0, 2 * pause))
            app.kill(random.choices(KINDS, weights=(4, 2, 1))[0])
            if sum(run.open is not None for run in app.runs().values()) < 3:
                app.drop()
        return app.killed, check(app.settle(600)), len(app.dropped)
    finally:
        stack.down()


def main() -> None:
    """Print the kills and the ends of the runs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--pause", type=float, default=8, help="seconds between two kills, on average")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2)))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    with tempfile.TemporaryDirectory() as folder:
        killed, ended, dropped = chaos(Path(folder), options.minutes, options.pause, options.seed)
    print(f"killed: {', '.join(f'{number} {kind}s' for kind, number in killed.items())}")
    print(f"{dropped} datasets dropped: {', '.join(f'{number} {how}' for how, number in ended.items())}")


if __name__ == "__main__":
    main()
