"""The transposed convolution in one, two and three dimensions: its twin and its adapter.

Its weight is (in_channels, out_channels / g, kernel...), in and out swapped against a convolution.
It is read by the common rule, the leading dimension makes the rows: W (in_channels, out_channels *
prod(kernel)), or for g groups a stack of (in_channels / g, out_channels / g * prod(kernel)). So U
meets the input, which is mixed down to r channels before it is spread, at the fewer positions; and
whoever reads the weight of a checkpoint without knowing the layer finds the same matrices.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvTransposeNd

from oialr.layers.conv import CONVOLVE, PLAIN, ConvAdapter, described, memory_layout
from oialr.layers.reading import MatrixReading
from oialr.layers.twin import FactoredTwin

TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SPREAD = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


class FactoredConvTranspose(FactoredTwin):
    """A transposed convolution with W = U core Vh, (in_channels, out_channels * prod(kernel)).

    U^T is applied as a convolution with a kernel of one and r output channels, core^T as another,
    in most cases folded into one; Vh follows as a transposed convolution from r channels, with the
    kernel, stride, padding and dilation of the dense layer. With g groups all of them have g.

    After a release, W = A B, it is A^T with a kernel of one, then B.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Map the input (b, in_channels, ...) to (b, out_channels, ...), or the same without b.

        Args:
            input: of the layer.
            output_size: spatial size of the output where the stride leaves several; with or without
                batch and channels.
        """
        x, d = input, len(self.kernel_size)
        layout = memory_layout(x, d)
        assert isinstance(self, _ConvTransposeNd)
        output_padding = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, d, self.dilation
        )

        def mix(x: Tensor, matrix: Tensor) -> Tensor:
            """Mix channels by a matrix (m, r), or (g, m / g, r), transposed, at every position."""
            kernel = matrix.mT.reshape(-1, matrix.shape[-2], *(1 for _ in range(d)))
            convolve: Any = CONVOLVE[d]
            result: Tensor = convolve(x, kernel, groups=self.groups)
            return result

        def spread(x: Tensor, kernel: Tensor) -> Tensor:
            """Apply the transposed convolution by a kernel (..., n), and add the bias."""
            kernel = kernel.reshape(-1, *self.reading.shape[1:]).contiguous(memory_format=layout)
            convolve: Any = SPREAD[d]
            result: Tensor = convolve(
                x,
                kernel,
                self.bias,
                self.stride,
                self.padding,
                output_padding,
                self.groups,
                self.dilation,
            )
            return result

        way = self.way(x.numel() // max(1, self.in_channels))
        if way == "dense":
            return spread(x, self.form_weight())
        if self.released:
            A, B = self.operands
            return spread(mix(x, A), B)
        U, core, Vh = self.operands
        if way == "factored":
            return spread(mix(mix(x, U), core), Vh)
        return spread(mix(x, U @ core), Vh)

    def plain_pair(self) -> nn.Sequential:
        """Make a convolution with a kernel of one and a transposed one of r channels in each group.

        Neither takes an ``output_size`` in its call.
        """
        A, B = self.pair()
        d, channels = len(self.kernel_size), self.groups * self.rank
        common = {"groups": self.groups, "device": "meta", "dtype": A.dtype}
        kind: Any = PLAIN[d]
        pointwise = kind(self.in_channels, channels, 1, bias=False, **common)
        kind = TRANSPOSED[d]
        spatial = kind(
            channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            output_padding=self.output_padding,
            dilation=self.dilation,
            bias=self.bias is not None,
            **common,
        )
        for layer, matrix in ((pointwise, A.mT), (spatial, B)):
            layer.weight = nn.Parameter(matrix.reshape(layer.weight.shape))
        if self.bias is not None:
            spatial.bias = nn.Parameter(self.bias.detach())
        return nn.Sequential(pointwise, spatial)

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        return described(self)


class ConvTransposeAdapter(ConvAdapter):
    """nn.ConvTranspose1d, 2d and 3d; groups and depthwise ones are as those of a convolution."""

    name = "a transposed convolution"
    dense_types = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    twin = FactoredConvTranspose
    separable = False
    inputs_meet = "rows"

    def inputs(self, layer: nn.Module, reading: MatrixReading, x: Tensor) -> Tensor:
        """Return the input at every position, (b, in_channels), or (g, b, in_channels / g)."""
        x = x if x.dim() == len(reading.shape) else x[None]
        x = x.unflatten(1, (reading.groups, -1)).flatten(3).permute(1, 0, 3, 2).flatten(1, 2)
        return x if reading.groups > 1 else x[0]

    def rows(self, layer: nn.Module, inputs: Sequence[Any], output: Any) -> int:
        """Count the positions of the input, over the batch: each is multiplied by all of W."""
        assert isinstance(layer, _ConvTransposeNd)
        x = next(value for value in inputs if isinstance(value, Tensor))
        return x.numel() // layer.in_channels
