"""Ask the base and the tuned model every inference test: what a test job does.

Reads the run config (`run` channel), the tests (`inference_testing`), the base model (`models`, else the hub) and the
training job's `merged/` (`tuned`). Both models get the same prompts, decoding settings and seeds: one answer to a test is
greedy, several (`samples`) are drawn as in training. They are scored by the rewards that trained, and by each test's own
checks. A test that cannot be asked or scored says why and does not lose the others.

Leaves in `/opt/ml/model`: `inference.json`, which publish_results judges, and `evaluation_base.jsonl` and
`evaluation_tuned.jsonl`, a line per answer in the shape of RFT evaluations. Both models are also asked the ordinary
questions of `probe.json`: what tuning cost elsewhere.
"""

import gc
import importlib.util
import json
import logging
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from trainer import container, folders, models
from trainer.job import JobError, failure_reported, set_up_logging
from trainer.permissions import job_permissions
from tunedrop.config.model import RunConfig
from tunedrop.config.parse import parse_run_config
from tunedrop.inference_tests import Check, InferenceTest, Latency, ModelResult, Outcome, build_checks, parse_tests
from tunedrop.rewards import Reward, RewardError, RewardPermissions, RewardSpec, build_rewards, score
from tunedrop.rewards.wire import write_result

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("trainer")

# A batch holds at most this many tokens, prompt and answer: at 64 tokens per test that is 128 tests at once.
BATCH_TOKENS = 8192
PROBE = Path(__file__).with_name("probe.json")
PROBE_TOKENS = 48


class Written(NamedTuple):
    """What a model wrote: the text, its tokens, and the seconds of the batch that it was written in."""

    text: str
    tokens: int
    seconds: float


class Decoding(NamedTuple):
    """How both models answer: `limit` tokens at most; where several answers are drawn, by these settings and this seed."""

    limit: int
    seed: int
    temperature: float
    top_p: float
    top_k: int

    @classmethod
    def of(cls, config: RunConfig) -> "Decoding":
        """Return the decoding settings of a run: those that it trained with."""
        return cls(
            limit=int(config.grpo["max_completion_length"]),
            seed=config.grpo_value("seed"),
            temperature=config.grpo_value("temperature"),
            top_p=config.grpo_value("top_p"),
            top_k=config.grpo_value("top_k") or 0,
        )


