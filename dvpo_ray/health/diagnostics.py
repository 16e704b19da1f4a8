"""What a step's rollouts say about the model that judges them: the `health/` metrics of one batch.

The estimate of a response is what the policy is optimised towards: V after its last token, or a reward model's reward. The
gold score is what the user wants. They have different units, so each is standardised over the batch before they are compared:

    z(x) = (x - mean) / standard deviation
    error of a response = z(estimate) - z(gold)

The values along a response have the estimate's unit and are compared with it directly. The values of the current policy would
be a martingale: V(t) would be the mean estimate of all responses that continue from there.
"""

from __future__ import annotations

import numpy as np

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.policy.statistics import sequence_kl

THIRDS = 3
CALIBRATION_BINS = 10


def health_statistics(batch: RaggedBatch) -> dict[str, float]:
    """The `health/` metrics that a batch has the fields for.

    Args:
        batch: with `log_probs` and `reference_log_probs`; with `values` by token, `rewards` by row or both, depending on the
            algorithm; and with `gold` by row if there is a judge.
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
    """How well the values before the end predict the estimate at the end.

    Args:
        values: the T + 1 values of each row.
        estimates: float64 [R].

    Returns:
        The calibration error in each third of the responses, and the drift: the mean of estimate - V(0).
    """
    before = np.concatenate([v[:-1] for v in values])
    outcome = np.repeat(estimates, [len(v) - 1 for v in values])
    third = np.concatenate([THIRDS * np.arange(len(v) - 1) // (len(v) - 1) for v in values if len(v) > 1])
    metrics = {
        f"health/calibration_error_{name}": calibration_error(before[third == i], outcome[third == i])
        for i, name in enumerate(("early", "mid", "late"))
        if (third == i).any()
    }
    return metrics | {"health/value_drift": float(np.mean(estimates - [v[0] for v in values]))}


def calibration_error(predictions: np.ndarray, outcomes: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error of a regression (Naeini et al. 2015, with quantile bins).

    The predictions are cut into bins of equal counts. The absolute difference of mean prediction and mean outcome in a bin is
    averaged over all predictions.

    Args:
        predictions, outcomes: float64 [n], n at least 1.
    """
    parts = quantile_bins(predictions, min(bins, len(predictions)))
    return float(sum(abs(np.sum(predictions[part] - outcomes[part])) for part in parts) / len(predictions))


def against_gold(estimates: np.ndarray, gold: np.ndarray, kl: np.ndarray, values: list[np.ndarray] | None) -> dict[str, float]:
    """Whether estimates rank responses as the gold judge does, and whether they still do so far from the reference.

    Args:
        estimates, gold: float64 [R].
        kl: float64 [R], sequence KL from the reference.
        values: the T + 1 values of each row, if the run has values.

    Returns:
        Empty if all responses have the same gold score, which ranks nothing.
    """
    if not gold.std() > 0:
        return {}
    metrics = {"health/gold_correlation": correlation(estimates, gold)}
    if values is not None:
        metrics["health/gold_correlation_half"] = correlation(np.array([v[len(v) // 2] for v in values]), gold)
    error = standardised(estimates) - standardised(gold)
    by_kl = {name: error[rows] for name, rows in zip(("low", "mid", "high"), quantile_bins(kl, THIRDS), strict=True) if len(rows)}
    metrics |= {f"health/value_error_kl_{name}": float(np.sqrt(np.mean(errors**2))) for name, errors in by_kl.items()}
    return metrics | ({"health/value_bias_kl_high": float(by_kl["high"].mean())} if "high" in by_kl else {})


def standardised(x: np.ndarray) -> np.ndarray:
    """(x - mean) / standard deviation; 0 if nothing varies."""
    spread = x.std()
    return (x - x.mean()) / spread if spread > 0 else np.zeros_like(x)


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; 0 if one of the two does not vary."""
    return float(np.mean(standardised(x) * standardised(y)))


def quantile_bins(x: np.ndarray, bins: int) -> list[np.ndarray]:
    """Indices by ascending x, in bins whose counts differ by at most 1."""
    return np.array_split(np.argsort(x, kind="stable"), bins)


def ensemble_std(values: list[np.ndarray]) -> np.ndarray:
    """Disagreement of at least two value models: the standard deviation (divided by n) of the value after each token.

    Args:
        values: float32 [N] of each model.

    Returns:
        float32 [N].
    """
    return np.std(np.stack(values).astype(np.float64), axis=0).astype(np.float32)


def confidence(batch: RaggedBatch, coefficient: float) -> np.ndarray:
    """The factor for each token's advantage, smaller where the value models disagree: 1 / (1 + c * s_t / S).

    s_t is the disagreement about the value after the token. S is the standard deviation of the values over all states of the
    batch's responses, so c has no unit. With c = 1 an advantage halves where the models differ as much as the values vary.

    Args:
        batch: with `values` and `disagreement`.
        coefficient: c; 0 leaves every advantage as it is.

    Returns:
        float64 [N], in (0, 1].
    """
    states = batch.by_token["values"][batch.state_index].astype(np.float64)
    spread = states.std()
    if coefficient == 0 or not spread > 0:
        return np.ones(batch.num_tokens)
    return 1.0 / (1.0 + coefficient * batch.by_token["disagreement"].astype(np.float64) / spread)
