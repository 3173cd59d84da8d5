"""Reports and an index of made-up runs, with hostile text wherever a model, a dataset or a user may write some."""

import random
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import structs

from pipeline.publish.gate import evaluate
from pipeline.publish.index import IndexedRun, render_index
from pipeline.publish.report import render_report
from tunedrop.config.parse import parse_run_config
from tunedrop.inference_tests import ModelResult, Outcome

HOSTILE = '</script><script>document.title = "pwned"</script><img src=x onerror="document.title=1"> & "quoted"'
PROOFS = {
    "adapter_effect": {"mean": 0.4, "largest": 9.1},
    "merge_parity": {"dtype": "bfloat16", "kept": 1.0, "error": 0.02, "mean": 0.0071, "tensors_off": 0},
    "fresh_process": {"seconds": 9.5, "peft": "0.21.2"},
}
SHARES = {"prompts": 16, "dead": 0.875, "learnable": 0.125, "solved": 0.0}
SECTIONS = {
    "learnability": {"prompts": 64, "dead": 5},
    "sampling": {"taught": 60, "refilled": 7},
    "shares": {"before": SHARES, "after the warm start": SHARES | {"dead": 0.25, "learnable": 0.75}},
    "warm_start": {"reason": HOSTILE, "steps": 12, "ended": "learnable"},
}
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards make toxic brew".split()


def made_tests(count: int) -> list[Outcome]:
    """Tests with answers of a few sentences, hostile text among them; number 3 could not be scored."""
    generator = random.Random(count)

    def text(length: int) -> str:
        return " ".join(generator.choices(WORDS, k=length))

    def answer(text: str, score: float) -> ModelResult:
        return ModelResult(
            text=text, score=score, rewards={"exact_match": score}, passed=score >= 1, tokens=9, cut=text.endswith("brew")
        )

    tests = []
    for number in range(count):
        base = text(generator.randint(20, 120))
        tuned = base.replace("fox", "cat") + " " + HOSTILE
        tests.append(
            Outcome(
                id=f"case-{number}",
                prompt=[
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": f"What is {text(8)}? {HOSTILE}"},
                ],
                reference=HOSTILE,
                tags=[["easy", "hard", "<b>safety</b>"][number % 3]],
                must_pass=number == 0,
                base=answer(base, float(number % 4 == 0)),
                judges=number != 4,
                tuned=answer(tuned, float(number % 5 != 1))
                if number != 3
                else ModelResult(error=f"reward 'judge' failed: {HOSTILE}"),
            )
        )
    return tests


def with_champion(tests: list[Outcome], **more: Any) -> list[Outcome]:
    """The tests with a champion's answers too: it fails every third, and one of them could not be scored."""

    def champion(number: int, test: Outcome) -> ModelResult:
        if number == 7:
            return ModelResult(error=f"reward 'judge' failed: {HOSTILE}")
        score = float(number % 3 != 0)
        return ModelResult(text=f"{test.base.text} {HOSTILE}", score=score, passed=score >= 1, cut=number == 9)

    return [structs.replace(test, champion=champion(number, test), **more) for number, test in enumerate(tests)]