class Transformers:
    """A model that transformers runs, batch by batch; the samples of a test share the prefill of its prompt."""

    def __init__(self, location: str, tokenizer: "PreTrainedTokenizerBase", decoding: Decoding):
        import torch

        dtype = torch.bfloat16 if models.fast_bf16() else torch.float32
        device = "auto" if torch.cuda.is_available() else None
        self._model = models.load_model(location, dtype=dtype, device_map=device).eval()
        self._tokenizer, self.decoding = tokenizer, decoding
        self.context: int | None = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)

    def batches(self, prompts: Sequence[list[int]], samples: Sequence[int], alone: Sequence[bool]) -> Iterator[list[int]]:
        """Yield the indices of prompts to answer together."""
        return batches([len(prompt) for prompt in prompts], samples, alone, self.decoding.limit)

    def write(self, prompts: list[list[int]], samples: int) -> list[list[Written]]:
        """Return what the model writes to prompts (token ids): one greedy answer to each, or several that are drawn."""
        import torch

        if samples > 1:
            settings = self._sampling()
        else:
            # The model's own generation config may ask for sampling; a test should give the same answer every time.
            settings = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        repeated = [prompt for prompt in prompts for _ in range(samples)]
        inputs = self._tokenizer.pad({"input_ids": repeated}, padding_side="left", return_tensors="pt").to(
            self._model.device
        )
        torch.manual_seed(self.decoding.seed)
        started = time.monotonic()
        with torch.inference_mode():
            output = self._model.generate(**inputs, max_new_tokens=self.decoding.limit, **settings)
        seconds = time.monotonic() - started
        answers = output[:, inputs["input_ids"].shape[1] :]
        texts = self._tokenizer.batch_decode(answers, skip_special_tokens=True)
        tokens = (answers != self._tokenizer.pad_token_id).sum(1).tolist()
        written = [Written(text, count, seconds) for text, count in zip(texts, tokens, strict=True)]
        return [written[start : start + samples] for start in range(0, len(written), samples)]

    def _sampling(self) -> dict[str, Any]:
        from trainer.grpo import ATTENTION, sample, why_not_model

        settings: dict[str, Any] = {
            "do_sample": True,
            "temperature": self.decoding.temperature,
            "top_p": self.decoding.top_p,
            "top_k": self.decoding.top_k,
        }
        if self._model.config._attn_implementation != ATTENTION:
            reason = why_not_model(self._model)
            if reason:
                log.info("samples do not share their prompt's prefill: %s", reason)
                return settings
            self._model.set_attn_implementation(ATTENTION)
        return settings | {"custom_generate": sample}

    def close(self) -> None:
        """Give the memory back, for the next model."""
        import torch

        del self._model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Vllm:
    """A model that vLLM runs; it batches by itself and shares common prefixes."""

    def __init__(self, location: str, decoding: Decoding):
        from vllm import LLM

        self._llm = LLM(
            model=location, dtype="bfloat16", seed=decoding.seed, enable_prefix_caching=True, load_format="safetensors"
        )
        self.decoding = decoding
        self.context: int | None = self._llm.llm_engine.model_config.max_model_len

    def batches(self, prompts: Sequence[list[int]], samples: Sequence[int], alone: Sequence[bool]) -> Iterator[list[int]]:
        """Yield the indices of prompts to answer together: all that ask for as many samples, but those to be timed."""
        for count in sorted(set(samples)):
            together = [at for at in range(len(prompts)) if samples[at] == count and not alone[at]]
            yield from [together] if together else []
            yield from ([at] for at in range(len(prompts)) if samples[at] == count and alone[at])

    def write(self, prompts: list[list[int]], samples: int) -> list[list[Written]]:
        """Return what the model writes to prompts (token ids): one greedy answer to each, or several that are drawn."""
        from vllm import SamplingParams

        drawn = {"temperature": self.decoding.temperature, "top_p": self.decoding.top_p, "top_k": self.decoding.top_k}
        settings = SamplingParams(
            n=samples,
            max_tokens=self.decoding.limit,
            seed=self.decoding.seed,
            **(drawn if samples > 1 else {"temperature": 0.0}),
        )
        started = time.monotonic()
        outputs = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
        seconds = time.monotonic() - started
        return [[Written(each.text, len(each.token_ids), seconds) for each in output.outputs] for output in outputs]

    def close(self) -> None:
        """Give the memory back, for the next model."""
        import torch

        del self._llm
        gc.collect()
        torch.cuda.empty_cache()


Engine = Transformers | Vllm


def load(location: str, tokenizer: "PreTrainedTokenizerBase", decoding: Decoding) -> Engine:
    """Load a model into vLLM where there is a GPU and it is installed, else into transformers."""
    import torch

    if torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None:
        return Vllm(location, decoding)
    return Transformers(location, tokenizer, decoding)


def batches(lengths: Sequence[int], samples: Sequence[int], alone: Sequence[bool], new_tokens: int) -> Iterator[list[int]]:
    """Yield batches of indices, longest first (a batch that does not fit shows at once), of similar lengths.

    A batch has one number of samples. What is `alone` is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda at: (samples[at], alone[at], -lengths[at]))
    batch: list[int] = []
    for at in order:
        first = batch[0] if batch else at
        fits = (len(batch) + 1) * samples[at] * (lengths[first] + new_tokens) <= BATCH_TOKENS
        if batch and (not fits or alone[at] or samples[at] != samples[first]):
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch


def answer(
    engine: Engine, tokenizer: "PreTrainedTokenizerBase", tests: Sequence[InferenceTest], config: RunConfig, name: str
) -> list[list[Written] | str]:
    """Return what the model writes to every test, in the tests' order: its answers, or why there are none."""
    kwargs, limit = config.grpo.get("chat_template_kwargs") or {}, engine.decoding.limit
    prompts: dict[int, list[int]] = {}
    answers: list[list[Written] | str] = ["never asked"] * len(tests)
    for at, test in enumerate(tests):
        try:
            text = tokenizer.apply_chat_template(test.prompt, add_generation_prompt=True, tokenize=False, **kwargs)
        except Exception as error:  # noqa: BLE001 - a template is a program of its own; the other tests go on
            answers[at] = f"the chat template does not take this conversation: {error}"
            continue
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if engine.context and len(ids) + limit > engine.context:
            answers[at] = f"{len(ids)} tokens of prompt and {limit} of answer exceed the model's context of {engine.context}"
        else:
            prompts[at] = ids
    where = list(prompts)
    chosen = [tests[at] for at in where]
    done, started = 0, time.monotonic()
    for batch in engine.batches(list(prompts.values()), [test.samples for test in chosen], [test.timed for test in chosen]):
        for at, written in zip(
            batch, _write(engine, [prompts[where[at]] for at in batch], chosen[batch[0]].samples), strict=True
        ):
            answers[where[at]] = written
        done += len(batch)
        eta = (time.monotonic() - started) / done * (len(where) - done)
        log.info("tested=%d total=%d model=%s eta_seconds=%.0f", done, len(where), name, eta)
    return answers


