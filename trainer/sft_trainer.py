"""Supervised fine-tuning of a run's adapter: TRL's `SFTTrainer` on the model of the run's GRPO trainer.

    sft = build_sft_trainer(trainer, config, sequences, heldout, run=…, record=…, folder=…, decays=…)

Short sequences share one row of the batch (packing). Transformers then masks the attention between them
(`transformers.masking_utils.find_packed_sequence_indices`), and the positions of each begin at 0, so that it has the loss
that it has alone: tests/trainer/test_sft.py compares them. A model that `trainer.shared_prefix_models` does not support,
such as one with a recurrent state, gets one sequence at a time.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from accelerate.utils import gather_object
from trl import SFTConfig, SFTTrainer

from trainer.checkpoints import Record
from trainer.progress import memory_gb
from trainer.run_trainer import RunTrainer, SharedPrefixRunTrainer
from trainer.sampling import without_dropout
from trainer.sft_sequences import Sequences
from trainer.whole_checkpoints import WholeCheckpoints
from tunedrop.config.model import RunConfig
from tunedrop.config.schedule import prompt_limit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# The most tokens of a packed sequence that holds several short ones: attention computes the square of it.
MOST_PACKED = 2048


class RunSftTrainer(WholeCheckpoints, SFTTrainer):  # type: ignore[misc] # TRL is untyped here
    """A `trl.SFTTrainer` with whole checkpoints. It leaves the model as it was, but for the adapter's weights.

    `learned` are the sequences, `heldout` those whose loss says whether the model still learns.
    """

    curriculum = None

    def __init__(self, *args: Any, model: Any, learned: Sequences, heldout: Sequences, **kwargs: Any):
        base: PreTrainedModel = model.get_base_model()
        self.targets, self.heldout = learned.summary, heldout.items
        self._logged, self._stock = time.monotonic(), (base, base.forward)
        own = [(each, each.data) for each in model.parameters() if each.requires_grad]
        super().__init__(*args, model=model, train_dataset=datasets.Dataset.from_list(learned.items), **kwargs)
        for parameter, data in own:  # TRL makes an adapter on 4-bit weights bf16, in which small steps get lost
            parameter.data = data

    def heldout_loss(self) -> float | None:
        """Return the mean loss of the held-out targets' tokens, in nats. None without held-out sequences."""
        if not self.heldout:
            return None
        loss = tokens = 0.0
        own = self.heldout[self.accelerator.process_index :: self.accelerator.num_processes]
        with torch.no_grad(), without_dropout(self.model), self.compute_loss_context_manager():
            for each in own:
                output = self._forward_alone(each["input_ids"], each["labels"])
                loss -= float(output.log_probs.sum())
                tokens += float(output.label_mask.sum())
        sums = gather_object([(loss, tokens)])
        return float(sum(each for each, _ in sums) / sum(each for _, each in sums))

    def probe(self, tokens: int) -> None:
        """Run one sequence of so many random tokens forward and backward, all of them with a loss."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (tokens,), generator=generator).tolist()
        self.model.train()
        with self.compute_loss_context_manager():
            loss = self._forward_alone(ids, ids).loss
        loss.backward()

    def _forward_alone(self, ids: list[int], labels: list[int]) -> Any:
        """Return TRL's output for one sequence: `loss`, and `log_probs` and `label_mask` (1, tokens - 1)."""
        inputs, targets = (torch.tensor([each], device=self.args.device) for each in (ids, labels))
        return self.model(input_ids=inputs, labels=targets, use_cache=False, fused_lm_head=True)

    def add_metric(self, name: str, value: float) -> None:
        """Add a value to a metric of the current step."""
        self._metrics["train"][name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL's, with the time of the step and the memory."""
        if "loss" in logs:
            now = time.monotonic()
            logs |= {"step_time": now - self._logged, "memory_gb": memory_gb()}
            self._logged = now
        super().log(logs, start_time)

    def free_memory(self) -> None:
        """Free the optimizer, and take TRL's head off the model, which others may still use. Ends this trainer."""
        base, forward = self._stock
        base.forward = forward
        del self._stock
        super().free_memory()

    @property
    def rows(self) -> int:
        """The number of rows that it learns."""
        return int(self.targets["usable"])


def build_sft_trainer(
    trainer: RunTrainer,
    config: RunConfig,
    learned: Sequences,
    heldout: Sequences,
    *,
    run: dict[str, Any],
    record: Record,
    folder: Path,
    decays: bool,
) -> RunSftTrainer:
    """Make the trainer of sequences on the model of a run's GRPO trainer, which still samples from it.

    `run`, `record` and `folder` are those of its checkpoints. `decays`: the learning rate falls to 0 at the end, for a
    training whose end is known; else it is constant.
    """
    arguments, sft = trainer.args, config.sft
    packing = isinstance(trainer, SharedPrefixRunTrainer)
    mean = sum(len(each["input_ids"]) for each in learned.items) / len(learned.items)
    longest = prompt_limit(config) + arguments.max_completion_length
    if packing:
        longest = max(longest, min(MOST_PACKED, tokens_of_a_loss(trainer, longest), int(sft.rows_per_step * mean)))
    rows = min(longest // mean, len(learned.items)) if packing else 1
    datasets.disable_progress_bars()
    return RunSftTrainer(
        model=trainer.model,
        args=SFTConfig(
            output_dir=str(folder),
            learning_rate=sft.learning_rate,
            lr_scheduler_type="linear" if decays else "constant",
            num_train_epochs=sft.num_train_epochs,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=max(1, round(sft.rows_per_step / (max(rows, 1) * arguments.world_size))),
            packing=packing,
            max_length=longest,
            shuffle_dataset=True,
            logging_steps=1,
            save_strategy="no",  # trainer/bounds.py saves
            save_total_limit=arguments.save_total_limit,
            report_to=[],
            disable_tqdm=True,
            use_cpu=arguments.use_cpu,
            seed=arguments.seed,
            data_seed=arguments.seed,
            bf16=arguments.bf16,
            fp16=arguments.fp16,
            activation_checkpointing=arguments.activation_checkpointing,
            activation_checkpointing_kwargs=arguments.activation_checkpointing_kwargs,
        ),
        processing_class=trainer.processing_class,
        learned=learned,
        heldout=heldout,
        run=run,
        record=record,
    )


def tokens_of_a_loss(trainer: RunTrainer, longest: int) -> int:
    """Return the tokens of a micro-batch of GRPO's loss, whose memory a run has. A group has its prompt once."""
    completion: int = trainer.args.max_completion_length
    sequences: int = trainer.args.per_device_train_batch_size
    group: int = trainer.num_generations
    return sequences // group * (longest - completion) + sequences * completion


Learner = RunTrainer | RunSftTrainer  # the trainer of a run's method
