"""Tests the base and the tuned model with the inference tests, in a test job.

The job reads the run config (channel `run`), the tests (`inference_testing`), the base model (`models`, else the hub) and
the training job's `merged/` (`tuned`). Both models get the same prompts, decoding settings and seeds. A test with one sample
is decoded greedily; several samples are drawn as in training. Tests have a limit of tokens of their own, and an answer that
it cut is marked. The run's rewards score the completions, and so do each test's own checks. If a test cannot be completed or
scored, its result says why, and the other tests go on.

The job writes to `/opt/ml/model`: `inference.json`, from which publish_results decides the verdict, and
`evaluation_base.jsonl` and `evaluation_tuned.jsonl`, one line per completion in the format of RFT evaluations. Both models
also complete the general questions of `probe.json`, which show what the tuning cost elsewhere.
"""

import json
import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import msgspec

from trainer import container, folders, models
from trainer.dataset import chat_ids, with_rewards
from trainer.engines import Completion, Decoding, Engine
from trainer.job import JobError, failure_reported, set_up_logging
from trainer.permissions import job_permissions
from tunedrop.config.model import RunConfig
from tunedrop.config.parse import parse_run_config
from tunedrop.inference_tests import (
    Check,
    InferenceTest,
    Latency,
    ModelResult,
    Outcome,
    build_checks,
    parse_tests,
    with_reasoning,
)
from tunedrop.rewards import Reward, RewardError, RewardPermissions, RewardSpec, build_rewards, score
from tunedrop.rewards.wire import write_result

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("trainer")

PROBE = Path(__file__).with_name("probe.json")
PROBE_TOKENS = 48


def complete(
    engine: Engine, tokenizer: "PreTrainedTokenizerBase", tests: Sequence[InferenceTest], config: RunConfig, name: str
) -> list[list[Completion] | str]:
    """Return the model's completions of every test, in the order of the tests, or the reason why there are none.

    `name` is the model's name in the log.
    """
    kwargs = config.grpo.get("chat_template_kwargs") or {}
    least = min(engine.decoding.limit, int(config.grpo["max_completion_length"]))
    prompts: dict[int, list[int]] = {}
    results: list[list[Completion] | str] = ["not completed"] * len(tests)
    for at, test in enumerate(tests):
        try:
            ids = chat_ids(test.prompt, tokenizer, kwargs)
        except Exception as error:  # noqa: BLE001 - a chat template is a program; the other tests go on
            results[at] = f"the chat template does not accept this conversation: {error}"
            continue
        if engine.context and len(ids) + least > engine.context:
            results[at] = (
                f"{len(ids)} tokens of prompt and {least} of completion exceed the model's context of {engine.context}"
            )
        else:
            prompts[at] = ids
    indices = list(prompts)
    chosen = [tests[at] for at in indices]
    done, started = 0, time.monotonic()
    for batch in engine.batches(list(prompts.values()), [test.samples for test in chosen], [test.timed for test in chosen]):
        completed = _write(engine, [prompts[indices[at]] for at in batch], chosen[batch[0]].samples)
        for at, result in zip(batch, completed, strict=True):
            results[indices[at]] = result
        done += len(batch)
        eta = (time.monotonic() - started) / done * (len(indices) - done)
        log.info("tested=%d total=%d model=%s eta_seconds=%.0f", done, len(indices), name, eta)
    return results


def _write(engine: Engine, prompts: list[list[int]], samples: int) -> list[list[Completion] | str]:
    """Return the completions of each prompt. If a batch fails, its prompts are tried again one by one."""
    try:
        return list(engine.write(prompts, samples))
    except Exception as error:  # noqa: BLE001 - out of memory mostly; the other tests go on
        if len(prompts) == 1:
            return [f"the model failed on this test: {type(error).__name__}: {error}"[:1000]]
        log.warning("a batch of %d failed; trying its prompts one by one: %s", len(prompts), error)
    return [_write(engine, [prompt], samples)[0] for prompt in prompts]


