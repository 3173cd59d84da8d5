"""Trains what `tunedrop init --yes` proposes for two shapes that people drop, to see whether the reward moves.

    .venv/bin/python -m benchmarks.proposals [--steps 8] [--shape faq]

`faq` has rows `{"Index", "Question", "Answer", "Reasoning"}` whose answers are sentences; `worked` has word problems whose
answers end with `#### number`, as GSM8K's. The base model is SmolLM2-135M-Instruct. Only the number of steps and the batch
are set here. The benchmark prints the proposal, the learnability gate's estimate, and the mean reward of the first and the
last steps. The learning rate is that of `init` for so many steps.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tunedrop_cli.init import learning_rate, propose

ROOT = Path(__file__).parents[1]
MODEL = ROOT / ".tunedrop/models/SmolLM2-135M-Instruct"
PARAMETERS = 135e6
CAPITALS = dict(
    pair.split(":")
    for pair in (
        "France:Paris Italy:Rome Spain:Madrid Japan:Tokyo Egypt:Cairo Peru:Lima Norway:Oslo Greece:Athens Austria:Vienna "
        "Poland:Warsaw Kenya:Nairobi Cuba:Havana Iran:Tehran Chile:Santiago Portugal:Lisbon Ireland:Dublin Hungary:Budapest "
        "Finland:Helsinki Sweden:Stockholm Denmark:Copenhagen"
    ).split()
)
ASKED = (
    "What is the capital of {}?",
    "Which city is the capital of {}?",
    "Name the capital of {}.",
    "Where is {}'s government?",
)


def faq() -> list[dict[str, Any]]:
    """Return 80 questions with answers of one sentence."""
    return [
        {
            "Index": index,
            "Question": question.format(country),
            "Answer": f"The capital of {country} is {city}, where its government has its seat.",
            "Reasoning": f"{country} is a country, and {city} is its capital.",
        }
        for index, (question, (country, city)) in enumerate((ask, each) for each in CAPITALS.items() for ask in ASKED)
    ]


def worked() -> list[dict[str, Any]]:
    """Return 160 word problems with worked answers."""
    draw = random.Random(0)
    rows = []
    for _ in range(160):
        boxes, each, more = draw.randint(2, 5), draw.randint(2, 9), draw.randint(1, 5)
        total = boxes * each + more
        rows.append(
            {
                "question": f"Ann has {boxes} boxes with {each} pens in each, and {more} more pens. How many pens has she?",
                "answer": f"The boxes hold {boxes} * {each} = {boxes * each} pens.\n"
                f"With {more} more, she has {total}.\n#### {total}",
            }
        )
    return rows


SHAPES = {"faq": faq, "worked": worked}


def train(shape: str, steps: int, folder: Path) -> None:
    """Propose a config for a shape, train it, and print what became of it."""
    data = folder / f"{shape}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in SHAPES[shape]()))
    proposal = propose(data, MODEL, folder, lambda _: True)
    if not proposal.receipt.ok:
        sys.exit(f"{shape}: {proposal.receipt.errors}")
    grpo = proposal.config["grpo"] | {"max_steps": steps, "per_device_train_batch_size": 32}
    grpo["learning_rate"] = learning_rate(steps, PARAMETERS)
    config = proposal.config | {"model": MODEL.name, "grpo": grpo}
    print(yaml.safe_dump({shape: proposal.config}, sort_keys=False), flush=True)
    (folder / "run").mkdir()
    (folder / "run/config.json").write_text(json.dumps(config))
    environment = os.environ | {
        "SM_CHANNEL_TRAINING": str(folder),
        "SM_CHANNEL_RUN": str(folder / "run"),
        "SM_CHANNEL_MODELS": str(MODEL),
        "PYTHONPATH": f"{ROOT / 'functions'}:{ROOT}",
    }
    command = [sys.executable, "-m", "trainer.train", "--dataset-filename", data.name]
    job = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if job.returncode:
        print("\n".join(job.stderr.strip().splitlines()[-12:]), flush=True)
        return
    training = json.loads((folder / "output/model/training.json").read_text())
    metrics = [json.loads(line) for line in (folder / "output/model/metrics.jsonl").read_text().splitlines()]
    rewards = [point["reward"] for point in metrics if "reward" in point]
    few = max(1, len(rewards) // 4)
    first, last = statistics.fmean(rewards[:few]), statistics.fmean(rewards[-few:])
    print(f"{shape}: learnability {training['learnability']}")
    print(f"{shape}: {len(rewards)} steps in {training['seconds']:.0f} s, reward {first:.3f} -> {last:.3f}", flush=True)


def main() -> None:
    """Train each shape."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    arguments = parser.parse_args()
    for shape in arguments.shape or SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            train(shape, arguments.steps, Path(folder))


if __name__ == "__main__":
    main()
