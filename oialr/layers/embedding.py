"""The embedding: its factorized twin, its adapter and its costs, on request.

The weight is read as it is stored, W (tokens, width): a row of U belongs to a token, and the rows
that a batch asks for are looked up in U and multiplied by core and Vh. It saves storage and the
optimizer's state, not multiply-adds: a full-rank embedding multiplies nothing.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from oialr.layers.adapter import LayerAdapter
from oialr.layers.cost import Way, cheapest
from oialr.layers.reading import MatrixReading
from oialr.layers.twin import FactoredTwin


class FactoredEmbedding(FactoredTwin):
    """Rows of W = U core Vh (tokens, width): rows of U, times core Vh.

    After a release, W = A B, they are rows of A, times B.
    """

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None

    def forward(self, input: Tensor) -> Tensor:
        """Map token numbers (...) to (..., width)."""
        indices = input
        way = self.way(indices.numel())
        if way == "dense":
            weight = self.form_weight().to(self.trained.dtype)
            return functional.embedding(indices, weight, self.padding_idx)
        left, *others = self.operands
        rows = functional.embedding(indices, left)
        if way == "folded" and not self.released:
            core, Vh = others
            rows = rows @ (core @ Vh)
        else:
            for factor in others:
                rows = rows @ factor
        rows = rows.to(self.trained.dtype)  # as of nn.Embedding: autocast has no part in it
        if self.padding_idx is None:
            return rows
        # The padding gives no gradient, as of nn.Embedding.
        return torch.where((indices == self.padding_idx)[..., None], rows.detach(), rows)

    @staticmethod
    def cheapest_way(rows: int, m: int, n: int, r: int) -> Way:
        """Return the way of the fewest multiply-adds, as of :mod:`oialr.layers.cost`."""
        return cheapest(multiply_adds, rows=rows, m=m, n=n, r=r)

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, rank={self.rank}"


class EmbeddingAdapter(LayerAdapter):
    """nn.Embedding; one that is tied to a head is refused as any tied weight is."""

    name = "nn.Embedding"
    dense_types = (nn.Embedding,)
    twin = FactoredEmbedding
    is_linear_map = False
    option = "include_embeddings"

    def obstacle(self, layer: nn.Module, key: str) -> str | None:
        """Refuse what acts on rows of the weight, which a factorized one has not."""
        assert isinstance(layer, nn.Embedding)
        if layer.max_norm is not None:
            return "max_norm, which writes to the rows that are looked up"
        if layer.sparse:
            return "sparse, whose gradients are rows of the weight"
        if layer.scale_grad_by_freq:
            return "scale_grad_by_freq, which scales the gradients of rows"
        return None

    def full_rank_multiply_adds(self, *, rows: int, m: int, n: int) -> float:
        """Additions of the rows' gradients; nothing is multiplied."""
        return rows * n

    def multiply_adds(self, way: Way, *, rows: int, m: int, n: int, r: int) -> float:
        """Multiply-adds with U core Vh: see :func:`multiply_adds`."""
        return multiply_adds(way, rows=rows, m=m, n=n, r=r)

    def cheapest_way(self, *, rows: int, m: int, n: int, r: int) -> Way:
        """Return the way that the twin takes by itself."""
        return FactoredEmbedding.cheapest_way(rows, m, n, r)

    def released_multiply_adds(self, *, rows: int, m: int, n: int, r: int) -> float:
        """Rows of A times B, and the gradients of both."""
        return 3 * rows * r * n

    def released_margin(self, reading: MatrixReading) -> float:
        """Let every rank be: there is no time to be saved, and what is stored counts."""
        return math.inf

    def rank_pays(self, m: int, n: int, r: int) -> bool:
        """Tell that no rank saves multiply-adds where there are none."""
        return False


def multiply_adds(way: Way, *, rows: int, m: int, n: int, r: int) -> float:
    """Multiply-adds of forward and backward for some rows that are looked up, U and Vh frozen.

    Args:
        way: how the products are ordered: (U[i] core) Vh, U[i] (core Vh), or (U core Vh)[i].
        rows: token numbers in the batch.
        m, n: tokens and width.
        r: rank.
    """
    match way:
        case "factored":
            return rows * (2 * r * n + 2 * r * r)
        case "folded":
            return rows * 2 * r * n + 2 * n * r * r
        case "dense":
            return 2 * m * r * (n + r) + rows * n
