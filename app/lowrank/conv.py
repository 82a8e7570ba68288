"""The factorized two-dimensional convolution."""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from app.lowrank.layer import FactoredLayer


class FactoredConv2d(FactoredLayer):
    """A convolution with W = U core Vh, (out_channels, in_channels * height * width) as a matrix.

    Vh is applied as a convolution with r output channels and the kernel of the dense layer, with
    its stride, padding and dilation; U core follows as a 1x1 convolution. U core is folded first:
    that costs m r^2 multiply-adds, against r^2 for each pixel.
    """

    def __init__(self, U: Tensor, core: Tensor, Vh: Tensor, *, dense: nn.Conv2d) -> None:
        super().__init__(U, core, Vh, dense=dense)
        assert dense.groups == 1
        self.stride = dense.stride
        self.padding = dense.padding
        self.dilation = dense.dilation
        self.padding_mode = dense.padding_mode
        self._padding_by_side = list(dense._reversed_padding_repeated_twice)

    @classmethod
    def from_dense(cls, dense: nn.Module, U: Tensor, core: Tensor, Vh: Tensor) -> Self:
        """Make the twin of an ungrouped nn.Conv2d from U (m, r), core (r, r), Vh (r, n)."""
        assert isinstance(dense, nn.Conv2d)
        return cls(U, core, Vh, dense=dense)

    def to_dense(self) -> nn.Conv2d:
        """Make the nn.Conv2d with the same function and the same bias object."""
        arguments: dict[str, Any] = {
            "kernel_size": tuple(self.weight_shape[2:]),
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "padding_mode": self.padding_mode,
        }
        dense = nn.Conv2d(
            self.in_channels, self.out_channels, bias=False, device="meta", **arguments
        )
        with torch.no_grad():
            dense.weight = nn.Parameter(self.weight)
        dense.register_parameter("bias", self.bias)
        return dense.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, in_channels, height, width) to (b, out_channels, height', width')."""
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x = functional.pad(x, self._padding_by_side, mode=self.padding_mode)
            padding = 0
        inner = functional.conv2d(
            x,
            self.Vh.view(self.rank, *self.weight_shape[1:]),
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
        )
        return functional.conv2d(inner, (self.U @ self.core)[:, :, None, None], self.bias)

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.weight_shape[1]

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.weight_shape[0]

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        kernel = tuple(self.weight_shape[2:])
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={kernel}, "
            f"stride={self.stride}, padding={self.padding}, rank={self.rank}"
        )
