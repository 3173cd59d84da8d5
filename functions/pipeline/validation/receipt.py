"""Check a dataset, its config and its inference tests without AWS: what `validate_dataset` and a laptop both run.

The receipt's schema is `Receipt`; docs/receipt.md explains it.
"""

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from xxhash import xxh3_64_intdigest

from pipeline.validation.cost import CHARACTERS_PER_TOKEN, NO_TERMS, Terms, Work, estimate
from pipeline.validation.model_files import parameters_of
from pipeline.validation.preflight import check_rewards
from pipeline.validation.split import Split
from pipeline.validation.survey import Survey
from pipeline.validation.tokens import TokenCounter, TokenizerError, unusable_tokenizer
from tunedrop.config.model import RunConfig, check_instances, check_steps, config_warnings, load_run_config
from tunedrop.dataset.rows import Records, Row
from tunedrop.inference_tests import InferenceTest, dump_tests, parse_tests, tests_from_rows
from tunedrop.problems import Problem, RejectedError
from tunedrop.rewards import NO_PERMISSIONS, Reward, RewardError, RewardPermissions, build_rewards

VERSION = 1
LISTED_ERRORS = 100
# GRPO on fewer rows than this teaches nothing that a test could show.
MIN_ROWS = 2
# What fits beside a dataset in the function's /tmp; a Parquet file can unpack to any size.
MAX_WRITTEN_BYTES = 5 * 1024**3


class Receipt(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a check found. `version` changes when a key gets another meaning; new keys do not change it."""

    version: int
    ok: bool
    rows: int
    errors: list[Problem]
    error_counts: dict[str, int]
    warnings: list[str]
    fixes: list[str]
    rejected: "RejectedRows"
    columns: dict[str, str]
    stats: dict[str, Any]
    tokens: dict[str, Any]
    examples: list[dict[str, str]]
    rewards: dict[str, Any]
    cost: dict[str, Any]
    heldout: int
    inference_tests: int


class RejectedRows(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The broken rows of a dataset that is accepted without them: how many, why (the first hundred), and counts by code."""

    rows: int
    problems: list[Problem]
    counts: dict[str, int]


@dataclass
class Findings:
    """Problems: the first hundred in full, all of them counted by code."""

    listed: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, *problems: Problem) -> None:
        """Add problems."""
        for problem in problems:
            self.counts[problem.code] += 1
            if len(self.listed) < LISTED_ERRORS:
                self.listed.append(problem)

    def take(self, other: "Findings") -> None:
        """Take over what another one has."""
        self.listed += other.listed[: LISTED_ERRORS - len(self.listed)]
        self.counts += other.counts
        other.listed, other.counts = [], Counter()


@dataclass
class Check:
    """What was found: the receipt's content, and the files of a valid run's input folder under `folder`."""

    config: RunConfig
    errors: Findings = field(default_factory=Findings)
    rejected: Findings = field(default_factory=Findings)
    warnings: list[str] = field(default_factory=list)
    rows: int = 0
    heldout: int = 0
    tests: int = 0
    columns: dict[str, str] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, Any] = field(default_factory=dict)
    examples: list[dict[str, str]] = field(default_factory=list)
    rewards: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether a run may start."""
        return not self.errors.counts

    @property
    def reason(self) -> str | None:
        """The first of the errors in a line, None if there are none."""
        return str(self.errors.listed[0]) if self.errors.listed else None

    def add(self, *problems: Problem) -> None:
        """Record problems that reject the dataset."""
        self.errors.add(*problems)

    def receipt(self) -> Receipt:
        """Return the receipt."""
        return Receipt(
            version=VERSION,
            ok=self.ok,
            rows=self.rows,
            errors=self.errors.listed,
            error_counts=dict(sorted(self.errors.counts.items())),
            warnings=config_warnings(self.config) + self.warnings,
            fixes=self.config.fixes,
            rejected=RejectedRows(
                rows=self.rejected.counts.total(),
                problems=self.rejected.listed,
                counts=dict(sorted(self.rejected.counts.items())),
            ),
            columns=self.columns,
            stats=self.stats,
            tokens=self.tokens,
            examples=self.examples,
            rewards=self.rewards,
            cost=self.cost,
            heldout=self.heldout,
            inference_tests=self.tests,
        )


def check_config(raw: bytes, default_model: str) -> Check:
    """Begin a check with the config; `default_model` is the deployment's, for a config that names none."""
    try:
        return Check(load_run_config(raw, default_model=default_model))
    except RejectedError as error:
        # Go on with the defaults: the dataset's mistakes belong in the same receipt as the config's.
        check = Check(RunConfig(model=default_model))
        check.add(*error.problems)
        return check


