"""How far estimates are from Monte-Carlo means, with the noise of the means taken out: pure functions of arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Affine:
    """value -> offset + slope * value."""

    offset: float
    slope: float

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return self.offset + self.slope * np.asarray(values, dtype=np.float64)


def fit_affine(values: np.ndarray, targets: np.ndarray) -> Affine:
    """Least squares of targets on values, both [n]: the unit of one in that of the other. A constant value gets slope 0."""
    values, targets = np.asarray(values, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    variance = values.var()
    slope = float(np.cov(values, targets, bias=True)[0, 1] / variance) if variance > 0 else 0.0
    return Affine(float(targets.mean() - slope * values.mean()), slope)


def error_metrics(estimates: np.ndarray, samples: np.ndarray) -> dict[str, float]:
    """Bias, root mean squared error and correlation of estimates against the means of samples.

    The mean of m samples has noise of its own, on average (variance of the samples) / m in squared error, which is subtracted; the
    correlation is lowered by it.

    Args:
        estimates: [n]; samples: [n, m] with m of at least 2.

    Returns:
        `bias`: mean of estimate minus target; `rmse`: 0 where the noise explains all of the error; `correlation`: NaN where one side is constant.
    """
    samples = np.asarray(samples, dtype=np.float64)
    means = samples.mean(axis=1)
    noise = (samples.var(axis=1, ddof=1) / samples.shape[1]).mean()
    error = np.asarray(estimates, dtype=np.float64) - means
    varies = np.std(estimates) > 0 and means.std() > 0
    return {
        "bias": float(error.mean()),
        "rmse": float(np.sqrt(max(0.0, np.mean(error**2) - noise))),
        "correlation": float(np.corrcoef(estimates, means)[0, 1]) if varies else float("nan"),
    }
