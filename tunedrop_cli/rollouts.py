"""The answers of a training in a terminal: of a finished run, and of one whose job still writes them."""

from collections.abc import Callable, Iterable, Iterator

from pipeline.runs.states import Run
from tunedrop import object_keys, rollouts
from tunedrop.plain import one_line
from tunedrop.rollouts import Answer, Group, Index
from tunedrop_cli.deployment import Deployment
from tunedrop_cli.output import Fact

LONGEST = 2000  # characters of a prompt or an answer
SAMPLE_LENGTH = 100  # characters of an answer in `watch`


class Folder:
    """A run's folder `rollouts/`: in its model's folder, and before the end of its training beside its checkpoints."""

    def __init__(self, deployment: Deployment, run: Run):
        self._deployment, self._run = deployment, run
        bucket = deployment.outputs.artifact_bucket
        self._name = "checkpoints/"
        if run.artifacts:
            self._name = object_keys.folder_key(run.artifacts, bucket).removeprefix(object_keys.run_key(run.run_id))

    def _read(self, name: str) -> bytes | None:
        return self._deployment.read(self._run, f"{self._name}{rollouts.FOLDER}/{name}")

    def index(self) -> Index | None:
        """Return the index of the parts, None if the job has not written one."""
        return rollouts.read_index(self._read)

    def groups(self, index: Index, of: Callable[[int], bool] = lambda _: True) -> Iterator[Group]:
        """Yield the groups of the steps for which `of` is true. A part that is not copied to S3 yet is left out."""
        for part in index.parts:
            if of(part.step) and (raw := self._read(part.name)) is not None:
                yield from rollouts.decode(raw)


def newest_step(index: Index) -> int | None:
    """Return the newest step with groups, None without one."""
    return max((part.step for part in index.parts if part.kind == "step"), default=None)


def by_reward(answers: Iterable[Answer]) -> list[Answer]:
    """Return answers, the highest reward first, and those without one last."""
    return sorted(answers, key=lambda answer: (answer.score is None, -(answer.score or 0.0)))


def facts_of_group(group: Group) -> Iterator[Fact]:
    """Yield a group's prompt and its answers."""
    what = "evaluation after step" if group.panel else "step"
    yield "group", f"{what} {group.step}, prompt {group.prompt_id}, mean reward {group.mean:.3f}"
    yield "prompt", _shortened(str(group.prompt[-1].get("content") or "") if group.prompt else "")
    if group.reference is not None:
        yield "expected", _shortened(group.reference)
    for answer in by_reward(group.answers):
        yield f"reward {in_digits(answer.score)}", f"{_shortened(answer.text)}\n({'; '.join(_numbers(answer))})"


def _numbers(answer: Answer) -> Iterator[str]:
    yield ", ".join(f"{name} {in_digits(value)}" for name, value in answer.rewards.items())
    if answer.advantage is not None:
        yield f"advantage {answer.advantage:+.2f}"
    yield f"{answer.tokens} tokens" + (", cut by the limit" if answer.cut else "")
    means = (("sampled", answer.sampler_log_prob), ("in the loss", answer.trainer_log_prob))
    if known := [f"{value:.3f} {name}" for name, value in means if value is not None]:
        yield f"mean log-probability {', '.join(known)}"


def scatter(group: Group) -> float:
    """Return the difference between a group's highest and lowest reward, 0 without rewards."""
    scores = [answer.score for answer in group.answers if answer.score is not None]
    return max(scores) - min(scores) if scores else 0.0


def newest_groups(folder: Folder, after: int = 0) -> list[Group]:
    """Return the groups of the newest step if it is later than the step `after`, the largest scatter first.

    Groups of the evaluations are left out.
    """
    index = folder.index()
    newest = newest_step(index) if index else None
    if index is None or newest is None or newest <= after:
        return []
    groups = [group for group in folder.groups(index, lambda step: step == newest) if not group.panel]
    return sorted(groups, key=scatter, reverse=True)


def sample_lines(group: Group) -> Iterator[str]:
    """Yield lines about two answers of a group, the best and the worst."""
    answers = by_reward(group.answers)
    prompt = one_line(str(group.prompt[-1].get("content") or "") if group.prompt else "")
    yield f"  two answers of step {group.step} to: {_shortened(prompt, SAMPLE_LENGTH)}"
    for answer in (answers[0], answers[-1]):
        yield f"    {in_digits(answer.score)}  {_shortened(one_line(answer.text), SAMPLE_LENGTH)}"


def in_digits(score: float | None) -> str:
    """Return a score as text; `none` without one."""
    return "none" if score is None else f"{score:.3f}"


def _shortened(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else f"{text[:longest]}…"
