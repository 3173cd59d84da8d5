"""Jobs on several instances, as processes with namespaces of their own; and the trainer on two ranks, both ways."""

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest

import trainer
import tunedrop

TWO = {"ResourceConfig": {"InstanceType": "ml.g5.4xlarge", "InstanceCount": 2, "VolumeSizeInGB": 50}}


def test_two_instances_know_and_reach_each_other_and_leave_their_files_in_one_place(local: Any) -> None:
    local.s3.put_object(Bucket="art", Key="data/two/rows", Body="1")
    local.create(
        "two",
        """
        set -e
        host=$(python -c 'import json; print(json.load(open("/opt/ml/input/config/resourceconfig.json"))["current_host"])')
        cp /opt/ml/input/config/resourceconfig.json /opt/ml/output/data/$host.json
        cat /opt/ml/input/data/training/rows > /opt/ml/model/$host
        echo $host > /opt/ml/model/first
        getent hosts algo-1 algo-2 > /opt/ml/output/data/$host.hosts
        echo "$$ $(ls /proc | grep -c '^[0-9]*$')" > /opt/ml/output/data/$host.self
        """,
        InputDataConfig=[local.channel("code", "s3://art/code/two/"), local.channel("training", "s3://art/data/two/")],
        **TWO,
    )
    assert local.wait("two")["TrainingJobStatus"] == "Completed"
    base = "out/two/two/output"
    for name in ("algo-1", "algo-2"):
        resources = json.loads(local.text(f"{base}/data/{name}.json"))
        assert (resources["current_host"], resources["hosts"]) == (name, ["algo-1", "algo-2"])
        assert resources["instance_groups"][0]["hosts"] == ["algo-1", "algo-2"]
        assert local.text(f"{base}/data/{name}.hosts").split().count("127.0.0.1") == 2
        pid, processes = local.text(f"{base}/data/{name}.self").split()
        assert (pid, int(processes) < 6) == ("1", True)
        assert local.text(f"{base}/model/{name}") == "1"
    assert local.text(f"{base}/model/first") == "algo-1\n"


def test_an_instance_that_fails_ends_the_others_and_its_reason_is_the_jobs(local: Any, tmp_path: Path) -> None:
    local.create(
        "falls",
        """
        if grep -q '"current_host": "algo-2"' /opt/ml/input/config/resourceconfig.json; then
          echo "no rows" > /opt/ml/output/failure; exit 3
        fi
        sleep 60
        """,
        **TWO,
    )
    job = local.wait("falls")
    assert job["TrainingJobStatus"] == "Failed"
    assert job["FailureReason"] == "AlgorithmError: no rows, exit code: 3"
    local.until(lambda: [path.name for path in (tmp_path / "state/jobs/falls").iterdir()] == ["job.log"])


def test_a_stop_reaches_every_instance(local: Any) -> None:
    local.create(
        "stops",
        """
        host=$(grep -o 'algo-[12]' /opt/ml/input/config/resourceconfig.json | head -1)
        trap 'touch /opt/ml/model/$host; exit 0' TERM
        touch /opt/ml/checkpoints/$host; sleep 60 & wait
        """,
        CheckpointConfig={"S3Uri": "s3://art/checkpoints/stops"},
        **TWO,
    )
    for name in ("algo-1", "algo-2"):
        local.wait_for_key(f"checkpoints/stops/{name}")
    local.client.stop_training_job(TrainingJobName="stops")
    assert local.wait("stops")["TrainingJobStatus"] == "Stopped"
    assert len(local.keys("out/stops/stops/output/model/algo-")) == 2


# What ModelTrainer's driver tells a command, as far as the trainer listens.
ENTRY = """
set -e
export SM_MODEL_DIR=/opt/ml/model SM_OUTPUT_FAILURE=/opt/ml/output/failure SM_HPS='{}' OMP_NUM_THREADS=1
for name in models run training; do export SM_CHANNEL_${name^^}=/opt/ml/input/data/$name; done
config=/opt/ml/input/config/resourceconfig.json
export SM_HOSTS=$(python -c "import json; print(json.dumps(json.load(open('$config'))['hosts']))")
export SM_CURRENT_HOST=$(python -c "import json; print(json.load(open('$config'))['current_host'])")
cd /opt/ml/input/data/trainer
# trainer.job starts a rank for each GPU; where there are none, several must be asked for.
[ -z "$RANKS" ] || exec python -m torch.distributed.run --nproc-per-node=$RANKS -m trainer.train
exec python -m trainer.job train
"""


