"""Reads the weights of a checkpoint, whatever program wrote it."""

import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from app.lowrank.attention import INPUT_PROJECTIONS, FactoredAttention, FactoredProjection
from app.lowrank.layer import FactoredLayer
from app.training.archive import verify_foreign

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
    if (name := _impossible_name(weights)) is not None:
        raise CheckpointError(f"{path}: {name!r} is no name that a weight of a module can have")
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
    verify_foreign(path)
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
        if key in _FACTORS and _are_factors(factors):
            if key == "core":
                weights[_dense_name(path, state)] = StoredFactors(*factors)
        elif tensor.dim() >= 2 and tensor.is_floating_point() and tensor.numel():
            weights[name] = tensor
    return weights


def _are_factors(factors: Sequence[Tensor]) -> bool:
    """Whether U (m, r), core (r, r) and Vh (r, n) are there, or stacks of them."""
    if len(factors) != len(_FACTORS) or len({factor.dim() for factor in factors}) != 1:
        return False
    U, core, Vh = factors
    if core.dim() not in (2, 3) or not core.numel():
        return False
    r = core.shape[-1]
    same_count = U.shape[:-2] == core.shape[:-2] == Vh.shape[:-2]
    return same_count and U.shape[-1] == core.shape[-2] == Vh.shape[-2] == r


def _impossible_name(names: Collection[str]) -> str | None:
    """Return a name under which no tree of modules can hold a weight; None if there is none."""
    reserved = nn.Module()
    for name in names:
        parts = name.split(".")
        parents = (".".join(parts[:end]) for end in range(1, len(parts)))
        if any(not part.strip("/") or hasattr(reserved, part) for part in parts) or any(
            parent in names for parent in parents
        ):
            return name
    return None


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


def is_finite(weight: Weight) -> bool:
    """Whether a weight holds neither NaN nor infinity."""
    parts = weight if isinstance(weight, StoredFactors) else (weight,)
    return all(bool(_to(part, part.device).isfinite().all()) for part in parts)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """Bring a tensor to a device, dense, in a dtype that is computed in."""
    # torch promotes no dtype of 8 bits.
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to_dense().to(device, dtype)


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
