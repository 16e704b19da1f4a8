"""Token advantages of the algorithms with one reward per response from a reward model: PPO, GRPO, RLOO, ReMax, REINFORCE.

Notation for one row: R its reward, kl_t = log pi(y_t) - log pi_ref(y_t), S = R - beta * (kl_1 + ... + kl_T) its penalised return, and
G_t = R - beta * (kl_t + ... + kl_T) the return from token t on. A response that was cut off has a reward like any other.
"""

from __future__ import annotations

import numpy as np

from dvpo_ray.policy.mode_inputs import ModeInputs, mean_and_variance

GRPO_EPSILON = 1e-4


def ppo(inputs: ModeInputs) -> np.ndarray:
    """GAE (Schulman et al. 2016) on a critic's values with gamma 1.

    The reward comes after the last token, where the value is 0, so it takes the place of the value after the last token.
    """
    after = np.where(inputs.is_last, inputs.per_token(inputs.rewards), inputs.values[inputs.position])
    return inputs.to_go(after - inputs.value_before - inputs.kl_penalty, inputs.gae_lambda)


def grpo(inputs: ModeInputs) -> np.ndarray:
    """(S - mean) / (std + 1e-4) over the samples of a prompt, at every token (Shao et al. 2024, arXiv 2402.03300).

    The standard deviation is the unbiased one. The advantage is 0 if the prompt has one sample only.
    """
    returns = _penalised_returns(inputs)
    count, mean = _group_means(returns, inputs.group)
    spread = np.bincount(inputs.group, (returns - mean) ** 2)[inputs.group] / np.maximum(count - 1, 1)
    return inputs.per_token((returns - mean) / (np.sqrt(spread) + GRPO_EPSILON))


def rloo(inputs: ModeInputs) -> np.ndarray:
    """S minus the mean S of the other samples of its prompt, at every token (Ahmadian et al. 2024, arXiv 2402.14740).

    The advantage is 0 if the prompt has one sample only.
    """
    returns = _penalised_returns(inputs)
    count, mean = _group_means(returns, inputs.group)
    return inputs.per_token((returns - mean) * count / np.maximum(count - 1, 1))


def remax(inputs: ModeInputs) -> np.ndarray:
    """G_t minus the reward of the greedy response to the same prompt (Li et al. 2023, arXiv 2310.10505)."""
    return _returns(inputs) - inputs.per_token(inputs.batch.by_row["greedy_rewards"])


def reinforce(inputs: ModeInputs) -> np.ndarray:
    """G_t minus the mean of S over the batch (Williams 1992, with the batch mean as the baseline)."""
    baseline, _ = mean_and_variance(_penalised_returns(inputs))
    return _returns(inputs) - baseline


def _returns(inputs: ModeInputs) -> np.ndarray:
    """G_t, float64 [n]."""
    return inputs.per_token(inputs.rewards) - inputs.to_go(inputs.kl_penalty, decay=1.0)


def _penalised_returns(inputs: ModeInputs) -> np.ndarray:
    """S, float64 [R]."""
    row = inputs.batch.row_of_token[inputs.position]
    return inputs.rewards - np.bincount(row, inputs.kl_penalty, minlength=inputs.batch.num_rows)


def _group_means(returns: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of samples of each row's prompt, and their mean return, both [R]."""
    count = np.bincount(group)[group]
    return count, np.bincount(group, returns)[group] / count
