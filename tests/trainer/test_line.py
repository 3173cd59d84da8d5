"""The test job of a line with a champion: three models, the line's suite, and answers that were given before."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch

from trainer import answers, engines, suite_tests, test_model
from trainer.answers import answer_key
from trainer.engines import Decoding
from trainer.job import JobError
from tunedrop.config.model import RunConfig
from tunedrop.inference_tests import dump_tests, parse_tests

from .conftest import Job

OLD, NEW = "cars-0123456789ab", "cars-ba9876543210"
CASES = [{"id": f"t{i}", "prompt": "x" * i, "description": str(i)} for i in range(1, 5)]
DRAWN = {"id": "drawn", "prompt": "draw", "description": "e", "samples": 3}
REWARDS = [{"type": "length", "maximum": 3, "unit": "characters", "weight": 2.0}]
FAST = {"tests": {"max_completion_length": 9}}


class LineJob:
    """A test job, and the models that it loaded: names of folders."""

    def __init__(self, job: Job, monkeypatch: pytest.MonkeyPatch):
        self.job, self.patch, self.loaded = job, monkeypatch, list[str]()
        load = engines.Engine

        def noted(location, *args):
            self.loaded.append(Path(location).parent.name)
            return load(location, *args)

        monkeypatch.setattr(answers, "Engine", noted)
        self.model("tuned", seed=1)

    def model(self, channel: str, seed: int) -> None:
        folder = self.job.root / "models" / f"{channel}-{seed}"
        if not folder.exists():
            tiny_model.make_tiny_model(folder / "merged", seed=seed)
        self.patch.setenv(f"SM_CHANNEL_{channel.upper()}", str(folder))

    def champion(self, run_id: str, seed: int) -> None:
        self.model("champion", seed)
        self.patch.setenv("SM_HPS", json.dumps({"run-id": NEW, "champion": run_id}))

    def suite(self, *parts: dict[str, Any]) -> None:
        self.job.channel("suite", "suite.json", json.dumps({"parts": parts}))
        self.job.rows()

    def run(self, *cases: dict[str, Any], **config: Any) -> dict[str, Any]:
        self.loaded.clear()
        shutil.rmtree(self.job.model, ignore_errors=True)
        self.job.config(**{"rewards": REWARDS} | FAST | config)
        self.job.channel("inference_testing", "inference_tests.json", json.dumps({"evaluations": cases}))
        test_model.main()
        return json.loads((self.job.model / "inference.json").read_text())

    def keep_answers(self, **channels: str) -> None:
        """Have the next job know the answers that a model gave in this one, by the next job's name of the model."""
        for name, given_as in channels.items():
            content = (self.job.model / f"answers_{given_as}.jsonl").read_text()
            self.job.channel(f"answers_{name}", f"{given_as}-{len(content)}.jsonl", content)


@pytest.fixture
def line(job, monkeypatch):
    return LineJob(job, monkeypatch)


def part(line, result, run_id=OLD, **changes):
    """What a run brings to the suite, from the files of its test job."""
    raw = (line.job.root / "input/inference_testing/inference_tests.json").read_bytes()
    tests = json.loads(dump_tests(parse_tests(raw, RunConfig(model="tiny"))))["evaluations"]
    kept = {"rewards": result["rewards"], "chat_template_kwargs": result["chat_template_kwargs"]}
    return {"run_id": run_id, "decoding": result["generation"], "tests": tests} | kept | changes


def test_without_a_champion_and_a_suite_the_result_says_so(line):
    result = line.run(*CASES)
    assert (result["champion"], result["suite"], result["rewards"]) == (None, [], REWARDS)
    assert all(test["champion"] is None for test in result["tests"])
    assert result["asked"] == {name: {"answers": 28, "asked": 28} for name in ("base", "tuned")}
    assert not (line.job.model / "evaluation_champion.jsonl").exists()


