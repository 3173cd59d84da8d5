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
from tunedrop.rollouts import Answer, Group, Index, Part

HOSTILE = '</script><script>document.title = "pwned"</script><img src=x onerror="document.title=1"> & "quoted"'
PROOFS = {
    "adapter_effect": {"mean": 0.4, "largest": 20.93257713317871},
    "merge_parity": {"dtype": "bfloat16", "kept": 1.0, "error": 0.02, "mean": 0.0071, "tensors_off": 0},
    "adapter_served": {"kept": 0.98, "error": 0.05},
    "fresh_process": {"seconds": 9.5, "peft": "0.21.2"},
}
LEARNABILITY = {"prompts": 64, "samples": 8, "dead": 0.25, "learnable": 0.5833, "solved": 0.1667, "reward": 0.3}
TRAINING: dict[str, Any] = {
    "learnability": LEARNABILITY | {"expected_nonzero_groups": 0.6139, "reward_error": 0.01, "seconds": 536.5},
    "sampling": {"rollouts": 10, "groups": 120, "taught": 60, "refilled": 7},
    "ended": "complete",
    "evaluations": [{"step": step, "heldout_reward": step / 400} for step in range(30, 301, 30)],
    "checkpoint": {"step": 270, "heldout_reward": 0.675},
    "shares": {
        "before": {"prompts": 16, "dead": 0.875, "learnable": 0.125, "solved": 0.0},
        "after the warm start": {"prompts": 16, "dead": 0.25, "learnable": 0.75, "solved": 0.0},
    },
    "warm_start": {"reason": HOSTILE, "steps": 12, "ended": "learnable"},
    "rows": 900,
    "rows_dropped": 12,
    "rows_truncated": 0,
}
COST = {
    "instances": [
        {"instance_type": "ml.g5.4xlarge", "gpu": "A10G", "hours": [0.5, 2.0], "usd_per_hour": 2.0, "usd": [1.0, 4.0]},
        {"instance_type": "ml.p5.48xlarge", "gpu": "H100", "hours": [0.25, 1.0], "usd_per_hour": None, "usd": None},
    ],
    "assumptions": ["training reaches 5% to 50% of the GPU's 16-bit arithmetic"],
}
LENGTHS = {"min": 3.0, "p50": 25.0, "p95": 80.0, "p99": 100.0, "max": 120.0, "mean": 30.0}
DUPLICATES = {"exact": 3, "same_prompt": 1, "exact_rows": [], "same_prompt_rows": []}
ROLLOUTS_INDEX = Index(max_mb=50, parts=[Part(name="step-000010.jsonl.gz", step=10, kind="step", bytes=1_234_567)])
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


def made_rollouts(groups: int, steps: int = 50, characters: int = 60, panel: int = 8) -> list[Group]:
    """Groups of 8 answers in each tenth of a run's steps, and the panel's answers in ten evaluations; all of it hostile."""
    lots = random.Random(groups)

    def answer(length: int, **more: Any) -> Answer:
        score = lots.random()
        return Answer(
            text=" ".join(lots.choices([*WORDS, HOSTILE], [1] * len(WORDS) + [0.2], k=max(1, length // 6))),
            score=round(score, 3),
            rewards={"exact_match": round(score, 3), "length": -0.4 if lots.random() < 0.5 else None},
            tokens=lots.randint(1, 40),
            cut=lots.random() < 0.05,
            **more,
        )

    def prompt(name: str) -> list[dict[str, Any]]:
        return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What is {name}? {HOSTILE}"}]

    made = [
        Group(
            step=10 * (1 + number * steps // groups),
            prompt_id=f"row-{number}",
            prompt=prompt(f"row-{number}"),
            answers=[
                answer(characters, advantage=lots.gauss(0, 1), sampler_log_prob=-0.5, trainer_log_prob=-0.6)
                for _ in range(8)
            ],
            reference=HOSTILE,
        )
        for number in range(groups)
    ]
    return [
        Group(step=step, prompt_id=f"held-{n}", prompt=prompt(f"held-{n}"), answers=[answer(characters)], panel=True)
        for step in range(30, 301, 30)
        for n in range(panel)
    ] + made


def made_report(tests: list[Outcome], steps: int = 300, suite: Sequence[Outcome] = (), tries: int = 1, **more: Any) -> str:
    """The report of a made-up run."""
    rewards = [{"type": "exact_match"}, {"type": "length", "weight": 0.1}]
    config = parse_run_config({"model": "SmolLM2-135M-Instruct", "rewards": rewards, "system_prompt": HOSTILE})
    evaluation = msgspec.to_builtins(evaluate(tests, config, suite, tries, more.get("probe", ())))
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
        "training": {"steps": steps, "max_steps": steps, "versions": {"trl": "1"}, "proofs": PROOFS} | TRAINING,
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
        "rejected": {"rows": 2},
        "stats": {"prompt_characters": LENGTHS, "answer_characters": LENGTHS, "duplicates": DUPLICATES},
        "tokens": {"prompt": LENGTHS},
        "source": {"sha256": "ab" * 32},
        "warnings": [HOSTILE],
        "fixes": [],
        "cost": COST,
    }
    metrics = [
        {
            "step": n,
            "reward": n / steps,
            "rewards": {"exact_match": n / steps, "length": 1.0},
            "kl": n / 1e4,
            "entropy": 2 - n / steps,
        }
        | {"completion_length": 60.0, "loss": 0.1, "frac_reward_zero_std": 0.08, "answers": 64.0}
        for n in range(1, steps + 1)
    ]
    learned = {"phase": "sft", "rewards": {}, "heldout_loss": 2.0}
    metrics = [{"step": n, "loss": 3.0 / n} | learned for n in range(1, 13)] + metrics
    evidence = [{"step": 90, "prompt_id": "row-85"}, {"step": 90, "prompt_id": "row-87"}]
    alerts = [
        {"code": "ENTROPY_COLLAPSE", "step": 88, "message": HOSTILE},
        {"code": "JUDGE_DISAGREES", "step": 90, "message": HOSTILE, "rollouts": evidence},
    ]
    parts = {"receipt": receipt, "metrics": metrics, "tests": tests, "suite": suite, "alerts": alerts}
    return render_report(result, **parts | {"rollouts": (ROLLOUTS_INDEX, made_rollouts(500))} | more)


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