def scored(
    test: InferenceTest, completions: list[Completion] | str, rewards: Sequence[Reward], allowed: RewardPermissions
) -> ModelResult:
    """Score the completions of a test. If a reward fails, the result has its error and no score, never a score of 0."""
    if isinstance(completions, str):
        return ModelResult(error=completions)
    checks = build_checks(test.checks, allowed)
    checkers = build_rewards([check for check in checks if isinstance(check, Check)], allowed)
    count = len(completions)
    prompts = [test.prompt] * count
    messages = [[{"role": "assistant", "content": completion.text}] for completion in completions]
    columns = {name: [value] * count for name, value in test.columns.items()}
    columns |= {"answer": [test.reference] * count, "id": [test.id] * count}
    try:
        results = score(rewards, prompts, messages, columns)
        checked = {checker.__name__: checker(prompts, messages, **columns) for checker in checkers}
    except RewardError as error:
        return ModelResult(text=completions[0].text, error=str(error))
    samples = []
    for number, (completion, result) in enumerate(zip(completions, results, strict=True)):
        measured = {name: values[number] for name, values in checked.items()}
        unmet = [reason for check in checks if (reason := _unmet(check, completion, measured))]
        paid = [result["rewards"][reward.__name__] for reward in rewards if reward.weight > 0]
        samples.append(
            ModelResult(
                text=completion.text,
                score=result["score"],
                rewards=result["rewards"],
                passed=not unmet if checks else all(value is None or value >= 1.0 for value in paid),
                unmet=unmet,
                tokens=completion.tokens,
                cut=completion.cut,
                seconds=round(completion.seconds, 3) if test.timed else None,
            )
        )
    return samples[0] if count == 1 else _mean(samples)


def _unmet(check: Check | Latency, completion: Completion, measured: dict[str, float | None]) -> str | None:
    """Return the reason why a check fails, None if it passes. A check that abstains passes."""
    if isinstance(check, Latency):
        if completion.seconds > check.maximum:
            return f"took {completion.seconds:.2f} s, more than the maximum of {check.maximum:g} s"
        return None
    value = measured[check.label]
    if value is not None and value < check.at_least:
        return f"{check.label} is {value:.2f}, less than the minimum of {check.at_least:g}"
    return None


def _mean(samples: list[ModelResult]) -> ModelResult:
    """Return the samples of a test as one result: mean scores, and passed if all samples passed."""
    rewards: dict[str, float | None] = {}
    for name in samples[0].rewards:
        values = [value for sample in samples if (value := sample.rewards[name]) is not None]
        rewards[name] = fmean(values) if values else None
    return ModelResult(
        text=samples[0].text,
        score=fmean([sample.score or 0.0 for sample in samples]),
        rewards=rewards,
        passed=all(sample.passed for sample in samples),
        unmet=next((sample.unmet for sample in samples if sample.unmet), []),
        tokens=sum(sample.tokens or 0 for sample in samples),
        cut=any(sample.cut for sample in samples),
        samples=samples,
    )


