"""What a factorized layer's training step costs, and the cheapest exact way to take it.

All ways give the same function and the same gradients; they differ in the order of the products.
Counted are multiply-adds of forward and backward together for b rows of input (batch times tokens
or pixels), with U (m, r) and Vh (r, n) frozen:

- factored: ((x Vh^T) core^T) U^T. Forward b (n r + r^2 + r m), backward the same and b r^2 for the
  core's gradient: 2 b r (m + n) + 3 b r^2.
- folded: the core is multiplied into the factor of the smaller side first, (m, r) or (r, n), and
  two products are left. The folded factor takes a gradient, which is projected onto the core:
  2 b r (m + n) + b r k + 2 k r^2, with k = min(m, n).
- dense: W is rebuilt, and its gradient is projected onto the core: 3 b m n + 2 m n r + 2 m r^2.

A full-rank layer takes 3 b m n. After a release both factors of W = A B are trained, as two layers,
which takes 3 b r (m + n).
"""

from collections.abc import Callable
from typing import Literal

Way = Literal["factored", "folded", "dense"]
OTHER_WAYS: tuple[Way, ...] = ("folded", "dense")

SMALL_PRODUCT = 40
"""Columns of width that one more product of (b, r) matrices costs beyond its multiply-adds.

Such a product reads and writes much for what it computes. Measured on one core of an AMD EPYC (Zen
4) in float32, at 192 <= k <= 1024: with it the model's choice is the fastest way, or within 5 % of
it. Folding into Vh also keeps the input (b, n) for backward and not the product (b, r), so of two
ways that take the same time the factored one is better.
"""

MARGIN = 0.9
"""Share of a full-rank layer's multiply-adds up to which a factorized one is the faster of both.

Several narrow products run at a lower rate than one wide one: measured as above.
"""

CONVOLUTIONS_MARGIN = 0.8
"""The same for two trained factors of a kernel in two or three dimensions, read by the rule."""
DIRECTIONS_MARGIN = 0.7
"""And of one that is read by its directions.

Both by benchmarks/layer_pairs.py on one core of an AMD EPYC (Zen 5) in float32, with 16 to 128
channels: up to these shares two convolutions are at most some hundredths slower than one, but for
those of 16 channels. Linear layers and convolutions in one dimension have :data:`MARGIN`.
"""

MANY_ROWS = 2**30

CALL = 150_000
"""Multiply-adds in whose time a plain layer is called; 3 us, measured as above, as are the next."""
WEIGHT_READ = 4
"""Rows in whose time a weight is read from memory."""
WIDTH = 16
"""Multiple up to which the width of a product is rounded, in its time."""


def multiply_adds(way: Way, *, rows: int, m: int, n: int, r: int) -> float:
    """Multiply-adds of one training step through a factorized weight.

    Args:
        way: how the products are ordered.
        rows: b, rows of the layer's input.
        m, n: shape of the weight read as a matrix.
        r: its rank.
    """
    k = min(m, n)
    match way:
        case "factored":
            return rows * (2 * r * (m + n) + 3 * r * r)
        case "folded":
            return rows * (2 * r * (m + n) + r * k) + 2 * k * r * r
        case "dense":
            return 3 * rows * m * n + 2 * m * n * r + 2 * m * r * r


def released_multiply_adds(*, rows: int, m: int, n: int, r: int) -> float:
    """Multiply-adds of one training step through two trained factors, A (m, r) and B (r, n)."""
    return 3 * rows * r * (m + n)


def training_cost(
    way: Way, *, rows: int, m: int, n: int, r: int, counted: Callable[..., float] = multiply_adds
) -> float:
    """What such a step costs: its multiply-adds, and :data:`SMALL_PRODUCT` if factored.

    Args:
        counted: counts the multiply-adds of a kind of layer, as :func:`multiply_adds` those of a
            linear one.
    """
    narrow = rows * SMALL_PRODUCT * r if way == "factored" else 0
    return counted(way, rows=rows, m=m, n=n, r=r) + narrow


def full_rank_cost(*, rows: int, m: int, n: int) -> float:
    """Multiply-adds of one training step through the full-rank weight."""
    return 3 * rows * m * n


def cheapest_way(rows: int, m: int, n: int, r: int) -> Way:
    """Return the way of the smallest :func:`training_cost`. It is a function of shapes alone."""
    return cheapest(multiply_adds, rows=rows, m=m, n=n, r=r)


def cheapest(counted: Callable[..., float], *, rows: int, m: int, n: int, r: int) -> Way:
    """Return that way for layers whose multiply-adds are counted otherwise."""
    found: Way = "factored"
    least = training_cost(found, rows=rows, m=m, n=n, r=r, counted=counted)
    for way in OTHER_WAYS:  # not min with a key, which torch.compile does not follow
        cost = training_cost(way, rows=rows, m=m, n=n, r=r, counted=counted)
        if cost < least:
            found, least = way, cost
    return found


def rank_pays(m: int, n: int, r: int) -> bool:
    """Tell whether a factorized layer of this rank is trained faster than the full-rank layer.

    Judged for many rows of input, where forming products of factors costs nothing, and with
    :data:`MARGIN`. It is a function of shapes alone.
    """
    ways: tuple[Way, ...] = ("factored", "folded")
    cost = min(training_cost(way, rows=MANY_ROWS, m=m, n=n, r=r) for way in ways)
    return cost <= MARGIN * full_rank_cost(rows=MANY_ROWS, m=m, n=n)


def pair_pays(m: int, n: int, r: int, *, rows: int = MANY_ROWS, groups: int = 1) -> bool:
    """Tell whether two plain layers are applied faster than the dense one, without a backward.

    Args:
        m, n: shape of the weight, or of each group's, read as a matrix.
        r: rank of its factors (m, r) and (r, n).
        rows: of the input (batch times tokens, or output positions).
        groups: number of matrices.
    """
    rows += WEIGHT_READ
    width = -(-r // WIDTH) * WIDTH
    pair = 2 * CALL + groups * rows * width * (m + n)
    return pair <= MARGIN * (CALL + groups * rows * m * n)
