"""Writes what a training job leaves in `/opt/ml/model`: adapter, merged model, run config and summary, and proves them."""

import gzip
import json
import logging
import shutil
import tarfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import folders, models
from trainer.job import started

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from trainer.checkpoints import Checkpoint, Record
    from trainer.dataset import Dataset
    from trainer.sft_trainer import Learner
    from trainer.start import Start
    from tunedrop.config.model import RunConfig

log = logging.getLogger("trainer")


def save(checkpoint: "Checkpoint", tokenizer: "PreTrainedTokenizerBase", location: str, config: "RunConfig") -> None:
    """Write the run config, the checkpoint's `adapter/` and its archive, and `merged/`: base model plus adapter in bf16."""
    import torch

    adapter = folders.model_dir() / "adapter"
    adapter.mkdir(parents=True, exist_ok=True)
    shutil.copy(checkpoint.path / "adapter_model.safetensors", adapter)
    # PEFT writes the base model's folder in this container, which means nothing elsewhere.
    name, _, revision = config.model.partition("@")
    adapter_config = json.loads((checkpoint.path / "adapter_config.json").read_bytes()) | {
        "base_model_name_or_path": name,
        "revision": revision or None,
    }
    (adapter / "adapter_config.json").write_text(json.dumps(adapter_config, indent=1))
    archive(adapter, folders.model_dir() / "adapter.tar.gz")
    (folders.model_dir() / "run_config.json").write_text(config.model_dump_json(indent=1))
    tokenizer.save_pretrained(str(folders.model_dir() / "merged"))
    save_merged(location, torch.bfloat16)


def archive(adapter: Path, target: Path) -> None:
    """Write an adapter's two files as a .tar.gz without folders. The same files give the same bytes.

    An endpoint loads this archive (https://docs.aws.amazon.com/sagemaker/latest/dg/realtime-endpoints-adapt.html). Weights
    hardly shrink, so the fastest level of compression is used.
    """

    def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        member.mode = 0o644
        return member

    with (
        target.open("wb") as file,
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            tar.add(adapter / name, name, filter=anonymous)


def save_merged(location: str, dtype: "torch.dtype") -> None:
    """Write the weights of `merged/` in this type: the bf16 base model with the adapter added."""
    import torch
    from peft import PeftModel

    from trainer.merging import merge

    merged = folders.model_dir() / "merged"
    for file in merged.glob("model*.safetensors*"):
        file.unlink()
    # Never the 4-bit weights, which would be rounded twice.
    base = models.load_model(location, dtype=torch.bfloat16, device_map=models.device_with_room(location))
    merge(PeftModel.from_pretrained(base, str(folders.model_dir() / "adapter")), dtype).save_pretrained(str(merged))


def prove(
    config: "RunConfig", location: str, prompts: list[list[dict[str, str]]], history: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return the proofs that the saved model is the trained model. Raises JobError if a proof fails.

    `history`: the points of metrics.jsonl up to the saved adapter. If bf16 does not keep the adapter's effect, `merged/` is
    written again in fp32.
    """
    import torch

    from trainer import proofs

    def proved() -> dict[str, Any]:
        return proofs.prove(
            location,
            folders.model_dir(),
            prompts,
            load_in_4bit=config.lora.load_in_4bit,
            template=config.grpo.get("chat_template_kwargs") or {},
            history=history,
        )

    try:
        return proved()
    except proofs.RoundedAwayError as error:
        log.warning("%s The merged model is written in fp32.", error)
    save_merged(location, torch.float32)
    return proved()


def summary(
    trainer: "Learner",
    config: "RunConfig",
    run_id: str,
    data: "Dataset",
    start: "Start | None",
    chosen: "Checkpoint",
) -> dict[str, Any]:
    """Return the content of `training.json`, without the proofs.

    `trainer` is that of the run's method, `chosen` the checkpoint whose adapter was saved.
    """
    from trainer.bounds import LIMITS
    from trainer.learnability import measured
    from trainer.progress import history

    record, state, points = trainer.record, trainer.state, history(trainer.state)
    gate, curriculum = record.learnability, trainer.curriculum
    if gate and points and not curriculum:  # the gate's forecast is for prompts in a random order
        gate = gate | measured(points, gate, trainer.num_generations)
    return {
        "model": config.model,
        "run_id": run_id,
        "start": start.summary() if start else None,
        "steps": state.global_step,
        "max_steps": state.max_steps,
        "stopped": record.ended is None or state.global_step < state.max_steps,
        "ended": record.ended,
        "bounded": record.ended if record.ended in LIMITS else None,
        "checkpoint": {"step": chosen.step, "heldout_reward": chosen.record.heldout_reward},
        "evaluations": record.evaluations,
        "learnability": gate,
        "shares": shares(record, config.method),
        "warm_start": {name: each for name, each in (record.warm_start or {}).items() if name != "points"} or None,
        "targets": trainer.targets if config.method == "sft" else None,
        "sampling": curriculum.summary() if curriculum else None,
        "alerts": [alert["code"] for alert in record.alerts],
        "method": config.method,
        "rows": trainer.rows,
        "rows_dropped": data.dropped + len(record.dropped),
        "rows_truncated": data.truncated,
        "seconds": round(time.time() - started(), 1),
        "reward_first": points[0]["reward"] if points else None,
        "reward_last": points[-1]["reward"] if points else None,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "datasets")},
    }


def shares(record: "Record", method: str) -> dict[str, dict[str, Any]]:
    """Return the shares of dead, learnable and solved prompts before the training and after each phase, by its name.

    A run of GRPO alone asks only before.
    """
    warm = record.warm_start
    before = warm["before"] if warm else record.learnability
    after = {"after the warm start": warm.get("after") if warm else None, f"after {method}": record.learnability_after}
    names = ("prompts", "dead", "learnable", "solved")
    return {phase: {name: each[name] for name in names} for phase, each in ({"before": before} | after).items() if each}
