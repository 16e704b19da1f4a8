"""Disagreement of several value models, and advantages that trust a token less where they disagree."""

from __future__ import annotations

import numpy as np

from dvpo_ray.batch import RaggedBatch


def ensemble_std(values: list[np.ndarray]) -> np.ndarray:
    """Standard deviation over the models (dividing by their number) of the value after each token.

    Args:
        values: float32 [N] of each of at least two models.

    Returns:
        float32 [N].
    """
    return np.std(np.stack(values).astype(np.float64), axis=0).astype(np.float32)


def confidence(batch: RaggedBatch, coefficient: float) -> np.ndarray:
    """What each token's advantage is multiplied by: 1 / (1 + c * s_t / S).

    s_t is the disagreement on the value after the token and S the standard deviation of the values themselves, over all states of
    the batch's responses, so that c has no unit. With c = 1 a token halves where the models differ as much as values do at all.

    Args:
        batch: with `values` and `disagreement`.
        coefficient: c; 0 leaves every advantage as it is.

    Returns:
        float64 [N], in (0, 1].
    """
    states = batch.by_token["values"][batch.state_index].astype(np.float64)
    spread = states.std()
    if coefficient == 0 or not spread > 0:
        return np.ones(batch.num_tokens)
    return 1.0 / (1.0 + coefficient * batch.by_token["disagreement"].astype(np.float64) / spread)
