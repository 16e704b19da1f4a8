"""The adaptive KL coefficient."""

from __future__ import annotations

from dvpo_ray.config.arithmetic import MAX_KL_ERROR, shortest_horizon


class AdaptiveKLController:
    """Moves the KL coefficient so that the sequence KL stays near a target (Ziegler et al. 2019, arXiv 1909.08593).

    Each update multiplies it by 1 + error * samples / horizon, where error = clip(KL / target - 1, -0.2, 0.2).
    """

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
        if self.horizon <= shortest_horizon(samples):
            raise ValueError(
                f"an adaptive KL horizon of {self.horizon:g} is too short for {samples} samples: it must be above {shortest_horizon(samples):g}"
            )
        error = min(max(sequence_kl_nats / self.target_nats - 1.0, -MAX_KL_ERROR), MAX_KL_ERROR)
        self.coefficient *= 1.0 + error * samples / self.horizon
        return self.coefficient

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps; the target and the horizon are settings."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coefficient = state["coefficient"]