def _write(engine: Engine, prompts: list[list[int]], samples: int) -> list[list[Written] | str]:
    """Return what the model writes to prompts; where a batch fails, it is asked again one prompt at a time."""
    try:
        return list(engine.write(prompts, samples))
    except Exception as error:  # noqa: BLE001 - out of memory mostly; the other tests go on
        if len(prompts) == 1:
            return [f"the model could not answer: {type(error).__name__}: {error}"[:1000]]
        log.warning("a batch of %d failed and is asked again one by one: %s", len(prompts), error)
    return [_write(engine, [prompt], samples)[0] for prompt in prompts]


def marked(
    test: InferenceTest, written: list[Written] | str, rewards: Sequence[Reward], allowed: RewardPermissions
) -> ModelResult:
    """Score what a model wrote to a test; a reward that fails makes an answer that says so, never a score of 0."""
    if isinstance(written, str):
        return ModelResult(error=written)
    checks = build_checks(test.checks, allowed)
    checkers = build_rewards([check for check in checks if isinstance(check, Check)], allowed)
    count = len(written)
    prompts, completions = [test.prompt] * count, [[{"role": "assistant", "content": each.text}] for each in written]
    columns = {name: [value] * count for name, value in test.columns.items()}
    columns |= {"answer": [test.reference] * count, "id": [test.id] * count}
    try:
        scored = score(rewards, prompts, completions, columns)
        checked = {checker.__name__: checker(prompts, completions, **columns) for checker in checkers}
    except RewardError as error:
        return ModelResult(text=written[0].text, error=str(error))
    samples = []
    for number, (each, result) in enumerate(zip(written, scored, strict=True)):
        measured = {name: values[number] for name, values in checked.items()}
        unmet = [reason for check in checks if (reason := _unmet(check, each, measured))]
        given = [result["rewards"][reward.__name__] for reward in rewards if reward.weight > 0]
        samples.append(
            ModelResult(
                text=each.text,
                score=result["score"],
                rewards=result["rewards"],
                passed=not unmet if checks else all(value is None or value >= 1.0 for value in given),
                unmet=unmet,
                tokens=each.tokens,
                seconds=round(each.seconds, 3) if test.timed else None,
            )
        )
    return samples[0] if count == 1 else _together(samples)


def _unmet(check: Check | Latency, written: Written, measured: dict[str, float | None]) -> str | None:
    """Say why a check does not hold; one that abstains holds."""
    if isinstance(check, Latency):
        if written.seconds > check.maximum:
            return f"it took {written.seconds:.2f} s, at most {check.maximum:g} s were asked for"
        return None
    value = measured[check.label]
    if value is not None and value < check.at_least:
        return f"{check.label} gives {value:.2f}, at least {check.at_least:g} was asked for"
    return None


def _together(samples: list[ModelResult]) -> ModelResult:
    """Return a test's samples as one answer: means, and passed if all are."""
    rewards: dict[str, float | None] = {}
    for name in samples[0].rewards:
        given = [value for sample in samples if (value := sample.rewards[name]) is not None]
        rewards[name] = fmean(given) if given else None
    return ModelResult(
        text=samples[0].text,
        score=fmean([sample.score or 0.0 for sample in samples]),
        rewards=rewards,
        passed=all(sample.passed for sample in samples),
        unmet=next((sample.unmet for sample in samples if sample.unmet), []),
        tokens=sum(sample.tokens or 0 for sample in samples),
        samples=samples,
    )


