"""The test job on two tiny models."""

import json

import msgspec
import pytest
import tiny_model
import torch

from pipeline.publish.gate import evaluate
from trainer import engines, probe_part, test_model
from trainer.answers import AskedModel
from trainer.models import load_tokenizer
from trainer.scoring import Part
from tunedrop.config.model import RunConfig
from tunedrop.inference_tests import InferenceTest, Outcome
from tunedrop.rewards import NO_PERMISSIONS

CASES = [{"id": f"t{i}", "prompt": "x" * i, "description": str(i)} for i in range(1, 6)]


def part(tests, **decoding):
    """A part of tests with a limit of 12 tokens."""
    return Part(
        "",
        tests,
        engines.Decoding(**{"limit": 12, "seed": 42, "temperature": 1.0, "top_p": 1.0, "top_k": 0} | decoding),
        [],
        NO_PERMISSIONS,
        {},
    )


def texts(answers):
    """The text of each test's first completion."""
    return [completions[0].text for completions in answers]


@pytest.fixture
def ask(job, tmp_path):
    """Run the test job with inference tests and return what it left."""
    tiny_model.make_tiny_model(tmp_path / "tuned/merged", seed=1)
    job.patch.setenv("SM_CHANNEL_TUNED", str(tmp_path / "tuned"))

    def run(*cases, **config):
        job.config(**{"rewards": [{"type": "length", "maximum": 3, "unit": "characters", "weight": 2.0}]} | config)
        job.channel("inference_testing", "inference_tests.json", json.dumps({"evaluations": cases}))
        test_model.main()
        return json.loads((job.model / "inference.json").read_text())

    return run


def lines(job, name):
    return [json.loads(line) for line in (job.model / f"evaluation_{name}.jsonl").read_text().splitlines()]


def test_both_models_answer_and_are_scored(ask, job, capsys):
    last = {"prompt": "last", "description": "é", "tags": ["a"], "weight": 2.5, "must_pass": True}
    result = ask(*CASES, last, system_prompt="Be 'brief'")
    assert [test["id"] for test in result["tests"]] == ["t1", "t2", "t3", "t4", "t5", "test-6"]
    first, last = result["tests"][0], result["tests"][-1]
    assert first["prompt"] == [{"role": "system", "content": "Be 'brief'"}, {"role": "user", "content": "x"}]
    assert (last["reference"], last["tags"], last["weight"], last["must_pass"]) == ("é", ["a"], 2.5, True)
    for test in result["tests"]:
        for model in ("base", "tuned"):
            assert len(test[model]["text"]) <= 12  # the tests' limit is twice the training's
            assert test[model]["score"] == 2.0 * test[model]["rewards"]["length"]
            assert test[model]["passed"] == (test[model]["rewards"]["length"] == 1.0)
    for test in result["tests"]:
        likely = test["tuned"]["first_token"]
        assert len(likely) == 20
        assert test["tuned"]["text"].startswith(max(likely, key=likely.get).strip())
        assert likely != test["base"]["first_token"]
    assert [test["base"]["text"] for test in result["tests"]] != [test["tuned"]["text"] for test in result["tests"]]
    assert (result["base_model"], result["generation"]["dtype"]) == ("tiny", "float32")
    log = capsys.readouterr().out
    assert "tested=6 total=6 model=tuned eta_seconds=0\n" in log
    assert "tests=6 base_score=" in log
    assert lines(job, "tuned")[0] == {
        "id": "t1",
        "aggregate_reward_score": first["tuned"]["score"],
        "metrics_list": [{"name": "length", "value": first["tuned"]["rewards"]["length"], "type": "Reward"}],
        "cut": first["tuned"].get("cut", False),
    }


def test_the_probe_asks_both_models_ordinary_questions_without_the_system_prompt(ask):
    result = ask(CASES[0], system_prompt="Be brief")
    assert len(result["probe"]) == 24
    for case in result["probe"]:
        assert [message["role"] for message in case["prompt"]] == ["user"]
        assert {case["base"]["passed"], case["tuned"]["passed"]} <= {True, False}
        assert len(case["base"]["text"]) <= probe_part.PROBE_TOKENS


