"""Makes a trainer of Transformers save whole checkpoints (`trainer.checkpoints`), and free its memory at its end.

    class RunTrainer(WholeCheckpoints, GRPOTrainer): …

The trainers of both methods are made this way, of TRL's `GRPOTrainer` and `SFTTrainer`. Like trainer/run_trainer.py, this
module uses private names of Transformers' `Trainer`.
"""

import gc
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from transformers import PrinterCallback, TrainerState

from trainer import checkpoints
from trainer.checkpoints import SAVING, Checkpoint, Record

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class WholeCheckpoints(_Base):  # type: ignore[misc] # transformers is untyped here
    """Adds whole checkpoints to a trainer. `run` and `record` go into their manifests; other arguments are the trainer's."""

    _saving = False
    OWN: tuple[str, ...] = ("model", "model_wrapped", "optimizer", "lr_scheduler")  # attributes with tensors

    def __init__(self, *args: Any, run: dict[str, Any], record: Record, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.run, self.record = run, record
        self.remove_callback(PrinterCallback)

    def finish_from(self, checkpoint: Checkpoint) -> None:
        """Take over the state of a run that ended with this checkpoint, and let the callbacks write their files again."""
        self.state = TrainerState.load_from_json(str(checkpoint.path / "trainer_state.json"))
        self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self.callback_handler.on_train_end(self.args, self.state, self.control)

    def free_memory(self) -> None:
        """Free the model, the optimizer and the rollout. The trainer can no longer train."""
        for name in self.OWN:
            self.__dict__.pop(name, None)
        handler = self.callback_handler
        handler.model = handler.optimizer = handler.lr_scheduler = None
        self.accelerator.free_memory()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def save_more(self, folder: Path) -> None:
        """Save what this rank needs to go on, beside what Transformers saves."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Do nothing: TRL writes a model card beside the checkpoints at every save."""

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return str(Path(folder, SAVING)) if self._saving else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As Transformers', into `saving/`; sealed and renamed when every rank has written its files."""
        accelerator, parent, name = self.accelerator, Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        folder = parent / SAVING / name
        if accelerator.is_local_main_process:
            shutil.rmtree(folder.parent, ignore_errors=True)
        accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        self.save_more(folder)
        accelerator.wait_for_everyone()
        # Each machine has its own folder. SageMaker copies all of them to one prefix in S3.
        hashes = gather_object([checkpoints.hashes(folder) if accelerator.is_local_main_process else {}])
        if accelerator.is_local_main_process:
            files = {file: digest for each in hashes for file, digest in each.items()}
            manifest = {"step": self.state.global_step, "run": self.run, "record": asdict(self.record), "files": files}
            checkpoints.publish(folder, parent / name, manifest)
            checkpoints.clean(parent, self.args.save_total_limit, verify=False)
        accelerator.wait_for_everyone()
