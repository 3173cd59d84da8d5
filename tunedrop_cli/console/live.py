"""A run as its page shows it now: its stages, and the progress of its jobs from their logs."""

import time
from typing import Any, NamedTuple

from pipeline.publish.charts import Curve, Mark, chart
from pipeline.runs.states import FINAL, Run, RunState
from tunedrop.plain import printable
from tunedrop.rollouts import Answer, Group, spread
from tunedrop_cli.deployment import Deployment
from tunedrop_cli.job_log import JobLog
from tunedrop_cli.progress import Alert, Progress, read_line
from tunedrop_cli.rollouts import Folder, by_reward, newest_groups
from tunedrop_cli.watch import COST_EVERY, job_of

# A run's stages for people, each with the states in which it is the present one.
STAGES = {
    "validation": (RunState.VALIDATING, RunState.VALIDATED, RunState.WAITING),
    "training": (RunState.TRAINING,),
    "testing": (RunState.TRAINED, RunState.TESTING),
    "publishing": (RunState.TESTED,),
    "published": (),
}
LOG_LINES = 200  # the last lines of a job's log on the page
MOST_POINTS = 200  # of the reward's curve
SHOWN_GROUPS = 2
SAMPLES_EVERY = 5.0  # seconds between two requests for answers


class Stage(NamedTuple):
    """A stage of a run; `status` is done, now, failed or later."""

    name: str
    status: str


def stages(run: Run) -> list[Stage]:
    """Return the stages of a run. A run that failed did so in the stage of its last job, or in its validation."""
    names = list(STAGES)
    if run.state == RunState.PUBLISHED:
        return [Stage(name, "done") for name in names]
    failed = run.state in FINAL
    if failed:
        at = 2 if run.test_job else 1 if run.train_job else 0
    else:
        at = next(number for number, states in enumerate(STAGES.values()) if run.state in states)
    now = "failed" if failed else "now"
    return [Stage(name, "done" if number < at else now if number == at else "later") for number, name in enumerate(names)]


class Live:
    """Follows one run: each `look` reads what is new. Figures of a job that began anew replace those before."""

    def __init__(self, run: Run):
        self.run = run
        self._positions: dict[str, str] = {}
        self._job: str | None = None
        self._spent_at = self._sampled_at = 0.0
        self._log = JobLog()
        self.rewards: dict[int, float] = {}
        self.alerts: list[Alert] = []
        self.progress: Progress | None = None
        self.spent: float | None = None
        self.lines: list[str] = []
        self.groups: list[Group] = []

    def look(self, deployment: Deployment) -> None:
        """Read the run's state, the new lines of its jobs' logs, and now and then its cost and newest answers."""
        self.run = deployment.find(self.run.run_id)
        for job in filter(None, (self.run.train_job, self.run.test_job)):
            for stream, line in deployment.log_events(job, self._positions):
                self._read(job, stream, line)
        now, running = time.monotonic(), job_of(self.run)
        if running and now >= self._spent_at:
            self.spent, self._spent_at = deployment.spent(self.run, running), now + COST_EVERY
        if self.run.train_job and now >= self._sampled_at:
            folder = Folder(deployment, self.run)
            self.groups, self._sampled_at = newest_groups(folder)[:SHOWN_GROUPS], now + SAMPLES_EVERY

    def _read(self, job: str, stream: str, line: str) -> None:
        if job != self._job:
            self._job, self.progress = job, None
        for own in self._log.own_lines(stream, line):
            self.lines = [*self.lines[1 - LOG_LINES :], printable(own)]
        match read_line(line):
            case Progress(model=None) as step:
                self.progress = step
                self.rewards = {each: value for each, value in self.rewards.items() if each < step.done}
                if "reward" in step.figures:
                    self.rewards[step.done] = float(step.figures["reward"])
            case Progress() as answered:
                self.progress = answered
            case Alert() as alert if alert not in self.alerts:
                self.alerts.append(alert)

    @property
    def ended(self) -> bool:
        """Whether the run has ended, and its end has been announced."""
        return self.run.state in FINAL and self.run.open is None

    def chart(self) -> dict[str, Any] | None:
        """Return the chart of the reward by step, None before the first step."""
        if not self.rewards:
            return None
        points = spread(sorted(self.rewards.items()), MOST_POINTS)
        marks = [Mark(alert.step, "alert", f"alert {alert.code}") for alert in self.alerts]
        return chart("Reward", [Curve("training", points)], marks)


def best_and_worst(group: Group) -> list[Answer]:
    """Return the answers of a group with the highest and the lowest reward."""
    answers = by_reward(group.answers)
    return answers if len(answers) < 2 else [answers[0], answers[-1]]
