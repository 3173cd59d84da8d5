"""`tunedrop logs` begins with the job, and shows the container's start only where it failed."""

import pytest

from tunedrop_cli.job_log import JobLog

START = ["Starting training script", "+ pip install", "Requirement already satisfied: peft", "ERROR: no such version"]
ENTRY = "+++ exec python -m trainer.job train"


def printed(*lines: tuple[str, str]) -> tuple[list[str], list[str]]:
    """Return the lines that the log prints as they come, and those at its end."""
    log = JobLog()
    own = [line for stream, message in lines for line in log.own_lines(stream, message)]
    return own, list(log.unfinished_start())


def of(stream: str, *messages: str) -> list[tuple[str, str]]:
    return [(stream, message) for message in messages]


@pytest.mark.parametrize(
    ("messages", "own", "at_the_end"),
    [
        ([*START, ENTRY, "run=a", "step=1"], ["run=a", "step=1"], []),
        (START, [], START),  # pip failed: its output is the reason
        (["hello"], ["hello"], []),  # not ModelTrainer's script
        ([*START, ENTRY, "step=1", *START, ENTRY, "step=2"], ["step=1", "step=2"], []),  # a spot job that came back
        ([*START, ENTRY, "step=1", *START], ["step=1"], START),
    ],
)
def test_only_a_start_that_failed_is_printed(messages: list[str], own: list[str], at_the_end: list[str]) -> None:
    assert printed(*of("algo-1", *messages)) == (own, at_the_end)


def test_each_instance_has_its_own_start() -> None:
    one, two = of("algo-1", *START, ENTRY, "step=1"), of("algo-2", *START)
    mixed = [line for pair in zip(one, two, strict=False) for line in pair] + one[len(two) :]
    assert printed(*mixed) == (["step=1"], START)


def test_the_words_are_model_trainers_and_the_launch_plans() -> None:
    from sagemaker.train import templates

    from release.plan import entry
    from tunedrop_cli import job_log

    assert f'echo "{job_log.SCRIPT}"' in templates.TRAIN_SCRIPT_TEMPLATE
    assert "set -x" in templates.TRAIN_SCRIPT_TEMPLATE
    assert job_log.ENTRY.fullmatch("+ " + entry("train").rpartition("; ")[2].removesuffix("train"))
