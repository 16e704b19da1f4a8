"""KL to the reference policy: per-token estimators and the adaptive coefficient."""

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


class AdaptiveKLController:
    """Moves the KL coefficient so that the sequence KL stays near a target (Ziegler et al. 2019, arXiv 1909.08593).

    Each update multiplies it by 1 + error * samples / horizon, where error = clip(KL / target - 1, -0.2, 0.2).
    """

    MAX_ERROR = 0.2

    def __init__(self, coefficient: float, target_nats: float | None, horizon: float) -> None:
        """
        Args:
            coefficient: where it starts.
            target_nats: the mean KL of a whole response to hold; None keeps the coefficient constant.
            horizon: samples over which it reacts.
        """
        self.coefficient = coefficient
        self.target_nats = target_nats
        self.horizon = horizon

    def update(self, sequence_kl_nats: float, samples: int) -> float:
        """Take in a batch's mean sequence KL and return the new coefficient.

        Raises:
            ValueError: so many samples against the horizon that the coefficient would reach 0 or below.
        """
        if self.target_nats is None:
            return self.coefficient
        if self.MAX_ERROR * samples >= self.horizon:
            raise ValueError(
                f"an adaptive KL horizon of {self.horizon:g} is too short for {samples} samples: it must be above {samples * self.MAX_ERROR:g}"
            )
        error = min(max(sequence_kl_nats / self.target_nats - 1.0, -self.MAX_ERROR), self.MAX_ERROR)
        self.coefficient *= 1.0 + error * samples / self.horizon
        return self.coefficient

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps; the target and the horizon are settings."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coefficient = state["coefficient"]
