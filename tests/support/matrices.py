"""Matrices of every kind of spectrum."""

import math

import torch


def random_matrix(m, n, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(m, n):
    return random_matrix(m, n).float()


def power_law(m, n):
    """Singular values i^(-a) down to 1e-4."""
    k = min(m, n)
    U, V = torch.linalg.qr(random_matrix(m, k)).Q, torch.linalg.qr(random_matrix(n, k, 1)).Q
    s = torch.arange(1, k + 1, dtype=torch.float64) ** (-4 / math.log10(max(k, 2)))
    return ((U * s) @ V.T).float()


def rank_deficient(m, n):
    """Rank of half of the columns; what is left is rounding noise."""
    r = math.ceil(min(m, n) / 2)
    return (random_matrix(m, r) @ random_matrix(r, n, 1)).float()
