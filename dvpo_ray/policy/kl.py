"""KL to the reference policy: per-token estimators, and the adaptive coefficient."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dvpo_ray.config.arithmetic import MAX_KL_ERROR


def k1(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """log pi - log pi_ref: unbiased, can be negative.

    As a loss it does nothing: on samples of the policy its expected gradient is zero.
    """
    return log_probs - reference_log_probs


def k2(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Half the squared log-ratio: a biased estimate, but its expected gradient on samples of the policy is that of the KL."""
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


class AdaptiveKLController:
    """Moves the KL coefficient to keep the sequence KL near a target (Ziegler et al. 2019, arXiv 1909.08593).

    Each update multiplies the coefficient by 1 + error * samples / horizon, where error = clip(KL / target - 1, -0.2, 0.2).
    """

    def __init__(self, coefficient: float, target_nats: float | None, horizon: float) -> None:
        """
        Args:
            coefficient: the start value.
            target_nats: the target of the mean KL of a whole response; None keeps the coefficient constant.
            horizon: number of samples over which the coefficient reacts; above 0.2 * samples, else the coefficient could fall to 0.
        """
        self.coefficient = coefficient
        self.target_nats = target_nats
        self.horizon = horizon

    def update(self, sequence_kl_nats: float, samples: int) -> float:
        """Update the coefficient with the mean sequence KL of a batch of samples, and return it."""
        if self.target_nats is None:
            return self.coefficient
        error = min(max(sequence_kl_nats / self.target_nats - 1.0, -MAX_KL_ERROR), MAX_KL_ERROR)
        self.coefficient *= 1.0 + error * samples / self.horizon
        return self.coefficient

    def state_dict(self) -> dict[str, float]:
        """The state for a checkpoint; target and horizon come from the config."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coefficient = state["coefficient"]
