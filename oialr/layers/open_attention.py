"""Multi-head attention by its formula: projections are called, and none of their weights read."""

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional


class OpenAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention but for its input projections, which a subclass applies as it likes.

    out_proj is called as the module it is.
    """

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
            out, weights = self.for_nested()(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights
            )
            return out, weights
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask, which is missing")
        batched = query.dim() == 3
        q, k, v = self.project(query, key, value)
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

    @abstractmethod
    def project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Map query, key and value to width E, each by its projection."""

    @abstractmethod
    def for_nested(self) -> nn.MultiheadAttention:
        """Return a module that attends nested tensors."""


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
        TypeError: a mask is of integers, which would be added to the scores.
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
    for mask in masks:
        if not (mask.dtype == torch.bool or mask.is_floating_point()):
            raise TypeError(f"a mask of attention is boolean or floating, and not {mask.dtype}")
    floating = [
        torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
        if mask.dtype == torch.bool
        else mask.to(dtype)
        for mask in masks
    ]
    return sum(floating[1:], floating[0]) if floating else None