def test_an_answer_that_the_limit_cut_is_marked(ask, job, tiny):
    """The same greedy model with a smaller limit writes the beginning of the same answer, and is cut where it wrote more."""
    far = ask(*CASES, CASES[0] | {"id": "drawn", "samples": 4}, tests={"max_completion_length": 60})["tests"]
    lengths = sorted({test["base"]["tokens"] for test in far[:5]})
    assert len(lengths) > 1, "the tiny model's answers must differ in length for this test"
    limit = lengths[0] + 1  # the tokens do not count the end
    near = ask(*CASES, CASES[0] | {"id": "drawn", "samples": 4}, tests={"max_completion_length": limit})["tests"]
    for whole, test in zip(far[:5], near[:5], strict=True):
        for model in ("base", "tuned"):
            assert whole[model]["text"].startswith(test[model]["text"])
            assert test[model].get("cut", False) == (whole[model]["tokens"] >= limit)
    drawn = near[5]["base"]
    assert drawn.get("cut", False) == any(sample.get("cut", False) for sample in drawn["samples"])
    marks = {line["id"]: line["cut"] for line in lines(job, "base")}
    assert marks == {test["id"]: test["base"].get("cut", False) for test in near[:5]} | {
        f"drawn:{n}": sample.get("cut", False) for n, sample in enumerate(drawn["samples"])
    }


@pytest.mark.parametrize(
    ("limits", "test", "limit"),
    [
        ({}, {}, 12),  # twice the training's
        ({}, {"description": "x" * 30}, 31),  # the longest expected answer, and its end
        ({}, {"columns": {"Chain_of thought": "y" * 20}}, 23),  # its reasoning, a line break, the answer and the end
        ({"tests": {"max_completion_length": 9}}, {"description": "x" * 30}, 9),
    ],
)
def test_tests_have_a_limit_of_their_own(ask, limits, test, limit):
    result = ask(CASES[0], CASES[1] | {"description": "e"} | test, **limits)
    assert result["generation"]["limit"] == limit
    assert all(each["base"]["tokens"] <= limit for each in result["tests"])


def test_where_the_context_leaves_less_than_the_limit_it_is_the_limit(ask):
    """Training allows 6 tokens after a prompt, the tests 100. Three special tokens belong to the prompt of 490 letters."""
    (test,) = ask(CASES[0] | {"prompt": "x" * 490}, tests={"max_completion_length": 100})["tests"]
    for model in ("base", "tuned"):
        assert test[model]["tokens"] <= 512 - 493
        assert test[model].get("cut", False) == (test[model]["tokens"] == 512 - 493)


def test_samples_are_drawn_with_one_seed_and_share_the_prefill(ask, job, capsys):
    several = [case | {"samples": 5} for case in CASES]
    first = ask(*several, CASES[0] | {"id": "greedy"}, grpo={"temperature": 1.2})
    assert "do not share" not in capsys.readouterr().out
    for test in first["tests"][:-1]:
        samples = test["base"]["samples"]
        assert len(samples) == 5
        assert len({sample["text"] for sample in samples}) > 1
        assert test["base"]["score"] == pytest.approx(sum(sample["score"] for sample in samples) / 5)
        assert test["base"]["passed"] == all(sample["passed"] for sample in samples)
    assert "samples" not in first["tests"][-1]["base"]
    assert [line["id"] for line in lines(job, "base")] == [f"t{i}:{n}" for i in range(1, 6) for n in range(5)] + ["greedy"]
    again = ask(*several, CASES[0] | {"id": "greedy"}, grpo={"temperature": 1.2})
    assert again["tests"] == first["tests"]


def test_identical_models_give_identical_answers_and_are_rejected(ask, job, tiny, tmp_path):
    """Same prompts, settings and seeds: the same weights answer the same, greedily and drawn."""
    (tmp_path / "same").mkdir()
    (tmp_path / "same/merged").symlink_to(tiny)
    job.patch.setenv("SM_CHANNEL_TUNED", str(tmp_path / "same"))
    cases = [{"id": f"t{i}", "prompt": f"say {i}", "description": "e", "samples": 1 + 2 * (i % 2)} for i in range(24)]
    result = ask(*cases)
    assert all(test["base"] == test["tuned"] for test in result["tests"])
    outcomes = [msgspec.convert(test, Outcome) for test in result["tests"]]
    verdict = evaluate(outcomes, RunConfig(model="tiny")).verdict
    assert verdict.status == "REJECTED"
    assert "scores the same as the base model in each of the 24 tests" in verdict.reasons[0]


