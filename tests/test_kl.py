"""KL estimators against exact enumeration of a small vocabulary; the adaptive coefficient against hand-computed numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dvpo_ray.policy.kl import ESTIMATORS, AdaptiveKLController, token_kl

logits_of = st.lists(st.floats(-4, 4), min_size=5, max_size=5).map(lambda v: torch.tensor(v, dtype=torch.float64))


def kl_divergence(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    p, q = p_logits.log_softmax(0), q_logits.log_softmax(0)
    return (p.exp() * (p - q)).sum()


def expected_estimate(logits: torch.Tensor, reference: torch.Tensor, estimator: str) -> torch.Tensor:
    """Mean over all tokens of the vocabulary, weighted by the policy's probability; the weight has no gradient, as in sampling."""
    log_probs = logits.log_softmax(0)
    return (log_probs.detach().exp() * token_kl(log_probs, reference.log_softmax(0), estimator)).sum()


@pytest.mark.parametrize(
    ("estimator", "expected", "gradient"),
    [
        # log pi = log 0.5, log pi_ref = log 0.25: r = pi_ref / pi = 0.5
        ("k1", math.log(2), 1.0),
        ("k2", math.log(2) ** 2 / 2, math.log(2)),
        ("k3", 0.5 - 1 + math.log(2), 1 - 0.5),
    ],
)
def test_hand_computed_token(estimator, expected, gradient):
    log_prob = torch.tensor([math.log(0.5)], dtype=torch.float64, requires_grad=True)
    estimate = token_kl(log_prob, torch.tensor([math.log(0.25)], dtype=torch.float64), estimator)
    assert estimate.item() == pytest.approx(expected, abs=1e-12)
    estimate.sum().backward()
    assert log_prob.grad.item() == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@given(logits_of, logits_of)
def test_k1_and_k3_are_unbiased(estimator, logits, reference):
    assert torch.allclose(expected_estimate(logits, reference, estimator), kl_divergence(logits, reference), atol=1e-9)


@given(logits_of, logits_of)
def test_expected_gradients(logits, reference):
    """As a loss on samples of the policy, k1 does nothing, k2 has the gradient of the reverse KL, k3 that of the forward KL."""

    def gradient(function) -> torch.Tensor:
        leaf = logits.clone().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf)[0]

    assert torch.allclose(gradient(lambda x: expected_estimate(x, reference, "k1")), torch.zeros(5, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(gradient(lambda x: expected_estimate(x, reference, "k2")), gradient(lambda x: kl_divergence(x, reference)), atol=1e-9)
    assert torch.allclose(gradient(lambda x: expected_estimate(x, reference, "k3")), gradient(lambda x: kl_divergence(reference, x)), atol=1e-9)


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
@given(st.lists(st.tuples(st.floats(-8, 0), st.floats(-8, 0)), min_size=1, max_size=8))
def test_k2_and_k3_are_never_negative_and_all_vanish_at_the_reference(estimator, pairs):
    log_probs, reference = torch.tensor(pairs, dtype=torch.float64).T
    assert (token_kl(log_probs, log_probs, estimator) == 0).all()
    if estimator != "k1":
        assert (token_kl(log_probs, reference, estimator) >= 0).all()


# -------------------------------------------------------------------------------------------- adaptive coefficient


@pytest.mark.parametrize(
    ("sequence_kl", "expected"),
    [
        (6.0, 0.2),  # on target
        (6.6, 0.2 * (1 + 0.1 * 0.0256)),  # 10 % above
        (5.4, 0.2 * (1 - 0.1 * 0.0256)),
        (60.0, 0.2 * (1 + 0.2 * 0.0256)),  # clipped
        (0.0, 0.2 * (1 - 0.2 * 0.0256)),
    ],
)
def test_one_update_with_the_constants_of_ziegler(sequence_kl, expected):
    controller = AdaptiveKLController(0.2, target_nats=6.0, horizon=10_000)
    assert controller.update(sequence_kl, samples=256) == pytest.approx(expected, rel=1e-9)
    assert controller.coefficient == pytest.approx(expected, rel=1e-9)


def test_it_settles_on_the_target():
    """If KL falls as the coefficient rises, here as 1 / coefficient, it converges to the target."""
    controller = AdaptiveKLController(1.0, target_nats=5.0, horizon=640)
    for _ in range(400):
        controller.update(1.0 / controller.coefficient, samples=64)
    assert controller.coefficient == pytest.approx(0.2, rel=1e-3)


def test_without_a_target_the_coefficient_is_constant():
    controller = AdaptiveKLController(0.05, target_nats=None, horizon=1)
    assert controller.update(100.0, samples=64) == 0.05


def test_a_restored_controller_continues_the_same():
    first = AdaptiveKLController(0.2, target_nats=6.0, horizon=1000)
    first.update(9.0, samples=64)
    second = AdaptiveKLController(0.2, target_nats=6.0, horizon=1000)
    second.load_state_dict(first.state_dict())
    assert second.update(3.0, samples=64) == first.update(3.0, samples=64)
