"""The convolution in one, two and three dimensions, with groups: its twin and its adapter."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import checkpoint

from oialr.layers.adapter import LayerAdapter
from oialr.layers.cost import CONVOLUTIONS_MARGIN, DIRECTIONS_MARGIN, MARGIN
from oialr.layers.reading import MatrixReading
from oialr.layers.twin import FactoredTwin
from oialr.linalg.weighting import Side
from oialr.options import Execution, Selection

PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
LARGEST_PATCHES = 2**25
"""Numbers that the patches of an input may take, whose second moments are formed."""
CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


class FactoredConv(FactoredTwin):
    """A convolution with W = U core Vh, (out_channels, in_channels * prod(kernel)) as a matrix.

    Vh is applied as a convolution with r output channels and the kernel of the dense layer, with
    its stride, padding and dilation; core and U follow as convolutions with a kernel of one, in
    most cases folded into one. (The smaller side of a convolution is that of U but for very few
    input channels, or a kernel of one and more output channels. There the cost model counts the
    core folded into Vh, b r (m - n) multiply-adds less; measured, that takes longer.)

    With g groups each has a factorization of its own, of (out_channels / g, in_channels / g *
    prod(kernel)), and both convolutions have g groups.

    After a release, W = A B, it is B as a convolution of r output channels, then A as one with a
    kernel of one.

    Where the kernel is read by its directions (:meth:`MatrixReading.by_direction`), Vh or B is a
    convolution along the width, and U core or A one along the height, each with the stride,
    padding and dilation of its direction.

    A convolution keeps its input for backward in any case. With ``recompute`` it keeps nothing
    beside it: the product with Vh or B, of r channels, is formed a second time in backward.
    """

    recompute: bool = False

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]
    own = FactoredTwin.own | {"recompute"}

    def configure(self, *, execution: Execution, recompute_convolutions: bool) -> None:
        """Take the method's options for the execution of layers."""
        self.execution, self.recompute = execution, recompute_convolutions

    def forward(self, input: Tensor) -> Tensor:
        """Map the input (b, in_channels, ...) to (b, out_channels, ...), or the same without b."""
        x = input
        convolve: Any = CONVOLVE[len(self.kernel_size)]
        padding = self.padding
        if self.padding_mode != "zeros":
            x = functional.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * len(self.kernel_size)

        def spatial(kernel: Tensor, bias: Tensor | None = None) -> Tensor:
            """Convolve x by a kernel (..., n), with stride, padding and dilation."""
            result: Tensor = convolve(
                x,
                # In another layout than the input's it would cost up to a tenth more.
                kernel.reshape(-1, *self.reading.shape[1:]).contiguous(memory_format=layout),
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

        def along(x: Tensor, kernel: Tensor, direction: int, bias: Tensor | None) -> Tensor:
            """Convolve x by a kernel that extends in one direction."""
            kernel = kernel.contiguous(memory_format=layout)
            result: Tensor = convolve(x, kernel, bias, **self._along(direction, padding))
            return result

        def low_rank() -> Tensor:
            left, *cores, right = self.operands
            if self.reading.is_by_direction:
                inner = along(x, self._horizontal(right), 1, None)
            else:
                inner = spatial(right)
            for core in cores:
                if way == "factored":
                    inner = pointwise(inner, core)
                else:
                    left = left @ core
            if self.reading.is_by_direction:
                return along(inner, self._vertical(left), 0, self.bias)
            return pointwise(inner, left, self.bias)

        layout = memory_layout(x, len(self.kernel_size))
        way = self.way(self._positions(x))
        if way == "dense":
            return spatial(self.form_weight(), self.bias)
        if self.recompute and torch.is_grad_enabled():
            # Stops as soon as what backward needs is there again: the last product is not repeated.
            recomputed: Tensor = checkpoint(low_rank, use_reentrant=False, preserve_rng_state=False)
            return recomputed
        return low_rank()

    def plain_pair(self) -> nn.Sequential:
        """Make two convolutions, that of r channels for each group and one with a kernel of one.

        Of a kernel that is read by its directions one along the width and one along the height.
        """
        A, B = self.pair()
        kind: Any = PLAIN[len(self.kernel_size)]
        g = self.groups
        whole = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        if self.reading.is_by_direction:
            kernels = self._horizontal(B), self._vertical(A).contiguous()
            geometries = self._along(1, self.padding), self._along(0, self.padding)
        else:
            kernels = (
                B.reshape(-1, *self.reading.shape[1:]),
                A.reshape(self.out_channels, -1, *(1 for _ in self.kernel_size)),
            )
            geometries = whole, {}
        pair = [
            kind(
                g * kernel.shape[1],
                kernel.shape[0],
                tuple(kernel.shape[2:]),
                **geometry,
                groups=g,
                padding_mode=self.padding_mode if geometry else "zeros",
                bias=False,
                device="meta",
                dtype=A.dtype,
            )
            for kernel, geometry in zip(kernels, geometries, strict=True)
        ]
        for layer, kernel in zip(pair, kernels, strict=True):
            layer.weight = nn.Parameter(kernel)
        if self.bias is not None:
            pair[-1].bias = nn.Parameter(self.bias.detach())
        return nn.Sequential(*pair)

    def _horizontal(self, right: Tensor) -> Tensor:
        """Return Vh or B (r, i kw) as a kernel (r, i, 1, kw)."""
        return right.reshape(-1, self.in_channels, 1, self.kernel_size[1])

    def _vertical(self, left: Tensor) -> Tensor:
        """Return U core or A (o kh, r) as a kernel (o, r, kh, 1).

        It lies in memory as channels last, with the stride of that in its last dimension too: torch
        lets any other stride pass where there is one number, and its own convolution's backward,
        which has no oneDNN for float64, then raises.
        """
        kernel = left.reshape(self.out_channels, self.kernel_size[0], 1, -1)
        return kernel.permute(0, 3, 1, 2)

    def _along(self, direction: int, padding: str | tuple[int, ...]) -> dict[str, Any]:
        """Return what a convolution along the height (0) or the width (1) takes of this one's."""

        def only(values: Sequence[int], other: int) -> tuple[int, int]:
            return (values[0], other) if direction == 0 else (other, values[1])

        return {
            "stride": only(self.stride, 1),
            "padding": padding if isinstance(padding, str) else only(padding, 0),
            "dilation": only(self.dilation, 1),
        }

    def _positions(self, x: Tensor) -> int:
        """Positions of the output, over the batch; those of the input over the stride, about."""
        d = len(self.kernel_size)
        return x.numel() // max(1, self.in_channels * math.prod(self.stride[-d:]))

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        return described(self)


class ConvAdapter(LayerAdapter):
    """nn.Conv1d, nn.Conv2d and nn.Conv3d: (out_channels, in_channels / g * prod(kernel))."""

    name = "a convolution"
    dense_types: ClassVar[tuple[type[nn.Module] | str, ...]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    twin: ClassVar[type[FactoredTwin]] = FactoredConv
    example = (1, 1, 1)
    inputs_meet: ClassVar[Side | None] = "columns"
    separable: ClassVar[bool] = True
    """Whether a kernel in two dimensions may be read by its directions."""

    def reading(
        self, layer: nn.Module, key: str, options: Selection | None = None
    ) -> MatrixReading:
        """Every group has a matrix of its own; a depthwise kernel is one matrix.

        With the option ``convolutions="spatial"`` a kernel in two dimensions is read by its
        directions; one with groups, or with a single row or column, by the rule.
        """
        assert isinstance(layer, _ConvNd)
        shape = tuple(layer.get_parameter(key).shape)
        has_groups = not is_depthwise(layer) and shape[0] % layer.groups == 0
        groups = layer.groups if has_groups else 1
        has_directions = self.separable and len(shape) == 4 and min(shape[2:]) > 1
        reading = MatrixReading(shape, groups=groups, separable=has_directions and groups == 1)
        is_asked = options is not None and options.convolutions == "spatial"
        return reading.by_direction() if reading.separable and is_asked else reading

    def inner_positions(self, layer: nn.Module, reading: MatrixReading) -> int:
        """By its directions, a kernel leaves the stride of the height to its second convolution."""
        assert isinstance(layer, _ConvNd)
        return layer.stride[0] if reading.is_by_direction else 1

    def released_margin(self, reading: MatrixReading) -> float:
        """Two convolutions of images run at a lower rate than one, in two directions above all."""
        if reading.is_by_direction:
            return DIRECTIONS_MARGIN
        return CONVOLUTIONS_MARGIN if len(reading.shape) > 3 else MARGIN

    def obstacle(self, layer: nn.Module, key: str) -> str | None:
        """A depthwise kernel has nothing that could be saved."""
        assert isinstance(layer, _ConvNd)
        if is_depthwise(layer):
            return f"depthwise, a grouped convolution ({layer.groups} groups) of single channels"
        return None

    def inputs(self, layer: nn.Module, reading: MatrixReading, x: Tensor) -> Tensor:
        """Return the patches of the padded input that the kernel meets, (b, n) or (g, b, n).

        Those of a kernel that is read by its directions are of its width alone. Of a large batch
        the first samples count, and of a large sample the middle of its first direction, so that
        the patches have no more than about LARGEST_PATCHES numbers.
        """
        assert isinstance(layer, _ConvNd)
        d = len(layer.kernel_size)
        x = x if x.dim() == d + 2 else x[None]
        directions = range(1, d) if reading.is_by_direction else range(d)
        strides = [layer.stride[i] if i in directions else 1 for i in range(d)]
        positions = [-(-size // stride) for size, stride in zip(x.shape[2:], strides, strict=True)]
        taps = math.prod(layer.kernel_size[i] for i in directions)
        numbers = max(1, x.shape[1] * math.prod(positions) * taps)
        x = x[: max(1, LARGEST_PATCHES // numbers)]
        span = layer.dilation[0] * (layer.kernel_size[0] - 1) + 1
        length = max(span, x.shape[2] * LARGEST_PATCHES // numbers)
        if length < x.shape[2]:
            start = (x.shape[2] - length) // 2
            x = x.narrow(2, start - start % strides[0], length)  # on the grid of the whole
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        x = x.unflatten(1, (reading.groups, -1))
        for i in directions:
            dilation = layer.dilation[i]
            span = dilation * (layer.kernel_size[i] - 1) + 1
            x = x.unfold(3 + i, span, layer.stride[i])[..., ::dilation]
        # (b, g, channels, positions..., kernel...) -> (g, b positions, channels kernel)
        kernel = tuple(range(3 + d, x.dim()))
        x = x.permute(1, 0, *range(3, 3 + d), 2, *kernel)
        x = x.flatten(1, 1 + d).flatten(2)
        return x if reading.groups > 1 else x[0]

    def rows(self, layer: nn.Module, inputs: Sequence[Any], output: Any) -> int:
        """Count the positions of the output, over the batch."""
        return int(output.numel() // output.shape[1])


def is_depthwise(layer: _ConvNd) -> bool:
    """Whether every group of a convolution has a single channel of input."""
    return 1 < layer.groups == layer.in_channels


def described(layer: Any) -> str:
    """Describe a factorized convolution in one line, transposed or not."""
    groups = f", groups={layer.groups}" if layer.groups > 1 else ""
    return (
        f"{layer.in_channels}, {layer.out_channels}, kernel_size={layer.kernel_size}, "
        f"stride={layer.stride}, padding={layer.padding}{groups}, rank={layer.rank}"
    )


def memory_layout(x: Tensor, dimensions: int) -> torch.memory_format:
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
