"""How much the log-probs of rollout engine and learner differ for the same tokens and weights."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from dvpo_ray.config.arithmetic import counted
from dvpo_ray.errors import ResourceError


def mismatch_shares(learner_log_probs: Tensor, engine_log_probs: Tensor, tokens: int) -> dict[str, Tensor]:
    """Compare the log-probs that learner and engine compute for some response tokens of a batch.

    Args:
        learner_log_probs: float [n], n may be 0.
        engine_log_probs: float [n], from sampling.
        tokens: response tokens of all parts of the batch that are compared.

    Returns:
        float64 scalars. `mismatch/log_prob_abs_max`, the largest |learner - engine| in nats. The shares of the others add up:
        `mismatch/kl`: KL(engine || learner) in nats per token, Schulman's k3 estimator;
        `mismatch/log_prob_abs_mean`: mean of |learner - engine|, in nats;
        `mismatch/token_mult_excess`: mean of exp(|learner - engine|) - 1, 0 if they agree.
    """
    log_ratio = learner_log_probs.double() - engine_log_probs.double()
    distance = log_ratio.abs()
    return {
        "mismatch/kl": (log_ratio.expm1() - log_ratio).sum() / tokens,
        "mismatch/log_prob_abs_max": distance.max() if len(distance) else distance.sum(),
        "mismatch/log_prob_abs_mean": distance.sum() / tokens,
        "mismatch/token_mult_excess": distance.expm1().sum() / tokens,
    }


def check_mismatch(metrics: dict[str, float], max_token_mult_error: float | None) -> None:
    """Stop the run if the engine samples from another distribution than the learner trains.

    Args:
        metrics: of the whole batch, with `mismatch/token_mult_error`: 1 if they agree, as `token_mult_prob_error` in NeMo-RL.
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


START_BOUNDS = {"float32": (1e-4, 0.01), "bfloat16": (0.01, 3.0), "float16": (0.005, 1.0)}
"""By dtype: the largest |mean difference| per token and the largest difference of one token, in nats, of two computations of one model.
docs/metrics.md has measured values."""


def check_same_weights(engine_log_probs: np.ndarray, reference_log_probs: np.ndarray, dtype: str) -> None:
    """Stop a run whose engine and reference disagree while both have the same weights: before the first update.

    The two are compared on the run's own first rollouts. The mean of the difference is the KL of the policy to the reference per token,
    which is 0 for equal weights; it may be out of its bound by three standard errors.

    Args:
        engine_log_probs, reference_log_probs: float [n], of the response tokens.
        dtype: of the computation, a key of `START_BOUNDS`.

    Raises:
        ResourceError: a difference is out of bounds; names both numbers.
    """
    difference = engine_log_probs.astype(np.float64) - reference_log_probs
    mean, largest = float(difference.mean()), float(np.abs(difference).max())
    mean_bound, largest_bound = START_BOUNDS[dtype]
    standard_error = float(difference.std()) / len(difference) ** 0.5
    if abs(mean) <= mean_bound + 3 * standard_error and largest <= largest_bound:
        return
    raise ResourceError(
        f"the engine and the reference have the same weights, but their log-probs differ on the first "
        f"{counted(len(difference), 'token')}: KL {mean:.3g} nats per token (at most {mean_bound:g} in "
        f"{dtype}), largest difference {largest:.3g} nats (at most {largest_bound:g}); the engine does not "
        "compute this model as transformers does: try rollout.backend=transformers, or another vLLM"
    )
