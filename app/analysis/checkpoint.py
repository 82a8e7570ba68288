"""Reads the weights of a checkpoint, whatever program wrote it."""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from app.lowrank.attention import INPUT_PROJECTIONS, FactoredAttention, FactoredProjection
from app.lowrank.layer import FactoredLayer

STATE_KEYS = ("state_dict", "model", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before the name of every weight."""

_STEP_KEYS = ("step", "global_step", "iteration")


class StoredFactors(NamedTuple):
    """A weight that is stored as U core Vh, as this program does; with groups a stack of them."""

    U: Tensor
    core: Tensor
    Vh: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (m, n) of the weight read as a matrix."""
        return self.groups * self.U.shape[-2], self.Vh.shape[-1]

    @property
    def groups(self) -> int:
        """Number of matrices that the weight is read as."""
        return self.U.shape[0] if self.U.dim() == 3 else 1


Weight = Tensor | StoredFactors

_FACTORS = StoredFactors._fields


@dataclass(frozen=True, kw_only=True)
class StoredCheckpoint:
    """What is known of a checkpoint."""

    weights: Mapping[str, Weight]
    """All floating tensors of two or more dimensions, by the dense name, in stored order."""
    step: int | None
    epoch: int | None


class CheckpointError(Exception):
    """A file that cannot be read as a checkpoint; says why in one line."""


def read_checkpoint(path: Path) -> StoredCheckpoint:
    """Read a checkpoint; its tensors come from the disk when they are used.

    Nothing but tensors and plain values is unpickled (weights_only=True).

    Args:
        path: a file of safetensors, or of torch.save: a state_dict, or a dictionary that holds one
            under one of STATE_KEYS.

    Raises:
        CheckpointError: it is nothing of that.
    """
    try:
        content = _load(path)
    except Exception as error:  # a damaged file may raise anything
        reason = "holds more than tensors and plain values, or is damaged: save the state_dict"
        if "weights_only" not in str(error) and "Weights only" not in str(error):
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{path}: cannot be read ({reason})") from None
    state = _find_state(content)
    if state is None:
        raise CheckpointError(
            f"{path}: no state_dict, neither at the top nor under {', '.join(STATE_KEYS)}"
        )
    weights = _name_weights(_without_prefix(state))
    if not weights:
        raise CheckpointError(f"{path}: no floating tensor of two or more dimensions")
    position = content.get("position", content)
    position = position if isinstance(position, Mapping) else {}
    steps = (_as_int(position.get(key)) for key in _STEP_KEYS)
    return StoredCheckpoint(
        weights=weights,
        step=next((step for step in steps if step is not None), None),
        epoch=_as_int(position.get("epoch")),
    )


def as_module(weights: Mapping[str, Weight], device: torch.device) -> nn.Module:
    """Hang weights into a tree of modules under their names, as a measurement expects them.

    Args:
        weights: by dense name. Half precision becomes float32.
        device: where they are measured.
    """
    root = nn.Module()
    for name, weight in weights.items():
        path, _, key = name.rpartition(".")
        if isinstance(weight, StoredFactors):
            U, core, Vh = (_to(factor, device) for factor in weight)
            shape = torch.Size(weight.shape)
            if key in INPUT_PROJECTIONS:
                projection = FactoredProjection(U, core, Vh, weight_shape=shape)
                child = key.removesuffix("_weight")
                _attention(root, path).add_module(child, projection)
            else:
                _place(root, path, FactoredLayer(U, core, Vh, weight_shape=shape))
        else:
            parameter = nn.Parameter(_to(weight, device), requires_grad=False)
            _holder(root, path).register_parameter(key, parameter)
    return root


def _load(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return {"state_dict": load_file(path)}
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(content, Mapping):
        raise TypeError(f"holds a {type(content).__name__}, not a dictionary")
    return dict(content)


def _find_state(content: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Return the tensors of the state_dict, which may lie one level down."""
    for candidate in (*(content.get(key) for key in STATE_KEYS), content):
        if isinstance(candidate, Mapping):
            tensors = {str(k): v for k, v in candidate.items() if isinstance(v, Tensor)}
            if tensors:
                return tensors
    return None


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _name_weights(state: dict[str, Tensor]) -> dict[str, Weight]:
    """Find the weights, those that are held as factors under their dense names."""
    weights: dict[str, Weight] = {}
    for name, tensor in state.items():
        path, _, key = name.rpartition(".")
        factors = [state[k] for k in (f"{path}.{part}" for part in _FACTORS) if k in state]
        if key in _FACTORS and len(factors) == len(_FACTORS):
            if key == "core":
                weights[_dense_name(path, state)] = StoredFactors(*factors)
        elif tensor.dim() >= 2 and tensor.is_floating_point() and tensor.numel():
            weights[name] = tensor
    return weights


def _dense_name(path: str, state: Mapping[str, Tensor]) -> str:
    """Return the dense parameter name of factors: attention holds its weights without a layer."""
    parent, _, child = path.rpartition(".")
    bias = f"{parent}.in_proj_bias" if parent else "in_proj_bias"
    is_projection = f"{child}_weight" in INPUT_PROJECTIONS
    if is_projection and (child == "in_proj" or bias in state):
        return f"{path}_weight"
    return f"{path}.weight"


def _as_int(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, torch.promote_types(tensor.dtype, torch.float32))


def _holder(root: nn.Module, path: str) -> nn.Module:
    """Return the module at a path; what is missing on the way is made."""
    module = root
    for part in filter(None, path.split(".")):
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    return module


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    _holder(root, parent).add_module(child, module)


def _attention(root: nn.Module, path: str) -> FactoredAttention:
    """Return the attention at a path, that holds what was there already."""
    module = _holder(root, path)
    if isinstance(module, FactoredAttention):
        return module
    attention = FactoredAttention.from_dense(nn.MultiheadAttention(1, 1, device="meta"))
    attention._modules = dict(module._modules)
    attention._parameters = dict(module._parameters)
    _place(root, path, attention)
    return attention
