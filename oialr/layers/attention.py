"""Multi-head attention whose projections are factorized: the layer and its adapter."""

from collections.abc import Collection, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from oialr.layers.adapter import LayerAdapter
from oialr.layers.base import COMPILED, FactoredLayer, FactoredParts, hooks_of
from oialr.layers.linear import FactoredLinear, ordered, plain_linear
from oialr.layers.open_attention import OpenAttention
from oialr.layers.plain_attention import PlainAttention
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
            return tuple(factor[i] for factor in self.operands)
        if len(places) == count:
            return self.operands
        left, *others = self.operands
        rows = left.chunk(count)
        return torch.cat([rows[i] for i in places]), *others


class FactoredAttention(FactoredParts, OpenAttention):
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
                dense._parameters[key] = projection.dense_weight()
                del dense._modules[_child(key)]
        return dense

    def plain(self, rows: int | None) -> nn.Module:
        """Make a plain module with the same function, in which no projection is factorized.

        It is the dense attention where no projection is faster as two layers.

        Args:
            rows: of the input (batch times tokens); None: the dense attention is wanted.
        """
        parts = [part for key in INPUT_PROJECTIONS if (part := self.part(key))]
        out: nn.Module = self.out_proj
        factored = [*parts, out] if isinstance(out, FactoredLinear) else parts
        if not any(part.pair_pays(rows) for part in factored):
            dense = self.to_dense()
            if isinstance(out, FactoredLinear):
                dense._modules["out_proj"] = out.to_dense()
                dense._modules["out_proj"].__dict__.update(hooks_of(out))
            return dense
        shared, own = self._plain_projections(rows)
        out = out.plain(rows) if isinstance(out, FactoredLinear) else out
        if isinstance(out, nn.Linear):  # of the type that is passed over
            out = plain_linear(out.weight, out.bias)
        out.__dict__.update(hooks_of(self.out_proj))
        attention = PlainAttention.of(self, shared=shared, own=own, out_proj=out)
        return attention.train(self.training)

    def _plain_projections(self, rows: int | None) -> tuple[nn.Module | None, list[nn.Module]]:
        """Make plain layers of the input projections: what they share, and three of their own."""
        bias = self.in_proj_bias
        biases = [None] * 3 if bias is None else [b.clone() for b in bias.chunk(3)]
        packed = self.part("in_proj_weight")
        if packed and packed.groups == 1 and packed.pair_pays(rows):
            A, B = packed.pair()
            own = zip(A.chunk(3), biases, strict=True)
            return plain_linear(B), [plain_linear(left.clone(), b) for left, b in own]
        if packed and packed.pair_pays(rows):
            stack = zip(*packed.pair(), biases, strict=True)
            return None, [_plain_pair(A.clone(), B.clone(), b) for A, B, b in stack]
        if self._qkv_same_embed_dim:
            weights = zip(self.in_proj_weight.detach().chunk(3), biases, strict=True)
            return None, [plain_linear(weight.clone(), b) for weight, b in weights]
        layers: list[nn.Module] = []
        for letter, b in zip("qkv", biases, strict=True):
            key = f"{letter}_proj_weight"
            part = self.part(key)
            pair = part.pair() if part and part.pair_pays(rows) else None
            layers.append(_plain_pair(*pair, b) if pair else plain_linear(getattr(self, key), b))
        return None, layers

    def densify(self, key: str) -> nn.Parameter:
        """Hold a factorized input projection as the dense weight again, and return that."""
        projection = self.part(key)
        assert projection is not None
        weight = projection.dense_weight()
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
        # One order, in whichever the weights come: processes that share the work have others.
        for child in map(_child, INPUT_PROJECTIONS):
            if child in self._modules:
                self._modules[child] = self._modules.pop(child)
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

    def for_nested(self) -> nn.MultiheadAttention:
        """Return the dense twin."""
        return self.to_dense()

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
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


def _plain_pair(A: Tensor, B: Tensor, bias: Tensor | None) -> nn.Sequential:
    return nn.Sequential(plain_linear(B), plain_linear(A, bias))


def _child(key: str) -> str:
    """Name of the child module that holds the factors of a parameter."""
    return key.removesuffix("_weight")


def _shared(module: nn.Module) -> dict[str, object]:
    """All that a module is, for a twin: the same objects, in dictionaries of its own."""
    own = {"_parameters": module._parameters.copy(), "_modules": module._modules.copy()}
    return {key: value for key, value in {**module.__dict__, **own}.items() if key != COMPILED}
