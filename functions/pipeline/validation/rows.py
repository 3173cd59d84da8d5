"""The pass over a dataset's rows: every row is split off, surveyed, or set aside. Memory does not grow with the file."""

import io
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
from xxhash import xxh3_64_intdigest

from pipeline.validation.columns import check_columns
from pipeline.validation.judges import RepeatedTests
from pipeline.validation.receipt import LISTED_ERRORS, RejectedRows, Tally
from pipeline.validation.section import Section
from pipeline.validation.split import Split, divide
from pipeline.validation.survey import Survey
from pipeline.validation.tokens import TokenCounter, TokenizerError, unusable_tokenizer
from tunedrop.config.model import RunConfig
from tunedrop.dataset.rows import Records, Row, Rows
from tunedrop.inference_tests import InferenceTest
from tunedrop.problems import Problem
from tunedrop.questions import sketches

# The limit of bytes in train.jsonl. A Parquet file can unpack to any size, and the function's /tmp has 10 GiB.
MAX_WRITTEN_BYTES = 5 * 1024**3
CHARACTERS_PER_TOKEN = 4


class _Pass(NamedTuple):
    """Where the pass takes the rows: the tests that they may repeat, whether such rows are left out, split and survey."""

    repeated: RepeatedTests
    leave_out: bool
    split: Split
    survey: Survey


class RowsRead(NamedTuple):
    """The sections of the pass, a sample of the rows, and the numbers of rows to train on, and to choose the checkpoint by.

    `judging` are the held-out rows that are inference tests; none if there is a test file.
    `mean_tokens` of a prompt and of an answer are those of the sample, or estimates from characters without a tokenizer.
    """

    sections: list[Section]
    sample: list[Row]
    judging: list[Row]
    trained: int
    choosing: int
    mean_tokens: tuple[float, float]


def read_rows(
    data: io.BufferedReader,
    suffix: str,
    config: RunConfig,
    tests: Sequence[InferenceTest],
    model: Path | None,
    folder: Path,
) -> RowsRead:
    """Read a dataset of a format (`suffix`), and write `train.jsonl`, `heldout.jsonl` and `rejected.jsonl` into `folder`.

    `model` is a folder with the base model's tokenizer, None if only the job has it.
    """
    with ExitStack() as stack:
        counter, tokenizer = stack.enter_context(_tokenizer(model, config))
        split = stack.enter_context(Split(folder, config.heldout_fraction))
        survey = Survey(config, tests, counter)
        records, repeated = Records(config), RepeatedTests(tests, config)
        to = _Pass(repeated, config.tests.leave_out_rows, split, survey)
        broken = _read(records.batches(data, suffix), to, config.max_bad_rows, folder / "rejected.jsonl")
        heldout, sample = split.finish()
        choosing, judging = (heldout, []) if tests else divide(heldout)
        (folder / "heldout.jsonl").write_bytes(msgspec.json.Encoder().encode_lines(choosing))
        surveyed = survey.finish(sample, records.roles, [] if to.leave_out else repeated.ids())
    left_out = repeated.rows if to.leave_out else 0
    counts = {"rows": split.rows, "left_out": left_out, "heldout": len(heldout), "choosing": len(choosing)}
    sections = [tokenizer, broken, Section(counts, [], []), check_columns(records, sample, config), surveyed]
    trained = split.rows - len(heldout) - survey.dropped
    tokens = (_mean_tokens(surveyed, "prompt"), _mean_tokens(surveyed, "answer"))
    return RowsRead(sections, sample, judging, trained, len(choosing), tokens)


def _mean_tokens(surveyed: Section, part: str) -> float:
    tokens, stats = surveyed.receipt["tokens"], surveyed.receipt["stats"]
    if tokens:
        return float(tokens[part]["mean"])
    return float(stats[f"{part}_characters"]["mean"]) / CHARACTERS_PER_TOKEN if stats else 0.0


@contextmanager
def _tokenizer(model: Path | None, config: RunConfig) -> Iterator[tuple[TokenCounter | None, Section]]:
    """Start the model's tokenizer, if there is one, and end it afterwards."""
    counter, section = None, Section({}, [], [])
    if model is not None and (model / "tokenizer.json").exists():
        try:
            counter = TokenCounter(model, config.grpo_value("chat_template_kwargs"))
        except TokenizerError as error:
            section.problems.append(unusable_tokenizer(config, error))
    try:
        yield counter, section
    finally:
        if counter:
            counter.close()


def _read(batches: Iterator[Rows], to: _Pass, allowed: float, aside: Path) -> Section:
    """Take every row to the split and the survey; return the section about broken rows.

    Up to the share `allowed`, broken rows go into the file `aside`. A larger share of them rejects the dataset.
    """
    errors, rejected, rows = Tally(), Tally(), 0
    encode = msgspec.json.Encoder().encode
    with aside.open("wb") as file:
        for batch in batches:
            errors.add(*batch.failed)
            rejected.add(*(bad.problem for bad in batch.rejected))
            rows += len(batch.rows) + len(batch.rejected)
            if allowed:
                file.writelines(
                    encode(msgspec.to_builtins(bad.problem) | {"record": bad.record}) + b"\n" for bad in batch.rejected
                )
            if batch.rows:
                _take(batch, to)
            if to.split.written > MAX_WRITTEN_BYTES:
                message = f"the unpacked rows exceed {MAX_WRITTEN_BYTES:,} bytes"
                errors.add(Problem("TOO_LARGE", message, "upload a sample of them"))
                break
    count = rejected.counts.total()
    counts, listed = errors.counts, errors.listed
    if count > allowed * rows:
        counts, listed, rejected = counts + rejected.counts, [*listed, *rejected.listed][:LISTED_ERRORS], Tally()
    return Section(
        {
            "error_counts": counts,
            "rejected": RejectedRows(
                rows=rejected.counts.total(), problems=rejected.listed, counts=dict(sorted(rejected.counts.items()))
            ),
        },
        listed,
        [f"broken rows set aside in rejected.jsonl: {count} of {rows}"] if rejected.counts else [],
    )


def _take(batch: Rows, to: _Pass) -> None:
    encoded = list(map(str.encode, batch.texts))
    repeating = to.repeated.find(batch.texts, encoded)
    if repeating and to.leave_out:
        kept = [index for index in range(len(encoded)) if index not in repeating]
        encoded = [encoded[index] for index in kept]
        batch = _only(batch, kept)
    to.survey.add(batch, encoded, list(map(xxh3_64_intdigest, encoded)))
    ranks = list(map(xxh3_64_intdigest, sketches(batch.texts, encoded)))
    to.split.add(batch.rows, ranks, batch.numbers)


def _only(batch: Rows, indices: Sequence[int]) -> Rows:
    return batch._replace(
        rows=[batch.rows[index] for index in indices],
        numbers=[batch.numbers[index] for index in indices],
        lines=[batch.lines[index] for index in indices] if batch.lines else [],
        texts=[batch.texts[index] for index in indices],
    )