def test_the_champion_answers_as_the_others_do(line, capsys):
    line.champion(OLD, seed=2)
    result = line.run(*CASES, DRAWN)
    assert result["champion"] == OLD
    assert "tested=5 total=5 model=champion eta_seconds=0\n" in capsys.readouterr().out
    for each in (result["tests"], result["probe"]):
        texts = {name: [test[name]["text"] for test in each] for name in ("base", "champion", "tuned")}
        assert len({tuple(answered) for answered in texts.values()}) == 3
    lines = (line.job.model / "evaluation_champion.jsonl").read_text().splitlines()
    assert [json.loads(each)["id"] for each in lines] == ["t1", "t2", "t3", "t4", "drawn:0", "drawn:1", "drawn:2"]
    line.champion(OLD, seed=1)  # the same model as the tuned one
    assert all(test["champion"] == test["tuned"] for test in line.run(*CASES, DRAWN)["tests"])


def test_a_champion_without_its_model_or_its_run_is_named(line):
    line.patch.setenv("SM_CHANNEL_CHAMPION", str(line.job.root))
    for hyperparameters, message in (({}, "hyperparameter 'champion'"), ({"champion": OLD}, "has no merged/config.json")):
        line.patch.setenv("SM_HPS", json.dumps(hyperparameters))
        with pytest.raises(SystemExit, match=message):
            line.run(*CASES)


def test_known_answers_give_the_same_outcomes_and_load_no_model(line):
    """A job's second try knows all answers of base and champion, but for the timed test, which is always asked."""
    line.champion(OLD, seed=2)
    twice = CASES[0] | {"id": "again", "checks": [{"type": "contains", "text": "e"}]}
    first = line.run(*CASES, DRAWN, twice)
    assert first["asked"]["base"] == {"answers": 30, "asked": 29}  # two tests ask one question
    line.keep_answers(base="base", champion="champion")
    second = line.run(*CASES, DRAWN, twice)
    assert second["asked"] == {
        "base": {"answers": 30, "asked": 0},
        "champion": {"answers": 30, "asked": 0},
        "tuned": {"answers": 30, "asked": 29},
    }
    assert line.loaded == ["tuned-1"]
    same = ("champion", "generation", "rewards", "tests", "probe", "suite")
    assert {name: second[name] for name in same} == {name: first[name] for name in same}
    assert (line.job.model / "answers_base.jsonl").read_text() == ""

    timed = CASES[1] | {"id": "timed", "checks": [{"type": "latency", "maximum": 60}]}
    third = line.run(*CASES, DRAWN, twice, timed)
    assert third["asked"]["base"] == {"answers": 31, "asked": 1}
    assert third["tests"][-1]["base"]["seconds"] > 0
    assert third["tests"][:-1] == first["tests"]
    assert (line.job.model / "answers_base.jsonl").read_text() == ""

    kept = next((line.job.root / "input/answers_base").glob("*.jsonl"))
    lines = kept.read_text().splitlines()
    kept.write_bytes("\n".join(["{", *lines[1:3], lines[3][:-1], '{"key": 1}', *lines[4:]]).encode() + b"\n\xff\n")
    fourth = line.run(*CASES, DRAWN, twice)
    assert fourth["asked"]["base"] == {"answers": 30, "asked": 2}
    assert fourth["tests"] == first["tests"]
    assert len((line.job.model / "answers_base.jsonl").read_text().splitlines()) == 2


GREEDY = Decoding(9, 42, 1.0, 1.0, 0)


