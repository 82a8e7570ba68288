"""How much each parameter matters for the loss, over the evaluations of a search."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_EVALUATIONS = 10
"""Fewer say nothing."""
_FOLDS = 5
_TREES = 100
_REPEATS = 10


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Importance of every parameter."""

    mean: np.ndarray
    """(n,) float64: what the model's R^2 loses if the parameter's values are shuffled."""
    deviation: np.ndarray
    """(n,) float64: over folds and shuffles."""
    score: float
    """R^2 of the model on evaluations it was not fitted to: near 0 the rest means nothing."""


def importance(positions: np.ndarray, losses: Sequence[float]) -> Importance | None:
    """Measure the permutation importance (Breiman, Machine Learning 45, 2001, section 10).

    A random forest is fitted to the ranks of the losses, so that the large loss of a failed
    evaluation is worth no more than being last. It is judged on held-out folds. The same input
    gives the same result.

    Args:
        positions: (evaluations, n) in the unit cube.
        losses: one per evaluation, finite.

    Returns:
        None with fewer than LEAST_EVALUATIONS evaluations.
    """
    if len(positions) < LEAST_EVALUATIONS:
        return None
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance
    from sklearn.model_selection import KFold

    ranks = np.argsort(np.argsort(losses, kind="stable"), kind="stable") / len(losses)
    drops, scores = [], []
    for fitted, held in KFold(_FOLDS, shuffle=True, random_state=0).split(positions):
        forest = RandomForestRegressor(_TREES, min_samples_leaf=2, random_state=0)
        forest.fit(positions[fitted], ranks[fitted])
        scores.append(forest.score(positions[held], ranks[held]))
        found = permutation_importance(
            forest, positions[held], ranks[held], n_repeats=_REPEATS, random_state=0
        )
        drops.append(found.importances)
    shuffled = np.concatenate(drops, axis=1)
    return Importance(
        mean=shuffled.mean(axis=1), deviation=shuffled.std(axis=1), score=float(np.mean(scores))
    )