def test_checks_say_what_is_not_met(ask):
    checked = [
        {"checks": [{"type": "length", "maximum": 100, "unit": "characters"}, {"type": "latency", "maximum": 60}]},
        {"checks": [{"type": "contains", "text": "never said", "at_least": 0.5}]},
        {"checks": [{"type": "latency", "maximum": 1e-9}]},
    ]
    fine, wrong, slow = ask(*[case | check for case, check in zip(CASES, checked, strict=False)])["tests"]
    assert fine["tuned"]["passed"]
    assert fine["tuned"]["seconds"] > 0
    assert not wrong["tuned"]["passed"]
    assert wrong["tuned"]["unmet"] == ["contains is 0.00, less than the minimum of 0.5"]
    assert not slow["tuned"]["passed"]
    assert slow["tuned"]["unmet"][0].endswith("more than the maximum of 1e-09 s")


def test_a_failure_in_one_test_does_not_lose_the_others(ask, job):
    """One prompt is longer than the model's context, one row lacks the column that its reward reads."""
    terms = {"columns": {"terms": ["e"]}}
    long = {"id": "long", "prompt": "x" * 600, "description": "e"} | terms
    result = ask(
        *[case | terms for case in CASES], long, CASES[0] | {"id": "bare"}, rewards=[{"type": "keywords", "column": "terms"}]
    )
    by_id = {test["id"]: test["base"] for test in result["tests"]}
    assert by_id["long"]["error"].endswith("of completion exceed the model's context of 512")
    assert "has no column 'terms'" in by_id["bare"]["error"]
    assert by_id["bare"]["text"]
    assert all("error" not in by_id[case["id"]] for case in CASES)
    assert [line["id"] for line in lines(job, "base")] == [case["id"] for case in CASES]


def test_a_batch_that_fails_is_asked_again_one_by_one(tiny, job, caplog):
    model, tokenizer = AskedModel("base", str(tiny), torch.float32), load_tokenizer(str(tiny))
    tests = [InferenceTest(id=str(i), prompt=[{"role": "user", "content": "a" * i}], reference="") for i in range(1, 5)]
    expected = model.complete(part(tests))
    assert model._engine
    model._known.clear()
    generate = model._engine._model.generate

    def small_memory(**inputs):
        if len(inputs["input_ids"]) > 1:
            raise RuntimeError("out of memory")
        if inputs["input_ids"].shape[1] == len(expected_ids):
            raise RuntimeError("this one always fails")
        return generate(**inputs)

    expected_ids = tokenizer.apply_chat_template(tests[3].prompt, add_generation_prompt=True, return_dict=False)
    model._engine._model.generate = small_memory
    answers = model.complete(part(tests))
    assert texts(answers[:3]) == texts(expected[:3])
    assert answers[3] == "the model failed on this test: RuntimeError: this one always fails"


def test_no_test_that_can_be_scored_fails_the_job(ask, job):
    with pytest.raises(SystemExit):
        ask(*CASES, rewards=[{"type": "keywords", "column": "terms"}])
    assert job.failure().startswith("None of the 5 inference tests could be scored with the base model. ")
    assert "The first error: reward 'keywords' failed on the row 't1'" in job.failure()


def test_batching_does_not_change_an_answer(tiny):
    """Each test asked alone answers as in its padded batch; in fp64, where no rounding decides between two tokens."""
    model = AskedModel("base", str(tiny), torch.float64)
    cases = [InferenceTest(id=str(i), prompt=[{"role": "user", "content": "x" * i}], reference="") for i in range(1, 7)]

    def answered(tests):
        model._known.clear()
        return texts(model.complete(part(tests)))

    assert [answered([case])[0] for case in cases] == answered(cases)


def test_batches_are_of_similar_length_and_bounded():
    lengths = [5, 40, 6, 300, 7, 8, 8, 8]
    samples = [1, 1, 1, 1, 1, 2, 2, 3]
    alone = [False, False, False, False, True, False, False, False]
    assert list(engines.batches(lengths, samples, alone, 10, 99)) == [[3], [1], [2, 0], [4], [5, 6], [7]]


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({"README.md": "---\nlicense: apache-2.0\ntags: [a]\n---\n# Model"}, "apache-2.0"),
        ({"README.md": "# Model", "LICENSE.txt": "\n  MIT License\n\nCopyright"}, "MIT License"),
        ({}, None),
    ],
)
def test_the_licence_of_a_model(tmp_path, files, licence):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert test_model.license_of(str(tmp_path)) == licence


@pytest.mark.parametrize("missing", ["tuned", "run", "inference_testing"])
def test_a_missing_channel_is_named(job, tmp_path, missing):
    job.config()
    job.channel("inference_testing", "inference_tests.json", '{"evaluations": [{"prompt": "a", "description": "b"}]}')
    job.patch.delenv(f"SM_CHANNEL_{missing.upper()}", raising=False)
    with pytest.raises(SystemExit, match=missing):
        test_model.main()
    assert missing in job.failure()