def longest_answer(location: str, tests: Sequence[InferenceTest]) -> int:
    """Return how many tokens of the model's tokenizer the longest expected answer has, its reasoning included."""
    expected = [with_reasoning(test.reference, test.columns) for test in tests]
    ids = models.load_tokenizer(location)(expected, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return max(map(len, ids))


def run_tests(
    location: str, tests: list[InferenceTest], config: RunConfig, name: str, decoding: Decoding, dtype: "torch.dtype"
) -> tuple[list[ModelResult], list[ModelResult]]:
    """Load a model in this type and run the tests and the probe; return the results of both.

    Raises JobError when no test could be scored.
    """
    allowed = job_permissions()
    tokenizer = models.load_tokenizer(location)
    engine = Engine(location, tokenizer, decoding, dtype)
    rewards = build_rewards(config.rewards, allowed)
    results = [
        scored(test, completions, rewards, allowed)
        for test, completions in zip(tests, complete(engine, tokenizer, tests, config, name), strict=True)
    ]
    if all(result.error for result in results):
        raise JobError(
            f"None of the {len(tests)} inference tests could be scored with the {name} model. The first error: "
            f"{results[0].error}"
        )
    engine.decoding = engine.decoding._replace(limit=PROBE_TOKENS)
    questions, contains = probe(config)
    probed = [
        scored(test, completions, contains, allowed)
        for test, completions in zip(questions, complete(engine, tokenizer, questions, config, f"{name}_probe"), strict=True)
    ]
    engine.close()
    return results, probed


def probe(config: RunConfig) -> tuple[list[InferenceTest], list[Reward]]:
    """Return the probe's questions, without the run's system prompt, and the reward that scores their completions."""
    plain = RunConfig(model=config.model)
    return parse_tests(PROBE.read_bytes(), plain), build_rewards([RewardSpec(type="contains")])


def tuned_model() -> str:
    """Return the folder of the merged model. Raises JobError if the channel `tuned` does not have it."""
    folder = folders.channel("tuned")
    if folder is None or not (folder / "merged" / "config.json").is_file():
        raise JobError(f"There is no tuned model: the channel 'tuned' ({folder}) has no merged/config.json.")
    return str(folder / "merged")


def license_of(location: str) -> str | None:
    """Return the licence of a model's folder: from its model card, else the first line of its licence file."""
    folder = Path(location)
    card = folder / "README.md"
    if card.is_file() and (front := re.match(r"---\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL)):
        stated = re.search(r"^license:\s*(\S.*)$", front[1], re.MULTILINE)
        if stated:
            return stated[1].strip()
    for file in sorted(folder.glob("LICENSE*")):
        return next((line.strip() for line in file.read_text(errors="replace").splitlines() if line.strip()), None)
    return None


def outcomes(tests: list[InferenceTest], base: list[ModelResult], tuned: list[ModelResult]) -> list[Outcome]:
    """Join both models' results by test."""
    return [
        Outcome(
            id=test.id,
            prompt=test.prompt,
            reference=test.reference,
            tags=test.tags,
            weight=test.weight,
            must_pass=test.must_pass,
            judges=test.judges,
            base=before,
            tuned=after,
        )
        for test, before, after in zip(tests, base, tuned, strict=True)
    ]


def evaluation_lines(tests: list[InferenceTest], results: list[ModelResult]) -> bytes:
    """Return one line per scored completion, `{"id", "aggregate_reward_score", "metrics_list", "cut"}`."""
    lines = [
        write_result(
            f"{test.id}:{number}" if result.samples else test.id, {"score": sample.score, "rewards": sample.rewards}
        )
        | {"cut": sample.cut}
        for test, result in zip(tests, results, strict=True)
        if result.error is None
        for number, sample in enumerate(result.samples or [result])
    ]
    return b"".join(msgspec.json.encode(line) + b"\n" for line in lines)


def run() -> Path:
    """Test both models and return the path of `inference.json`."""
    started = time.monotonic()
    container.check("test")
    config_file, tests_file = folders.channel_file("run"), folders.channel_file("inference_testing")
    if config_file is None or tests_file is None:
        raise JobError("A test job needs the channels 'run' (config.json) and 'inference_testing' (inference_tests.json).")
    config = parse_run_config(json.loads(config_file.read_bytes()))
    tests = parse_tests(tests_file.read_bytes(), config, job_permissions())
    config = with_rewards(config, [test.columns | {"prompt": test.prompt, "answer": test.reference} for test in tests])
    location, merged = models.locate(config.model), tuned_model()
    dtype = models.test_dtype(merged)
    decoding = Decoding.of(config, longest_answer(location, tests))
    base, base_probe = run_tests(location, tests, config, "base", decoding, dtype)
    tuned, tuned_probe = run_tests(merged, tests, config, "tuned", decoding, dtype)
    result = {
        "base_model": config.model,
        "base_model_license": license_of(location),
        "generation": {"dtype": str(dtype).removeprefix("torch.")} | decoding._asdict(),
        "seconds": round(time.monotonic() - started, 1),
        "tests": outcomes(tests, base, tuned),
        "probe": outcomes(probe(config)[0], base_probe, tuned_probe),
    }
    folder = folders.model_dir()
    folder.mkdir(parents=True, exist_ok=True)
    for name, results in (("base", base), ("tuned", tuned)):
        (folder / f"evaluation_{name}.jsonl").write_bytes(evaluation_lines(tests, results))
    path = folder / "inference.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
    scores = [[each.score for each in results if each.score is not None] for results in (base, tuned)]
    cut = [sum(each.cut for each in results) for results in (base, tuned)]
    log.info("tests=%d base_score=%.4f tuned_score=%.4f base_cut=%d tuned_cut=%d", len(tests), *map(fmean, scores), *cut)
    return path


def main() -> None:
    """Run the test job. Exits with 0, or with 1 and the reason in the failure file."""
    set_up_logging()
    with failure_reported():
        run()


if __name__ == "__main__":
    main()
