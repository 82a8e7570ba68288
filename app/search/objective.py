"""What a search minimizes. Pure functions of figures."""

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from app.config.search_section import SearchSection

HOPELESS = 1e5
"""Least loss of an evaluation that was given up: it never came to all prices and bounds."""
OUT_OF_BOUNDS = 1e6
"""Least loss of an evaluation that exceeds search.trainable_bound."""
FAILED = 1e9
"""Loss of an evaluation without a result. Finite: Propulate takes NaN for the best."""
LEAST_FINISHED = 5
"""Evaluations whose median is worth a comparison."""
KEYS = ("trainable_price", "step_price", "trainable_bound")
"""Of the section search: what losses depend on."""


def error(figures: Mapping[str, float]) -> float:
    """Return what is wrong with a network: 1 - accuracy, else the mean squared error, else loss.

    Args:
        figures: of an evaluation on the validation part.
    """
    if "accuracy" in figures:
        return 1.0 - figures["accuracy"]
    return figures["mse"] if "mse" in figures else figures["loss"]


def priced_error(section: SearchSection, *, error: float, trainable_percent: float) -> float:
    """Return the error with the price of trainable parameters: what epochs are compared by."""
    return error + section.trainable_price * trainable_percent / 100


def loss(
    section: SearchSection, *, error: float, trainable_percent: float, step_seconds: float
) -> float:
    """Return the loss of a whole training.

    What exceeds the bound on trainable parameters loses against everything that does not, and the
    more it exceeds it, the more: the search is led into the bound.

    Args:
        section: prices and bound.
        error: see :func:`error`.
        trainable_percent: trained parameters of the tested weights, in percent of the full-rank
            network's.
        step_seconds: mean wall time of a step.
    """
    if not math.isfinite(error):
        return FAILED
    if section.trainable_bound is not None and trainable_percent > section.trainable_bound:
        return OUT_OF_BOUNDS + trainable_percent - section.trainable_bound
    priced = priced_error(section, error=error, trainable_percent=trainable_percent)
    return priced + section.step_price * step_seconds


def loss_of_hopeless(value: float) -> float:
    """Return the loss of a training that was given up for its priced error at some epoch.

    It loses against all that came to an end within bounds, the more the larger the error.
    """
    return min(HOPELESS + value, OUT_OF_BOUNDS)


def medians(curves: Sequence[Sequence[float]]) -> list[float]:
    """Return the median per epoch over the curves of trainings that finished within bounds.

    Args:
        curves: one value per epoch each; their lengths may differ.

    Returns:
        A list as long as the longest; infinity where fewer than LEAST_FINISHED curves go on.
    """
    longest = max((len(curve) for curve in curves), default=0)
    columns = [[curve[i] for curve in curves if len(curve) > i] for i in range(longest)]
    return [
        statistics.median(column) if len(column) >= LEAST_FINISHED else math.inf
        for column in columns
    ]


def pareto_front(points: np.ndarray) -> np.ndarray:
    """Return the indices (k,) int64, by the first coordinate, of points that no other dominates.

    A point dominates another if it is nowhere larger and somewhere smaller; of equal points the
    first is kept.

    Args:
        points: (n, 2); both coordinates are to be small.
    """
    order = np.lexsort((points[:, 1], points[:, 0]))
    front, lowest = [], math.inf
    for i in order:
        if points[i, 1] < lowest:
            front.append(i)
            lowest = points[i, 1]
    return np.array(front, dtype=np.int64)
