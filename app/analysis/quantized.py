"""Weights of 8 bits that are stored beside their scales, as programs that quantize networks do.

Without its scales such a weight is another matrix, with other singular vectors, and the scales are
no weights. What cannot be put together with certainty is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_FLOATS = {
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
}
_PACKED = {torch.uint8, torch.int32}  # 4 bits, by two or eight
_SCALES = ("_scale", "_scale_inv")
"""Ends of the names of scales; the weight is values times scale with either."""
_OF_WEIGHT = re.compile(r"scale|absmax|zero_?point", re.IGNORECASE)
_OF_MODULE = {"SCB", "scales", "qzeros", "weight_scale", "weight_scale_inv", "weight_zero_point"}


@dataclass(frozen=True)
class Scaled:
    """A weight that is stored as values and scales, one for each block of it."""

    values: Tensor
    """(m, n), of 8 bits; (m, ...) where the scales are those of rows or a single one."""
    scale: Tensor
    """As many dimensions as the values have."""
    block: tuple[int, ...]
    """Size of a block in each dimension; the last one of a dimension may be smaller."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return self.values.shape

    def dense(self, device: torch.device) -> Tensor:
        """Return the weight in float32."""
        scale = self.scale.detach().to(device, torch.float32)
        for dimension, (size, block) in enumerate(zip(self.shape, self.block, strict=True)):
            if scale.shape[dimension] > 1:
                scale = scale.repeat_interleave(block, dimension).narrow(dimension, 0, size)
        return self.values.detach().to(device, torch.float32) * scale


def join_scales(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor | Scaled], list[str]]:
    """Put weights and their scales together.

    Args:
        state: of a checkpoint.

    Returns:
        The state without those scales, and a text for each tensor of integers that may have been
        meant as a weight, having two or more dimensions.

    Raises:
        ValueError: a weight cannot be measured for its scales; says so.
    """
    joined: dict[str, Tensor | Scaled] = dict(state)
    integers = []
    for name, tensor in state.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.dim() < 2 or tensor.is_complex() or tensor.dtype == torch.bool:
            continue
        if tensor.is_floating_point() and tensor.dtype not in _FLOATS:
            continue
        scales = _scales_of(name, tensor, state)
        if tensor.is_quantized or scales:
            scaled = None
            if len(scales) == 1 and scales[0] in {name + end for end in _SCALES}:
                scaled = _scaled(tensor, state[scales[0]])
            if scaled is None:
                raise ValueError(f"{name!r} is {kind} with scales: save it dequantized")
            joined[name] = scaled
            del joined[scales[0]]
        elif not tensor.is_floating_point():
            integers.append(f"{name} ({kind})")
    return joined, integers


def _scales_of(name: str, tensor: Tensor, state: Mapping[str, Tensor]) -> list[str]:
    """Return the names of what is stored to make a weight of a tensor's values."""
    if tensor.dtype not in {*_FLOATS, *_PACKED, torch.int8}:
        return []  # such as int64: an index
    path, dot, _ = name.rpartition(".")
    ends = {
        other: other[len(name) :] for other in state if other.startswith((f"{name}_", f"{name}."))
    }
    found = [other for other, end in ends.items() if _OF_WEIGHT.search(end)]
    of_module = [f"{path}{dot}{key}" for key in sorted(_OF_MODULE)]
    return found + [other for other in of_module if other in state and other not in found]


def _scaled(values: Tensor, scale: Tensor) -> Scaled | None:
    """Put values and scales together; None where it is not certain how."""
    if values.dtype not in {*_FLOATS, torch.int8} or not scale.is_floating_point():
        return None
    if scale.numel() == 1:
        scale = scale.reshape((1,) * values.dim())
    elif tuple(scale.shape) in {(len(values),), (len(values), *(1,) * (values.dim() - 1))}:
        scale = scale.reshape(-1, *(1,) * (values.dim() - 1))
    elif values.dim() != 2 or scale.dim() != 2:
        return None
    blocks = [_block(size, count) for size, count in zip(values.shape, scale.shape, strict=True)]
    if any(block is None for block in blocks):
        return None
    return Scaled(values, scale, tuple(block for block in blocks if block is not None))


def _block(size: int, count: int) -> int | None:
    """Return the size of blocks of which there are so many; None where it may be one or another.

    Of 200 rows with two scales, blocks may have 100 rows, or 128 and the rest.
    """
    if count == 1:
        return size
    fitting = {2**power for power in range(20) if -(-size // 2**power) == count}
    if size % count == 0:
        fitting.add(size // count)
    return fitting.pop() if len(fitting) == 1 else None