def made_suite(count: int) -> list[Outcome]:
    """The suite of a line with two earlier runs."""
    first, second = (made_tests(part) for part in (count // 2, count - count // 2))
    return with_champion(first, run_id="faq-00000000000a") + with_champion(second, run_id="faq-00000000000b")


def made_report(tests: list[Outcome], steps: int = 300, suite: Sequence[Outcome] = (), tries: int = 1, **more: Any) -> str:
    """The report of a made-up run."""
    rewards = [{"type": "exact_match"}, {"type": "length", "weight": 0.1}]
    config = parse_run_config({"model": "SmolLM2-135M-Instruct", "rewards": rewards, "system_prompt": HOSTILE})
    evaluation = msgspec.to_builtins(evaluate(tests, config, suite, tries))
    if evaluation["champion"]:
        evaluation["champion"]["run_id"] = "faq-00000000000b"
    folder = "s3://artifacts/runs/cars-0123456789ab/"
    job = {"name": "job", "instance_type": "ml.g5.4xlarge", "instance_count": 1, "spot": True}
    job |= {"seconds": 3700, "billable_seconds": 1500, "usd": 3.5}
    result = evaluation | {
        "run_id": "cars-0123456789ab",
        "dataset": f"cars {HOSTILE}",
        "line": f"faq {HOSTILE}",
        "start": {"run_id": "faq-00000000000b"} if evaluation["champion"] else None,
        "attempt": 1,
        "arrived": "2026-01-02T03:04:05.123456+00:00",
        "verdict": evaluation["verdict"]["status"],
        "reasons": [*evaluation["verdict"]["reasons"], HOSTILE],
        "bounded": True,
        "training": {"steps": steps, "versions": {"trl": "1"}, "proofs": PROOFS} | SECTIONS,
        "jobs": {"train": "job", "test": "job"},
        "cost": {"usd": 3.5, "jobs": {"train": job, "test": job | {"billable_seconds": None, "usd": None}}},
        "source": f"s3://data/training_data/{HOSTILE}.jsonl",
        "source_version": "v",
        "trainer": "f00d",
        "config": config.model_dump(mode="json"),
        "artifacts": {
            "report": folder + "report.html",
            "receipt": folder + "validation.json",
            "input": folder + "input/",
            "merged_model": folder + "training/job/output/model/merged/",
        },
    }  # fmt: skip
    receipt = {
        "rows": 1000,
        "heldout": 100,
        "choosing": 25,
        "columns": {"prompt": HOSTILE, "answer": "Answer"},
        "stats": {"mean_prompt_characters": 82.1},
        "source": {"sha256": "ab" * 32},
        "warnings": [HOSTILE],
        "fixes": [],
        "cost": {"low_usd": 2.1, "high_usd": 4.0},
    }
    metrics = [
        {
            "step": n,
            "reward": n / steps,
            "rewards": {"exact_match": n / steps, "length": 1.0},
            "kl": n / 1e4,
            "entropy": 2 - n / steps,
        }
        | {"completion_length": 60.0, "loss": 0.1, "frac_reward_zero_std": 0.5}
        for n in range(1, steps + 1)
    ]
    learned = {"phase": "sft", "rewards": {}, "heldout_loss": 2.0}
    metrics = [{"step": n, "loss": 3.0 / n} | learned for n in range(1, 13)] + metrics
    alerts = [{"code": "ENTROPY_COLLAPSE", "step": 88, "message": HOSTILE}]
    return render_report(
        result, **{"receipt": receipt, "metrics": metrics, "tests": tests, "suite": suite, "alerts": alerts} | more
    )


def made_line(count: int) -> list[IndexedRun]:
    """A line's runs: each odd one starts from the one before, which is approved and its champion."""

    def run(number: int) -> IndexedRun:
        before = f"faq-{number - 1:012x}" if number else None
        given = (
            made_run(number),
            {"run_id": f"faq-{number:012x}", "dataset": f"faq/{number} {HOSTILE}", "line": "faq & more"},
        )
        published = {"published": f"2026-01-{number + 1:02d}T00:00:00+00:00"}
        lines = {"start": before if number % 2 else None, "champion": before, "champion_lift": 0.1 if before else None}
        return structs.replace(given[0], **given[1], **published, **lines)

    return [run(number) for number in range(count)]


def made_run(number: int) -> IndexedRun:
    """A made-up run of the index."""
    generator = random.Random(number)
    base, lift = round(generator.random() / 2, 4), round(generator.gauss(0.15, 0.2), 4)
    return IndexedRun(
        run_id=f"cars-{number:012x}",
        dataset=["cars", "faq", HOSTILE][number % 3],
        line=["cars", "faq", HOSTILE][number % 3],
        attempt=1,
        verdict="APPROVED" if lift > 0.2 else "REJECTED" if lift < 0 else "PENDING",
        model="SmolLM2-135M-Instruct",
        published=f"2026-{1 + number % 12:02d}-{1 + number % 28:02d}T00:00:00.{number:06d}+00:00",
        tests=100,
        base=base,
        tuned=base + lift,
        lift=lift,
        low=lift - 0.1,
        high=lift + 0.1,
        wins=30,
        ties=50,
        losses=20,
        rows=900,
        steps=100,
        seconds=None if number % 7 == 0 else float(number),
        usd=None if number % 5 == 0 else number / 10,
        learning_rate=1e-5 * (1 + number),
        rewards=["exact_match"],
        reward=[round(base + lift * n / 24 + generator.gauss(0, 0.02), 4) for n in range(24)],
    )


def made_index(count: int) -> str:
    """The index of made-up runs."""
    return render_index([made_run(number) for number in range(count)])
