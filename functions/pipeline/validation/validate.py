"""Validate a dataset with its config, inference tests, base model and rewards: `validate(submission, terms) -> Receipt`.

validate_dataset (files from S3) and `tunedrop check` (files of this machine) both call it. Every step returns a `Section`;
the receipt is the sections put together. docs/receipt.md explains it.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from botocore.exceptions import BotoCoreError, ClientError

from pipeline.validation.bedrock import unchecked
from pipeline.validation.cost import Work, estimate
from pipeline.validation.fine_tuning import check_fine_tuning
from pipeline.validation.internal import internal
from pipeline.validation.judges import judges_from_file, judges_from_rows
from pipeline.validation.model_files import ModelFiles, check_model, parameters_of
from pipeline.validation.preflight import check_rewards
from pipeline.validation.receipt import Receipt, accepts, assemble
from pipeline.validation.rows import RowsRead, read_rows
from pipeline.validation.section import Section
from pipeline.validation.terms import Terms, resolve
from tunedrop.config.model import ResolvedConfig, RunConfig, Serve
from tunedrop.config.parse import load_run_config
from tunedrop.config.rules import check_instances, config_warnings
from tunedrop.config.schedule import check_steps, fit_batches
from tunedrop.dataset.readers import refuse, suffix_of
from tunedrop.dataset.rows import CANONICAL
from tunedrop.inference_tests import InferenceTest, dump_tests, parse_tests
from tunedrop.problems import Problem, RejectedError
from tunedrop.rewards import Reward, RewardError, RewardPermissions, build_rewards
from tunedrop.rewards.default import choose_rewards
from tunedrop.sandboxed_process import WorkerKilledError

# GRPO on a single row teaches nothing that a test could show.
MIN_ROWS = 2
MAX_REWARD_FILE_BYTES = 1024**2
# Faults of the machine or of a service, not of a user's files.
MACHINE_FAULTS = (WorkerKilledError, OSError, BotoCoreError, ClientError)
# A valid run's input files, which `validate` writes into the submission's folder.
INPUT_FILES = ("config.json", "train.jsonl", "heldout.jsonl", "inference_tests.json")


class Submission(NamedTuple):
    """A dataset and its companion files, all on this machine.

    name, size: the dataset's file name, whose suffix is its format, and its bytes.
    open: opens the dataset (seekable for Parquet). `validate` calls it once, and not for a file that `refuse` refuses.
    config, about_config: the result of `read_config`.
    tests: the bytes of the test file; None: the held-out rows are the tests.
    model: the base model's files; None: only the job has them.
    rewards, beside: a folder with the files of `python` rewards, and the user's location of these files, for messages.
    folder: receives the run's input files.
    """

    name: str
    size: int
    open: Callable[[], io.BufferedReader]
    config: RunConfig
    about_config: Section
    tests: bytes | None
    model: ModelFiles | None
    rewards: Path
    beside: str
    folder: Path


def read_config(raw: bytes, default_model: str) -> tuple[RunConfig, Section]:
    """Parse a config file, correct its batch sizes, and return the config and the section about it.

    A config with mistakes gives the defaults: then the receipt lists the mistakes of the dataset, too. So does a config that
    Tunedrop itself fails on (`INTERNAL`).
    """
    try:
        config, problems = load_run_config(raw, default_model=default_model), []
    except RejectedError as error:
        config, problems = RunConfig(model=default_model), error.problems
    except Exception as error:  # noqa: BLE001 - every file ends in a receipt
        config, problems = RunConfig(model=default_model), [internal(error)]
    config, fixes = fit_batches(config)
    return config, Section({"fixes": fixes}, problems, config_warnings(config))


def validate(submission: Submission, terms: Terms) -> Receipt:
    """Validate a submission under a stack's terms.

    If the receipt is `ok`, the submission's folder has INPUT_FILES: `config.json` is the config that the stack's values
    completed. `rejected.jsonl` has the rows that were set aside.

    An exception that no code expects is the problem `INTERNAL` of the receipt: the same files would raise it in every try.
    Raises MACHINE_FAULTS, after which another try may succeed.
    """
    try:
        return _validate(submission, terms)
    except MACHINE_FAULTS:
        raise
    except Exception as error:  # noqa: BLE001 - every file ends in a receipt
        return assemble([submission.about_config, _problems(internal(error))])


def _validate(submission: Submission, terms: Terms) -> Receipt:
    config = resolve(submission.config, terms)
    sections = [submission.about_config, _problems(*_check_files(submission))]
    if refused := refuse(submission.name, submission.size):
        return assemble([*sections, _problems(refused)])
    sections.append(_problems(*check_instances(submission.config, config.compute.instance_type, terms.image)))
    sections.append(Section({}, [], [*_not_served(config, terms), *unchecked(config)]))
    accepted = accepts(sections)
    tests, problems = _read_tests(submission.tests, config, terms.permissions)
    sections.append(_problems(*problems))
    model = submission.model.folder if submission.model else None
    rows = read_rows(submission.open(), suffix_of(submission.name), config, tests, model, submission.folder)
    sections += rows.sections
    chosen: dict[str, Any] = {}
    if not config.rewards and rows.sample:
        choice = choose_rewards(rows.sample, terms.permissions)
        config = config.model_copy(update={"rewards": choice.rewards})
        chosen = {"chosen": [spec.model_dump(exclude_defaults=True) for spec in choice.rewards], "reason": choice.reason}
        sections.append(Section({}, [], choice.warnings))
    rewards, problems = _build_rewards(config, terms.permissions) if accepted else ([], [])
    sections.append(_problems(*problems))
    if rewards:
        tried = check_rewards(rewards, rows.sample, config, tests, trained_rows=rows.trained)
        sections.append(Section({"rewards": chosen | tried.receipt}, tried.problems, tried.warnings))
        sections.append(check_fine_tuning(config, rewards, rows.sample))
    if rows.trained > 0:
        parameters = parameters_of(config.model, submission.model)
        work = Work(rows.trained, rows.choosing, len(tests) or len(rows.judging), *rows.mean_tokens, parameters)
        cost = estimate(config, work, terms)
        sections.append(Section({"cost": cost.receipt}, cost.problems, cost.warnings))
    draft = assemble(sections)
    return assemble([*sections, _complete(draft, config, rows, tests, submission.folder)])


def _problems(*problems: Problem) -> Section:
    return Section({}, list(problems), [])


def _not_served(config: RunConfig, terms: Terms) -> list[str]:
    """Return a warning if the config says how to serve the model, and the stack serves none."""
    if terms.endpoint_instance_type or not config.serve.enabled or config.serve == Serve():
        return []
    return ["serve has no effect: the stack serves no model, because its parameter EndpointInstanceType is empty"]


def reward_files(config: RunConfig) -> list[str]:
    """Return the names of the files that the config's `python` rewards run."""
    return sorted({spec.reward_file for spec in config.rewards if spec.reward_file})


