"""The method, and the measurement of basis stability, as callbacks of transformers' Trainer.

The Trainer restores the weights before any callback but ``on_init_end`` is called, and the
optimizer's state before ``on_train_begin``. So the network is prepared at the former, the method
begins at the latter, and its state travels in trainer_state.json.

With accelerate alone the method is used as in any loop; it takes the wrappers off itself, and
``accelerator.register_for_checkpointing(method)`` stores its state.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState

from oialr.errors import UserError
from oialr.export.state import dense_state
from oialr.method import OIALR
from oialr.preparation import prepare
from oialr.stability.alone import StabilityTracker
from oialr.stability.tracker import mean_stability
from oialr.wrappers import renew_wrappers, unwrapped, unwrapped_optimizer


class OIALRCallback(TrainerCallback, ExportableState):
    """Turns the network of a Trainer low-rank while it is trained.

    ``Trainer(callbacks=[OIALRCallback(delay=1000, update_interval=500)])``; resumes, gradient
    accumulation and clipping are the Trainer's own.
    """

    def __init__(self, **options: Any) -> None:
        """Keep what :class:`oialr.OIALR` will be made with.

        Args:
            **options: of :class:`oialr.OIALR`, plain values, which trainer_state.json can hold;
                delay and update_interval count optimizer steps.

        Raises:
            UserError: the delay is by stability.
        """
        if options.get("delay") == "stability":
            raise UserError(
                "delay: stability compares weights with those of a window before, which the "
                "Trainer's checkpoints cannot hold: give OIALRCallback a number of steps"
            )
        self.options = options
        self.method: OIALR | None = None
        """There from ``on_train_begin`` on, and after the training."""

    def on_init_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Let the network take weights of whatever ranks."""
        prepare(objects["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Begin, or go on where the checkpoint was, or where an earlier training of both ended.

        Raises:
            UserError: the network is not the one that was restored.
            ValueError: as :class:`oialr.OIALR`; a sharded network among others.
        """
        model, optimizer = unwrapped(objects["model"]), unwrapped_optimizer(objects["optimizer"])
        method, state_of_last = self.method, None
        if method is None or (method.model, method.optimizer) != (model, optimizer):
            if method and method.model is model:  # it goes on with another optimizer too
                state_of_last = method.state_dict()
            method = self.method = OIALR(model, optimizer, **self.options)
        name, callbacks = type(self).__name__, state.stateful_callbacks
        callback = callbacks.get(name, {})
        callbacks.setdefault(name, self.state())  # the Trainer stores what a checkpoint has not had
        stored = json.loads(callback.get("attributes", {}).get("stored", "null"))
        if not stored or not state.global_step:  # a new training: what is there is the last one's
            if state_of_last:
                method.load_state_dict(state_of_last)
            return
        if any(stored["ranks"].values()) and not method.converted:
            raise UserError(
                "the checkpoint is of a low-rank network, and model_init has made another one "
                "after OIALRCallback had prepared its own: let model_init return "
                "oialr.prepare(model)"
            )
        method.load_state_dict(stored)

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Convert, update or release, where it is due."""
        assert self.method is not None
        event = self.method.step()
        if event and event.shapes_changed:
            renew_wrappers(self.method.model)  # the Trainer's loop holds its own by a local name

    def state(self) -> dict[str, Any]:
        """Return the method's state for trainer_state.json, as text, which keeps its order."""
        stored = json.dumps(self.method.state_dict() if self.method else None)
        return {"args": self.options, "attributes": {"stored": stored}}


class StabilityCallback(TrainerCallback):
    """Measures basis stability at the end of every epoch, full-rank or low-rank.

    ``tracker`` holds all measurements, as of :class:`oialr.StabilityTracker`; their mean is in the
    Trainer's log history as ``stability``. Process 0 measures alone. A resume begins a new history.
    """

    def __init__(self, **options: Any) -> None:
        """Keep what :class:`oialr.StabilityTracker` will be made with, such as window."""
        self.options = options
        self.tracker: StabilityTracker | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Look at the network's weights."""
        self.tracker = StabilityTracker(objects["model"], **self.options)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Measure, on process 0."""
        assert self.tracker is not None
        if state.is_world_process_zero:
            stability = mean_stability(self.tracker.measure())
            if not math.isnan(stability):  # as within the first window
                row = {"stability": stability, "epoch": state.epoch, "step": state.global_step}
                state.log_history.append(row)


def from_pretrained(kind: Any, folder: str | os.PathLike[str]) -> Any:
    """Make a network of transformers from a folder of whatever ranks.

    Transformers' own from_pretrained would take factorized layers for missing ones, and initialize
    them anew.

    Args:
        kind: a class of networks, such as LlamaForCausalLM, or AutoModelForCausalLM.
        folder: a checkpoint of the Trainer, or what save_pretrained has written, as safetensors.

    Raises:
        ValueError: the weights are not those of such a network. There is no partial load.
        FileNotFoundError: there are no weights.
    """
    from transformers import AutoConfig

    stored: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        stored |= load_file(file)
    if not stored:
        raise FileNotFoundError(f"{folder}: there is no model.safetensors")
    config = (getattr(kind, "config_class", None) or AutoConfig).from_pretrained(folder)
    make = getattr(kind, "_from_config", None) or kind.from_config
    # Not that of config.json, which is the first parameter's, perhaps a frozen one's.
    model: Any = prepare(make(config, dtype=_dtype_of(stored)))
    state = _renamed(model, stored)
    unknown = model.load_state_dict(state, strict=False).unexpected_keys
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)  # tied ones are stored under one of theirs
    there = {*state, *(model._keys_to_ignore_on_save or ())}
    lacking = [min(tied) for tied in names.values() if not tied & there]
    if unknown or lacking:
        raise ValueError(
            f"{folder} does not fit {type(model).__name__}: "
            f"{', '.join([*unknown, *lacking][:3])} are on one side alone"
        )
    if (Path(folder) / "generation_config.json").exists() and model.can_generate():
        model.generation_config = model.generation_config_class.from_pretrained(folder)
    return model.eval()


def save_pretrained(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Save dense weights under the original names, for transformers' own from_pretrained.

    Args:
        model: dense or low-rank; it stays as it is.
        folder: gets the configuration and the weights.
    """
    state = dense_state(model)
    model.save_pretrained(folder, state_dict=state)
    if model.dtype != (dtype := _dtype_of(state)):  # which is the first parameter's
        model.config.dtype = dtype
        model.config.save_pretrained(folder)


def _dtype_of(state: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype of most of the weights, those left aside that may be frozen bases."""
    counts: Counter[torch.dtype] = Counter()
    for name, tensor in state.items():
        if tensor.is_floating_point() and name.rpartition(".")[2] not in ("U", "Vh"):
            counts[tensor.dtype] += tensor.numel()
    return counts.most_common(1)[0][0] if counts else torch.float32


def _renamed(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors of a file the names that the network's code has for them now.

    transformers stores some networks under the names of earlier versions.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    return {rename_source_key(name, renamings, [])[0]: tensor for name, tensor in state.items()}
