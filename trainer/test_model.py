"""Ask the base and the tuned model every inference test: what a test job does.

Reads the run config (`run` channel), the tests (`inference_testing`), the base model (`models`, else the hub) and the
training job's `merged/` (`tuned`). Both models answer greedily and are scored by the rewards that trained. Leaves
`/opt/ml/model/inference.json`; comparing and judging is for who reads it.
"""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import folders, models
from trainer.job import JobError, failure_reported, set_up_logging
from tunedrop.inference_tests import InferenceTest, read_tests
from tunedrop.rewards import build_rewards, score
from tunedrop.run_config import RunConfig, parse_run_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("trainer")

# A batch holds at most this many tokens, prompt and answer: at 64 tokens per test that is 128 tests at once.
BATCH_TOKENS = 8192


def batches(lengths: list[int], new_tokens: int) -> Iterator[list[int]]:
    """Yield batches of indices, longest first (a batch that does not fit shows at once), of similar lengths."""
    batch: list[int] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = max(longest, lengths[index])
        if batch and (len(batch) + 1) * (longest + new_tokens) > BATCH_TOKENS:
            yield batch
            batch, longest = [], lengths[index]
        batch.append(index)
    if batch:
        yield batch


def answer(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tests: list[InferenceTest], config: RunConfig, name: str
) -> list[str]:
    """Return the model's greedy answer to every test, in the tests' order."""
    import torch

    kwargs, limit = config.grpo.get("chat_template_kwargs") or {}, int(config.grpo["max_completion_length"])
    prompts = [
        tokenizer.apply_chat_template(test.prompt, add_generation_prompt=True, tokenize=False, **kwargs) for test in tests
    ]
    encoded = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    answers, done, started = [""] * len(tests), 0, time.monotonic()
    for batch in batches([len(ids) for ids in encoded], limit):
        inputs = tokenizer.pad({"input_ids": [encoded[i] for i in batch]}, padding_side="left", return_tensors="pt").to(
            model.device
        )
        with torch.inference_mode():
            # The model's own generation config may ask for sampling; a test should give the same answer every time.
            output = model.generate(
                **inputs, max_new_tokens=limit, do_sample=False, temperature=None, top_p=None, top_k=None
            )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(batch, texts, strict=True):
            answers[index] = text
        done += len(batch)
        eta = (time.monotonic() - started) / done * (len(tests) - done)
        log.info("tested=%d total=%d model=%s eta_seconds=%.0f", done, len(tests), name, eta)
    return answers


def test(location: str, tests: list[InferenceTest], config: RunConfig, name: str) -> list[dict[str, Any]]:
    """Load a model, let it answer and score it: `{"text", "score", "rewards"}` per test."""
    import torch

    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if models.fast_bf16() else torch.float32
    model = models.load_model(location, dtype=dtype, device_map="auto" if gpu else None).eval()
    texts = answer(model, models.load_tokenizer(location), tests, config, name)
    scores = score(
        build_rewards(config.rewards),
        [case.prompt for case in tests],
        [[{"role": "assistant", "content": text}] for text in texts],
        {"answer": [case.reference for case in tests], "id": [case.id for case in tests]}
        | {name: [case.columns.get(name) for case in tests] for name in {name for case in tests for name in case.columns}},
    )
    return [{"text": text} | scored for text, scored in zip(texts, scores, strict=True)]


def tuned_model() -> str:
    """Return the folder of the merged model. Raises JobError when the training job left none."""
    folder = folders.channel("tuned")
    if folder is None or not (folder / "merged" / "config.json").is_file():
        raise JobError(f"No tuned model: expected merged/config.json in the 'tuned' channel ({folder}).")
    return str(folder / "merged")


def run() -> Path:
    """Test both models and return the path of `inference.json`."""
    started = time.monotonic()
    config_file, tests_file = folders.channel_file("run"), folders.channel_file("inference_testing")
    if config_file is None or tests_file is None:
        raise JobError("A test job needs the channels 'run' (config.json) and 'inference_testing' (inference_tests.json).")
    config = parse_run_config(json.loads(config_file.read_bytes()))
    tests = read_tests(tests_file, config)
    base = test(models.locate(config.model), tests, config, "base")
    tuned = test(tuned_model(), tests, config, "tuned")
    result = {
        "base_model": config.model,
        "generation": {"do_sample": False, "max_new_tokens": config.grpo["max_completion_length"]},
        "seconds": round(time.monotonic() - started, 1),
        "tests": [
            {
                "id": case.id,
                "prompt": case.prompt,
                "reference": case.reference,
                "tags": case.tags,
                "weight": case.weight,
                "must_pass": case.must_pass,
                "base": before,
                "tuned": after,
            }
            for case, before, after in zip(tests, base, tuned, strict=True)
        ],
    }
    path = folders.model_dir() / "inference.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, ensure_ascii=False, indent=1), encoding="utf-8")
    means = [sum(each["score"] for each in scored) / len(scored) for scored in (base, tuned)]
    log.info("tests=%d base_score=%.4f tuned_score=%.4f", len(tests), *means)
    return path


def main() -> None:
    """Run the test job; exits 0, or 1 with the reason in the failure file."""
    set_up_logging()
    with failure_reported():
        run()


if __name__ == "__main__":
    main()
