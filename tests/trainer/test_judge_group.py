"""A judge that ranks, in real trainings of a small model: a judge's server in this process counts what it is asked."""

import json
from collections import Counter

import pytest
from answering_server import answers_in, chat, judge_server, ranking, request_text

from pipeline.validation.cost import Work, estimate
from pipeline.validation.terms import Terms, resolve
from trainer import train
from trainer.dataset import check_whole_groups
from trainer.engines import Completion, Decoding
from trainer.job import JobError
from trainer.scoring import Part, scored
from tunedrop.config.parse import parse_run_config
from tunedrop.inference_tests import InferenceTest
from tunedrop.rewards import NO_PERMISSIONS, RewardPermissions, RewardSpec, build_rewards


def vowels(text):
    return sum(letter in "aeiou" for letter in text)


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setenv("REWARD_HTTP_HOSTS", "127.0.0.1")
    with judge_server(vowels) as server:
        yield server


def asks(judge):
    return [request_text(asked) for asked in judge.asked]


def test_a_training_makes_the_requests_that_its_receipt_estimates(job, judge):
    config = {"rewards": [{"type": "judge_group", "model": "any", "url": judge.url}], "grpo": {"max_steps": 2}}
    job.config(**config)
    job.rows()
    job.heldout()
    train.train(train.parse_flags([]))
    steps = job.metrics()
    assert len(steps) == 2
    # Ranks of different texts differ, and the row's own answer, a digit without a vowel, loses or ties.
    assert all(step["reward_std"] > 0 and 0.5 <= step["reward"] < 0.6 and step["abstained"] == 0.0 for step in steps)
    assert Counter(len(answers_in(text)) > 2 for text in asks(judge)) == {True: 8, False: 4}  # groups; single answers

    read = parse_run_config(json.loads((job.root / "input/run/config.json").read_bytes()))
    terms = Terms(["ml.g5.xlarge"])
    work = Work(rows=12, choosing=4, tests=0, prompt_tokens=10.0, answer_tokens=1.0, parameters=None)
    (service,) = estimate(resolve(read, terms), work, terms).receipt["services"].values()
    assert service["by_part"] == {"learnability": 4, "training": 4, "evaluations": 4, "tests": 0}
    assert service["requests"] == pytest.approx(len(judge.asked), rel=0.2)


def test_groups_without_a_ranking_are_counted_and_the_training_goes_on(job, judge):
    def some(body):
        text = request_text(body)
        return chat("I cannot say." if "say 1" in text else json.dumps({"ranking": ranking(text, vowels)}))

    judge.reply = some
    job.config(
        rewards=[
            {"type": "judge_group", "model": "any", "url": judge.url},
            {"type": "contains", "text": "e", "weight": 0.5},
        ],
        grpo={"max_steps": 6},
        learnability={"samples": 0},
    )
    job.rows()
    train.train(train.parse_flags([]))
    abstained = [step["abstained"] for step in job.metrics()]
    assert set(abstained) <= {0.0, 0.25, 0.5}  # of the scores: the other reward never abstains
    assert 0 < sum(abstained) < 6 * 0.5
    # Three of the twelve rows begin so, and each is asked about twice.
    assert sum("say 1" in text for text in asks(judge)) == 2 * 3
    assert "PLATEAU" not in job.training()["alerts"]


def test_a_group_on_two_gpus_is_refused(job):
    job.config(
        rewards=[{"type": "judge_group", "model": "any", "url": "http://127.0.0.1:1"}],
        grpo={"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 1},
    )
    config = train.read_config(train.parse_flags([]))
    arguments = train.grpo_config(config, [])
    check_whole_groups(arguments)  # a single GPU: fit_batches made the batch of one whole group
    arguments.steps_per_generation = 1
    with pytest.raises(JobError, match="Each GPU generates 4 completions at a time"):
        check_whole_groups(arguments)


def part(judge):
    spec = RewardSpec(type="judge_group", model="any", url=judge.url)
    rewards = build_rewards([spec], RewardPermissions(hosts=("127.0.0.1",)))
    return Part("", [], Decoding(8, 0, 1.0, 1.0, 0), rewards, NO_PERMISSIONS, {})


def completions(*texts):
    return [Completion(text, 1, 0.0, cut=False, first_token={}) for text in texts]


TEST = InferenceTest(id="t", prompt=[{"role": "user", "content": "q"}], reference="ae", columns={}, samples=3)


def test_the_samples_of_a_test_are_compared_with_its_answer_and_not_with_each_other(judge):
    result = scored(TEST, completions("aei", "aeio", "b"), part(judge))
    assert [sample.score for sample in result.samples] == [1.0, 1.0, 0.0]
    assert result.score == pytest.approx(2 / 3)
    assert [len(answers_in(text)) for text in asks(judge)] == [2, 2, 2]


def test_a_test_without_a_ranking_has_no_score(judge):
    judge.reply = lambda _: chat("Who knows?")
    result = scored(TEST, completions("aei", "b"), part(judge))
    assert (result.score, result.error) == (
        None,
        "reward 'judge_group' gave no rank: its judge did not reply with a ranking",
    )
