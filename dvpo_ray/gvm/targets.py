"""Targets and losses of the value regression: pure functions of tensors.

The values of several responses are in one flat tensor of S states: `lengths[r] = T_r + 1` states for response r, its
`values[0..T]`. The only reward is the outcome r of the whole response, and γ = 1, so every target is a λ-return
(Sutton & Barto, 2nd ed., eq. 12.2) of a chain with a single reward at its end:

    G_T = r        G_t = (1 − λ)·V(s_{t+1}) + λ·G_{t+1}        for t = T−1 .. 0

which equals V(s_t) + Σ_l λ^l δ_{t+l} with δ_t = V(s_{t+1}) − V(s_t) and δ_T = r − V(s_T).
The last state of a response that was cut off is not terminal, but its outcome is known: r is the target there too.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Objective = Literal["td0", "td_lambda", "monte_carlo"]


def value_targets(objective: Objective, values: Tensor, lengths: Tensor, outcomes: Tensor, decay: float) -> Tensor:
    """Regression targets of all states, float32 [S], without gradients.

    Args:
        values: [S], the current values.
        lengths: int64 [R], states of each response, at least 1.
        outcomes: [R], r of each response.
        decay: λ of `td_lambda`.
    """
    values = values.detach().float()
    outcomes = outcomes.float()
    if objective == "td0":
        return td0_targets(values, lengths, outcomes)
    if objective == "td_lambda":
        return td_lambda_targets(values, lengths, outcomes, decay)
    return monte_carlo_targets(values, lengths, outcomes)


def td0_targets(values: Tensor, lengths: Tensor, outcomes: Tensor) -> Tensor:
    """G_t = V(s_{t+1}), and the outcome in the last state: λ = 0."""
    targets = values.roll(-1)
    targets[lengths.cumsum(0) - 1] = outcomes
    return targets


def td_lambda_targets(values: Tensor, lengths: Tensor, outcomes: Tensor, decay: float) -> Tensor:
    """The λ-returns of the formula above, of all responses at once.

    G_t = b_t + a_t G_{t+1}, with a = λ and b = (1 − λ) V(s_{t+1}), or 0 and r in the last state, which so ends a response. Two of these
    steps are one of the same form, so each round doubles the steps that b holds (a parallel scan, Blelloch 1990): a few
    rounds instead of as many steps as there are states.
    """
    last = lengths.cumsum(0) - 1
    rest = ((1.0 - decay) * values.double()).roll(-1)
    rest[last] = outcomes.double()
    weight = torch.full_like(rest, decay)
    weight[last] = 0.0
    distance = 1
    while distance < len(rest):
        rest = torch.cat([rest[:-distance] + weight[:-distance] * rest[distance:], rest[-distance:]])
        weight = torch.cat([weight[:-distance] * weight[distance:], weight[-distance:]])
        distance *= 2
    return rest.float()


def monte_carlo_targets(values: Tensor, lengths: Tensor, outcomes: Tensor) -> Tensor:
    """The outcome in every state: λ = 1."""
    return outcomes.repeat_interleave(lengths, output_size=len(values))


def squared_error(values: Tensor, targets: Tensor) -> Tensor:
    """½ Σ (V − G)² over states, a scalar. Divided by the number of states in the minibatch it is the regression loss."""
    return 0.5 * (values.float() - targets).square().sum()


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Σ −log σ(v_chosen − v_rejected) over pairs (Bradley & Terry 1952), a scalar. The caller divides it by the number of pairs.

    Args:
        chosen, rejected: [P], the last or the mean value of each response.
    """
    return -F.logsigmoid(chosen.float() - rejected.float()).sum()


def last_values(values: Tensor, lengths: Tensor) -> Tensor:
    """values[T] of each response, [R]."""
    return values[lengths.cumsum(0) - 1]


def mean_values(values: Tensor, lengths: Tensor) -> Tensor:
    """Mean of values[1..T] of each response, [R]: the values at its tokens."""
    starts = lengths.cumsum(0) - lengths
    counted = torch.ones_like(values)
    counted[starts] = 0.0  # values[0] belongs to the prompt alone
    response = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths, output_size=len(values))
    sums = torch.zeros(len(lengths), dtype=values.dtype, device=values.device).index_add(0, response, values * counted)
    return sums / (lengths - 1).clamp(min=1)
