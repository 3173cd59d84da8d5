"""Follows a run: a progress bar in a terminal, plain lines in a pipe."""

import time
from collections.abc import Callable
from typing import NamedTuple

from rich import progress
from rich.console import Console

from pipeline.runs.states import FINAL, Run, RunState
from tunedrop.plain import printable
from tunedrop_cli.deployment import Deployment, in_words
from tunedrop_cli.progress import Alert, Note, Progress, read_line
from tunedrop_cli.rollouts import Folder, newest_groups, sample_lines

COST_EVERY = 30.0  # seconds between two requests for a job's cost
SAMPLES_EVERY = 20.0  # seconds between two requests for sample answers
FIGURE_WIDTH = 8  # characters of a figure's value
STAGES = {
    RunState.VALIDATED: "validated, waiting to start",
    RunState.WAITING: "waiting for a slot or for capacity",
    RunState.TRAINING: "training",
    RunState.TRAINED: "trained, waiting for its tests",
    RunState.TESTING: "testing base and tuned model",
    RunState.TESTED: "tested, writing the report",
}


def follow(deployment: Deployment, run: Run, console: Console, every: float = 1.0, *, samples: bool = False) -> Run:
    """Print a run's stages and its jobs' progress until the run has ended and its end has been announced; return it.

    `every` is the pause in seconds between two requests. With `samples`, some of the model's answers are printed too.
    """
    if not console.is_terminal:

        def write(line: str) -> None:
            console.print(printable(line), markup=False)

        show = Show(write, write, lambda _done, _total, text: write(f"  {text}"))
        return _follow(deployment, run, show, every, samples)
    columns = (
        progress.TextColumn("{task.description}", markup=False),
        *(progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeElapsedColumn()),
        progress.TextColumn("{task.fields[text]}", markup=False),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None, text="")

        def stage(text: str) -> None:
            bar.reset(task, description=text, total=None, text="")
            say(text)

        def say(text: str) -> None:
            bar.console.print(printable(text), markup=False, highlight=False)

        def advance(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, text=text)

        return _follow(deployment, run, Show(stage, say, advance), every, samples)


class Show(NamedTuple):
    """How a run is shown: a new stage, a line beside it, and its progress (done, total, text)."""

    stage: Callable[[str], object]
    say: Callable[[str], object]
    progress: Callable[[int, int, str], object]


def _follow(deployment: Deployment, run: Run, show: Show, every: float, samples: bool) -> Run:
    positions: dict[str, str] = {}
    printed: tuple[RunState, int] | None = None
    spent, next_request, next_sample, sampled = None, 0.0, 0.0, 0
    while True:
        if printed != (run.state, run.attempt):
            printed = (run.state, run.attempt)
            attempt = f" (attempt {run.attempt})" if run.attempt > 1 else ""
            show.stage(f"{run.run_id}: {STAGES.get(run.state, in_words(run.state))}{attempt}")
        job = job_of(run)
        if job and time.monotonic() >= next_request:
            spent, next_request = deployment.spent(run, job), time.monotonic() + COST_EVERY
        for line in deployment.log_lines(job, positions) if job else []:
            match read_line(line):
                case Progress() as step:
                    show.progress(step.done, step.total, _progress_text(step, spent))
                case Note(text):
                    show.say(f"  {text}")
                case Alert() as alert:
                    show.say(f"  {alert.code} at step {alert.step}: {alert.message}")
        if samples and run.state == RunState.TRAINING and time.monotonic() >= next_sample:
            sampled, next_sample = _show_samples(deployment, run, sampled, show.say), time.monotonic() + SAMPLES_EVERY
        if run.state in FINAL and run.open is None:
            return run
        time.sleep(every)
        run = deployment.find(run.run_id)


def job_of(run: Run) -> str | None:
    """Return the job that works for a run now, None without one."""
    return {RunState.TRAINING: run.train_job, RunState.TESTING: run.test_job}.get(run.state)


def _show_samples(deployment: Deployment, run: Run, after: int, say: Callable[[str], object]) -> int:
    """Show two answers of the newest step, if it is later than the step `after`; return the newest shown step."""
    groups = newest_groups(Folder(deployment, run), after)
    if not groups:
        return after
    for line in sample_lines(groups[0]):
        say(line)
    return groups[0].step


def _progress_text(step: Progress, spent: float | None) -> str:
    """Return a step's figures in aligned columns, for example `step  3/10  reward=0.5       1:12 left  $0.40`."""
    done = f"{step.done:>{len(str(step.total))}}/{step.total}"
    columns = [f"{step.label} {done}"]
    columns += [f"{name}={value:<{FIGURE_WIDTH}}" for name, value in step.figures.items()]
    columns += [step.left] if step.left else []
    if spent is not None:
        columns.append(f"${spent:.2f}")
    return "  ".join(columns)
