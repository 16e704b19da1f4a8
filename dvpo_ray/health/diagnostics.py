"""What a step's rollouts say of the model that judges them: the `health/` metrics of one batch.

The estimate of a response is what the policy is optimised towards: V after its last token, or a reward model's reward. The gold
score is what the user wants. They have different units, so they are compared after standardising each over the batch:

    z(x) = (x - mean) / standard deviation
    error of a response = z(estimate) - z(gold)

The values along a response share the estimate's unit. They are compared with it as they are: the values of the current policy
would be a martingale, so that V(t) is the mean of the estimates of all responses that go on from there.
"""

from __future__ import annotations

import numpy as np

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.policy.statistics import sequence_kl

KL_BINS = ("low", "mid", "high")
POSITION_BINS = ("early", "mid", "late")
CALIBRATION_BINS = 10


def health_statistics(batch: RaggedBatch) -> dict[str, float]:
    """The `health/` metrics of a batch: those that its fields allow.

    Args:
        batch: with `log_probs` and `reference_log_probs`; with `values` by token, `rewards` by row or both, as the algorithm has them;
            and with `gold` by row where there is a judge.
    """
    values = [batch.by_token["values"][batch.states(r)].astype(np.float64) for r in range(batch.num_rows)] if "values" in batch.by_token else None
    estimates = batch.by_row["rewards"] if "rewards" in batch.by_row else np.array([v[-1] for v in values])
    metrics = {"health/estimate_mean": float(estimates.mean()), "health/estimate_std": float(estimates.std())}
    if values is not None:
        metrics |= along_the_response(values, estimates)
    if "gold" in batch.by_row:
        metrics |= against_gold(estimates, batch.by_row["gold"].astype(np.float64), sequence_kl(batch), values)
    if "disagreement" in batch.by_token:
        metrics["health/disagreement"] = float(batch.by_token["disagreement"][batch.state_index].mean(dtype=np.float64))
    return metrics


def along_the_response(values: list[np.ndarray], estimates: np.ndarray) -> dict[str, float]:
    """How well the values before the end foresee the estimate at the end.

    Args:
        values: the T + 1 values of each row.
        estimates: float64 [R].

    Returns:
        The calibration error in each third of the responses, and the drift: the mean of estimate - V(0).
    """
    before = np.concatenate([v[:-1] for v in values])
    outcome = np.repeat(estimates, [len(v) - 1 for v in values])
    third = np.concatenate([3 * np.arange(len(v) - 1) // (len(v) - 1) for v in values if len(v) > 1])
    metrics = {
        f"health/calibration_error_{name}": calibration_error(before[third == i], outcome[third == i])
        for i, name in enumerate(POSITION_BINS)
        if (third == i).any()
    }
    return metrics | {"health/value_drift": float(np.mean(estimates - [v[0] for v in values]))}


def calibration_error(predictions: np.ndarray, outcomes: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error of a regression: predictions are cut into bins of equal counts, and the absolute difference of
    mean prediction and mean outcome is averaged over all predictions (Naeini et al. 2015, with quantile bins).

    Args:
        predictions, outcomes: float64 [n], n at least 1.
    """
    order = np.argsort(predictions, kind="stable")
    parts = [part for part in np.array_split(order, min(bins, len(order))) if len(part)]
    return float(sum(abs(np.sum(predictions[part] - outcomes[part])) for part in parts) / len(order))


def against_gold(estimates: np.ndarray, gold: np.ndarray, kl: np.ndarray, values: list[np.ndarray] | None) -> dict[str, float]:
    """Whether estimates order responses as the gold judge does, and whether they still do so far from the reference.

    Args:
        estimates, gold: float64 [R].
        kl: float64 [R], sequence KL from the reference.
        values: the T + 1 values of each row, where something estimates them.

    Returns:
        Nothing where all responses have one gold score: there is no order to compare with.
    """
    if not gold.std() > 0:
        return {}
    metrics = {"health/gold_correlation": correlation(estimates, gold)}
    if values is not None:
        metrics["health/gold_correlation_half"] = correlation(np.array([v[len(v) // 2] for v in values]), gold)
    error = standardised(estimates) - standardised(gold)
    by_kl = {name: error[rows] for name, rows in zip(KL_BINS, quantile_bins(kl, len(KL_BINS)), strict=True) if len(rows)}
    metrics |= {f"health/value_error_kl_{name}": float(np.sqrt(np.mean(errors**2))) for name, errors in by_kl.items()}
    return metrics | ({"health/value_bias_kl_high": float(by_kl["high"].mean())} if "high" in by_kl else {})


def standardised(x: np.ndarray) -> np.ndarray:
    """(x - mean) / standard deviation; 0 where nothing varies."""
    spread = x.std()
    return (x - x.mean()) / spread if spread > 0 else np.zeros_like(x)


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; 0 where one of the two does not vary and so says nothing of the other."""
    return float(np.mean(standardised(x) * standardised(y)))


def quantile_bins(x: np.ndarray, bins: int) -> list[np.ndarray]:
    """Indices in bins of equal counts, up to one, by ascending x."""
    return np.array_split(np.argsort(x, kind="stable"), bins)
