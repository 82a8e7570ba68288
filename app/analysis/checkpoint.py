"""Reads the weights of a checkpoint, whatever program wrote it."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from app.analysis.files import shards_by_tensor
from app.analysis.quantized import Scaled, join_scales
from app.training.foreign_files import (
    STATE_KEYS,
    CheckpointError,
    find_state,
    load,
    without_wrappers,
)
from oialr.layers.base import FROZEN, RELEASED, FactoredLayer, FactoredParts
from oialr.layers.reading import MatrixReading
from oialr.layers.registry import adapters

_STEP_KEYS = ("step", "global_step", "iteration")
_DTYPES = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
}
"""Of weights; those of 4 bits are packed, and float8_e8m0fnu is for the scales of others."""
_LARGEST_EXPANSION = 2**26
"""Values of a weight that is stored as fewer: sparse, or one value for many."""
_LOOKED_AT = 64
"""Entries at the beginning and at the end of a weight that a fingerprint is made of."""


@dataclass(frozen=True)
class StoredFactors:
    """A weight that is stored as a product, as this program does; with groups a stack of them."""

    factors: tuple[Tensor, ...]
    """U, core and Vh; or A and B after a release."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (m, n) of the weight read as a matrix."""
        return self.groups * self.factors[0].shape[-2], self.factors[-1].shape[-1]

    @property
    def groups(self) -> int:
        """Number of matrices that the weight is read as."""
        first = self.factors[0]
        return first.shape[0] if first.dim() == 3 else 1


Weight = Tensor | StoredFactors | Scaled


@dataclass(frozen=True, kw_only=True)
class StoredCheckpoint:
    """What is known of a checkpoint."""

    weights: Mapping[str, Weight]
    """All floating tensors of two or more dimensions, by the dense name, in stored order."""
    integers: list[str]
    """Tensors of two or more dimensions that are left out, since they hold integers."""
    step: int | None
    epoch: int | None
    within_epoch: bool
    """Whether more than ``epoch`` epochs were trained, but not one more."""


def read_checkpoint(
    *files: Path, index: Path | None = None, verify: bool = True
) -> StoredCheckpoint:
    """Read a checkpoint; its tensors come from the disk when they are used.

    What was read of the disk stays in memory no longer than the result: who looks at one weight
    and lets go of it has never more than that in memory, except of torch.save's oldest format.

    Nothing but tensors and plain values is unpickled (:mod:`app.training.foreign_files`).

    Args:
        files: one of safetensors, or of torch.save: a state_dict, or a dictionary that holds one
            under one of STATE_KEYS. Several: its shards, with a part of the weights each.
        index: of the shards, which must hold what it promises.
        verify: whether to read files that have checksums to their end, and compare. They have been
            before, if not.

    Raises:
        CheckpointError: it is nothing of that.
    """
    state: dict[str, Tensor] = {}
    position: Mapping[str, Any] = {}
    for file in files:
        content = load(file, verify=verify)
        found = find_state(content)
        if found is None:
            raise CheckpointError(
                f"{file}: no state_dict, neither at the top nor under {', '.join(STATE_KEYS)}"
            )
        if twice := state.keys() & found.keys():
            raise CheckpointError(f"{file}: {min(twice)!r} is in another shard too")
        state |= found
        stored = content.get("position", content)
        position = position or (stored if isinstance(stored, Mapping) else {})
    path = files[0]
    if index is not None and (problem := _differs(index, state)):
        raise CheckpointError(f"{index}: {problem}")
    if problem := next(filter(None, map(_unusable, state.items())), None):
        raise CheckpointError(f"{path}: {problem}")
    try:
        joined, integers = join_scales(without_wrappers(state))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    weights = _name_weights(joined)
    if not weights:
        raise CheckpointError(f"{path}: no floating tensor of two or more dimensions")
    if (name := _impossible_name(weights)) is not None:
        raise CheckpointError(f"{path}: {name!r} is no name that a weight of a module can have")
    steps = (_as_int(position.get(key)) for key in _STEP_KEYS)
    return StoredCheckpoint(
        weights=weights,
        integers=integers,
        step=next((step for step in steps if step is not None), None),
        epoch=_as_int(position.get("epoch")),
        within_epoch=bool(_as_int(position.get("batch"))),
    )


def fingerprint(weights: Mapping[str, Weight]) -> str:
    """Return a digest of some entries of every weight: what differs in it, is not the same.

    Whole weights are not read, which would take as long as the analysis itself.
    """
    digest = hashlib.sha256()
    for name, weight in weights.items():
        for part in _parts(weight):
            flat = part.detach().to_dense().flatten()
            some = torch.cat([flat[:_LOOKED_AT], flat[-_LOOKED_AT:]]).contiguous()
            digest.update(f"{name} {tuple(part.shape)} {part.dtype}".encode())
            digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def as_module(weights: Mapping[str, Weight], device: torch.device) -> nn.Module:
    """Hang weights into a tree of modules under their names, as a measurement expects them.

    Args:
        weights: by dense name. Half precision becomes float32.
        device: where they are measured.
    """
    root = _Holder()
    for name, weight in weights.items():
        path, _, key = name.rpartition(".")
        holder = _holder(root, path)
        if isinstance(weight, StoredFactors):
            factors = [_to(factor, device) for factor in weight.factors]
            reading = MatrixReading(weight.shape, groups=weight.groups)
            holder.add_module(key, FactoredLayer(*factors, reading=reading))
        else:
            parameter = nn.Parameter(_to(weight, device), requires_grad=False)
            holder.register_parameter(key, parameter)
    return root


