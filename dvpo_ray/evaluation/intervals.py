"""Bootstrap confidence intervals of means over held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_DRAWS_AT_ONCE = 1 << 22  # bounds the index matrix to 32 MiB, whatever the number of prompts


def mean_ci(values: Sequence[float] | np.ndarray, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """The mean of some values with its percentile-bootstrap confidence interval (Efron 1979).

    Args:
        values: one number per prompt, [n].
        confidence: coverage of the interval, between 0 and 1.
        resamples: bootstrap samples, each of n prompts drawn with replacement.
        seed: the same seed gives the same interval.

    Returns:
        (mean, low, high) in the unit of the values.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"expected one number per prompt, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"value {int(np.flatnonzero(~np.isfinite(values))[0])} is not finite")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    means = _resampled_means(values, resamples, np.random.default_rng(seed))
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return float(values.mean()), float(low), float(high)


def paired_bootstrap_ci(
    before: Sequence[float] | np.ndarray,
    after: Sequence[float] | np.ndarray,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """The mean gain `after - before` over the same prompts, with its bootstrap confidence interval.

    Prompts are resampled, each with both of its scores, so that the spread between prompts cancels.

    Args:
        before, after: scores of the same prompts in the same order, [n] each.

    Returns:
        (mean_gain, low, high) in the unit of the scores.

    Raises:
        ValueError: different lengths, no scores, or one that is not finite.
    """
    before, after = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if before.shape != after.shape:
        raise ValueError(f"{before.shape} scores before and {after.shape} after: the same prompts must be scored twice")
    return mean_ci(after - before, confidence=confidence, resamples=resamples, seed=seed)


def _resampled_means(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of bootstrap samples, float64 [resamples]."""
    n = len(values)
    rows = max(1, _DRAWS_AT_ONCE // n)
    means = np.empty(resamples)
    for start in range(0, resamples, rows):
        chunk = means[start : start + rows]
        chunk[:] = values[rng.integers(n, size=(len(chunk), n))].mean(axis=1)
    return means
