"""Measures the speed of validation, beside two common methods with the same checks, the same file and one process.

    .venv/bin/python benchmarks/validate_dataset.py [--megabytes 200] [--memory 2000]

The file is chat-style JSON Lines with about 700 bytes per row. Each method reads it; checks the messages of each row, their
roles and their order, and that prompt and answer are not empty; measures lengths; finds repeated rows and prompts; holds
rows out; and writes the other rows in canonical form. Then Tunedrop validates the same rows in other formats (sizes of gzip
files are unpacked). `--memory` is the size in megabytes of a file that a new process validates, to print the growth of its
resident memory.
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.validation.terms import Terms
from pipeline.validation.validate import Submission, read_config, validate
from tunedrop.dataset.batches import BLOCK_BYTES

REPEATS = 3
HELD_OUT = 256


def write_rows(path: Path, megabytes: int) -> int:
    """Write the dataset; return its number of rows."""
    generator = random.Random(0)
    words = [f"word{n}" for n in range(5000)]

    def text(length: int) -> str:
        return " ".join(generator.choices(words, k=length // 8))

    rows = size = 0
    with path.open("w") as file:
        while size < megabytes * 1_000_000:
            system = {"role": "system", "content": 'You answer "briefly".\nIf you do not know, say so.'}
            turns = [{"role": "user", "content": text(370)}, {"role": "assistant", "content": text(120)}]
            size += file.write(json.dumps({"messages": [system, *turns]}) + "\n")
            rows += 1
    return rows


def tunedrop(path: Path, folder: Path) -> int:
    """Validate with the code of `validate_dataset`; return the number of rows."""
    config, about_config = read_config(b"", "model")
    reader: io.BufferedReader = io.BufferedReader(io.FileIO(path), BLOCK_BYTES)
    with reader as file:
        submission = Submission(
            name=path.name,
            size=path.stat().st_size,
            open=lambda: file,
            config=config,
            about_config=about_config,
            tests=None,
            model=None,
            rewards=folder,
            beside="",
            folder=folder,
        )
        receipt = validate(submission, Terms(["ml.g5.xlarge"]))
    assert receipt.ok, receipt.errors[0]
    return receipt.rows


# --- the same checks in a loop over the rows of a loader ---

Conversation = list[dict[str, str]]


def finish(conversations: Iterable[Conversation], folder: Path) -> int:
    """Check well-formed conversations and collect what a receipt contains; return the number of rows."""
    prompts, answers = Counter[int](), Counter[int]()
    seen: set[bytes] = set()
    repeated = rows = 0
    low: list[tuple[bytes, int]] = []
    with (folder / "train.jsonl").open("w") as train:
        for messages in conversations:
            *prompt, answer = messages
            roles = [message["role"] for message in prompt]
            turns = roles[1:] if roles[:1] == ["system"] else roles
            good = answer["role"] == "assistant" and turns and turns[0] == "user" and turns[-1] == "user"
            if not good or "system" in turns or not prompt[-1]["content"].strip() or not answer["content"].strip():
                raise ValueError(f"row {rows + 1} is not valid")
            text = "\0".join(message["content"] for message in prompt)
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            pair = hashlib.blake2b(answer["content"].encode(), digest_size=8, key=digest).digest()
            repeated += (digest in seen) + (pair in seen)
            seen |= {digest, pair}
            prompts[len(text)] += 1
            answers[len(answer["content"])] += 1
            low.append((digest, rows))
            rows += 1
            train.write(json.dumps({"id": f"row-{rows}", "prompt": prompt, "answer": answer["content"]}) + "\n")
    low.sort()
    del low[HELD_OUT:]
    return rows


def datasets_loader(path: Path, folder: Path) -> int:
    """Validate with Hugging Face's `datasets.load_dataset("json")` and a loop over its rows."""
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "cache"))

    def conversations() -> Iterable[Conversation]:
        for batch in rows.iter(1000):
            for messages in batch["messages"]:
                if any(message["role"] not in {"system", "user", "assistant"} for message in messages):
                    raise ValueError("unknown role")
                yield messages

    return finish(conversations(), folder)