def check_dataset(
    check: Check,
    data: io.BufferedReader,
    suffix: str,
    tests_raw: bytes | None,
    folder: Path,
    *,
    instance_types: Sequence[str],
    image: str = "",
    model: Path | None,
    weights: int = 0,
    permissions: RewardPermissions = NO_PERMISSIONS,
    terms: Terms = NO_TERMS,
) -> None:
    """Check an open dataset file of a format with the config and tests, and write the run's input files into `folder`.

    `tests_raw` is None where no test file was given: the held-out rows are the tests then. `instance_types` are the
    deployment's, for a config that names none, and `image` is what its jobs run in. `model` is a folder with the base
    model's tokenizer, None where only the job will see it, and `weights` the bytes of its weights. `permissions` is what
    rewards may do, and `terms` what it pays.
    The files are `config.json`, `train.jsonl`, `heldout.jsonl` and `inference_tests.json`, complete only if the check is
    `ok`, and `rejected.jsonl`.
    """
    check.add(*check_instances(check.config, check.config.compute.instance_type or instance_types, image))
    rewards = _rewards(check, permissions)
    tests: list[InferenceTest] = []
    if tests_raw is not None:
        try:
            tests = parse_tests(tests_raw, check.config, permissions)
        except RejectedError as error:
            check.add(*error.problems)
    with ExitStack() as stack:
        split = stack.enter_context(Split(folder, check.config.heldout_fraction))
        survey = Survey(check.config, tests, stack.enter_context(_tokenizer(model, check)))
        records = Records(data, suffix, check.config)
        _read(records, split, survey, check, folder)
        heldout, sample = split.finish()
        survey.finish(sample, records.roles, records.variants)
    check.add(*survey.problems)
    check.warnings += survey.warnings
    check.stats, check.tokens, check.examples = survey.stats, survey.tokens, survey.examples
    check.rows, check.heldout, check.columns = split.rows, len(heldout), next(iter(records.variants), {})
    trained = check.rows - check.heldout - survey.dropped
    _try_rewards(check, rewards, sample, tests, trained)
    _estimate(
        check, trained, len(tests) or check.heldout, instance_types, parameters_of(check.config.model, model, weights), terms
    )
    if check.rows < MIN_ROWS and check.ok:
        check.add(Problem("NO_ROWS", f"the dataset has {check.rows} usable rows", f"at least {MIN_ROWS} are needed"))
    if check.ok:
        check.add(*check_steps(check.config, trained))
        tests = tests or tests_from_rows(heldout)
        if not tests:
            check.add(Problem("NO_TESTS", "there are no inference tests", "give a test file or heldout_fraction above 0"))
        check.tests = len(tests)
        (folder / "inference_tests.json").write_bytes(dump_tests(tests))
        (folder / "config.json").write_text(check.config.model_dump_json(indent=1))


def _rewards(check: Check, permissions: RewardPermissions) -> list[Reward]:
    """Return the config's rewards; none where the config or the deployment does not let them be made."""
    if not check.ok:
        return []
    try:
        return build_rewards(check.config.rewards, permissions)
    except RewardError as error:
        check.add(Problem("REWARD_NOT_ALLOWED", str(error), "use a reward that this deployment allows", key="rewards"))
        return []


def _try_rewards(check: Check, rewards: list[Reward], sample: list[Row], tests: list[InferenceTest], trained: int) -> None:
    """Try the rewards on a sample of the rows; broken ones among these do not matter to that."""
    if rewards:
        found = check_rewards(rewards, sample, check.config, tests, trained_rows=trained)
        check.rewards = found.receipt
        check.warnings += found.warnings
        check.add(*found.problems)


def _estimate(
    check: Check, trained: int, tests: int, instance_types: Sequence[str], parameters: float | None, terms: Terms
) -> None:
    """Say what the run will cost, by the tokens of a sample where they were counted, else by characters."""
    if not trained > 0:
        return
    mean = {
        name: check.tokens[name]["mean"]
        if check.tokens
        else check.stats[f"{name}_characters"]["mean"] / CHARACTERS_PER_TOKEN
        for name in ("prompt", "answer")
    }
    work = Work(trained, tests, mean["prompt"], mean["answer"], parameters)
    types = check.config.compute.instance_type or instance_types
    check.cost, problems, warnings = estimate(check.config, work, types, terms)
    check.warnings += warnings
    check.add(*problems)


@contextmanager
def _tokenizer(model: Path | None, check: Check) -> Iterator[TokenCounter | None]:
    """Start the model's tokenizer; one that cannot be used is a problem of the check."""
    counter = None
    if model is not None and (model / "tokenizer.json").exists():
        try:
            counter = TokenCounter(model, check.config.grpo_value("chat_template_kwargs"))
        except TokenizerError as error:
            check.add(unusable_tokenizer(check.config, error))
    try:
        yield counter
    finally:
        if counter:
            counter.close()


def _read(records: Records, split: Split, survey: Survey, check: Check, folder: Path) -> None:
    """Take every row to where it belongs; what is broken is set aside, or is an error if that is more than is allowed."""
    allowed, seen = check.config.max_bad_rows, 0
    encode = msgspec.json.Encoder().encode
    with (folder / "rejected.jsonl").open("wb") as aside:
        for batch in records.batches():
            check.add(*batch.failed)
            seen += len(batch.rows) + len(batch.rejected)
            check.rejected.add(*(bad.problem for bad in batch.rejected))
            if allowed:
                aside.writelines(
                    encode(msgspec.to_builtins(bad.problem) | {"record": bad.record}) + b"\n" for bad in batch.rejected
                )
            if batch.rows:
                encoded = list(map(str.encode, batch.texts))
                hashes = list(map(xxh3_64_intdigest, encoded))
                survey.add(batch, encoded, hashes)
                split.add(batch.rows, hashes, batch.numbers)
            if split.written > MAX_WRITTEN_BYTES:
                message = f"the rows have more than {MAX_WRITTEN_BYTES:,} bytes unpacked"
                check.add(Problem("TOO_LARGE", message, "drop a sample of them"))
                break
    rejected = check.rejected.counts.total()
    if rejected > allowed * seen:
        check.errors.take(check.rejected)
    elif rejected:
        check.warnings.append(f"{rejected} of {seen} rows are broken and set aside in rejected.jsonl")
