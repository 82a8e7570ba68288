"""The factorized linear layer."""

from torch import Tensor
from torch.nn import functional

from oialr.layers.cost import Way
from oialr.layers.twin import FactoredTwin


class FactoredLinear(FactoredTwin):
    """y = x W^T + b with W = U core Vh (out, in), applied as ((x Vh^T) core^T) U^T + b.

    For b rows the forward costs b (n r + r^2 + r m) multiply-adds instead of b m n, and backward
    keeps the products of width r instead of x, since only the core takes a gradient.
    """

    in_features: int
    out_features: int

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out)."""
        way = self.way(x.numel() // max(1, x.shape[-1]))
        inner, left = ordered(x, self.U, self.core, self.Vh, way)
        return functional.linear(inner, left, self.bias)

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}"


def ordered(x: Tensor, U: Tensor, core: Tensor, Vh: Tensor, way: Way) -> tuple[Tensor, Tensor]:
    """Order the products of x W^T with W = U core Vh, all but the last: x W^T = inner left^T.

    Args:
        x: (..., n).
        U: (m, r). core: (r, r). Vh: (r, n).
        way: the order.

    Returns:
        inner (..., r) and left (m, r); x itself and W where the dense weight is rebuilt.
    """
    linear = functional.linear
    match way:
        case "factored":
            return linear(linear(x, Vh), core), U
        case "dense":
            return x, U @ core @ Vh
    if U.shape[0] <= Vh.shape[1]:
        return linear(x, Vh), U @ core
    return linear(x, core @ Vh), U
