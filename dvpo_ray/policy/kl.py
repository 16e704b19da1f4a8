"""KL to the reference policy: per-token estimators."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def k1(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """log pi - log pi_ref: unbiased, can be negative.

    As a loss it is inert: on samples of the policy itself its expected gradient is zero.
    """
    return log_probs - reference_log_probs


def k2(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Half the squared log-ratio: biased as an estimate; its expected gradient on samples of the policy is exactly that of the KL."""
    return 0.5 * (log_probs - reference_log_probs).square()


def k3(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """r - 1 - log r with r = pi_ref / pi: unbiased, never negative, of low variance near the reference.

    Its expected gradient on samples of the policy is that of the forward KL(pi_ref || pi).
    """
    log_ratio = reference_log_probs - log_probs
    return log_ratio.expm1() - log_ratio


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def token_kl(log_probs: Tensor, reference_log_probs: Tensor, estimator: str) -> Tensor:
    """Estimate KL(pi || pi_ref) per token from tokens that pi sampled (Schulman 2020, "Approximating KL divergence").

    Args:
        log_probs: float [n], differentiable.
        reference_log_probs: float [n].
        estimator: `k1`, `k2` or `k3`.

    Returns:
        float [n] in nats.
    """
    return ESTIMATORS[estimator](log_probs, reference_log_probs)
