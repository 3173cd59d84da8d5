"""Reads the line's suite: tests of its approved runs, which each tuned model of the line answers too.

The channel `suite` has `suite.json` (`tunedrop.suite`), and in `rewards/<run id>/` the files of a run's `python` rewards. A
test is completed and scored as in the run that brought it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from trainer import folders
from trainer.engines import Decoding
from trainer.job import JobError
from trainer.permissions import job_permissions
from trainer.scoring import Part
from tunedrop.config.model import RunConfig
from tunedrop.config.parse import parse_run_config
from tunedrop.inference_tests import Check, InferenceTest, build_checks, parse_tests
from tunedrop.problems import RejectedError
from tunedrop.questions import prompt_text, question
from tunedrop.rewards import RewardError, RewardPermissions, build_rewards
from tunedrop.suite import Suite, SuitePart, select

NAME = "suite"
WAY_OUT = "To test without the suite, set suite: {max: 0} in the config."


def suite_parts(config: RunConfig, own: Sequence[InferenceTest]) -> list[Part]:
    """Return the parts of the line's suite, oldest run first; none without the channel, or if the config allows no tests.

    The parts have at most `suite.max` tests, and none with a question of the run's `own` tests, which all models answer in
    any case. A test that asks a question of this run's training rows does not judge. Raises JobError for an unreadable test.
    """
    folder = folders.channel(NAME)
    if folder is None or config.suite.max == 0:
        return []
    try:
        whole = msgspec.json.decode((folder / "suite.json").read_bytes(), type=Suite)
        suite = select(whole, config.suite.max, {question(prompt_text(test.prompt)) for test in own})
    except (OSError, msgspec.DecodeError, KeyError, TypeError) as error:  # a test may lack its messages
        reason = f"{type(error).__name__}: {error}"
        raise JobError(f"The line's suite, suite.json in {folder}, cannot be read: {reason}. {WAY_OUT}") from None
    parts = [_part(each, config, folder) for each in suite.parts]
    rows = folders.channel("training")
    if rows is None:
        raise JobError("A test job with the channel 'suite' needs the channel 'training' with the run's train.jsonl.")
    wanted = {each for part in parts for test in part.tests for each in questions_of(test.prompt)}
    asked = asked_in_training(rows / "train.jsonl", wanted)
    return [part._replace(tests=[_judging(test, asked) for test in part.tests]) for part in parts]


def _part(part: SuitePart, config: RunConfig, folder: Path) -> Part:
    """Return a part with its tests and rewards. Raises JobError with the run that brought what cannot be used any more."""
    allowed = job_permissions(folder / "rewards" / part.run_id)
    try:
        own = parse_run_config({"model": config.model, "rewards": part.rewards})
        tests = parse_tests(msgspec.json.encode({"evaluations": part.tests}), own, allowed)
        rewards = build_rewards(own.rewards, allowed)
        _check_files(own, tests, allowed)
    except (RejectedError, RewardError) as error:
        reason = error.problems[0] if isinstance(error, RejectedError) else error
        raise JobError(
            f"The line's suite has tests of the run '{part.run_id}' that cannot be used any more: {reason}. {WAY_OUT}"
        ) from None
    decoding = Decoding(**{name: part.decoding[name] for name in Decoding._fields})
    return Part(NAME, tests, decoding, rewards, allowed, part.chat_template_kwargs, run_id=part.run_id)


def _check_files(config: RunConfig, tests: Sequence[InferenceTest], allowed: RewardPermissions) -> None:
    """Raise RewardError if the file of a `python` reward is missing. Each test would fail with it."""
    checks = [check for test in tests for check in build_checks(test.checks, allowed) if isinstance(check, Check)]
    for spec in [*config.rewards, *checks]:
        if (name := spec.reward_file) and allowed.python_folder and not (allowed.python_folder / name).is_file():
            raise RewardError(f"the reward '{spec.label}' has no file {name} in {allowed.python_folder}")


def questions_of(prompt: Sequence[dict[str, str]]) -> set[str]:
    """Return a prompt's question, and its question without a first system message, which a run's config may have added."""
    system = prompt[0]["role"] == "system"
    return {question(prompt_text(each)) for each in (prompt, prompt[system:]) if each}


class _Row(msgspec.Struct):
    """What this module reads of a row."""

    prompt: list[dict[str, Any]]


def asked_in_training(path: Path, wanted: set[str]) -> set[str]:
    """Return which of these questions the rows of a file ask. Reads row by row."""
    decoder = msgspec.json.Decoder(_Row)
    with path.open("rb") as file:
        return {each for line in file for each in wanted & questions_of(decoder.decode(line).prompt)}


def _judging(test: InferenceTest, asked: set[str]) -> InferenceTest:
    return msgspec.structs.replace(test, judges=test.judges and not asked & questions_of(test.prompt))
