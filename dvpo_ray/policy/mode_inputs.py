"""What an advantage mode may read of a batch, and the sums it is made of. Everything is float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dvpo_ray.batch import RaggedBatch


@dataclass(frozen=True)
class ModeInputs:
    """What an advantage mode may read: the rows in the loss, in float64.

    Attributes:
        batch: R rows of N tokens, of which n are response tokens.
        values: float64 [N], value of the state after each token, prompt included; None where nothing estimates it.
        kl_penalty: float64 [n], beta * kl_t of each response token.
        truncation_penalty: float64 [n], what the value after a token loses: 0 but at the last token of a penalised row.
        gae_lambda: trace decay.
        rewards: float64 [R], outcome of each row by a reward model, less the penalty of a cut-off one; None where there is no reward model.
        group: int64 [R], a number for the prompt of each row.
    """

    batch: RaggedBatch
    values: np.ndarray | None
    kl_penalty: np.ndarray
    truncation_penalty: np.ndarray
    gae_lambda: float
    rewards: np.ndarray | None = None
    group: np.ndarray | None = None

    @cached_property
    def position(self) -> np.ndarray:
        """Position of each response token in the batch, int64 [n]. The position before it belongs to the same row."""
        return np.flatnonzero(self.batch.response_mask)

    @property
    def value_before(self) -> np.ndarray:
        """v[t-1] of each response token, float64 [n]."""
        return self.values[self.position - 1]

    @property
    def value_after(self) -> np.ndarray:
        """v[t] of each response token, less the penalty of a cut-off response, float64 [n]."""
        return self.values[self.position] - self.truncation_penalty

    @cached_property
    def is_last(self) -> np.ndarray:
        """True on the last token of each row, bool [n]."""
        return np.isin(self.position, self.batch.offsets[1:] - 1)

    def per_token(self, per_row: np.ndarray) -> np.ndarray:
        """A number of each row at every one of its response tokens, float64 [n]."""
        return np.repeat(per_row, self.batch.response_lengths)

    def to_go(self, per_token: np.ndarray, decay: float) -> np.ndarray:
        """Discounted sum from each response token to the end of its row, float64 [n]."""
        return discounted_to_go(per_token, self.batch.response_lengths, decay)


def discounted_to_go(per_token: np.ndarray, lengths: np.ndarray, decay: float) -> np.ndarray:
    """Sum over l >= 0 of decay^l * x_{t+l}, within each row.

    Args:
        per_token: float64 [n], the rows one after the other.
        lengths: int64 [R], their lengths; they sum to n, and a row may be empty.
        decay: 0 gives x itself, 1 the plain sum to the end of the row.

    Returns:
        float64 [n]. A row's numbers depend on no other row.
    """
    longest_first = np.argsort(-lengths, kind="stable")
    last = np.cumsum(lengths)[longest_first] - 1
    steps = np.arange(lengths.max(initial=0))
    rows_reaching = np.searchsorted(-lengths[longest_first], -steps, side="left")  # rows of more than `step` tokens
    result = np.empty(len(per_token), dtype=np.float64)
    to_go = np.zeros(len(lengths), dtype=np.float64)
    for step, rows in zip(steps, rows_reaching, strict=True):
        at = last[:rows] - step
        to_go[:rows] = per_token[at] + decay * to_go[:rows]
        result[at] = to_go[:rows]
    return result
