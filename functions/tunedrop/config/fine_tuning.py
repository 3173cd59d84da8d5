"""The sections of the run config about supervised fine-tuning: `warm_start` and `sft`. docs/training.md explains both."""

from typing import Annotated, Literal

from pydantic import Field

from tunedrop.config.section import Section


class WarmStart(Section):
    """Supervised fine-tuning on the rows' worked solutions before GRPO, where the base model is lost (docs/training.md)."""

    policy: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="auto: if the learnability check finds too many dead prompts, and the rows have reasoning, until fewer "
        "are dead; always: in any case, until the loss on held-out rows rises.",
    )
    dead_above: Annotated[
        float,
        Field(ge=0, lt=1, description="`auto` begins above this share of dead prompts, and ends at or below it."),
    ] = 0.5
    max_share: Annotated[
        float, Field(gt=0, le=0.9, description="The largest share of the run's time that the warm start may take.")
    ] = 0.3


class Sft(Section):
    """How supervised fine-tuning trains: a run with `method: sft`, and a warm start."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    num_train_epochs: Annotated[
        float, Field(gt=0, le=1000, description="Passes over the rows; a warm start takes at most so many.")
    ] = 3.0
    rows_per_step: Annotated[
        int, Field(ge=1, le=4096, description="About how many rows a step takes: short rows share a sequence.")
    ] = 16