@pytest.fixture(scope="module")
def data(s3: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The trainer, with rollouts that can be compared, a tiny model, and rows to train on."""
    import ranks
    import tiny_model

    tiny_model.make_tiny_model(folder := tmp_path_factory.mktemp("tiny"))
    sources = {"trainer": Path(trainer.__path__[0]), "tunedrop": Path(tunedrop.__path__[0]), "models": folder}
    for name, source in sources.items():
        prefix = "ranks/models/" if name == "models" else f"ranks/trainer/{name}/"
        for path in source.rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                s3.upload_file(str(path), "art", prefix + path.relative_to(source).as_posix())
    fixed = (sources["trainer"] / "shared_prefix_sampling.py").read_text() + ranks.FIXED_ROLLOUTS
    s3.put_object(Bucket="art", Key="ranks/trainer/trainer/shared_prefix_sampling.py", Body=fixed)
    for name, word, count in (("train", "say", 12), ("heldout", "tell", 4)):
        prompts = [[{"role": "user", "content": f"{word} {i}"}] for i in range(count)]
        rows = [json.dumps({"id": f"{name}{i}", "prompt": prompt, "answer": str(i)}) for i, prompt in enumerate(prompts)]
        s3.put_object(Bucket="art", Key=f"ranks/training/{name}.jsonl", Body="\n".join(rows))


def trained(
    local: Any, name: str, batch: int, sampling: dict[str, Any] | None = None, **changes: Any
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Train with micro-batches of this size, and return training.json, the metrics and the adapter."""
    from safetensors.torch import load

    grpo = {
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "num_generations": 8,
        "per_device_train_batch_size": batch,
        "max_completion_length": 6,
        "activation_checkpointing": False,
        "bf16": False,
    }
    config = {"model": "tiny", "rewards": [{"type": "contains", "text": "e"}], "lora": {"r": 4}, "grpo": grpo}
    config |= {"learnability": {"samples": 8 if sampling else 2}, "sampling": sampling or {}}
    local.s3.put_object(Bucket="art", Key=f"ranks/{name}.json", Body=json.dumps(config))
    channels = {"trainer": "ranks/trainer/", "models": "ranks/models/", "training": "ranks/training/"}
    channels |= {"code": f"code/{name}/", "run": f"ranks/{name}.json"}
    inputs = [local.channel(channel, f"s3://art/{key}") for channel, key in channels.items()]
    checkpoints = {"S3Uri": f"s3://art/checkpoints/{name}"}
    local.create(name, textwrap.dedent(ENTRY), InputDataConfig=inputs, CheckpointConfig=checkpoints, **changes)
    job = local.until(lambda: (found := local.describe(name))["TrainingJobStatus"] != "InProgress" and found, seconds=180)
    assert job["TrainingJobStatus"] == "Completed", job["FailureReason"] + "\n" + local.log(name)
    base = f"out/{name}/{name}/output/model"
    told, metrics = json.loads(local.text(f"{base}/training.json")), local.text(f"{base}/metrics.jsonl")
    adapter = local.s3.get_object(Bucket="art", Key=f"{base}/adapter/adapter_model.safetensors")["Body"].read()
    assert [key for key in local.keys(f"checkpoints/{name}/checkpoint-4/") if key.endswith("manifest.json")]
    return told, [json.loads(line) for line in metrics.splitlines()], load(adapter)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("instances", TWO),
        pytest.param("processes", {"Environment": {"RANKS": "2"}}, marks=pytest.mark.soak),
    ],
)
@pytest.mark.usefixtures("data")
def test_two_ranks_train_what_one_trains_with_the_same_global_batch(
    local: Any, one_rank: Any, name: str, changes: dict[str, Any]
) -> None:
    """The order of a sum differs: float32 rounds it by 1e-7, and Adam's square roots amplify the difference."""
    assert_equal(trained(local, name, 8, **changes), one_rank)


@pytest.mark.soak
@pytest.mark.usefixtures("data")
def test_two_ranks_choose_the_prompts_that_one_chooses(local: Any) -> None:
    teach = {"policy": "teach", "refills": 2}
    two = trained(local, "two-teach", 8, teach, Environment={"RANKS": "2"})
    one = trained(local, "one-teaches", 16, teach)
    assert two[0]["sampling"] == one[0]["sampling"]
    assert_equal(two, one)


def assert_equal(found: Any, of_one_rank: Any) -> None:
    told, metrics, adapter = found
    expected_told, expected_metrics, expected = of_one_rank
    for key in ("steps", "ended", "checkpoint", "evaluations", "alerts", "rows"):
        assert told[key] == expected_told[key], key
    assert told["learnability"]["prompts"] == expected_told["learnability"]["prompts"]
    assert told["proofs"]["merge_parity"]["tensors_off"] == 0
    for key in ("reward", "reward_std", "rewards", "completion_length", "entropy", "grad_norm", "answers"):
        assert [each[key] for each in metrics] == [pytest.approx(each[key], rel=1e-4) for each in expected_metrics], key
    assert max(float((adapter[each] - expected[each]).abs().max()) for each in expected) < 1e-4


@pytest.fixture(scope="module")
def one_rank(data: None, endpoint: str, s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from .conftest import launch

    local = launch(endpoint, s3, tmp_path_factory.mktemp("one") / "state")
    yield trained(local, "one", 16)
    local.close()
