"""Check a dataset, its config and its inference tests without AWS: what `validate_dataset` and a laptop both run."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from tunedrop.inference_tests import InferenceTest, dump_tests, parse_tests, tests_from_rows
from tunedrop.problems import Problem, RejectedError
from tunedrop.records import Row, read_rows
from tunedrop.rewards import RewardError, build_rewards
from tunedrop.run_config import RunConfig, check_instances, check_steps, config_warnings, load_run_config

LISTED_ERRORS = 100
MAX_HELDOUT = 256
# GRPO on fewer rows than this teaches nothing that a test could show.
MIN_ROWS = 2


@dataclass
class Check:
    """What was found: the receipt's content, and the files of a valid run's input folder under `folder`."""

    config: RunConfig
    problems: list[Problem] = field(default_factory=list)
    error_counts: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    heldout: int = 0
    tests: int = 0
    columns: dict[str, str] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether a run may start."""
        return not self.error_counts

    def add(self, *problems: Problem) -> None:
        """Record problems: the first hundred in full, all of them counted by code."""
        for problem in problems:
            self.error_counts[problem.code] += 1
            if len(self.problems) < LISTED_ERRORS:
                self.problems.append(problem)

    def receipt(self) -> dict[str, Any]:
        """Return the receipt, as it is written to `validation.json`."""
        return {
            "ok": self.ok,
            "rows": self.rows,
            "errors": msgspec.to_builtins(self.problems),
            "error_counts": dict(sorted(self.error_counts.items())),
            "warnings": config_warnings(self.config),
            "fixes": self.config.fixes,
            "columns": self.columns,
            "stats": self.stats,
            "heldout": self.heldout,
            "inference_tests": self.tests,
        }


def check_dataset(
    data: Path,
    config_raw: bytes,
    tests_raw: bytes | None,
    folder: Path,
    *,
    default_model: str,
    instance_types: Sequence[str],
) -> Check:
    """Check a dataset file with its config and tests, and write the run's input files into `folder`.

    `tests_raw` is None where no test file was given: the held-out rows are the tests then. `default_model` and
    `instance_types` are the deployment's, for a config that names none. The files are `config.json`,
    `train.jsonl`, `heldout.jsonl` and `inference_tests.json`; they are complete only if the check is `ok`.
    """
    try:
        check = Check(load_run_config(config_raw, default_model=default_model))
    except RejectedError as error:
        # Go on with the defaults: the dataset's mistakes belong in the same receipt as the config's.
        check = Check(RunConfig(model=default_model))
        check.add(*error.problems)
    check.add(*check_instances(check.config, check.config.compute.instance_type or instance_types))
    try:
        build_rewards(check.config.rewards)
    except RewardError as error:
        check.add(Problem("REWARD_NOT_ALLOWED", str(error), "use a reward that this deployment allows", key="rewards"))
    tests: list[InferenceTest] = []
    if tests_raw is not None:
        try:
            tests = parse_tests(tests_raw, check.config)
        except RejectedError as error:
            check.add(*error.problems)
    rows_file = folder / "rows.jsonl"
    ranks = _read(data, rows_file, check)
    if check.rows < MIN_ROWS and not check.error_counts:
        check.add(Problem("NO_ROWS", f"the dataset has {check.rows} usable rows", f"at least {MIN_ROWS} are needed"))
    if check.ok:
        heldout = _split(rows_file, ranks, folder, check)
        check.add(*check_steps(check.config, check.rows - check.heldout))
        tests = tests or tests_from_rows(heldout)
        if not tests:
            check.add(Problem("NO_TESTS", "there are no inference tests", "give a test file or heldout_fraction above 0"))
        check.tests = len(tests)
        (folder / "inference_tests.json").write_bytes(dump_tests(tests))
        (folder / "config.json").write_text(check.config.model_dump_json(indent=1))
    rows_file.unlink()
    return check


def _read(data: Path, rows_file: Path, check: Check) -> "array[int]":
    """Write every usable row to `rows_file`; return a rank per row that depends on nothing but its content."""
    ranks = array("Q")
    characters = Counter[str]()
    encode = msgspec.json.Encoder().encode
    records = read_rows(data, check.config)
    columns: dict[str, str] = {}
    with rows_file.open("wb") as out:
        for row in records:
            if isinstance(row, Problem):
                check.add(row)
                continue
            columns = columns or dict(records.columns)
            raw = encode(row)
            out.write(raw + b"\n")
            ranks.append(int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest()))
            characters["prompt"] += sum(len(message["content"]) for message in row["prompt"])
            characters["answer"] += len(row["answer"])
    check.rows, check.columns = len(ranks), columns
    if ranks:
        check.stats = {f"mean_{part}_characters": round(characters[part] / len(ranks), 1) for part in ("prompt", "answer")}
    return ranks


def _split(rows_file: Path, ranks: "array[int]", folder: Path, check: Check) -> list[Row]:
    """Split the rows into `train.jsonl` and `heldout.jsonl`; those of the lowest rank, in whatever order, are held out."""
    wanted = min(MAX_HELDOUT, round(len(ranks) * check.config.heldout_fraction))
    threshold = sorted(ranks)[wanted]
    heldout: list[Row] = []
    with (
        rows_file.open("rb") as lines,
        (folder / "train.jsonl").open("wb") as train,
        (folder / "heldout.jsonl").open("wb") as held,
    ):
        for raw, rank in zip(lines, ranks, strict=True):
            if rank < threshold:
                heldout.append(msgspec.json.decode(raw))
                held.write(raw)
            else:
                train.write(raw)
    check.heldout = len(heldout)
    return heldout