class Message(BaseModel):
    """A message as a pydantic model."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: str


class Record(BaseModel):
    """A row as a pydantic model."""

    model_config = ConfigDict(extra="forbid")
    messages: list[Message]


def json_and_pydantic(path: Path, folder: Path) -> int:
    """Validate with the standard library's `json` and pydantic models."""

    def conversations() -> Iterable[Conversation]:
        with path.open() as file:
            for number, line in enumerate(file, 1):
                try:
                    record = Record.model_validate(json.loads(line))
                except (ValueError, ValidationError) as error:
                    raise ValueError(f"line {number}: {error}") from None
                yield [{"role": message.role, "content": message.content} for message in record.messages]

    return finish(conversations(), folder)


def other_formats(path: Path) -> Iterator[Path]:
    """Write the same rows in the other formats, one after another."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [json.loads(line) for line in path.open()]
    pairs = [{"question": row["messages"][1]["content"], "answer": row["messages"][2]["content"]} for row in rows]
    for name in ("array.json", "pretty.json", "table.csv", "zipped.jsonl.gz", "table.parquet", "chat.parquet"):
        file = path.with_name(name)
        if name == "array.json":
            file.write_text(json.dumps(rows))
        elif name == "pretty.json":
            file.write_text("\n".join(json.dumps(row, indent=2) for row in rows))
        elif name == "table.csv":
            with file.open("w", newline="") as out:
                writer = csv.DictWriter(out, ["question", "answer"])
                writer.writeheader()
                writer.writerows(pairs)
        elif name == "zipped.jsonl.gz":
            file.write_bytes(gzip.compress(path.read_bytes()))
        else:
            pq.write_table(pa.Table.from_pylist(pairs if name == "table.parquet" else rows), file)
        yield file


def timed(check: Callable[[Path, Path], int], path: Path, rows: int) -> tuple[float, float]:
    """Return the best processor and wall seconds of a few runs."""
    best: tuple[float, float] = (float("inf"), float("inf"))
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            wall, before = time.perf_counter(), processor()
            assert check(path, Path(folder)) == rows
            best = min(best, (processor() - before, time.perf_counter() - wall))
    return best


def processor() -> float:
    """Return the processor seconds of this process and of its children; a child reads Parquet."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def peak_bytes() -> int:
    """Return the peak resident memory of this process. (getrusage would include its parent's before the fork.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def grown(path: Path) -> dict[str, Any]:
    """Validate a file in this process; return rows, seconds, and the growth of its memory in MB."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        small = Path(folder) / "small.jsonl"
        write_rows(small, 1)
        tunedrop(small, Path(folder))  # loads the modules that are imported on first use
        before = peak_bytes()
        started = processor()
        rows = tunedrop(path, Path(folder))
        seconds = processor() - started
    return {"rows": rows, "mb": (peak_bytes() - before) / 1e6, "seconds": seconds}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--memory", type=int, default=2000)
    parser.add_argument("--grown", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.grown:
        print(json.dumps(grown(arguments.grown)))
        return
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "chat.jsonl"
        rows = write_rows(path, arguments.megabytes)
        size = path.stat().st_size
        print(f"{size / 1e6:.0f} MB, {rows} rows of {size / rows:.0f} bytes; processor time, best of {REPEATS}")
        ways = {"tunedrop": tunedrop, "datasets": datasets_loader, "json + pydantic": json_and_pydantic}
        best = {way: timed(check, path, rows) for way, check in ways.items()}
        for way, (processor, wall) in best.items():
            ratio = processor / best["tunedrop"][0]
            print(f"{way:16} {size / processor / 1e6:7.1f} MB/s   {wall:6.2f} s   {ratio:5.2f} times tunedrop's time")
        for file in other_formats(path):
            processor, _ = timed(tunedrop, file, rows)
            size = (path if file.suffix == ".gz" else file).stat().st_size
            print(f"{file.name:16} {size / processor / 1e6:7.1f} MB/s   {rows / processor / 1000:.0f} thousand rows/s")
            file.unlink()
        rows = write_rows(path, arguments.memory)
        done = subprocess.run([sys.executable, __file__, "--grown", str(path)], check=True, capture_output=True, text=True)
        growth, size = json.loads(done.stdout.splitlines()[-1]), path.stat().st_size
        speed = size / growth["seconds"] / 1e6
        print(f"{size / 1e6:.0f} MB, {growth['rows']} rows: {speed:.1f} MB/s, the process grew by {growth['mb']:.0f} MB")


if __name__ == "__main__":
    main()