@pytest.mark.parametrize(
    ("change", "greedy", "drawn"),
    [
        ({"ids": [1, 2]}, True, True),
        ({"ids": [12, 3]}, True, True),
        ({"dtype": torch.float32}, True, True),
        ({"decoding": GREEDY._replace(limit=10)}, True, True),
        ({"decoding": GREEDY._replace(seed=43)}, False, True),
        ({"decoding": GREEDY._replace(temperature=0.9)}, False, True),
        ({"decoding": GREEDY._replace(top_p=0.9)}, False, True),
        ({"decoding": GREEDY._replace(top_k=1)}, False, True),
        ({"decoding": GREEDY._replace(temperature=1, top_p=1)}, False, False),
    ],
)
def test_the_key_of_an_answer_is_of_all_that_determines_it(change, greedy, drawn):
    given: dict[str, Any] = {"ids": [1, 2, 3], "decoding": GREEDY, "dtype": torch.bfloat16}
    for samples, differs in ((1, greedy), (2, drawn)):
        assert (answer_key(samples=samples, **given) != answer_key(samples=samples, **given | change)) == differs
    assert len({answer_key(samples=samples, **given) for samples in (1, 2, 3)}) == 3


def test_the_next_run_asks_base_and_champion_its_own_tests_only(line, capsys):
    """The old run's tuned model becomes the champion, and its tests the suite, decoded and scored as they were."""
    old = line.run(*CASES, DRAWN, grpo={"temperature": 1.3, "seed": 5})
    brought = part(line, old)
    tests, contains = brought["tests"], [{"type": "contains", "text": "e"}]
    line.keep_answers(base="base", champion="tuned")
    line.champion(OLD, seed=1)
    line.model("tuned", seed=3)
    other = brought | {"run_id": "cars-aaaaaaaaaaaa", "tests": tests[:2], "rewards": contains}
    line.suite(other, brought | {"tests": tests[2:]})
    fresh = [case | {"id": f"n{case['id']}", "prompt": f"new {case['id']}"} for case in CASES]
    capsys.readouterr()
    new = line.run(CASES[0], *fresh, tests={"max_completion_length": 20}, rewards=[{"type": "contains", "text": "a"}])
    found = [(test["run_id"], test["id"], list(test["tuned"]["rewards"])) for test in new["suite"]]
    # The first test of the suite is one of the run's own.
    assert found == [(other["run_id"], "t2", ["contains"]), *[(OLD, each, ["length"]) for each in ("t3", "t4", "drawn")]]
    for before, after in zip(old["tests"][1:], new["suite"], strict=True):
        assert [after[name]["text"] for name in ("base", "champion")] == [before[name]["text"] for name in ("base", "tuned")]
        assert after["tuned"]["text"] != before["tuned"]["text"]
    for before, after in zip(old["tests"][2:], new["suite"][1:], strict=True):
        assert (before["run_id"], after["base"], after["champion"]) == (None, before["base"], before["tuned"])
    assert new["asked"] == {
        "base": {"answers": 33, "asked": 5},
        "champion": {"answers": 33, "asked": 5},
        "tuned": {"answers": 33, "asked": 33},
    }
    assert "tested=3 total=3 model=champion_suite eta_seconds=0\n" in capsys.readouterr().out


STORED = [
    {"id": case["id"], "messages": [{"role": "user", "content": case["prompt"]}], "reference_answer": case["description"]}
    for case in CASES
]
PART: dict[str, Any] = {"run_id": OLD, "decoding": GREEDY._asdict(), "rewards": REWARDS, "tests": STORED}
ROWS = [
    [{"role": "user", "content": " XX"}],
    [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "say 7"}],
]
OWN = {"role": "system", "content": "Be long"}


@pytest.mark.parametrize(
    ("prompt", "judges"),
    [
        ([{"role": "user", "content": "x"}], True),
        ([{"role": "user", "content": "x x"}], False),
        ([OWN, {"role": "user", "content": "xx"}], False),
        ([{"role": "user", "content": "say 7.0"}], False),
        ([OWN, {"role": "user", "content": "say 7"}], False),
        ([{"role": "user", "content": "say 70"}], True),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "xx"}], True),
    ],
)
def test_a_suite_test_that_asks_a_training_rows_question_does_not_judge(line, prompt, judges):
    line.suite(PART | {"tests": [{"messages": prompt, "reference_answer": "1"}]})
    line.job.channel("training", "train.jsonl", "".join(json.dumps({"prompt": each, "answer": "1"}) + "\n" for each in ROWS))
    (found,) = suite_tests.suite_parts(RunConfig(model="tiny"), [])
    assert [test.judges for test in found.tests] == [judges]


