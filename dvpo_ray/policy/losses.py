"""The policy loss: PPO's clipped surrogate, with an optional KL term and entropy bonus; and the loss of an online critic.

Losses and metrics are sums over tokens, divided by the token count of the whole minibatch, which the caller gives. So the
shares of micro-batches and ranks add up to the loss of the minibatch, whatever the split.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dvpo_ray.policy.kl import token_kl


class Surrogate(NamedTuple):
    """The clipped surrogate of n tokens, and the numbers behind its metrics. Only `loss` carries gradients.

    Attributes:
        loss: float [n].
        ratio: float [n], pi_new / pi_old.
        clipped: bool [n], the ratio is outside [1 - epsilon, 1 + epsilon].
        approx_kl: float [n], estimate of KL(pi_old || pi_new) in nats, never negative.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    approx_kl: Tensor


def clipped_surrogate(
    new_log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_epsilon: float, weights: Tensor | None = None
) -> Surrogate:
    """PPO's clipped surrogate (Schulman et al. 2017, arXiv 1707.06347), as a loss per token: -w * min(r A, clip(r, 1-eps, 1+eps) A).

    Args:
        new_log_probs: float [n], under the trained policy; differentiable.
        old_log_probs: float [n], under the policy before the first update on these tokens.
        advantages: float [n].
        clip_epsilon: clipping range of the ratio.
        weights: float [n], importance weight of each token; 1 if None.
    """
    log_ratio = new_log_probs - old_log_probs
    ratio = log_ratio.exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_epsilon, 1 + clip_epsilon) * advantages)
    if weights is not None:
        loss = weights * loss
    ratio = ratio.detach()
    return Surrogate(
        loss=loss,
        ratio=ratio,
        clipped=(ratio - 1).abs() > clip_epsilon,
        approx_kl=token_kl(old_log_probs, new_log_probs.detach(), "k3"),
    )


def truncated_importance_weights(learner_log_probs: Tensor, engine_log_probs: Tensor, cap: float) -> Tensor:
    """min(pi_learner / pi_engine, cap) per token, without gradients (truncated importance sampling, Ionides 2008).

    The engine samples the tokens and the learner trains on them; their numerics differ, and the weight corrects the expectation.

    Args:
        learner_log_probs: float [n], from the learner before the first update.
        engine_log_probs: float [n], from the rollout engine while sampling.
        cap: upper bound of the weight, which limits the variance that it adds.
    """
    return (learner_log_probs - engine_log_probs).detach().exp().clamp(max=cap)


def policy_loss(
    new_log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    minibatch_tokens: int,
    clip_epsilon: float,
    weights: Tensor | None = None,
    reference_log_probs: Tensor | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: str = "k3",
    entropy: Tensor | None = None,
    entropy_coefficient: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The share of these tokens in the minibatch loss: (sum of surrogate + beta * KL - c * entropy) / minibatch_tokens.

    Args:
        new_log_probs, old_log_probs, advantages, clip_epsilon, weights: see `clipped_surrogate`. n may be 0: the loss is then 0
            with zero gradients, so that a rank without rows can take part in the backward pass.
        minibatch_tokens: number of tokens in the loss of the whole minibatch, over all micro-batches and ranks.
        reference_log_probs: float [n]; required if `kl_coefficient` isn't 0.
        kl_coefficient: weight of the KL term; 0 if KL is in the reward or off. Importance weights don't apply to it.
        kl_estimator: see `dvpo_ray.policy.kl`.
        entropy: float [n] in nats; must be differentiable if `entropy_coefficient` isn't 0, else it is only a metric.
        entropy_coefficient: weight of the entropy bonus.

    Returns:
        The loss, a scalar, and its metrics, detached scalars by name. The shares of all parts add up; of `*_max` the largest counts.
    """
    surrogate = clipped_surrogate(new_log_probs, old_log_probs, advantages, clip_epsilon, weights)
    total = surrogate.loss.sum()
    if kl_coefficient:
        total = total + kl_coefficient * token_kl(new_log_probs, reference_log_probs, kl_estimator).sum()
    if entropy_coefficient:
        total = total - entropy_coefficient * entropy.sum()
    loss = total / minibatch_tokens

    metrics = {
        "policy/loss": loss.detach(),
        "policy/approx_kl": surrogate.approx_kl.sum() / minibatch_tokens,
        "policy/clip_fraction": surrogate.clipped.sum() / minibatch_tokens,
        "policy/ratio_max": surrogate.ratio.max() if len(surrogate.ratio) else torch.zeros_like(loss),
    }
    if entropy is not None:
        metrics["policy/entropy"] = entropy.detach().sum() / minibatch_tokens
    return loss, metrics


def value_loss(
    new_values: Tensor, old_values: Tensor, returns: Tensor, *, minibatch_tokens: int, clip: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The share in a critic's minibatch loss: sum of 1/2 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / minibatch_tokens.

    Values are clipped as in OpenAI's PPO code and TRL; without clipping the loss is the squared error.

    Args:
        new_values: float [n], differentiable; n may be 0.
        old_values: float [n], from before the first update on these tokens.
        returns: float [n], the regression targets.
        minibatch_tokens: see `policy_loss`.
        clip: the distance c; None turns clipping off.

    Returns:
        As `policy_loss`.
    """
    squared = (new_values - returns).square()
    outside = torch.zeros_like(squared, dtype=torch.bool)
    if clip is not None:
        clipped = (torch.clamp(new_values, old_values - clip, old_values + clip) - returns).square()
        outside = clipped > squared
        squared = torch.maximum(squared, clipped)
    loss = 0.5 * squared.sum() / minibatch_tokens
    return loss, {
        "critic/loss": loss.detach(),
        "critic/clip_fraction": outside.sum() / minibatch_tokens,
        "critic/value_mean": new_values.detach().sum() / minibatch_tokens,
        "critic/return_mean": returns.sum() / minibatch_tokens,
    }
