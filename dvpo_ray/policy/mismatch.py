"""How far the rollout engine's log-probs are from the learner's for the same tokens and weights."""

from __future__ import annotations

import numpy as np

from dvpo_ray.errors import ResourceError


def mismatch_metrics(learner_log_probs: np.ndarray, engine_log_probs: np.ndarray) -> dict[str, float]:
    """Compare log-probs of the response tokens of a batch, as the learner and the engine compute them.

    Args:
        learner_log_probs: float [n]; without tokens the two agree.
        engine_log_probs: float [n], those the tokens were sampled with.

    Returns:
        `mismatch/kl`: KL(engine || learner) in nats per token, Schulman's k3 estimator;
        `mismatch/log_prob_abs_max`, `mismatch/log_prob_abs_mean`: of |learner - engine|, in nats;
        `mismatch/token_mult_error`: mean of exp(|learner - engine|), 1 when they agree (NeMo-RL's `token_mult_prob_error`).

    Raises:
        ValueError: the two have different numbers of tokens.
    """
    if learner_log_probs.shape != engine_log_probs.shape:
        raise ValueError(f"cannot compare {learner_log_probs.shape} learner log-probs with {engine_log_probs.shape} engine log-probs")
    with np.errstate(over="ignore", invalid="ignore"):  # infinite and NaN results are a finding: `check_mismatch` stops on them
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
    """Stop a run whose engine samples from another distribution than the learner trains.

    Args:
        metrics: of `mismatch_metrics`.
        max_token_mult_error: threshold; None never stops.

    Raises:
        ResourceError: the token-level multiplicative error is above the threshold, or not a number.
    """
    error = metrics["mismatch/token_mult_error"]
    if max_token_mult_error is None or error <= max_token_mult_error:
        return
    raise ResourceError(
        f"the engine's and the learner's log-probs disagree: mismatch/token_mult_error {error:.4g} is above "
        f"mismatch.max_token_mult_error {max_token_mult_error:g} (largest difference {metrics['mismatch/log_prob_abs_max']:.4g} nats); "
        "check that both use one dtype, that rollout.top_p is 1 and that weights arrive (weight_sync.checksum=true), "
        "or set mismatch.max_token_mult_error higher or to null"
    )