class _Holder(FactoredParts):
    """Holds weights, or their factors, without knowing what layer they belong to."""

    def part(self, key: str) -> FactoredLayer | None:
        """Return what holds the factors of a weight; None if the weight is dense."""
        part = self._modules.get(key)
        return part if isinstance(part, FactoredLayer) else None


def _differs(index: Path, state: Mapping[str, Tensor]) -> str | None:
    """Say what the shards lack of what their index promises; None if nothing."""
    try:
        places = shards_by_tensor(index)
    except ValueError as error:
        return str(error)
    name = next((name for name in places if name not in state), None)
    return name and f"promises {name!r} in {places[name].name}, which does not hold it"


def _unusable(entry: tuple[str, Tensor]) -> str | None:
    """Say why a tensor cannot be measured, though it may be a weight; None if it can."""
    name, tensor = entry
    if tensor.is_meta:
        return f"{name!r} has a shape and no values (device meta): save the weights themselves"
    if tensor.is_nested:
        return f"{name!r} is a nested tensor"
    if not tensor.is_floating_point() or tensor.dim() < 2:
        return None
    if tensor.dtype not in _DTYPES:
        return f"{name!r} is of {tensor.dtype}, which is no number by itself"
    # A few bytes can stand for more values than any memory holds.
    is_strided = tensor.layout == torch.strided
    stored = tensor.untyped_storage().nbytes() // tensor.element_size() if is_strided else 0
    if tensor.numel() > max(stored, _LARGEST_EXPANSION):
        return f"{name!r} {tuple(tensor.shape)} has far more values than are stored"
    return None


def _name_weights(state: Mapping[str, Tensor | Scaled]) -> dict[str, Weight]:
    """Find the weights, those that are held as factors under their dense names."""
    weights: dict[str, Weight] = {}
    for name, tensor in state.items():
        path, _, key = name.rpartition(".")
        parts = next((names for names in (FROZEN, RELEASED) if key in names), ())
        beside = [state[k] for k in (f"{path}.{part}" for part in parts) if k in state]
        factors = [factor for factor in beside if isinstance(factor, Tensor)]
        if parts and len(factors) == len(parts) and _are_factors(factors):
            if key == parts[0]:
                weights[_dense_name(path, state)] = StoredFactors(tuple(factors))
        elif isinstance(tensor, Scaled) or _may_be_weight(tensor):
            weights[name] = tensor
    return weights


def _may_be_weight(tensor: Tensor) -> bool:
    return bool(tensor.dim() >= 2 and tensor.is_floating_point() and tensor.numel())


def _are_factors(factors: Sequence[Tensor]) -> bool:
    """Whether they are U (m, r), core (r, r), Vh (r, n), or A (m, r), B (r, n), or stacks of them.

    Others call matrices A and B too: a product that stores no less than the weight is none of ours.
    """
    left, *core, right = factors
    if left.dim() not in (2, 3) or not left.numel() or not right.numel():
        return False
    if len({tuple(factor.shape[:-2]) for factor in factors}) != 1:
        return False
    r, m, n = left.shape[-1], left.shape[-2], right.shape[-1]
    if not core:
        return right.dim() == left.dim() and right.shape[-2] == r and r * (m + n) < m * n
    return all(tuple(part.shape[-2:]) == (r, r) for part in core) and right.shape[-2] == r


def _impossible_name(names: Collection[str]) -> str | None:
    """Return a name under which no module or no HDF5 file can hold a weight; None if none is."""
    reserved = nn.Module()
    for name in names:
        parts = name.split(".")
        parents = (".".join(parts[:end]) for end in range(1, len(parts)))
        if "\0" in name or not _is_text(name):
            return name
        if any(not part.strip("/") or hasattr(reserved, part) for part in parts) or any(
            parent in names for parent in parents
        ):
            return name
    return None


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # a half of a pair of UTF-16
        return False
    return True


def _dense_name(path: str, state: Collection[str]) -> str:
    """Return the dense parameter name of factors: a layer of several weights holds them itself."""
    parent, _, child = path.rpartition(".")
    prefix = f"{parent}." if parent else ""
    beside = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    for adapter in adapters():
        if (key := adapter.key_of_child(child, beside)) is not None:
            return f"{prefix}{key}"
    return f"{path}.weight"


def _as_int(value: Any) -> int | None:
    """Return a whole number, be it Python's, numpy's or a tensor of one element."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        value = value.item()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def is_finite(weight: Weight) -> bool:
    """Whether a weight holds neither NaN nor infinity."""
    return all(bool(_to(part, part.device).isfinite().all()) for part in _parts(weight))


def _parts(weight: Weight) -> tuple[Tensor, ...]:
    """Return the tensors that a weight is stored as."""
    if isinstance(weight, StoredFactors):
        return weight.factors
    return (weight.values, weight.scale) if isinstance(weight, Scaled) else (weight,)


def _to(tensor: Tensor | Scaled, device: torch.device) -> Tensor:
    """Bring a tensor to a device, dense, in a dtype that is computed in."""
    if isinstance(tensor, Scaled):
        return tensor.dense(device)
    # torch promotes no dtype of 8 bits.
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to_dense().to(device, dtype)


def _holder(root: nn.Module, path: str) -> nn.Module:
    """Return the module at a path; what is missing on the way is made."""
    module = root
    for part in filter(None, path.split(".")):
        if not hasattr(module, part):
            module.add_module(part, _Holder())
        module = module.get_submodule(part)
    return module
