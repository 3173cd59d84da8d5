"""Measures a test job of 200 prompts and two models, beside `transformers` pipelines that take one prompt at a time.

    .venv/bin/python benchmarks/test_model.py [--prompts 200] [--tokens 32]

Both load two models (here the same weights twice) and decode greedily, with the same data type and in the same process.
"""

import argparse
import json
import time

from transformers import pipeline

from local_app import base_model
from local_app.stack import PROJECT
from trainer import models
from trainer.answers import AskedModel
from trainer.engines import Decoding
from trainer.test_model import own_parts
from tunedrop.config.parse import parse_run_config
from tunedrop.inference_tests import InferenceTest

DATA = PROJECT / "tunedrop_cli/sample/additions.jsonl"


def batched(location: str, tests: list[InferenceTest], tokens: int) -> list[str]:
    """Return the completions as the test job makes them."""
    config = parse_run_config({"model": "base", "tests": {"max_completion_length": tokens}})
    model = AskedModel("base", location, models.test_dtype(location))
    texts = []
    for written in model.complete(own_parts(config, tests, Decoding.of(config))[0]):
        assert not isinstance(written, str), written  # the reason why there is none
        texts.append(written[0].text)
    model.close()
    return texts


def one_by_one(location: str, tests: list[InferenceTest], tokens: int) -> list[str]:
    """Return the completions of a text-generation pipeline, prompt by prompt."""
    chat = pipeline("text-generation", model=location, dtype=models.test_dtype(location))
    return [chat(test.prompt, max_new_tokens=tokens, do_sample=False)[0]["generated_text"][-1]["content"] for test in tests]


def main() -> None:
    """Print the seconds of the test job and of the pipelines, and their ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    location = str(base_model.fetch(PROJECT / ".tunedrop" / "models"))
    questions = [json.loads(line)["question"] for line in DATA.read_text().splitlines()][: options.prompts]
    tests = [
        InferenceTest(id=str(n), prompt=[{"role": "user", "content": text}], reference="")
        for n, text in enumerate(questions)
    ]
    seconds, texts = {}, {}
    for name, way in (("test job", batched), ("pipelines", one_by_one)):
        started = time.monotonic()
        for _ in ("base", "tuned"):
            texts[name] = way(location, tests, options.tokens)
        seconds[name] = time.monotonic() - started
        print(f"{name:10} {len(tests)} prompts, 2 models: {seconds[name]:6.1f} s")
    same = sum(one.strip() == other.strip() for one, other in zip(*texts.values(), strict=True))
    ratio = seconds["test job"] / seconds["pipelines"]
    print(f"test job / pipelines: {ratio:.2f} of the time; {same} of {len(tests)} completions identical")


if __name__ == "__main__":
    main()
