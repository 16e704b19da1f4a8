"""The policy loss and the mismatch of engine and learner: hand-computed numbers, gradients and sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpo_ray.errors import ResourceError
from dvpo_ray.policy.losses import clipped_surrogate, policy_loss, truncated_importance_weights
from dvpo_ray.policy.mismatch import check_mismatch, mismatch_shares

# One token for each case: ratio in range, above and below the range, with both signs of the advantage.
RATIOS = [1.0, 1.1, 1.5, 1.5, 0.5, 0.5]
ADVANTAGES = [2.0, -1.0, 1.0, -1.0, 1.0, -1.0]
LOSSES = [-2.0, 1.1, -1.2, 1.5, -0.5, 0.8]  # at epsilon 0.2
GRADIENTS = [-2.0, 1.1, 0.0, 1.5, -0.5, 0.0]  # of the loss with respect to the new log-prob: -ratio * A if not clipped


def tensors(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ("new_log_probs", "old_log_probs", "reference_log_probs", "advantages", "entropy")
    drawn = {name: torch.randn(count, generator=generator, dtype=torch.float64) * 0.5 for name in names}
    return {**drawn, "weights": torch.rand(count, generator=generator, dtype=torch.float64) + 0.5}


def combined(parts: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Shares of parts put together as the name of each metric says."""
    return {name: float((max if name.endswith("_max") else sum)(part[name] for part in parts)) for name in parts[0]}


def test_clipped_surrogate_in_every_case():
    old = torch.full((6,), -2.0, dtype=torch.float64)
    new = (old + torch.tensor(RATIOS, dtype=torch.float64).log()).requires_grad_()
    surrogate = clipped_surrogate(new, old, torch.tensor(ADVANTAGES, dtype=torch.float64), clip_epsilon=0.2)
    torch.testing.assert_close(surrogate.loss, torch.tensor(LOSSES, dtype=torch.float64))
    surrogate.loss.sum().backward()
    torch.testing.assert_close(new.grad, torch.tensor(GRADIENTS, dtype=torch.float64))
    assert surrogate.clipped.tolist() == [False, False, True, True, True, True]
    torch.testing.assert_close(surrogate.ratio, torch.tensor(RATIOS, dtype=torch.float64))
    torch.testing.assert_close(surrogate.approx_kl, torch.tensor([r - 1 - math.log(r) for r in RATIOS], dtype=torch.float64))
    assert not (surrogate.ratio.requires_grad or surrogate.approx_kl.requires_grad)


def test_importance_weights_scale_the_surrogate():
    t = tensors(6)
    args = (t["new_log_probs"], t["old_log_probs"], t["advantages"], 0.2)
    torch.testing.assert_close(clipped_surrogate(*args, weights=t["weights"]).loss, t["weights"] * clipped_surrogate(*args).loss)


def test_truncated_importance_weights():
    learner = torch.tensor([math.log(0.2), math.log(0.3), math.log(0.9), 0.0], requires_grad=True)
    engine = torch.tensor([math.log(0.4), math.log(0.3), math.log(0.3), -1000.0])
    weights = truncated_importance_weights(learner, engine, cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([0.5, 1.0, 2.0, 2.0]))
    assert not weights.requires_grad


def test_hand_computed_policy_loss():
    # surrogate -1.2 and 0.8 (cases 3 and 6); k1 = -1 and 2, weight 0.1; entropies 3 and 5, weight 0.01; 4 tokens in the minibatch
    old = torch.tensor([-2.0, -2.0], dtype=torch.float64)
    new = (old + torch.tensor([1.5, 0.5], dtype=torch.float64).log()).requires_grad_()
    loss, metrics = policy_loss(
        new,
        old,
        torch.tensor([1.0, -1.0], dtype=torch.float64),
        minibatch_tokens=4,
        clip_epsilon=0.2,
        reference_log_probs=new.detach() - torch.tensor([-1.0, 2.0], dtype=torch.float64),
        kl_coefficient=0.1,
        kl_estimator="k1",
        entropy=torch.tensor([3.0, 5.0], dtype=torch.float64, requires_grad=True),
        entropy_coefficient=0.01,
    )
    assert loss.item() == pytest.approx((-1.2 + 0.8 + 0.1 * (-1 + 2) - 0.01 * (3 + 5)) / 4, abs=1e-12)
    assert combined([metrics]) == pytest.approx(
        {
            "policy/loss": loss.item(),
            "policy/approx_kl": ((1.5 - 1 - math.log(1.5)) + (0.5 - 1 - math.log(0.5))) / 4,
            "policy/clip_fraction": 2 / 4,
            "policy/ratio_max": 1.5,
            "policy/entropy": 8 / 4,
        }
    )


