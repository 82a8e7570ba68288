"""Multi-head attention whose projections are factorized: the layer and its adapter."""

from collections.abc import Collection, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from oialr.layers.adapter import LayerAdapter
from oialr.layers.base import FactoredLayer, FactoredParts
from oialr.layers.linear import ordered
from oialr.layers.reading import MatrixReading
from oialr.options import Selection

INPUT_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""The weights that nn.MultiheadAttention holds itself; that of out_proj is a linear layer's."""


class FactoredProjection(FactoredLayer):
    """An input projection of attention, U core Vh or A B; its bias stays with the attention.

    The weight of the packed projection has one part each for query, key and value, one above the
    other. As one matrix (3 E, E) they share core and Vh, or B, and so the products of an input
    that they share; as a stack, U (3, E, r) and so on, each has its own.
    """

    def forward(
        self, inputs: Sequence[Tensor], biases: Sequence[Tensor] | Sequence[None]
    ) -> list[Tensor]:
        """Map each input (..., n) by the part of the weight that belongs to it.

        Args:
            inputs: one for each part.
            biases: (m,) of each part, or None.

        Returns:
            One (..., m) for each part.
        """
        outputs: dict[int, Tensor] = {}
        for places in self._places(inputs):
            x, factors = inputs[places[0]], self._factors(places, len(inputs))
            way = self.way(x.numel() // max(1, x.shape[-1]), len(factors[0]))
            inner, left = ordered(x, factors, way)
            for i, part in zip(places, left.chunk(len(places)), strict=True):
                outputs[i] = functional.linear(inner, part, biases[i])
        return [outputs[i] for i in range(len(inputs))]

    def _places(self, inputs: Sequence[Tensor]) -> list[list[int]]:
        """Numbers of the parts of the weight that share the products of an input."""
        if self.groups > 1:
            return [[i] for i in range(len(inputs))]
        places: dict[int, list[int]] = {}
        for i, x in enumerate(inputs):
            places.setdefault(id(x), []).append(i)
        return list(places.values())

    def _factors(self, places: Sequence[int], count: int) -> tuple[Tensor, ...]:
        """Return the factors of some parts of the weight, of so many in all."""
        if self.groups > 1:
            (i,) = places
            return tuple(factor[i] for factor in self.factors)
        if len(places) == count:
            return self.factors
        left, *others = self.factors
        rows = left.chunk(count)
        return torch.cat([rows[i] for i in places]), *others


class FactoredAttention(FactoredParts, nn.MultiheadAttention):
    """nn.MultiheadAttention whose input projections may be held as factors.

    It has the parameters of its dense twin, the same objects, but for the factorized weights: the
    factors of in_proj_weight are the child in_proj, those of q_proj_weight the child q_proj, and so
    on. out_proj is called as the module it is.

    The fused kernel with which nn.TransformerEncoderLayer skips this forward, in evaluation without
    gradients, reads the dense weights: there they are formed anew.
    """

    @classmethod
    def from_dense(cls, dense: nn.MultiheadAttention) -> Self:
        """Make a twin that shares all parameters and modules; no projection is factorized yet."""
        twin = cls.__new__(cls)
        twin.__dict__.update(_shared(dense))
        return twin

    def to_dense(self) -> nn.MultiheadAttention:
        """Make the nn.MultiheadAttention with the same function; out_proj stays what it is."""
        dense = nn.MultiheadAttention.__new__(nn.MultiheadAttention)
        dense.__dict__.update(_shared(self))
        for key in INPUT_PROJECTIONS:
            if projection := self.part(key):
                dense._parameters[key] = nn.Parameter(projection.form_weight().detach())
                del dense._modules[_child(key)]
        return dense

    def densify(self, key: str) -> nn.Parameter:
        """Hold a factorized input projection as the dense weight again, and return that."""
        projection = self.part(key)
        assert projection is not None
        weight = nn.Parameter(projection.form_weight().detach())
        del self._modules[_child(key)]
        self._parameters[key] = weight
        return weight

    def factorize(self, key: str, *factors: Tensor) -> FactoredProjection:
        """Hold an input projection as factors from now on.

        Args:
            key: one of INPUT_PROJECTIONS.
            factors: U (m, r), core (r, r), Vh (r, n); or A (m, r), B (r, n). All with a leading 3
                for a stack.
        """
        weight = self._parameters[key]
        assert weight is not None
        projection = FactoredProjection(*factors, reading=_reading(weight, factors[0].dim() == 3))
        self._parameters[key] = None  # not deleted: keeps its place in the order of parameters
        self._modules[_child(key)] = projection.train(self.training)
        return projection

    def part(self, key: str) -> FactoredProjection | None:
        """Return the factorized input projection of a dense parameter; None if it is dense."""
        projection = self._modules.get(_child(key))
        assert projection is None or isinstance(projection, FactoredProjection)
        return projection

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        if name in INPUT_PROJECTIONS and (projection := self.part(name)):
            return projection.weight
        return super().__getattr__(name)

    def forward(  # noqa: PLR0917 - the arguments of nn.MultiheadAttention
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute what nn.MultiheadAttention computes.

        Args:
            query: (L, N, E), (N, L, E) with batch_first, or unbatched (L, E). key, value: likewise,
                of length S and widths kdim and vdim. Nested tensors only in self-attention without
                gradients, as of nn.MultiheadAttention.
            key_padding_mask: (N, S) or (S,), True or -inf where a key is ignored.
            need_weights: return the attention weights too.
            attn_mask: (L, S) or (N heads, L, S), True or -inf where a query ignores a key.
            average_attn_weights: over the heads.
            is_causal: hint that attn_mask is the causal mask.

        Returns:
            The output, shaped like the query; the weights (N, L, S) or (N, heads, L, S), without N
            where the input is unbatched, or None.

        Raises:
            ValueError: is_causal without attn_mask, or a mask of the wrong shape.
        """
        if query.is_nested:  # known to torch's fused kernel alone, which takes dense weights
            out, weights = self.to_dense()(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights
            )
            return out, weights
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask, which is missing")
        batched = query.dim() == 3
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = (x[None] for x in (q, k, v))
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        if is_causal and key_padding_mask is None and not need_weights:
            mask = None  # the kernel has a causal mask of its own
        else:
            is_causal = False
            shape = (q.shape[0], self.num_heads, q.shape[1], k.shape[1])
            mask = _additive_mask(attn_mask, key_padding_mask, shape, query.dtype)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], dim=1)
        if self.add_zero_attn:
            k, v = functional.pad(k, (0, 0, 0, 1)), functional.pad(v, (0, 0, 0, 1))
        if mask is not None:  # no mask hides the keys that were added
            mask = functional.pad(mask, (0, k.shape[1] - mask.shape[-1]))
        q, k, v = (
            x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v)
        )
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            out, weights = _attend(q, k, v, mask, dropout)
            if average_attn_weights:
                weights = weights.mean(dim=1)
        else:
            out = functional.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        out = out.transpose(1, 2).flatten(2)
        if not batched:
            out, weights = out[0], weights[0] if weights is not None else None
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return self.out_proj(out), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Map query, key and value to width E, each by its projection."""
        inputs = (query, key, value)
        bias = self.in_proj_bias
        biases = (None, None, None) if bias is None else bias.chunk(3)
        if self._qkv_same_embed_dim:
            return self._apply_projection("in_proj_weight", inputs, biases)
        return [
            self._apply_projection(f"{letter}_proj_weight", (x,), (b,))[0]
            for letter, x, b in zip("qkv", inputs, biases, strict=True)
        ]

    def _apply_projection(
        self, key: str, inputs: Sequence[Tensor], biases: Sequence[Tensor] | Sequence[None]
    ) -> list[Tensor]:
        if projection := self.part(key):
            return projection(inputs, biases)
        weight = getattr(self, key)
        parts = zip(inputs, weight.chunk(len(inputs)), biases, strict=True)
        return [functional.linear(x, part, bias) for x, part, bias in parts]


class AttentionAdapter(LayerAdapter):
    """nn.MultiheadAttention itself, no subclass of it: it uses its weights in many ways.

    The input projections are its own; that of the output is a linear layer, whose weight it reads
    without calling it. So both are replaced together.
    """

    name = "nn.MultiheadAttention"
    dense_types = (nn.MultiheadAttention, FactoredAttention)
    accepts_subclasses = False
    weights = INPUT_PROJECTIONS
    children = ("out_proj",)

    def maps_linearly(self, key: str) -> bool:
        """bias_k and bias_v are a token each."""
        return key not in {"bias_k", "bias_v"}

    def reading(
        self, layer: nn.Module, key: str, options: Selection | None = None
    ) -> MatrixReading:
        """The packed projection is a stack of three, if it is asked for."""
        is_separate = options is not None and options.attention_projection == "separate"
        weight = layer.get_parameter(key)
        return _reading(weight, is_stack=is_separate and key == "in_proj_weight")

    def factorize(
        self, layer: nn.Module, key: str, factors: Sequence[Tensor]
    ) -> tuple[nn.Module, FactoredLayer]:
        """Hold one of the input projections as factors; they tell whether it is a stack."""
        attention = self.opened(layer)
        return attention, attention.factorize(key, *factors)

    def opened(self, layer: nn.Module) -> FactoredAttention:
        """Make the attention that calls its out_proj, unless it is one already."""
        if isinstance(layer, FactoredAttention):
            return layer
        assert isinstance(layer, nn.MultiheadAttention)
        return FactoredAttention.from_dense(layer)

    def key_of_child(self, child: str, beside: Collection[str]) -> str | None:
        """in_proj says enough; a q_proj may be anyone's layer, but beside an in_proj_bias."""
        key = f"{child}_weight"
        is_known = key in INPUT_PROJECTIONS and (child == "in_proj" or "in_proj_bias" in beside)
        return key if is_known else None


def _reading(weight: Tensor, is_stack: bool) -> MatrixReading:
    return MatrixReading(tuple(weight.shape), groups=3 if is_stack else 1)


def _child(key: str) -> str:
    """Name of the child module that holds the factors of a parameter."""
    return key.removesuffix("_weight")


def _shared(module: nn.Module) -> dict[str, object]:
    """All that a module is, for a twin: the same objects, in dictionaries of its own."""
    own = {"_parameters": module._parameters.copy(), "_modules": module._modules.copy()}
    return {**module.__dict__, **own}


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention by its formula, which gives the weights too.

    Args:
        q: (N, heads, L, width). k, v: (N, heads, S, width).
        mask: added to the scores, (N or 1, heads or 1, L or 1, S).
        dropout: probability with which a weight is dropped.

    Returns:
        Output (N, heads, L, width) and weights (N, heads, L, S), after the dropout.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    # Under autocast scores are of lower precision than the mask.
    weights = (scores if mask is None else scores + mask.to(scores.dtype)).softmax(-1)
    if dropout:
        weights = functional.dropout(weights, dropout)
    return weights @ v, weights


def _additive_mask(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
) -> Tensor | None:
    """Add both masks to one of the shape (N or 1, heads or 1, L or 1, S); None if there is none.

    Args:
        attn_mask: (L, S) or (N heads, L, S). key_padding_mask: (N, S), or (S,) where N is 1.
            Boolean, True for -inf, or of a floating dtype.
        shape: (N, heads, L, S).
        dtype: of the result.

    Raises:
        ValueError: a mask has another shape.
    """
    N, heads, L, S = shape
    masks = []
    if attn_mask is not None:
        if tuple(attn_mask.shape) not in {(L, S), (N * heads, L, S)}:
            raise ValueError(
                f"attn_mask has the shape {tuple(attn_mask.shape)}; "
                f"needed is {(L, S)} or {(N * heads, L, S)}"
            )
        masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.reshape(N, heads, L, S))
    if key_padding_mask is not None:
        if key_padding_mask.shape[-1] != S or key_padding_mask.numel() != N * S:
            raise ValueError(
                f"key_padding_mask has the shape {tuple(key_padding_mask.shape)}; "
                f"needed is {(N, S)}"
            )
        masks.append(key_padding_mask.reshape(N, 1, 1, S))
    floating = [
        torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
        if mask.dtype == torch.bool
        else mask.to(dtype)
        for mask in masks
    ]
    return sum(floating[1:], floating[0]) if floating else None
