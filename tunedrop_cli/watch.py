"""Show a run while it goes on: a progress bar for a person, plain lines for a log."""

import re
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pipeline.runs.states import FINAL, Run, RunState
from tunedrop_cli.deployment import Deployment

# The figures that the jobs print on a line of their own, as `name=value` pairs.
_STEP = re.compile(r"\bstep=(\d+) max_steps=(\d+)\b")
_TESTED = re.compile(r"\btested=(\d+) total=(\d+) model=(\w+)")
_FIGURE = re.compile(r"\b(reward|loss|completion_length)=(\S+)")
_ETA = re.compile(r"\beta_seconds=(\d+)")
_ALERT = re.compile(r"\balert=(\w+) step=(\d+) (.*)")
COST_EVERY = 30.0  # seconds between two looks at what a job has cost
_STAGES = {
    RunState.VALIDATED: "validated, waiting to be started",
    RunState.WAITING: "waiting for room",
    RunState.TRAINING: "training",
    RunState.TRAINED: "trained, waiting for its tests",
    RunState.TESTING: "testing base and tuned model",
    RunState.TESTED: "tested, writing the report",
}


def follow(deployment: Deployment, run: Run, console: Console, every: float = 1.0) -> Run:
    """Show a run's stages and its jobs' progress until it has ended and that has been announced; return it then."""
    if not console.is_terminal:
        return _follow(deployment, run, console.print, lambda _done, _total, text: console.print(f"  {text}"), every)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[text]}"), console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None, text="")

        def stage(text: str) -> None:
            bar.reset(task, description=text, total=None, text="")
            bar.print(text)

        def progress(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, text=text)

        return _follow(deployment, run, stage, progress, every)


def _follow(
    deployment: Deployment,
    run: Run,
    stage: Callable[[str], object],
    progress: Callable[[int, int, str], object],
    every: float,
) -> Run:
    seen: dict[str, str] = {}
    shown: tuple[RunState, int] | None = None
    spent, look_again = None, 0.0
    while True:
        if shown != (run.state, run.attempt):
            shown = (run.state, run.attempt)
            attempt = f" (attempt {run.attempt})" if run.attempt > 1 else ""
            stage(f"{run.run_id}: {_STAGES.get(run.state, run.state.lower().replace('_', ' '))}{attempt}")
        job = run.train_job if run.state == RunState.TRAINING else run.test_job if run.state == RunState.TESTING else None
        if job and time.monotonic() >= look_again:
            spent, look_again = deployment.spent(run, job), time.monotonic() + COST_EVERY
        for line in deployment.log_lines(job, seen) if job else []:
            match = _STEP.search(line) or _TESTED.search(line)
            if match:
                figures = [f"{name}={value}" for name, value in _FIGURE.findall(line)]
                if eta := _ETA.search(line):
                    figures.append(f"{int(eta[1]) // 60}:{int(eta[1]) % 60:02d} left")
                if spent is not None:
                    figures.append(f"${spent:.2f}")
                what = f"step {match[1]}/{match[2]}" if match.re is _STEP else f"{match[3]} {match[1]}/{match[2]}"
                progress(int(match[1]), int(match[2]), " ".join([what, *figures]))
            elif noticed := _ALERT.search(line):
                stage(f"  {noticed[1]} at step {noticed[2]}: {noticed[3]}")
        if run.state in FINAL and run.open is None:
            return run
        time.sleep(every)
        run = deployment.find(run.run_id)
