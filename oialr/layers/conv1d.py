"""The Conv1D of transformers, a linear layer whose weight is (in, out): its twin and its adapter.

It is known by its name, so that transformers need not be there. The weight is read as it is stored,
the leading dimension makes the rows: W (in, out), so that U meets the input.
"""

from torch import Tensor, nn
from torch.nn import functional

from oialr.layers.adapter import LayerAdapter
from oialr.layers.linear import ordered, plain_linear
from oialr.layers.twin import FactoredTwin


class FactoredConv1D(FactoredTwin):
    """y = x W + b with W = U core Vh (in, out), applied as ((x U) core) Vh + b.

    After a release, W = A B, it is (x A) B + b.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out)."""
        way = self.way(x.numel() // max(1, x.shape[-1]))
        if way == "dense":
            return functional.linear(x, self.form_weight().mT, self.bias)
        inner, left = ordered(x, [factor.mT for factor in reversed(self.operands)], way)
        return functional.linear(inner, left, self.bias)

    def plain_pair(self) -> nn.Sequential:
        """Make two linear layers of torch's own, (m, r) without and (r, n) with the bias."""
        A, B = (factor.mT.contiguous() for factor in self.pair())
        return nn.Sequential(plain_linear(A), plain_linear(B, self.bias))

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        m, n = self.matrix_shape
        return f"{m}, {n}, rank={self.rank}"


class Conv1DAdapter(LayerAdapter):
    """transformers.pytorch_utils.Conv1D, of GPT-2 and its kin."""

    name = "Conv1D of transformers"
    dense_types = ("transformers.pytorch_utils.Conv1D",)
    twin = FactoredConv1D
    inputs_meet = "rows"