def _check_files(submission: Submission) -> list[Problem]:
    """Return what is wrong with the files of the base model and of the rewards."""
    problems = check_model(submission.config, submission.model) if submission.model else []
    for name in reward_files(submission.config):
        file = submission.rewards / name
        if file.is_file() and file.stat().st_size <= MAX_REWARD_FILE_BYTES:
            continue
        reason = f"is larger than {MAX_REWARD_FILE_BYTES // 1024**2} MiB" if file.is_file() else "is missing"
        message = f"the file of a python reward, {submission.beside}{name}, {reason}"
        problems.append(Problem("REWARD_FILE", message, "put it beside the dataset, before the dataset", key="rewards"))
    return problems


def _build_rewards(config: RunConfig, permissions: RewardPermissions) -> tuple[list[Reward], list[Problem]]:
    """Return the config's rewards; none, and the problem, if the stack does not allow one of them."""
    try:
        return build_rewards(config.rewards, permissions), []
    except RewardError as error:
        return [], [Problem("REWARD_NOT_ALLOWED", str(error), "use a reward that this stack allows", key="rewards")]


def _read_tests(
    raw: bytes | None, config: RunConfig, permissions: RewardPermissions
) -> tuple[list[InferenceTest], list[Problem]]:
    """Return the inference tests of a file; none, and the problems, if it has mistakes."""
    try:
        return ([], []) if raw is None else (parse_tests(raw, config, permissions), [])
    except RejectedError as error:
        return [], error.problems


def _no_tests(draft: Receipt, config: RunConfig) -> Problem:
    """Return why no row could be held out as an inference test, and what to do."""
    if not config.heldout_fraction:
        message, hint = (
            "there is no test file, and heldout_fraction is 0",
            "upload a test file, or set heldout_fraction to 0.1",
        )
    elif draft.stats["duplicates"]["exact"] + draft.stats["duplicates"]["same_prompt"] >= draft.rows - 1:
        message = f"all {draft.rows} rows have the same prompt: no other prompt is left to test with"
        hint = "add rows with other prompts, or upload a test file"
    else:
        message = (
            f"heldout_fraction {config.heldout_fraction:g} of {draft.rows} rows is less than one prompt with all its rows"
        )
        hint = "upload a test file, raise heldout_fraction, or add rows"
    return Problem("NO_TESTS", message, hint)


def _complete(draft: Receipt, config: ResolvedConfig, rows: RowsRead, tests: list[InferenceTest], folder: Path) -> Section:
    """Check the dataset as a whole, and write `inference_tests.json` and `config.json`."""
    if not draft.ok:
        return _problems()
    if draft.rows < MIN_ROWS:
        message = f"the dataset has {draft.rows} usable rows; a run needs at least {MIN_ROWS}"
        return _problems(Problem("NO_ROWS", message, "add rows"))
    problems = check_steps(config, rows.trained)
    if tests:
        tests, warnings = judges_from_file(tests, draft.stats["tests_in_training"])
    else:
        tests, warnings = judges_from_rows(rows.judging, draft.rows, config.heldout_fraction)
    if not tests:
        problems.append(_no_tests(draft, config))
    (folder / "inference_tests.json").write_bytes(dump_tests(tests))
    config = config.model_copy(update={"columns": CANONICAL})
    (folder / "config.json").write_text(config.model_dump_json(indent=1))
    return Section({"inference_tests": len(tests)}, problems, warnings)
