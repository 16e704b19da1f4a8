"""Whitening over a mask: zero mean and unit variance of the numbers that count, and of no others."""

from __future__ import annotations

import numpy as np

VARIANCE_EPSILON = 1e-8


def mean_and_variance(values: np.ndarray) -> tuple[float, float]:
    """Mean and unbiased variance of a flat array.

    The numbers are summed in sorted order, so that the result is the same to the last bit for every order of the rows.

    Args:
        values: float64 [n].

    Returns:
        (mean, variance); (0, 0) without numbers, and variance 0 of a single one.
    """
    if len(values) == 0:
        return 0.0, 0.0
    ordered = np.sort(values)
    mean = ordered.mean()
    variance = np.square(ordered - mean).sum() / max(len(values) - 1, 1)
    return float(mean), float(variance)


def masked_whiten(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Whiten the numbers under a mask: (x - mean) / sqrt(variance + 1e-8), with the unbiased variance as in TRL's `masked_whiten`.

    Args:
        values: float [N]; what is outside the mask is never read.
        mask: bool [N].

    Returns:
        float64 [N], 0 outside the mask.
    """
    kept = values[mask].astype(np.float64)
    mean, variance = mean_and_variance(kept)
    whitened = np.zeros(len(values), dtype=np.float64)
    whitened[mask] = (kept - mean) / np.sqrt(variance + VARIANCE_EPSILON)
    return whitened
