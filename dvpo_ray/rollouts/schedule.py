"""Which prompts a step takes, and its seeds: pure functions of the seed and the step, so that resuming needs no state."""

from __future__ import annotations

import numpy as np


def prompt_indices(num_prompts: int, prompts_per_step: int, step: int, seed: int) -> list[int]:
    """Indices of a step's prompts. Every pass over the set is a fresh permutation, and no prompt is left out of one.

    Args:
        num_prompts: prompts in the set, at least 1.
        step: from 1.
    """
    positions = np.arange((step - 1) * prompts_per_step, step * prompts_per_step)
    epochs, places = positions // num_prompts, positions % num_prompts
    order = {epoch: np.random.default_rng([seed, epoch]).permutation(num_prompts) for epoch in set(epochs.tolist())}
    return [int(order[epoch][place]) for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)]


def sampling_seed(seed: int, step: int, index: int, stream: int = 0) -> int:
    """Seed of the sampling of an engine, or of a row, in one step; below 2**31. One that samples twice in a step takes another stream."""
    return int(np.random.default_rng([seed, step, index, stream]).integers(2**31))
