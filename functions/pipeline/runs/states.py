"""A run: its identity, its states, and the moves between them. Nothing here reads or writes."""

import hashlib
from collections.abc import Iterable
from datetime import timedelta
from enum import StrEnum

import msgspec

from pipeline.runs import clock
from tunedrop.object_keys import slug

LONGEST_BACKOFF = timedelta(hours=1)


class RunState(StrEnum):
    """The states of a run."""

    VALIDATING = "VALIDATING"
    VALIDATED = "VALIDATED"
    REJECTED = "REJECTED"
    WAITING = "WAITING"
    TRAINING = "TRAINING"
    TRAINED = "TRAINED"
    TRAINING_FAILED = "TRAINING_FAILED"
    TESTING = "TESTING"
    TESTED = "TESTED"
    TESTING_FAILED = "TESTING_FAILED"
    PUBLISHED = "PUBLISHED"
    CANCELLED = "CANCELLED"


FINAL = frozenset(
    {RunState.REJECTED, RunState.TRAINING_FAILED, RunState.TESTING_FAILED, RunState.PUBLISHED, RunState.CANCELLED}
)
# A run that ended in one of these states begins another attempt when its dataset is uploaded again.
RETRYABLE = FINAL - {RunState.PUBLISHED}
# The states from which a run may move to each state. WAITING and TRAINED allow a move to themselves: a new reason to wait.
MOVES: dict[RunState, frozenset[RunState]] = {
    RunState.WAITING: frozenset({RunState.VALIDATED, RunState.WAITING}),
    RunState.TRAINING: frozenset({RunState.VALIDATED, RunState.WAITING}),
    RunState.TRAINED: frozenset({RunState.TRAINING, RunState.TRAINED}),
    RunState.TRAINING_FAILED: frozenset({RunState.TRAINING, RunState.VALIDATED, RunState.WAITING}),
    RunState.TESTING: frozenset({RunState.TRAINED}),
    RunState.TESTED: frozenset({RunState.TESTING}),
    RunState.TESTING_FAILED: frozenset({RunState.TESTING, RunState.TRAINED}),
    RunState.PUBLISHED: frozenset({RunState.TESTED}),
    RunState.CANCELLED: frozenset(RunState) - FINAL,
}
# The same for moves that begin the next attempt: after a job that found no instance, or, from TESTED, because the line has
# another champion by now.
MOVES_TO_NEXT_ATTEMPT: dict[RunState, frozenset[RunState]] = {
    RunState.WAITING: frozenset({RunState.TRAINING}),
    RunState.TRAINED: frozenset({RunState.TESTING, RunState.TESTED}),
}
# What a move does to the run's slot, in DynamoDB's words: a run with a job has a slot, a waiting run has none.
SLOT_CHANGES: dict[RunState, str] = {RunState.TRAINING: "ADD", RunState.WAITING: "DELETE"}


ID_DIGITS = 12


def inputs_digest(dataset: str, parts: Iterable[bytes | str]) -> str:
    """Return the SHA-256 that identifies a run's inputs, in hexadecimal.

    `parts` are the data's format and digest, the config, the inference tests, the base model's identity and the trainer's
    digest. Each part is hashed by itself first: moving a byte from one part to the next changes the digest.
    """
    digest = hashlib.sha256(dataset.encode())
    for part in parts:
        digest.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    return digest.hexdigest()


def run_ids(dataset: str, digest: str) -> list[str]:
    """Return the possible ids of a run, `<dataset slug>-<12 hex>`: the first one that no other digest has is the run's.

    Two datasets whose digests begin alike can be made in a minute of computing, so an id alone does not identify a run.
    """
    return [f"{slug(dataset)}-{digest[at : at + ID_DIGITS]}" for at in range(0, len(digest) - ID_DIGITS + 1, ID_DIGITS)]


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A run. Times are ISO 8601 in UTC.

    `digest` identifies the run's inputs, and `base` the base model's files. `trigger` is the upload (`key@sequencer`) that
    began the attempt. `start` is the run whose adapter the training starts from. `verdict` is written before the results are
    published, and `tries` with it: how many models the same tests had judged since the line's last champion, this one
    included. From then on the run can only be published.

    `choices` counts the instance choices that attempts walk through (see `pipeline.jobs.plan.instance_choices`).
    """

    run_id: str
    dataset: str
    state: RunState
    attempt: int
    trigger: str
    key: str
    version_id: str
    arrived: str
    updated: str
    model: str
    plan: str
    line: str = ""
    start: str | None = None
    base: str = ""
    digest: str = ""
    rows: int = 0
    train_job: str | None = None
    test_job: str | None = None
    instance_type: str | None = None
    choices: int = 1
    not_before: str | None = None
    artifacts: str | None = None
    bounded: bool = False
    reason: str | None = None
    verdict: str | None = None
    tries: int = 1
    model_package: str | None = None
    open: str | None = None

    @property
    def failed(self) -> bool:
        """Whether the run ended without a model."""
        return self.state in RETRYABLE

    @property
    def waits(self) -> bool:
        """Whether the run waits for an instance: for its training job, or, once trained, for its test job."""
        return self.state == RunState.WAITING or (self.state == RunState.TRAINED and self.reason is not None)

    @property
    def backs_off(self) -> bool:
        """Whether the run must not ask for an instance yet."""
        return self.not_before is not None and self.not_before > clock.now()


class IdTakenError(Exception):
    """A run with other inputs got the id in the same moment. The upload's event must be delivered again."""


class UploadDoneError(Exception):
    """Another delivery of the upload's event validated the upload to its end meanwhile."""


class StaleMoveError(Exception):
    """A move came too late: the run is in a later state or in another attempt. The event behind the move is done."""


def backoff(run: Run) -> str | None:
    """Return the earliest time of the next attempt of a run whose job found no instance; None for at once.

    Each instance choice gets one attempt without a pause. After every choice, the run pauses 1, 2, 4, … minutes, at most
    an hour.
    """
    rounds, choices_left = divmod(run.attempt, run.choices)
    if choices_left:
        return None
    pause = min(timedelta(minutes=2 ** min(rounds - 1, 10)), LONGEST_BACKOFF)
    return clock.ago(-pause)
