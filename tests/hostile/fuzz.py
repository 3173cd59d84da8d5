"""Searches for files that a parser cannot bear, guided by the code that each file reaches.

    make fuzz SECONDS=600              # every parser
    PYTHONPATH=functions:tests/support .venv-fuzz/bin/python tests/hostile/fuzz.py csv 600

A parser must end within 5 seconds for each input of at most 1 MB, in 1 GB of memory, and raise only its own errors.
An input that breaks this is written to build/fuzz/<parser>/ and named, and the command fails. The slowest input is the file
`slowest` there. For each parser, the command prints a line with the number of inputs, the longest time of one input (for
rewards: in one reward), and the peak of the process's memory.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

FOLDER = Path("build/fuzz")
SAMPLES = Path("tests/samples")
MOST_BYTES, MOST_SECONDS, MOST_MB = 1_000_000, 5, 1000
# The parsers, and the files from which their search begins.
PARSERS = {
    "jsonl": "*.jsonl",
    "json": "*.json",
    "csv": "*.csv",
    "config": "../../examples/*.yaml",
    "tests": "../../tunedrop_cli/sample/*.json",
    "rewards": "*.jsonl",
}
# libFuzzer's statistics: https://llvm.org/docs/LibFuzzer.html#options (print_final_stats)
STATISTIC = re.compile(r"stat::(\w+):\s+(\d+)(?: (\w+))?")


def target_of(parser: str) -> Callable[[bytes], None]:
    """Return the function that gives bytes to a parser. Its modules must have been imported with instrumentation."""
    from reward_cases import CASES

    from tunedrop.config.model import RunConfig
    from tunedrop.config.parse import load_run_config
    from tunedrop.dataset.rows import read_rows
    from tunedrop.inference_tests import parse_tests
    from tunedrop.rewards import NO_PERMISSIONS, REWARDS, Reward, RewardSpec, Sample

    config = RunConfig(model="base")
    own = [name for name, type_ in REWARDS.items() if not type_.external and not type_.per_batch]
    rewards = [Reward(RewardSpec.model_validate({"type": name, **CASES[name][0][0]})) for name in own]
    file = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)) / f"data.{parser}"

    def dataset(raw: bytes) -> None:
        file.write_bytes(raw)
        for _ in read_rows(file, config):
            pass

    slowest = 0.0

    def measure(call: Callable[[], object], what: str, raw: bytes) -> None:
        """Make a call. One that seems slow is made again: libraries import parts of themselves for a first answer."""
        nonlocal slowest
        if _seconds(call) > slowest and (seconds := _seconds(call)) > slowest:
            slowest = seconds
            (FOLDER / parser / "slowest").write_bytes(raw)
            # libFuzzer counts whole seconds.
            print(f"stat::slowest_ms: {1000 * seconds:.0f} {what}", file=sys.stderr)

    def scores(raw: bytes) -> None:
        completion, _, answer = raw.decode(errors="surrogateescape").partition("\n")
        samples = [Sample(completion, answer, "What is it?")]
        for name, reward in zip(own, rewards, strict=True):
            measure(partial(reward.score_samples, samples), name, raw)

    if parser == "rewards":
        scores(b"")  # rewards import large libraries for their first answer

    parse: dict[str, Callable[[bytes], object]] = {
        "config": lambda raw: load_run_config(raw, default_model="base"),
        "tests": lambda raw: parse_tests(raw, config, NO_PERMISSIONS),
    }

    def target(raw: bytes) -> None:
        if parser == "rewards":
            scores(raw)
        else:
            measure(partial(parse.get(parser, dataset), raw), parser, raw)

    return target


def _seconds(call: Callable[[], object]) -> float:
    """Make a call and return its processor time. An answer that a reward cannot score is the dataset's mistake."""
    from tunedrop.problems import RejectedError
    from tunedrop.rewards import RewardError

    started = time.process_time()
    with suppress(RejectedError, RewardError):
        call()
    return time.process_time() - started


def search(parser: str, arguments: list[str]) -> None:
    """Give a parser one input after another, until libFuzzer's arguments end the search. Does not return."""
    import atheris

    with atheris.instrument_imports(include=["tunedrop"]):
        target = target_of(parser)
    atheris.Setup([sys.argv[0], *arguments], target)
    atheris.Fuzz()


def run(parser: str, seconds: int) -> bool:
    """Search in a process of its own and print its figures. Return whether nothing was found."""
    folder = FOLDER / parser
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for sample in SAMPLES.glob(PARSERS[parser]):
        (corpus / sample.name).write_bytes(sample.read_bytes())
    limits = [f"-max_total_time={seconds}", f"-max_len={MOST_BYTES}", f"-timeout={MOST_SECONDS}", f"-rss_limit_mb={MOST_MB}"]
    command = [sys.executable, __file__, parser, *limits, "-print_final_stats=1"]
    command += [f"-artifact_prefix={folder}/", str(corpus)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = {name: number for name, number, _ in STATISTIC.findall(done.stderr)}
    slowest = [what for name, _, what in STATISTIC.findall(done.stderr) if name == "slowest_ms"]
    print(
        f"{parser}: {int(found.get('number_of_executed_units', 0)):,} inputs in {seconds} s; the slowest took "
        f"{found.get('slowest_ms', '?')} ms ({slowest[-1] if slowest else '?'}); "
        f"peak memory {found.get('peak_rss_mb', '?')} MB"
    )
    if done.returncode:
        print(f"{parser}: FOUND SOMETHING (exit code {done.returncode})\n{done.stderr[-3000:]}", file=sys.stderr)
    return done.returncode == 0


def main() -> None:
    """Search every parser for some seconds, two at a time; or, with a parser, be its search."""
    first, *others = sys.argv[1:]
    if first in PARSERS and others and others[0].startswith("-"):
        search(first, others)
    parsers, seconds = ([first], others[0]) if first in PARSERS else (list(PARSERS), first)
    with ThreadPoolExecutor(2) as pool:
        clean = list(pool.map(lambda parser: run(parser, int(seconds)), parsers))
    sys.exit(0 if all(clean) else 1)


if __name__ == "__main__":
    main()
