"""Tests the base and the tuned model with the inference tests, in a test job, and the line's champion if there is one.

The job reads the run config (channel `run`), the tests (`inference_testing`), the base model (`models`, else the hub) and
the training job's `merged/` (`tuned`). In a line it also reads the champion's `merged/` (`champion`; the hyperparameter
`champion` is the id of its run), the line's suite (`suite`, trainer/suite_tests.py) and the answers of earlier jobs
(`answers_base` and `answers_champion`, trainer/answers.py).

All models get the same prompts, decoding settings and seeds. A test with one sample is decoded greedily; several samples are
drawn as in training. Tests have a limit of tokens of their own, and an answer that it cut is marked. The run's rewards score
the completions, and so do each test's own checks. If a test cannot be completed or scored, its result says why, and the
other tests go on.

The job writes to `/opt/ml/model`: `inference.json`, from which publish_results decides the verdict; for each model
`evaluation_<model>.jsonl`, one line per completion in the format of RFT evaluations, and `answers_<model>.jsonl`, what the
model was asked. The models also complete the general questions of `probe.json`, which show what the tuning cost elsewhere.
"""

import json
import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import msgspec

from trainer import container, folders, models
from trainer.answers import AskedModel
from trainer.dataset import with_rewards
from trainer.engines import Decoding
from trainer.job import JobError, failure_reported, read_hyperparameters, set_up_logging
from trainer.permissions import job_permissions
from trainer.probe_part import probe_part
from trainer.scoring import Part, evaluation_lines, outcomes, scored
from trainer.suite_tests import suite_parts
from tunedrop.config.model import RunConfig
from tunedrop.config.parse import parse_run_config
from tunedrop.inference_tests import InferenceTest, ModelResult, parse_tests, with_reasoning
from tunedrop.rewards import build_rewards

if TYPE_CHECKING:
    import torch

log = logging.getLogger("trainer")


def longest_answer(location: str, tests: Sequence[InferenceTest]) -> int:
    """Return how many tokens of the model's tokenizer the longest expected answer has, its reasoning included."""
    expected = [with_reasoning(test.reference, test.columns) for test in tests]
    ids = models.load_tokenizer(location)(expected, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return max(map(len, ids))


def own_parts(config: RunConfig, tests: Sequence[InferenceTest], decoding: Decoding) -> list[Part]:
    """Return the run's tests, and the probe."""
    allowed, least = job_permissions(), min(decoding.limit, int(config.grpo["max_completion_length"]))
    own = Part("", tests, decoding, build_rewards(config.rewards, allowed), allowed, template_of(config), least=least)
    return [own, probe_part(config, decoding)]


def template_of(config: RunConfig) -> dict[str, Any]:
    """Return the run's arguments for the chat template."""
    return config.grpo.get("chat_template_kwargs") or {}


def ask(name: str, location: str, dtype: "torch.dtype", parts: Sequence[Part]) -> tuple[list[list[ModelResult]], Any]:
    """Have a model complete all parts, and write its files. Returns its results by part, and how often it was asked.

    Raises JobError when no test of the first part, the run's own tests, could be scored.
    """
    model = AskedModel(name, location, dtype)
    results: list[list[ModelResult]] = []
    for part in parts:
        completions = model.complete(part)
        results.append([scored(test, each, part) for test, each in zip(part.tests, completions, strict=True)])
        if all(result.error for result in results[0]):
            raise JobError(
                f"None of the {len(results[0])} inference tests could be scored with the {name} model. The first error: "
                f"{results[0][0].error}"
            )
    model.close()
    model.save(folders.model_dir())
    (folders.model_dir() / f"evaluation_{name}.jsonl").write_bytes(evaluation_lines(parts[0].tests, results[0]))
    return results, {"answers": model.answers, "asked": model.asked}


def merged_model(channel: str) -> str:
    """Return the folder of a run's merged model. Raises JobError if the channel does not have it."""
    folder = folders.channel(channel)
    if folder is None or not (folder / "merged" / "config.json").is_file():
        raise JobError(f"There is no {channel} model: the channel '{channel}' ({folder}) has no merged/config.json.")
    return str(folder / "merged")


def champion_run() -> str | None:
    """Return the id of the champion's run; None if the line has no champion, and the job no channel with its model."""
    if folders.channel("champion") is None:
        return None
    run_id: str | None = read_hyperparameters().get("champion")
    if not run_id:
        raise JobError("A test job with the channel 'champion' needs the hyperparameter 'champion', the run's id.")
    return run_id


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


def run() -> Path:
    """Test the models and return the path of `inference.json`."""
    started = time.monotonic()
    container.check("test")
    config_file, tests_file = folders.channel_file("run"), folders.channel_file("inference_testing")
    if config_file is None or tests_file is None:
        raise JobError("A test job needs the channels 'run' (config.json) and 'inference_testing' (inference_tests.json).")
    config = parse_run_config(json.loads(config_file.read_bytes()))
    tests = parse_tests(tests_file.read_bytes(), config, job_permissions())
    config = with_rewards(config, [test.columns | {"prompt": test.prompt, "answer": test.reference} for test in tests])
    base, tuned, champion = models.locate(config.model), merged_model("tuned"), champion_run()
    dtype = models.test_dtype(tuned)
    decoding = Decoding.of(config, longest_answer(base, tests))
    parts = [*own_parts(config, tests, decoding), *suite_parts(config, tests)]
    tested = {"base": (base, dtype), "tuned": (tuned, dtype)}
    if champion:
        location = merged_model("champion")
        tested["champion"] = (location, models.test_dtype(location))
    folder = folders.model_dir()
    folder.mkdir(parents=True, exist_ok=True)
    results, asked = {}, {}
    for name, (location, own_dtype) in tested.items():
        results[name], asked[name] = ask(name, location, own_dtype, parts)
    own, probe, *suite = [
        outcomes(part, {name: each[at] for name, each in results.items()}) for at, part in enumerate(parts)
    ]
    result = {
        "base_model": config.model,
        "base_model_license": license_of(base),
        "champion": champion,
        "generation": {"dtype": str(dtype).removeprefix("torch.")} | decoding._asdict(),
        "chat_template_kwargs": template_of(config),
        "rewards": [spec.model_dump(mode="json", exclude_defaults=True) for spec in config.rewards],
        "asked": asked,
        "seconds": round(time.monotonic() - started, 1),
        "tests": own,
        "probe": probe,
        "suite": [outcome for part in suite for outcome in part],
    }
    path = folder / "inference.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
    log.info("tests=%d %s", len(tests), " ".join(figures(name, each[0]) for name, each in results.items()))
    return path


def figures(name: str, results: Sequence[ModelResult]) -> str:
    """Return a model's mean score and number of cut answers, for the log."""
    score = fmean(each.score for each in results if each.score is not None)
    return f"{name}_score={score:.4f} {name}_cut={sum(each.cut for each in results)}"


def main() -> None:
    """Run the test job. Exits with 0, or with 1 and the reason in the failure file."""
    set_up_logging()
    with failure_reported():
        run()


if __name__ == "__main__":
    main()