def test_a_test_that_did_not_judge_in_its_own_run_does_not_judge_now(line):
    line.suite(PART | {"tests": [STORED[0] | {"judges": False}, STORED[1]]})
    (found,) = suite_tests.suite_parts(RunConfig(model="tiny"), [])
    assert [test.judges for test in found.tests] == [False, True]


PYTHON = {"type": "python", "file": "mine.py"}
SCORE = "def reward(prompts, completions, answer, **_):\n    return [len(each) / 10 for each in answer]\n"
BARE = {"id": "bad", "messages": [{"role": "user", "content": "bare"}]}
UNUSABLE: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown reward": ({"rewards": [{"type": "gone"}]}, "unknown reward 'gone'"),
    "a reward's parameter": ({"rewards": [{"type": "length", "most": 3}]}, "rewards"),
    "an unknown check": ({"tests": [STORED[0] | {"checks": [{"type": "gone"}]}]}, "'t1'.*unknown reward 'gone'"),
    "a test without an answer": ({"tests": [*STORED, BARE]}, r"inference test 5 \('bad'\)"),
    "a forbidden reward": ({"rewards": [{"type": "code_tests"}]}, "not allowed"),
    "a missing file": ({"rewards": [PYTHON | {"file": "other.py"}]}, "has no file other.py"),
    "a check's missing file": ({"tests": [STORED[0] | {"checks": [PYTHON | {"file": "no.py"}]}]}, "has no file no.py"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_suite_that_cannot_be_used_any_more_names_its_run_and_the_way_out(line, name):
    change, message = UNUSABLE[name]
    line.patch.setenv("ALLOW_PYTHON_REWARDS", "true")
    line.suite(PART | {"tests": STORED[3:]}, PART | {"run_id": NEW, "tests": STORED[:3]} | change)
    with pytest.raises(JobError, match=f"of the run '{NEW}' that cannot be used any more: .*{message}") as error:
        suite_tests.suite_parts(RunConfig(model="tiny"), [])
    assert "suite: {max: 0}" in str(error.value)
    assert suite_tests.suite_parts(RunConfig.model_validate({"model": "tiny", "suite": {"max": 0}}), []) == []


@pytest.mark.parametrize(
    "content", ["", "[]", '{"parts": [{"run_id": "a"}]}', json.dumps({"parts": [PART | {"tests": [{"id": "bad"}]}]})]
)
def test_a_suite_that_cannot_be_read_is_named(line, content):
    line.suite(PART)
    line.job.channel("suite", "suite.json", content)
    with pytest.raises(JobError, match=r"suite.json in .* cannot be read"):
        suite_tests.suite_parts(RunConfig(model="tiny"), [])


def test_a_suite_without_the_training_rows_is_refused(line):
    line.suite(PART)
    line.patch.delenv("SM_CHANNEL_TRAINING")
    with pytest.raises(JobError, match="needs the channel 'training'"):
        suite_tests.suite_parts(RunConfig(model="tiny"), [])


def test_each_run_of_the_suite_has_its_own_reward_files(line):
    line.patch.setenv("ALLOW_PYTHON_REWARDS", "true")
    for run_id, factor in ((OLD, 10), (NEW, 100)):
        line.job.channel("suite", f"rewards/{run_id}/mine.py", SCORE.replace("10", str(factor)))
    tests = {OLD: STORED[:1], NEW: STORED[1:2]}
    line.suite(*[PART | {"run_id": run_id, "rewards": [PYTHON], "tests": each} for run_id, each in tests.items()])
    scores = [test["tuned"]["score"] for test in line.run(*CASES[2:])["suite"]]
    assert scores == [pytest.approx(0.1), pytest.approx(0.01)]
