"""Targets and losses of the value regression against an independent implementation of the formulas in docs/method.md."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dvpo_ray.gvm.targets import bradley_terry, last_values, mean_values, squared_error, value_targets

# Three responses of 3, 1 and 2 tokens: values[0..T] of each, and their outcomes.
VALUES = [[0.1, -0.2, 0.5, 0.4], [0.3, -0.6], [0.0, 0.2, -0.1]]
OUTCOMES = [1.0, -1.0, 2.5]


def flat(rows):
    return torch.tensor(np.concatenate(rows), dtype=torch.float32), torch.tensor([len(row) for row in rows])


def targets(objective, rows=VALUES, outcomes=OUTCOMES, decay=0.95):
    values, lengths = flat(rows)
    return value_targets(objective, values, lengths, torch.tensor(outcomes), decay)


def lambda_return(values, outcome, t, decay):
    """V(s_t) + sum over l of decay^l * delta_{t+l}."""
    after = [*values[1:], outcome]
    return values[t] + sum(decay**k * (after[t + k] - values[t + k]) for k in range(len(values) - t))


def test_td0_takes_the_next_value_and_the_outcome_last():
    np.testing.assert_allclose(targets("td0"), [-0.2, 0.5, 0.4, 1.0, -0.6, -1.0, 0.2, -0.1, 2.5], rtol=1e-6)


def test_monte_carlo_takes_the_outcome_everywhere():
    np.testing.assert_array_equal(targets("monte_carlo"), [1.0] * 4 + [-1.0] * 2 + [2.5] * 3)


def test_td_lambda_golden_values():
    # Response 2 by hand at 0.5: G_1 = r = -1; G_0 = 0.5 * V_1 + 0.5 * G_1 = 0.5 * -0.6 - 0.5 = -0.8.
    result = targets("td_lambda", decay=0.5)
    np.testing.assert_allclose(result[4:6], [-0.8, -1.0], rtol=1e-6)
    # Response 1: G_3 = 1; G_2 = 0.2 + 0.5 = 0.7; G_1 = 0.25 + 0.35 = 0.6; G_0 = -0.1 + 0.3 = 0.2.
    np.testing.assert_allclose(result[:4], [0.2, 0.6, 0.7, 1.0], rtol=1e-5)


@given(
    st.lists(st.lists(st.floats(-2, 2), min_size=1, max_size=12), min_size=1, max_size=5),
    st.floats(0, 1),
    st.data(),
)
def test_td_lambda_is_the_sum_of_decayed_td_errors(rows, decay, data):
    outcomes = data.draw(st.lists(st.floats(-3, 3), min_size=len(rows), max_size=len(rows)))
    expected = [lambda_return(row, r, t, decay) for row, r in zip(rows, outcomes, strict=True) for t in range(len(row))]
    np.testing.assert_allclose(targets("td_lambda", rows, outcomes, decay), expected, atol=1e-4)


def test_the_ends_of_lambda_are_td0_and_monte_carlo():
    np.testing.assert_allclose(targets("td_lambda", decay=0.0), targets("td0"), atol=1e-7)
    np.testing.assert_allclose(targets("td_lambda", decay=1.0), targets("monte_carlo"), atol=1e-7)


def test_from_a_zero_head_the_outcome_fades_towards_the_start():
    """At 0.95 the first targets are 0.6 r ten tokens before the end and 0.006 r a hundred tokens before it."""
    zero_head = [[0.0] * 201]
    result = targets("td_lambda", zero_head, [1.0])
    assert float(result[-11]) == pytest.approx(0.5987, abs=1e-4)
    assert float(result[-101]) == pytest.approx(0.00592, abs=1e-5)
    assert float(targets("td0", zero_head, [1.0]).sum()) == 1.0  # one-step targets reach only the last state
    assert (targets("monte_carlo", zero_head, [1.0]) == 1.0).all()


@pytest.mark.parametrize("objective", ["td0", "td_lambda", "monte_carlo"])
def test_targets_are_outside_the_graph(objective):
    values, lengths = flat(VALUES)
    values.requires_grad_()
    result = value_targets(objective, values, lengths, torch.tensor(OUTCOMES), 0.9)
    assert not result.requires_grad
    squared_error(values, result).backward()
    np.testing.assert_allclose(values.grad, (values - result).detach(), rtol=1e-6)  # the gradient of ½(V − G)² with G fixed


@pytest.mark.parametrize("objective", ["td0", "td_lambda", "monte_carlo"])
def test_a_response_has_the_same_targets_whatever_lies_beside_it(objective):
    together = targets(objective)
    alone = torch.cat([targets(objective, [row], [r]) for row, r in zip(VALUES, OUTCOMES, strict=True)])
    np.testing.assert_array_equal(together, alone)


def test_loss_golden_values():
    values, target = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.5])
    assert float(squared_error(values, target)) == pytest.approx(0.5 * (4.0 + 0.25))
    chosen, rejected = torch.tensor([0.3, -1.0]), torch.tensor([0.3, 1.0])
    assert float(bradley_terry(chosen, rejected)) == pytest.approx(math.log(2) + math.log(1 + math.exp(2)), rel=1e-6)


def test_bradley_terry_stays_finite_for_hopeless_pairs():
    loss = bradley_terry(torch.tensor([-500.0]), torch.tensor([500.0]))
    assert float(loss) == pytest.approx(1000.0)


def test_response_values():
    values, lengths = flat(VALUES)
    np.testing.assert_allclose(last_values(values, lengths), [0.4, -0.6, -0.1], rtol=1e-6)
    np.testing.assert_allclose(mean_values(values, lengths), [0.7 / 3, -0.6, 0.05], rtol=1e-5)
