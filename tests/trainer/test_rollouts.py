"""The answers that a training keeps: what is in them, and that they obey their limit. Resumption: test_checkpoints.py."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from trainer import train
from trainer.latest_rollout import Rollout
from trainer.rollouts import PANEL_SHARE, Rollouts
from trainer.sampling import ScoredCompletion
from tunedrop import rollouts
from tunedrop.rollouts import Group

from .conftest import Job

STEPS, SIZE = 4, 4
WEIGHTS = [2.0, 0.5]


def parts(folder: Path, kind: str) -> dict[int, list[Group]]:
    """The groups of each part of a kind, by step, in the order of the index."""
    index = rollouts.read_index(lambda name: (folder / name).read_bytes())
    assert index is not None
    assert {path.name for path in folder.iterdir()} == {rollouts.INDEX, *(part.name for part in index.parts)}
    assert all((folder / part.name).stat().st_size == part.bytes for part in index.parts)
    return {part.step: rollouts.decode((folder / part.name).read_bytes()) for part in index.parts if part.kind == kind}


@pytest.fixture(scope="module", params=["shared prefix", "stock", "curriculum"])
def trained(request, tmp_path_factory, tiny):
    """A run by each trainer: its job, and the kind."""
    with pytest.MonkeyPatch.context() as patch:
        job = Job(tmp_path_factory.mktemp("rollouts"), patch, tiny)
        rewards = [{"type": "contains", "text": "e", "weight": 2.0}, {"type": "length", "weight": 0.5, "maximum": 3}]
        grpo = {"max_steps": STEPS, "num_generations": SIZE, "gradient_accumulation_steps": 2, "bf16": False}
        sampling = {"sampling": {"policy": "teach"}} if request.param == "curriculum" else {}
        job.config(rewards=rewards, grpo=grpo, lora={"r": 4}, learnability={"samples": 0}, **sampling)
        job.rows()
        job.heldout()
        if request.param == "stock":
            patch.setattr("trainer.shared_prefix_models.unsupported", lambda *_: "a test")
        train.train(train.parse_flags([]))
        yield job, request.param


def test_each_step_has_its_answers_with_what_the_training_used(trained):
    job, kind = trained
    steps = parts(job.model / "rollouts", "step")
    assert list(steps) == [point["step"] for point in job.metrics()] == list(range(1, STEPS + 1))
    for point in job.metrics():
        groups = steps[point["step"]]
        answers = [answer for group in groups for answer in group.answers]
        assert {len(group.answers) for group in groups} == {SIZE}
        assert len(answers) == point["answers"]
        for name, mean in point["rewards"].items():
            assert sum(answer.rewards[name] or 0.0 for answer in answers) / len(answers) == pytest.approx(mean, abs=1e-5)
        assert sum(answer.score or 0.0 for answer in answers) / len(answers) == pytest.approx(point["reward"], abs=1e-5)
        assert sum(answer.tokens for answer in answers) / len(answers) == pytest.approx(point["completion_length"])
        assert sum(answer.cut for answer in answers) / len(answers) == pytest.approx(point["clipped_ratio"])
        for group in groups:
            assert group.prompt == [{"role": "user", "content": f"say {group.reference}"}]
            assert group.prompt_id == f"r{group.reference}"
            assert sum(answer.advantage or 0.0 for answer in group.answers) == pytest.approx(0.0, abs=1e-3)
            for answer in group.answers:
                assert answer.rewards["contains"] == float("e" in answer.text.lower())
                assert answer.trainer_log_prob is not None
                assert answer.trainer_log_prob < 0
                if kind == "stock":
                    assert answer.sampler_log_prob is None
                else:  # the same weights in fp32, by two ways
                    assert answer.sampler_log_prob == pytest.approx(answer.trainer_log_prob, abs=1e-3)


def test_each_evaluation_asks_the_panel_again(trained):
    job, _ = trained
    panel = parts(job.model / "rollouts", "panel")
    evaluations = job.training()["evaluations"]
    assert list(panel) == [each["step"] for each in evaluations]
    assert len(panel) > 1
    for each in evaluations:
        groups = panel[each["step"]]
        assert [group.prompt_id for group in groups] == ["h0", "h1", "h2", "h3"]
        assert all(group.panel and len(group.answers) == 1 for group in groups)
        assert sum(group.mean for group in groups) / 4 == pytest.approx(each["heldout_reward"])


# --- the limit ---


class Written:
    """Parts of made-up rollouts, by the callback that the trainer has."""

    def __init__(self, folder: Path, max_mb: float, max_steps: int = 100):
        self.folder = folder
        self.rows = [{"id": f"r{n}", "prompt": [{"role": "user", "content": "?"}], "answer": "!"} for n in range(8)]
        trainer: Any = SimpleNamespace(
            state=TrainerState(max_steps=max_steps, is_world_process_zero=True),
            record=SimpleNamespace(alerts=[]),
            reward_weights=torch.tensor(WEIGHTS),
            num_generations=SIZE,
            rollout=None,
        )
        self.trainer = trainer
        self.callback = Rollouts(folder, max_mb, trainer, self.rows)
        self.resume(0)

    def resume(self, step: int) -> None:
        self.trainer.state.global_step = step
        self.callback.on_train_begin(None, self.trainer.state, TrainerControl())

    def step(self, step: int, length: int = 200, seed: int = 0) -> None:
        lots = random.Random(1000 * step + seed)
        count = len(self.rows) * SIZE
        self.trainer.state.global_step = step
        self.trainer.rollout = Rollout(
            rows=[row for row in range(len(self.rows)) for _ in range(SIZE)],
            texts=["".join(lots.choices("abcdefgh é😀\ud7ff\x00", k=lots.randint(0, 2 * length))) for _ in range(count)],
            tokens=[length] * count,
            cut=[False] * count,
            rewards={"a": [lots.random() for _ in range(count)], "b": [float("nan")] * count},
            advantages=[float("inf")] * count,
            sampler_log_probs=None,
            trainer_log_probs=torch.full((count,), torch.nan),
        )
        self.callback.on_log(None, self.trainer.state, TrainerControl(), {"reward": 1.0})

    def evaluation(self, step: int, length: int) -> None:
        self.trainer.state.global_step = step
        texts = ["".join(random.Random(n).choices("abcdefgh", k=length)) for n in range(len(self.rows))]
        self.callback.keep_panel(self.rows, [ScoredCompletion(text, 1.0, {"a": 1.0}, cut=False) for text in texts])

    def bytes(self, kind: str = "*") -> int:
        return sum(path.stat().st_size for path in self.folder.glob(f"{kind}-*.jsonl.gz"))


@pytest.mark.parametrize(("max_mb", "length"), [(0, 200), (0.001, 0), (0.02, 200), (0.02, 5000), (1.0, 0), (1.0, 1000)])
def test_the_parts_obey_their_limit_and_are_spread_over_the_run(tmp_path, max_mb, length):
    run = Written(tmp_path, max_mb)
    for step in range(1, 101):
        if step % 10 == 0:
            run.evaluation(step, length)
        run.step(step, length)
        assert run.bytes("step") <= (1 - PANEL_SHARE) * step / 100 * max_mb * 1e6
    assert run.bytes() <= max_mb * 1e6
    steps = parts(tmp_path, "step")
    if max_mb == 1.0:
        assert run.bytes("step") > 0.5 * (1 - PANEL_SHARE) * 1e6 or len(steps) == 100
        halves = [sum(len(groups) for at, groups in steps.items() if (at > 50) == late) for late in (False, True)]
        assert max(halves) < 1.5 * min(halves)
    if max_mb == 0:
        assert steps == parts(tmp_path, "panel") == {}
    first = [[group.prompt_id for group in groups] for groups in parts(tmp_path, "panel").values()]
    assert all(ids == [f"r{n}" for n in range(len(ids))] for ids in first)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("TRUNCATION", ["r2", "r0", "r1"]),
        ("HACKING_SUSPECT", ["r1", "r3", "r2"]),
        ("ENTROPY_COLLAPSE", ["r3", "r0", "r1"]),
        ("DEAD_REWARD", ["r1", "r3", "r2"]),
        ("PLATEAU", ["r0", "r2", "r3"]),
    ],
)
def test_an_alert_names_the_groups_that_show_it_best(code, expected):
    """Two answers in each of four groups. A score that is NaN counts as none."""
    rollout = Rollout(
        rows=[0, 0, 1, 1, 2, 2, 3, 3],
        texts=["a", "b", "c", "d", "e", "f", "g", "g"],
        tokens=[1] * 8,
        cut=[False, False, False, False, True, False, False, False],
        rewards={"one": [0.0, 0.9, 1.0, 1.0, 0.8, 0.3, 0.7, 0.8], "two": [float("nan")] * 8},
        advantages=[0.0] * 8,
        sampler_log_probs=None,
        trainer_log_probs=torch.zeros(8),
    )
    rows = [{"id": f"r{n}", "prompt": []} for n in range(4)]
    assert rollout.telling(code, rows, 2) == expected


def test_an_alert_keeps_its_evidence_where_an_ordinary_step_has_no_room(tmp_path):
    run = Written(tmp_path, 0.05)
    for step in (1, 2):
        run.trainer.record.alerts = [
            {"step": 2, "rollouts": [{"step": 2, "prompt_id": "r7"}, {"step": 1, "prompt_id": "r3"}]}
        ]
        run.step(step, 2000)
    steps = parts(tmp_path, "step")
    assert list(steps) == [2]
    assert steps[2][0].prompt_id == "r7"
    assert run.bytes() <= 50_000


def test_an_alert_without_evidence_keeps_its_step(tmp_path):
    run = Written(tmp_path, 0.05)
    run.trainer.record.alerts = [{"step": 1, "code": "NON_FINITE"}]
    run.step(1, 2000)
    assert parts(tmp_path, "step")[1]


def test_a_resumed_run_removes_what_is_after_its_checkpoint_and_unknown_files(tmp_path):
    run = Written(tmp_path, 1.0)
    for step in range(1, 6):
        run.step(step)
    run.evaluation(5, 10)
    (tmp_path / "step-000002.jsonl.gz.part").write_text("half")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("step-*.gz")}
    run = Written(tmp_path, 1.0)
    assert parts(tmp_path, "step") == {}  # without a checkpoint, the folder is another run's
    for name, raw in before.items():
        (tmp_path / name).write_bytes(raw)
    run.resume(3)
    assert list(parts(tmp_path, "step")) == [1, 2, 3]
    assert parts(tmp_path, "panel") == {}
    for step in (4, 5):
        run.step(step)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("step-*.gz")} == before


def test_numbers_that_are_none_are_null(tmp_path):
    run = Written(tmp_path, 1.0)
    run.step(1)
    answer = parts(tmp_path, "step")[1][0].answers[0]
    assert (answer.rewards["b"], answer.advantage, answer.trainer_log_prob, answer.sampler_log_prob) == (None,) * 4
    assert answer.score == pytest.approx(WEIGHTS[0] * (answer.rewards["a"] or 0.0), abs=1e-5)


def test_the_loss_of_changed_weights_does_not_replace_the_first_log_probabilities(tmp_path):
    run = Written(tmp_path, 1.0)
    run.step(1)
    rollout: Rollout = run.trainer.rollout
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    rollout.note_log_probs(torch.tensor([5, 3]), torch.tensor([[-1.0, -2.0, -9.0], [-4.0, -9.0, -9.0]]), mask)
    rollout.note_log_probs(torch.tensor([3]), torch.tensor([[-7.0, -7.0, -7.0]]), torch.ones(1, 3))
    assert rollout.trainer_log_probs[[5, 3]].tolist() == [-1.5, -4.0]
    assert rollout.trainer_log_probs.isnan().sum() == len(rollout.texts) - 2


def test_a_part_is_json_lines_that_any_tool_reads(tmp_path):
    import gzip

    run = Written(tmp_path, 1.0)
    run.step(7)
    lines = gzip.decompress((tmp_path / "step-000007.jsonl.gz").read_bytes()).decode().splitlines()
    group = json.loads(lines[0])
    assert group["step"] == 7
    assert set(group["answers"][0]) == {"text", "score", "rewards", "tokens", "cut"}
