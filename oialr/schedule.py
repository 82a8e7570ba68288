"""When something happens to which layer, and how far a rank is cut. Pure functions on numbers."""

import math
from typing import Literal

from torch import Tensor

from oialr.options import Options, RankRule


def event_at(step: int, *, delay: int, update_interval: int) -> int | None:
    """Tell what happens after an optimizer step (arXiv 2401.08505, algorithm 1).

    Args:
        step: optimizer steps taken so far, from 1.
        delay: d, steps of full-rank training.
        update_interval: nu, steps between updates.

    Returns:
        0 for the conversion, i for the i-th update after it, None for nothing.
    """
    if step < delay or (step - delay) % update_interval:
        return None
    return (step - delay) // update_interval


def events_due(
    steps: range, *, delay: int, update_interval: int, release: int | None
) -> list[int | Literal["release"]]:
    """List what is to happen after some optimizer steps, in order.

    Args:
        steps: counts of optimizer steps at which nobody has looked yet.
        delay, update_interval: as of :func:`event_at`.
        release: step after which the ranks are fixed, at least the delay; None: never. A conversion
            at the same step is part of the release.

    Returns:
        Numbers as of :func:`event_at`, and "release".
    """
    due: list[int | Literal["release"]] = []
    for step in steps:
        if step == release:
            due.append("release")
        elif release is None or step < release:
            number = event_at(step, delay=delay, update_interval=update_interval)
            due += [] if number is None else [number]
    return due


def intervals_due(
    steps: range, *, start: int, update_interval: int, release: int | None
) -> list[int | Literal["release"]]:
    """List the steps at which layers may be converted by stability, or updated, in order.

    Args:
        steps: counts of optimizer steps at which nobody has looked yet.
        start: steps before which nothing happens.
        update_interval: of which they are multiples.
        release: step after which the ranks are fixed; None: never.

    Returns:
        Steps, and "release".
    """
    due: list[int | Literal["release"]] = []
    for step in steps:
        if step == release:
            due.append("release")
        elif (release is None or step < release) and step >= start and not step % update_interval:
            due.append(step)
    return due


def stability_in_vain(options: Options) -> str | None:
    """Say that all layers are converted before one could be found stable, if it is so.

    Events are at multiples of ``update_interval``, so that windows begin and end there.
    """
    if options.delay != "stability":
        return None
    interval = options.update_interval
    starts, lasts = max(1, options.stability_start), options.stability_window or interval
    ends = interval * (-(-starts // interval) - (-lasts // interval))
    if ends < options.end_of_waiting:
        return None
    return (
        f"delay: stability finds no layer stable: the first window ends after step {ends} "
        f"(stability_start and stability_window, in whole steps of update_interval, {interval}), "
        f"and all layers are converted after step {options.end_of_waiting} (latest_delay or "
        f"release)"
    )


def layers_in_turn(update: int, layer_count: int, *, layer_fraction: float) -> int:
    """Count the layers, from the last, that the update covers.

    The first update covers the last alpha L layers, the second the last 2 alpha L, and so on until
    all take part; at least one, also where alpha L < 1.

    Args:
        update: number of the update, from 1.
        layer_count: L.
        layer_fraction: alpha.
    """
    share = math.floor(update * layer_fraction * layer_count + 1e-9)  # 0.29 * 100 is 28.999...
    return min(layer_count, max(1, share))


def minimum_rank(full_rank: int, fraction: float) -> int:
    """Smallest rank a layer may be cut to: max(1, ceil(fraction * k)), with k = min(m, n)."""
    return max(1, math.ceil(fraction * full_rank - 1e-9))


def kept_rank(
    s: Tensor,
    rule: RankRule,
    *,
    full_rank: int,
    alignment: int = 1,
    wanted: int | None = None,
) -> int:
    """Rank that is left after one update.

    Kept are the singular values of at least cutoff * s[0], or the fewest that hold the retained
    energy, or as many as are wanted;
    never fewer than (1 - largest_cut) of the present rank, never so few that more energy is lost
    than allowed, and never fewer than :func:`minimum_rank`. Each matrix of a stack is judged by
    itself, and the one that keeps most decides for all.

    Args:
        s: singular values (r,), descending, or (g, r) of a stack.
        rule: the options that decide.
        full_rank: k = min(m, n) of the layer.
        alignment: see :func:`rounded_up`; never beyond the present rank.
        wanted: keep so many values, as a target size asks for, and look at neither cutoff nor
            retained energy; None: by these.
    """
    # The host waits once, and not at every question; and it adds up in an order that is fixed.
    s = s.cpu()
    rank = s.shape[-1]
    if wanted is not None:
        kept = wanted
    elif rule.retained_energy is None:
        counts = (s >= rule.cutoff * s[..., :1]).sum(-1)
        told = s[..., 0] > 0  # a zero matrix tells nothing, and where another one does, no more
        kept = int((counts * told if told.any() else counts).max())
    else:
        kept = energy_rank(s, largest_loss=1 - rule.retained_energy)
    guard = math.ceil((1 - rule.largest_cut) * rank - 1e-9)
    bound = energy_rank(s, largest_loss=rule.largest_energy_cut)
    kept = max(kept, guard, bound, minimum_rank(full_rank, rule.minimum_rank_fraction))
    rounded = rounded_up(
        kept, full_rank=full_rank, multiple=rule.rank_multiple, alignment=alignment
    )
    return min(rank, rounded)


def energy_rank(s: Tensor, *, largest_loss: float) -> int:
    """Smallest rank that loses no more than a share of the spectral energy, the sum of s^2.

    The energy is the squared Frobenius norm of the matrix, so the share is the squared relative
    error of the cut (Eckart and Young, 1936). Of a zero matrix nothing can be lost.

    Args:
        s: singular values (r,), descending, or (g, r) of a stack, of which none loses more.
        largest_loss: the share, in [0, 1].
    """
    lost = s.double().square().flip(-1).cumsum(-1).flip(-1)  # by keeping 0, 1, 2, ... values
    return int((lost > largest_loss * lost[..., :1]).sum(-1).max())


def rounded_up(rank: int, *, full_rank: int, multiple: int, alignment: int = 1) -> int:
    """Round a rank up to a multiple, in layers of at least twelve multiples, and not beyond k.

    Products of matrices whose sides are no multiples of the hardware's vectors are slower: at
    k = 192 a layer of rank 77 takes longer than one of rank 96. Tensor cores want rows of 16 bytes
    above all: without, ResNet-50 of ranks 25 and 51 takes a step .2 longer than with 16 and 32
    (docs/gpu.md). So smaller layers are rounded to what the hardware asks for.

    Args:
        rank: to be rounded.
        full_rank: k = min(m, n) of the layer.
        multiple: 1 rounds nothing, whatever the alignment.
        alignment: of the hardware, for layers of at least four times as much; 1: none.
    """
    if full_rank < 12 * multiple:
        multiple = alignment if multiple > 1 and full_rank >= 4 * alignment else 1
    return min(full_rank, math.ceil(rank / multiple) * multiple)