def test_on_policy_gradient_is_the_policy_gradient():
    """At ratio 1 the surrogate's gradient is REINFORCE's: -A per token."""
    t = tensors(9)
    new = t["old_log_probs"].clone().requires_grad_()
    loss, metrics = policy_loss(new, t["old_log_probs"], t["advantages"], minibatch_tokens=9, clip_epsilon=0.2)
    loss.backward()
    torch.testing.assert_close(new.grad, -t["advantages"] / 9)
    assert metrics["policy/clip_fraction"] == 0 and metrics["policy/ratio_max"] == 1


@settings(deadline=None)
@given(st.integers(1, 30), st.lists(st.integers(0, 30), max_size=4), st.sampled_from(["k1", "k2", "k3"]))
def test_parts_add_up_to_the_minibatch(count, cuts, estimator):
    """Loss, gradients and metrics don't depend on how the minibatch is split; parts may be empty."""
    t = tensors(count, seed=count)

    def run(bounds: list[int]) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        new, entropy = t["new_log_probs"].clone().requires_grad_(), t["entropy"].clone().requires_grad_()
        parts = []
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
            part = slice(start, stop)
            loss, metrics = policy_loss(
                new[part],
                t["old_log_probs"][part],
                t["advantages"][part],
                minibatch_tokens=count,
                clip_epsilon=0.2,
                weights=t["weights"][part],
                reference_log_probs=t["reference_log_probs"][part],
                kl_coefficient=0.3,
                kl_estimator=estimator,
                entropy=entropy[part],
                entropy_coefficient=0.1,
            )
            loss.backward()
            parts.append(metrics)
        return new.grad, entropy.grad, combined(parts)

    whole = run([0, count])
    split = run([0, *sorted(min(c, count) for c in cuts), count])
    torch.testing.assert_close(split[0], whole[0])
    torch.testing.assert_close(split[1], whole[1])
    assert split[2] == pytest.approx(whole[2], rel=1e-6, abs=1e-12)


def test_a_part_without_tokens_still_takes_part_in_the_backward_pass():
    parameter = torch.ones(3, requires_grad=True)
    none = parameter[torch.zeros(3, dtype=torch.bool)]
    loss, metrics = policy_loss(none, none.detach(), none.detach(), minibatch_tokens=5, clip_epsilon=0.2)
    loss.backward()
    assert loss == 0 and (parameter.grad == 0).all() and metrics["policy/ratio_max"] == 0


# -------------------------------------------------------------------------------------------------------- mismatch


def mismatch(learner: np.ndarray, engine: np.ndarray) -> dict[str, float]:
    shares = mismatch_shares(torch.from_numpy(learner), torch.from_numpy(engine), max(1, len(engine)))
    metrics = {name: float(value) for name, value in shares.items()}
    return metrics | {"mismatch/token_mult_error": 1.0 + metrics.pop("mismatch/token_mult_excess")}


def test_hand_computed_mismatch():
    # learner / engine = 2 and 1/2 and 1
    engine = np.log(np.array([0.1, 0.4, 0.3]))
    metrics = mismatch(np.log(np.array([0.2, 0.2, 0.3])), engine)
    assert metrics == pytest.approx(
        {
            "mismatch/kl": ((2 - 1 - math.log(2)) + (0.5 - 1 + math.log(2)) + 0) / 3,
            "mismatch/log_prob_abs_max": math.log(2),
            "mismatch/log_prob_abs_mean": 2 * math.log(2) / 3,
            "mismatch/token_mult_error": (2 + 2 + 1) / 3,
        }
    )


@pytest.mark.parametrize("log_probs", [np.array([-0.5, -3.0], dtype=np.float32), np.zeros(0, dtype=np.float32)])
def test_no_mismatch(log_probs):
    metrics = mismatch(log_probs, log_probs)
    assert metrics.pop("mismatch/token_mult_error") == 1.0
    assert set(metrics.values()) == {0.0}


@pytest.mark.parametrize("engine", [-5.0, -2000.0, -math.inf, math.nan])
def test_a_large_mismatch_stops_with_one_line_of_advice(engine):
    metrics = mismatch(np.array([-1.0, -1.0]), np.array([-1.0, engine]))
    with pytest.raises(ResourceError, match="mismatch.max_token_mult_error 1.5 .*weight_sync.checksum=true") as caught:
        check_mismatch(metrics, 1.5)
    assert "\n" not in str(caught.value)
    check_mismatch(metrics, None)


def test_a_small_mismatch_passes():
    check_mismatch({"mismatch/token_mult_error": 1.5, "mismatch/log_prob_abs_max": 1.0}, 1.5)
