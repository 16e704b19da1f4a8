"""How much the log-probs of rollout engine and learner differ for the same tokens and weights."""

from __future__ import annotations

import numpy as np

from dvpo_ray.errors import ResourceError


def mismatch_metrics(learner_log_probs: np.ndarray, engine_log_probs: np.ndarray) -> dict[str, float]:
    """Compare the log-probs that learner and engine compute for the response tokens of a batch.

    Args:
        learner_log_probs: float [n]; if n is 0, there is no mismatch.
        engine_log_probs: float [n], from sampling.

    Returns:
        `mismatch/kl`: KL(engine || learner) in nats per token, Schulman's k3 estimator;
        `mismatch/log_prob_abs_max`, `mismatch/log_prob_abs_mean`: of |learner - engine|, in nats;
        `mismatch/token_mult_error`: mean of exp(|learner - engine|), 1 if they agree (`token_mult_prob_error` in NeMo-RL).
    """
    with np.errstate(over="ignore", invalid="ignore"):  # `check_mismatch` stops the run on infinite and NaN results
        log_ratio = learner_log_probs.astype(np.float64) - engine_log_probs
        distance = np.abs(log_ratio)
        count = max(len(log_ratio), 1)
        return {
            "mismatch/kl": float((np.expm1(log_ratio) - log_ratio).sum() / count),
            "mismatch/log_prob_abs_max": float(distance.max(initial=0.0)),
            "mismatch/log_prob_abs_mean": float(distance.sum() / count),
            "mismatch/token_mult_error": 1.0 + float(np.expm1(distance).sum() / count),
        }


def check_mismatch(metrics: dict[str, float], max_token_mult_error: float | None) -> None:
    """Stop the run if the engine samples from another distribution than the learner trains.

    Args:
        metrics: from `mismatch_metrics`.
        max_token_mult_error: threshold; None turns the check off.

    Raises:
        ResourceError: `mismatch/token_mult_error` is above the threshold, or NaN.
    """
    error = metrics["mismatch/token_mult_error"]
    if max_token_mult_error is None or error <= max_token_mult_error:
        return
    raise ResourceError(
        f"the engine's and the learner's log-probs disagree: mismatch/token_mult_error {error:.4g} is above "
        f"mismatch.max_token_mult_error {max_token_mult_error:g} (largest difference {metrics['mismatch/log_prob_abs_max']:.4g} nats); "
        "check that both use the same dtype, that rollout.top_p is 1 and that the weights arrive (weight_sync.checksum=true), "
        "or set mismatch.max_token_mult_error higher or to null"
    )
