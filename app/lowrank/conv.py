"""The factorized convolution in one, two and three dimensions, with groups."""

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from app.lowrank.layer import FactoredLayer

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d

DENSE: dict[int, type[Conv]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


class FactoredConv(FactoredLayer):
    """A convolution with W = U core Vh, (out_channels, in_channels * prod(kernel)) as a matrix.

    Vh is applied as a convolution with r output channels and the kernel of the dense layer, with
    its stride, padding and dilation; core and U follow as convolutions with a kernel of one, in
    most cases folded into one. (The smaller side of a convolution is that of U but for very few
    input channels, or a kernel of one and more output channels. There the cost model counts the
    core folded into Vh, b r (m - n) multiply-adds less; measured, that takes longer.)

    With g groups each has a factorization of its own, of (out_channels / g, in_channels / g *
    prod(kernel)), and both convolutions have g groups.

    A convolution keeps its input for backward in any case. With ``recompute`` it keeps nothing
    beside it: the product with Vh, of r channels, is formed a second time in backward.
    """

    recompute: bool = False

    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: str
    _padding_by_side: list[int]

    @classmethod
    def from_dense(cls, dense: nn.Module, U: Tensor, core: Tensor, Vh: Tensor) -> Self:
        """Make the twin of a convolution from the factors of its weight."""
        assert isinstance(dense, Conv)
        bias = dense.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        twin = cls(U, core, Vh, weight_shape=dense.weight.shape, bias=bias)
        assert twin.groups == dense.groups
        twin.stride = dense.stride
        twin.padding = dense.padding
        twin.dilation = dense.dilation
        twin.padding_mode = dense.padding_mode
        twin._padding_by_side = list(dense._reversed_padding_repeated_twice)
        return twin.train(dense.training)

    def to_dense(self) -> Conv:
        """Make the convolution with the same function and the same bias object."""
        arguments: dict[str, Any] = {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "padding_mode": self.padding_mode,
        }
        kind = DENSE[len(self.kernel_size)]
        dense = kind(self.in_channels, self.out_channels, bias=False, device="meta", **arguments)
        with torch.no_grad():
            dense.weight = nn.Parameter(self.weight)
        dense.register_parameter("bias", self.bias)
        return dense.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, in_channels, ...) to (b, out_channels, ...), or the same without b."""
        convolve: Any = CONVOLVE[len(self.kernel_size)]
        padding = self.padding
        if self.padding_mode != "zeros":
            x = functional.pad(x, self._padding_by_side, mode=self.padding_mode)
            padding = (0,) * len(self.kernel_size)

        def spatial(kernel: Tensor, bias: Tensor | None = None) -> Tensor:
            """Convolve x by a kernel (..., n), with stride, padding and dilation."""
            result: Tensor = convolve(
                x,
                # In another layout than the input's it would cost up to a tenth more.
                kernel.reshape(-1, *self.weight_shape[1:]).contiguous(memory_format=layout),
                bias,
                stride=self.stride,
                padding=padding,
                dilation=self.dilation,
                groups=self.groups,
            )
            return result

        def pointwise(inner: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
            """Mix channels by a matrix (m, r), or (g, m / g, r), at every position."""
            kernel = matrix.reshape(-1, matrix.shape[-1], *(1 for _ in self.kernel_size))
            result: Tensor = convolve(inner, kernel, bias, groups=self.groups)
            return result

        def low_rank() -> Tensor:
            inner = spatial(self.Vh)
            if way == "factored":
                return pointwise(pointwise(inner, self.core), self.U, self.bias)
            return pointwise(inner, self.U @ self.core, self.bias)

        layout = _layout(x, len(self.kernel_size))
        way = self.way(self._positions(x))
        if way == "dense":
            return spatial(self.weight, self.bias)
        if self.recompute and torch.is_grad_enabled():
            # Stops as soon as what backward needs is there again: the last product is not repeated.
            recomputed: Tensor = checkpoint(low_rank, use_reentrant=False, preserve_rng_state=False)
            return recomputed
        return low_rank()

    def _positions(self, x: Tensor) -> int:
        """Positions of the output, over the batch; those of the input over the stride, about."""
        d = len(self.kernel_size)
        return x.numel() // max(1, self.in_channels * math.prod(self.stride[-d:]))

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.weight_shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.weight_shape[0]

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Extent of the kernel in each dimension."""
        return tuple(self.weight_shape[2:])

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        groups = f", groups={self.groups}" if self.groups > 1 else ""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}{groups}, rank={self.rank}"
        )


def _layout(x: Tensor, dimensions: int) -> torch.memory_format:
    """Return how a batch lies in memory: channels first, as is usual, or last."""
    channels_last = {2: torch.channels_last, 3: torch.channels_last_3d}.get(dimensions)
    if (
        channels_last is None
        or x.dim() != dimensions + 2  # one volume without a batch may lie like a batch of images
        or x.is_contiguous()
        or not x.is_contiguous(memory_format=channels_last)
    ):
        return torch.contiguous_format
    return channels_last
