"""The linear layer: its factorized twin and its adapter."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from oialr.layers.adapter import LayerAdapter
from oialr.layers.cost import Way
from oialr.layers.twin import FactoredTwin


class FactoredLinear(FactoredTwin):
    """y = x W^T + b with W = U core Vh (out, in), applied as ((x Vh^T) core^T) U^T + b.

    After a release, W = A B, it is the two linear maps (x B^T) A^T + b.

    For b rows the forward costs b (n r + r^2 + r m) multiply-adds instead of b m n, and backward
    keeps the products of width r instead of x, since only the core takes a gradient.
    """

    in_features: int
    out_features: int

    def forward(self, input: Tensor) -> Tensor:
        """Map the input (..., in) to (..., out)."""
        x = input
        way = self.way(x.numel() // max(1, x.shape[-1]))
        inner, left = ordered(x, self.operands, way)
        return functional.linear(inner, left, self.bias)

    def plain_pair(self) -> nn.Sequential:
        """Make two linear layers, (n, r) without and (r, m) with the bias."""
        A, B = self.pair()
        return nn.Sequential(plain_linear(B), plain_linear(A, self.bias))

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}"


class LinearAdapter(LayerAdapter):
    """nn.Linear, and the output projection of an attention that is known."""

    name = "nn.Linear"
    dense_types = (nn.Linear, NonDynamicallyQuantizableLinear)
    twin = FactoredLinear
    inputs_meet = "columns"

    def factorizes(self, kind: type[nn.Module], key: str, *, is_claimed: bool) -> bool:
        """Whoever is not known, and has such an output projection, may read its weight himself."""
        is_plain = is_claimed or not issubclass(kind, NonDynamicallyQuantizableLinear)
        return key == "weight" and is_plain


def plain_linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Make a linear layer of torch's own from a weight (m, n), and a bias (m,)."""
    m, n = weight.shape
    layer = nn.Linear(n, m, bias=bias is not None, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.detach())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    return layer


def ordered(x: Tensor, factors: Sequence[Tensor], way: Way) -> tuple[Tensor, Tensor]:
    """Order the products of x W^T, all but the last: x W^T = inner left^T.

    Args:
        x: (..., n).
        factors: U (m, r), core (r, r), Vh (r, n) with W = U core Vh; or A (m, r), B (r, n) with
            W = A B.
        way: the order.

    Returns:
        inner (..., r) and left (m, r); x itself and W where the dense weight is rebuilt.
    """
    linear = functional.linear
    if len(factors) == 2:
        A, B = factors
        return (x, A @ B) if way == "dense" else (linear(x, B), A)
    U, core, Vh = factors
    match way:
        case "factored":
            return linear(linear(x, Vh), core), U
        case "dense":
            return x, U @ core @ Vh
    if U.shape[0] <= Vh.shape[1]:
        return linear(x, Vh), U @ core
    return linear(x, core @ Vh), U
