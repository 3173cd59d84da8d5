"""Starts a run from another run's adapter: the new adapter gets its weights before the first step.

    start = read(config)              →  the files of the channel `start`, None for a run with a new adapter
    begin_at(start, trainer, config)  →  the trainer's adapter has the start's weights

The optimizer is new. A checkpoint of the run goes before its start, and its identity has the start's digest.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from trainer import folders
from trainer.job import JobError
from trainer.sampling import without_dropout
from tunedrop.config.fields import MANAGED_LORA
from tunedrop.config.model import RunConfig

if TYPE_CHECKING:
    from trainer.run_trainer import RunTrainer

log = logging.getLogger("trainer")

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as PEFT names them
# Fields of PEFT's LoraConfig that change neither an adapter's weights nor what they compute.
FREE = (MANAGED_LORA - {"peft_type"}) | {"lora_dropout"}
SHOWN_CHARACTERS = 200


class Start(NamedTuple):
    """A start: the run that it is of, its adapter's settings and tensors, and the SHA-256 digest of the tensors' file."""

    run_id: str
    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    digest: str

    def summary(self) -> dict[str, str]:
        """Return the start's entry in `training.json`."""
        return {"run_id": self.run_id, "adapter_sha256": self.digest}


def read(config: RunConfig) -> Start | None:
    """Read the channel `start`; None if the run starts with a new adapter. Raises JobError for a missing or broken file."""
    if config.start_from == "base":
        return None
    folder = folders.channel("start")
    if folder is None:
        raise JobError(
            f"start_from is '{config.start_from}', but the job has no channel 'start' with that run's adapter/. "
            "Add the channel, or set start_from to base."
        )
    content = {}
    for name in (SETTINGS, WEIGHTS):
        try:
            content[name] = (folder / name).read_bytes()
        except OSError as error:
            raise _unusable(config, name, f"cannot be read from {folder}: {error.strerror}") from None
    try:
        settings = json.loads(content[SETTINGS])
    except ValueError as error:
        raise _unusable(config, SETTINGS, f"is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise _unusable(config, SETTINGS, "is not a JSON object")
    try:
        tensors = safetensors.torch.load(content[WEIGHTS])
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise _unusable(config, WEIGHTS, f"is no whole file of safetensors: {error}") from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise _unusable(config, WEIGHTS, f"has values that are not finite in the tensor {name}")
    start = Start(config.start_from, settings, tensors, hashlib.sha256(content[WEIGHTS]).hexdigest())
    log.info("start=%s adapter_sha256=%s tensors=%d", start.run_id, start.digest, len(tensors))
    return start


def _unusable(config: RunConfig, file: str, reason: str) -> JobError:
    return JobError(
        f"The start's file {file}, of the run '{config.start_from}', {reason}. Set start_from to base or to another run."
    )


def begin_at(start: Start, trainer: "RunTrainer", config: RunConfig) -> None:
    """Give the trainer's adapter the start's weights. The start is the reference of the KL term too, if the config says so.

    Otherwise the reference is TRL's for a new adapter: the base model. Raises JobError if the start does not fit the run.
    """
    take_over(trainer.model, start, config)
    if config.reference == "start" and trainer.beta:
        trainer.ref_model = StartModel(trainer.model)


def take_over(model: PeftModel, start: Start, config: RunConfig) -> None:
    """Give the model's new adapter the start's weights. Raises JobError if the start has another base model or shape."""
    _check_settings(model, start, config)
    expected = get_peft_model_state_dict(model)
    for name in sorted(expected.keys() | start.tensors.keys()):
        if name not in start.tensors:
            raise _unusable(config, WEIGHTS, f"lacks the tensor {name}, which this run's adapter has")
        if name not in expected:
            raise _unusable(config, WEIGHTS, f"has the tensor {name}, which this run's adapter has not")
        found, wanted = list(start.tensors[name].shape), list(expected[name].shape)
        if found != wanted:
            raise _unusable(config, WEIGHTS, f"has the tensor {name} of shape {found}, and this run's is {wanted}")
    set_peft_model_state_dict(model, start.tensors)


def _check_settings(model: PeftModel, start: Start, config: RunConfig) -> None:
    """Raise JobError that names the first setting of the start's adapter that is not the run's."""
    name, _, revision = config.model.partition("@")
    for key, now in (("base_model_name_or_path", name), ("revision", revision or None)):
        if (then := start.settings.get(key)) != now:
            raise JobError(
                f"The run '{start.run_id}' cannot be the start: it tuned the {'model' if key != 'revision' else key} "
                f"{then!r} ({SETTINGS}), and this config's is {now!r}. Set model to that one, or start_from to base."
            )
    defaults, current = LoraConfig().to_dict(), model.peft_config["default"].to_dict()
    for key in sorted(current.keys() - FREE):
        then, now = _comparable(start.settings.get(key, defaults[key])), _comparable(current[key])
        if then != now:
            raise JobError(
                f"The run '{start.run_id}' cannot be the start: its adapter has {key} {_shown(then)} ({SETTINGS}), and this "
                f"config's lora.{key} is {_shown(config.lora.peft_kwargs().get(key, now))}. Set lora.{key} as in that run's "
                "config, or start_from to base."
            )


def _comparable(value: Any) -> Any:
    """Return a setting as JSON has it, with names in order: PEFT keeps names as sets."""
    value = json.loads(json.dumps(value, default=list))
    return sorted(value, key=str) if isinstance(value, list) else value


def _shown(value: Any) -> str:
    """Return a setting in a message: PEFT writes `all-linear` as the names of all layers."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


class StartModel:
    """A PEFT model as it was when this object was made, for calls: the reference of a run that stays close to its start.

    It shares the model's weights but for those that learn, of which it keeps a copy. Calls have no gradient and no dropout.
    """

    def __init__(self, model: PeftModel):
        self._model = model
        self._copies = [(each, each.detach().clone()) for each in model.parameters() if each.requires_grad]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with the weights of the start."""
        with torch.no_grad(), without_dropout(self._model), self._weights():
            return self._model(*args, **kwargs)

    @contextmanager
    def _weights(self) -> Iterator[None]:
        own = [(parameter, parameter.data) for parameter, _ in self._copies]
        try:
            for parameter, copy in self._copies:
                parameter.data = copy
            yield
        finally:
            for parameter, data in own:
                parameter.data = data
