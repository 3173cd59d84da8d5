"""The test job on two tiny models."""

import json

import pytest

from trainer import test_model
from tunedrop.run_config import RunConfig

from .conftest import tiny_model


@pytest.fixture
def tested(job, tmp_path, capsys):
    tiny_model.make_tiny_model(tmp_path / "tuned/merged", seed=1)
    job.patch.setenv("SM_CHANNEL_TUNED", str(tmp_path / "tuned"))
    job.config(system_prompt="Be 'brief'", rewards=[{"type": "length", "maximum": 3, "unit": "characters", "weight": 2.0}])
    cases = [{"id": f"t{i}", "prompt": "x" * i, "description": str(i)} for i in range(1, 6)]
    cases.append({"prompt": "last", "description": "é", "tags": ["a"], "weight": 2.5, "must_pass": True})
    job.channel("inference_testing", "inference_tests.json", json.dumps({"evaluations": cases}))
    test_model.main()
    return json.loads((job.model / "inference.json").read_text()), capsys.readouterr().out


def test_both_models_answer_and_are_scored(tested):
    result, log = tested
    assert [test["id"] for test in result["tests"]] == ["t1", "t2", "t3", "t4", "t5", "test-6"]
    first, last = result["tests"][0], result["tests"][-1]
    assert first["prompt"] == [{"role": "system", "content": "Be 'brief'"}, {"role": "user", "content": "x"}]
    assert (last["reference"], last["tags"], last["weight"], last["must_pass"]) == ("é", ["a"], 2.5, True)
    for test in result["tests"]:
        for model in ("base", "tuned"):
            assert len(test[model]["text"]) <= 6
            assert test[model]["score"] == 2.0 * test[model]["rewards"]["length"]
    assert [test["base"]["text"] for test in result["tests"]] != [test["tuned"]["text"] for test in result["tests"]]
    assert result["base_model"] == "tiny"
    assert "tested=6 total=6 model=tuned eta_seconds=0\n" in log
    assert "tests=6 base_score=" in log


def test_batching_does_not_change_an_answer(tested, job, tiny):
    """Each test asked alone answers as in its padded batch."""
    from trainer.models import load_model, load_tokenizer
    from tunedrop.inference_tests import InferenceTest

    result, _ = tested
    model, tokenizer = load_model(str(tiny)).eval(), load_tokenizer(str(tiny))
    config = RunConfig(model="tiny", grpo={"max_completion_length": 6})
    cases = [InferenceTest(id=test["id"], prompt=test["prompt"], reference="") for test in result["tests"]]
    alone = [test_model.answer(model, tokenizer, [case], config, "base")[0] for case in cases]
    assert alone == test_model.answer(model, tokenizer, cases, config, "base")


def test_batches_are_of_similar_length_and_bounded(monkeypatch):
    monkeypatch.setattr(test_model, "BATCH_TOKENS", 99)
    lengths = [5, 40, 6, 300, 7]
    batches = list(test_model.batches(lengths, 10))
    assert batches == [[3], [1], [4, 2, 0]]


@pytest.mark.parametrize("missing", ["tuned", "run", "inference_testing"])
def test_a_missing_channel_is_named(job, tmp_path, missing):
    job.config()
    job.channel("inference_testing", "inference_tests.json", '{"evaluations": [{"prompt": "a", "description": "b"}]}')
    job.patch.delenv(f"SM_CHANNEL_{missing.upper()}", raising=False)
    with pytest.raises(SystemExit, match=missing):
        test_model.main()
    assert missing in job.failure()
