"""Multi-head attention whose projections are plain layers, for inference."""

from collections.abc import Sequence
from typing import NoReturn, Self

from torch import Tensor, nn

from oialr.layers.base import COMPILED
from oialr.layers.open_attention import OpenAttention


class PlainAttention(OpenAttention):
    """What an nn.MultiheadAttention computes, by children of torch's own types.

    Quantization and exporters find all four projections here, whereas the weights of
    nn.MultiheadAttention lie open in it, and that of its out_proj is read without a call.

    ``shared`` is what the input projections have in common (the factor B of a packed weight, or
    nothing), ``own`` are the three maps behind it, for query, key and value.
    """

    shared: nn.Module
    own: nn.ModuleList

    @classmethod
    def of(
        cls,
        attention: nn.MultiheadAttention,
        *,
        shared: nn.Module | None,
        own: Sequence[nn.Module],
        out_proj: nn.Module,
    ) -> Self:
        """Make the attention with the settings of another one.

        Args:
            attention: its settings, bias_k and bias_v are taken over.
            shared: maps (..., width) to (..., r); None: nothing.
            own: three that map (..., r), or the width of query, key and value, to (..., E).
            out_proj: maps (..., E) to (..., E).
        """
        plain = cls.__new__(cls)
        nn.Module.__init__(plain)
        plain.__dict__.update(
            {
                key: value
                for key, value in attention.__dict__.items()
                if key not in plain.__dict__ and key != COMPILED
            }
        )
        plain.training = attention.training
        # nn.TransformerEncoderLayer takes this for a reason to call the attention, and not its
        # fused kernel, which reads dense weights.
        plain._qkv_same_embed_dim = False
        for key, parameter in attention._parameters.items():
            plain.register_parameter(key, parameter if key in {"bias_k", "bias_v"} else None)
        plain.shared = nn.Identity() if shared is None else shared
        plain.own = nn.ModuleList(own)
        plain.out_proj = out_proj  # type: ignore[assignment]
        return plain

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Map query, key and value to width E; what they share of an input is computed once."""
        inner: dict[int, Tensor] = {}
        for x in (query, key, value):
            if id(x) not in inner:
                inner[id(x)] = self.shared(x)
        inputs = (query, key, value)
        return [layer(inner[id(x)]) for layer, x in zip(self.own, inputs, strict=True)]

    def for_nested(self) -> NoReturn:
        """Refuse: only torch's fused kernel knows nested tensors, and it takes dense weights.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "nested tensors need dense attention: exclude it from oialr.for_inference by its name"
        )
