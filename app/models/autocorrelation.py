"""The two operations that Autoformer is built of: decomposition and auto-correlation of series.

Wu, Xu, Wang, Long, "Autoformer: Decomposition Transformers with Auto-Correlation for Long-Term
Series Forecasting", NeurIPS 2021 (arXiv 2106.13008), sections 3.1 and 3.2. Time is dimension 1
everywhere.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional


def decompose(series: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Split a series into its seasonal part and its trend, a moving average (equation 1).

    The ends are padded by repeating the first and the last value.

    Args:
        series: (b, length, channels).
        window: steps of the moving average, odd.

    Returns:
        Seasonal part and trend, (b, length, channels) each; their sum is the series.
    """
    margin = (window - 1) // 2
    padded = functional.pad(series.mT, (margin, margin), mode="replicate")
    trend = functional.avg_pool1d(padded, window, stride=1).mT
    return series - trend, trend


def circular_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return R[tau] = sum over t of a[(t + tau) mod L] b[t], by FFT (equation 8).

    Args:
        a: (batch, L, ...).
        b: (batch, L, ...), broadcast against ``a``.

    Returns:
        (batch, L, ...), real.
    """
    spectrum = _spectrum(a) * _spectrum(b).conj()
    return torch.fft.irfft(spectrum, n=a.shape[1], dim=1)


def mean_correlation(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the circular correlation of queries and keys, averaged over the channels.

    The average is taken before the inverse FFT, which is linear: one transform instead of d.

    Args:
        queries: (batch, L, heads, d).
        keys: (batch, L, heads, d).

    Returns:
        (batch, L, heads): at [:, tau] the similarity of queries and of keys tau steps earlier.
    """
    spectrum = _spectrum(queries) * _spectrum(keys).conj()
    return torch.fft.irfft(spectrum.mean(dim=-1), n=queries.shape[1], dim=1)


def delay_count(length: int, factor: float) -> int:
    """Number of delays that are kept, floor(factor log(length)), at least 1, at most ``length``."""
    return min(length, max(1, int(factor * math.log(length))))


def delay_weights(correlation: Tensor, count: int, *, shared_in_batch: bool) -> Tensor:
    """Keep the delays of largest correlation, weighted by softmax (equation 6).

    Args:
        correlation: (batch, L, heads).
        count: number of delays that are kept.
        shared_in_batch: one set of delays for the whole batch, those of the largest mean over it
            (the authors' form for training); otherwise each sample has its own (their form for
            inference). Weights are those of the sample in both.

    Returns:
        (batch, L, heads): weights that sum to 1 over dimension 1, zero but for ``count`` delays.
    """
    score = correlation.mean(dim=0, keepdim=True) if shared_in_batch else correlation
    delays = score.topk(count, dim=1).indices.expand(len(correlation), -1, -1)
    weights = correlation.gather(1, delays).softmax(dim=1)
    return torch.zeros_like(correlation).scatter(1, delays, weights)


def aggregate(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of the values rolled by every delay (equation 6).

    result[t] = sum over tau of weights[tau] values[(t + tau) mod L] is a circular correlation too,
    so that delays need not be known on the host and no rolled copy is made.

    Args:
        values: (batch, L, heads, d).
        weights: (batch, L, heads).

    Returns:
        (batch, L, heads, d).
    """
    return circular_correlation(values, weights[..., None])


def _spectrum(series: Tensor) -> Tensor:
    """FFT over time, in float32 at least: there is none of bfloat16."""
    return torch.fft.rfft(series.to(torch.promote_types(series.dtype, torch.float32)), dim=1)