def ask(
    location: str, tests: list[InferenceTest], config: RunConfig, name: str
) -> tuple[list[ModelResult], list[ModelResult], str]:
    """Load a model and ask it the tests and the probe; return its answers to both, and what ran it.

    Raises JobError when no test could be scored.
    """
    allowed = job_permissions()
    tokenizer = models.load_tokenizer(location)
    engine = load(location, tokenizer, Decoding.of(config))
    rewards = build_rewards(config.rewards, allowed)
    answers = [
        marked(test, written, rewards, allowed)
        for test, written in zip(tests, answer(engine, tokenizer, tests, config, name), strict=True)
    ]
    if all(each.error for each in answers):
        raise JobError(f"None of the {len(tests)} inference tests could be scored with the {name} model: {answers[0].error}")
    engine.decoding = engine.decoding._replace(limit=PROBE_TOKENS)
    questions, right = probe(config)
    probed = [
        marked(test, written, right, allowed)
        for test, written in zip(questions, answer(engine, tokenizer, questions, config, f"{name}_probe"), strict=True)
    ]
    engine.close()
    return answers, probed, type(engine).__name__.lower()


def probe(config: RunConfig) -> tuple[list[InferenceTest], list[Reward]]:
    """Return the ordinary questions, without the run's system prompt, and what marks the answers."""
    plain = RunConfig(model=config.model)
    return parse_tests(PROBE.read_bytes(), plain), build_rewards([RewardSpec(type="contains")])


def tuned_model() -> str:
    """Return the folder of the merged model. Raises JobError when the training job left none."""
    folder = folders.channel("tuned")
    if folder is None or not (folder / "merged" / "config.json").is_file():
        raise JobError(f"No tuned model: expected merged/config.json in the 'tuned' channel ({folder}).")
    return str(folder / "merged")


def license_of(location: str) -> str | None:
    """Return the licence that a model's folder states: its card's, else the first line of its licence file."""
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
    """Put both models' answers together, by test."""
    return [
        Outcome(
            id=test.id,
            prompt=test.prompt,
            reference=test.reference,
            tags=test.tags,
            weight=test.weight,
            must_pass=test.must_pass,
            base=before,
            tuned=after,
        )
        for test, before, after in zip(tests, base, tuned, strict=True)
    ]


def evaluation_lines(tests: list[InferenceTest], answers: list[ModelResult]) -> bytes:
    """Return a line per answer that was scored, `{"id", "aggregate_reward_score", "metrics_list"}`."""
    lines = [
        write_result(f"{test.id}:{number}" if given.samples else test.id, {"score": sample.score, "rewards": sample.rewards})
        for test, given in zip(tests, answers, strict=True)
        if given.error is None
        for number, sample in enumerate(given.samples or [given])
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
    location, merged = models.locate(config.model), tuned_model()
    base, base_probe, _ = ask(location, tests, config, "base")
    tuned, tuned_probe, engine = ask(merged, tests, config, "tuned")
    result = {
        "base_model": config.model,
        "base_model_license": license_of(location),
        "generation": {"engine": engine} | Decoding.of(config)._asdict(),
        "seconds": round(time.monotonic() - started, 1),
        "tests": outcomes(tests, base, tuned),
        "probe": outcomes(probe(config)[0], base_probe, tuned_probe),
    }
    folder = folders.model_dir()
    folder.mkdir(parents=True, exist_ok=True)
    for name, answers in (("base", base), ("tuned", tuned)):
        (folder / f"evaluation_{name}.jsonl").write_bytes(evaluation_lines(tests, answers))
    path = folder / "inference.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
    scores = [[each.score for each in answers if each.score is not None] for answers in (base, tuned)]
    log.info("tests=%d base_score=%.4f tuned_score=%.4f", len(tests), *map(fmean, scores))
    return path


def main() -> None:
    """Run the test job; exits 0, or 1 with the reason in the failure file."""
    set_up_logging()
    with failure_reported():
        run()


if __name__ == "__main__":
    main()
