"""`tunedrop check` and validate_dataset give the same receipt for the same files."""

import json
import re
from pathlib import Path

import msgspec
import pytest
from answering_server import judge_server
from click.testing import CliRunner
from fake_stack import ARTIFACTS, DATA

from pipeline.validation.model_files import READ_FILES
from pipeline.validation.receipt import Receipt
from tunedrop import object_keys
from tunedrop_cli.check import template_defaults
from tunedrop_cli.main import cli

SAMPLES = Path(__file__).parents[1] / "samples"
# What tells one run from another.
IDENTITY = {"run_id", "dataset", "line", "source"}
CONFIGS = {
    "broken": b"max_bad_rows: 0.5\n",
    "repeated": b"grpo: {generation_batch_size: 12}\nmax_prompt_length: 30\n",
    "trl_messages": b"system_prompt: Be brief.\ngrpo: {lerning_rate: 1}\n",
}
TESTS = {"trl_prompt": b'{"evaluations": [{"id": "a", "prompt": "What is the capital of France?", "description": "Paris"}]}'}


def without_times(receipt: str) -> str:
    """A receipt without how long rewards took."""
    return re.sub(r'"(p50_ms|p95_ms|run_seconds)": [\d.e-]+', "", receipt)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The base model of the fake stack, as a folder of its name."""
    return tmp_path_factory.mktemp("models") / "base"


@pytest.mark.parametrize("sample", sorted(path.name for path in SAMPLES.iterdir()))
def test_a_laptop_and_the_lambda_give_the_same_receipt(world, model, tmp_path, monkeypatch, sample):
    monkeypatch.setenv("ENDPOINT_INSTANCE_TYPE", "")  # the template's default: the world's stack serves models
    if not model.exists():
        model.mkdir()
        for name in (*READ_FILES, "model.safetensors"):
            if (raw := world.aws.read(DATA, f"models/base/{name}")) is not None:
                (model / name).write_bytes(raw)
    dataset = object_keys.dataset_of(object_keys.TRAINING_DATA + sample)
    files = {"--config": CONFIGS.get(dataset, b""), "--tests": TESTS.get(dataset)}
    options = ["--model", str(model), "--json"]
    for option, raw in files.items():
        if raw is not None:
            (tmp_path / option).write_bytes(raw)
            options += [option, str(tmp_path / option)]
    said = CliRunner().invoke(cli, ["check", str(SAMPLES / sample), *options])

    # With --model, `tunedrop drop` and `tunedrop check` have the config name the model.
    world.put(object_keys.config_key(dataset), b"model: base\n" + (files["--config"] or b""))
    if files["--tests"]:
        world.put(object_keys.tests_keys(dataset)[0], files["--tests"])
    run = world.drop(object_keys.TRAINING_DATA + sample, (SAMPLES / sample).read_bytes())
    raw = world.aws.read(ARTIFACTS, object_keys.run_key(run.run_id, "validation.json"))
    receipt = {key: value for key, value in json.loads(raw).items() if key not in IDENTITY}

    assert without_times(said.output) == without_times(msgspec.json.format(msgspec.json.encode(receipt)).decode() + "\n")
    assert said.exit_code == (0 if receipt["ok"] else 1)
    assert msgspec.to_builtins(msgspec.json.decode(msgspec.json.encode(receipt), type=Receipt)) == receipt
    assert (run.state == "VALIDATED") == receipt["ok"]
    rejected = world.aws.read(ARTIFACTS, object_keys.run_key(run.run_id, "rejected.jsonl"))
    assert (rejected is not None) == (sample == "broken.jsonl")


def test_the_command_takes_the_templates_defaults():
    assert template_defaults()["BaseModel"] == "SmolLM2-135M-Instruct"
    assert template_defaults()["InstanceTypes"].startswith("ml.")


def test_the_text_has_a_line_for_each_fact_and_is_plain_in_a_pipe(tmp_path):
    config = tmp_path / "cars.yaml"
    config.write_text("grpo: {generation_batch_size: 12}")
    said = CliRunner().invoke(cli, ["check", str(SAMPLES / "repeated.jsonl"), "--config", str(config)])
    assert said.output.splitlines() == [
        "columns:           prompt from 'question', answer from 'answer'",
        "rows:              14 usable, 1 held out",
        "prompts:           27 to 48 characters, median 30",
        "answers:           1 to 13 characters, median 4",
        "reward:            {type: exact_match}, because the answers are short",
        "rewards:           the dataset's answers score 1.00 on average",
        "paraphrases:       final answer alone 1.00, in a sentence 0.00, other spacing 1.00",
        "best wrong answer: empty, 0.00 vs 1.00 (row-1)",
        "cost:              ml.g6e.4xlarge, 0.1 to 0.4 hours",
        "cost:              ml.g5.4xlarge, 0.1 to 0.4 hours",
        "warning: base model and token counts not checked; pass --model DIR",
        "warning: duplicate rows: 1 (row 13 repeats row 1, for example)",
        (
            "warning: rows with an earlier row's prompt and another answer: 1 (rows 2 and 14, for example); "
            "a reward can pay only one of the answers"
        ),
        (
            "warning: there is no test file, and only 1 different held-out questions judge the model; the gate needs at "
            "least 20 to decide: add about 266 rows, or upload a test file"
        ),
        "Automatic corrections:",
        "  grpo.generation_batch_size 12 → 16: a multiple of num_generations (8) and of 8 completions per GPU",
        "valid: 14 rows, 1 held out, 1 inference test, 0 errors, 4 warnings",
    ]


def test_a_stack_that_serves_by_default_says_what_that_costs(monkeypatch):
    serving = template_defaults() | {"EndpointInstanceType": "ml.g5.xlarge"}
    monkeypatch.setattr("tunedrop_cli.check.template_defaults", lambda: serving)
    said = CliRunner().invoke(cli, ["check", str(SAMPLES / "repeated.jsonl")])
    line = "serving:           ml.g5.xlarge, at an unknown price while it is asked, nothing while it is not"
    assert line in said.output.splitlines()


def test_many_errors_are_counted_by_code_after_the_first_twenty(tmp_path):
    data = tmp_path / "cars.jsonl"
    data.write_text("".join(f'{{"question {n}": "?"}}\n' for n in range(25)) + '{"question": "?"}\n' * 5)
    said = CliRunner().invoke(cli, ["check", str(data)])
    assert said.exit_code == 1
    lines = said.output.splitlines()
    assert [line for line in lines if ": NO_PROMPT: " in line][19].startswith(f"{data}:20: NO_PROMPT: ")
    assert "10 more errors; all errors by code: NO_ANSWER 5, NO_PROMPT 25" in lines
    assert lines[-1] == "rejected: 0 rows, 0 held out, 0 inference tests, 30 errors, 1 warning"


def test_a_judges_consistency_and_requests_are_printed(tmp_path, monkeypatch):
    data, config = tmp_path / "t.jsonl", tmp_path / "t.yaml"
    rows = [{"question": f"Why is {n} so?", "answer": "because " * (n % 5 + 2) + str(n)} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("REWARD_HTTP_HOSTS", "127.0.0.1")
    with judge_server(lambda answer: ("because" in answer, len(answer))) as judge:
        config.write_text(f"rewards: [{{type: judge_group, model: any, url: '{judge.url}/v1'}}]")
        said = CliRunner().invoke(cli, ["check", str(data), "--config", str(config)])
    assert said.exit_code == 0, said.output
    assert re.search(r"^consistency: +'judge_group' ranked the same answers twice, .* 1\.00$", said.output, re.MULTILINE)
    requests = re.search(
        r"^requests: +([\d,]+) to the service of 'judge_group', [\d,]+ to [\d,]+ tokens$", said.output, re.M
    )
    # 36 rows are trained on, in groups of 8, with 16 prompts of the gate; the four held-out rows are tests of two models.
    assert requests
    assert int(requests[1]) == 36 + 16 + 2 * 4
