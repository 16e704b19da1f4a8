"""The inputs of an advantage mode, and the sums and the whitening that modes are made of. Everything is float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from dvpo_ray.batch import RaggedBatch

VARIANCE_EPSILON = 1e-8

ValueWhitening = Literal["row", "batch"]


@dataclass(frozen=True)
class ModeInputs:
    """The inputs of an advantage mode: the rows in the loss, in float64.

    Attributes:
        batch: R rows of N tokens; n of them are response tokens.
        values: float64 [N], value of the state after each token, prompt included; None if the mode does not read values.
        kl_penalty: float64 [n], beta * kl_t of each response token.
        penalty: is subtracted from the value after the last token of a row that was cut off.
        gae_lambda: trace decay.
        value_whitening: the values that are whitened together: those of one `row`, or those of the whole `batch`.
        rewards: float64 [R], reward of each row, minus the penalty if the row was cut off; None if the mode does not read rewards.
        group: int64 [R], a number for the prompt of each row.
    """

    batch: RaggedBatch
    values: np.ndarray | None
    kl_penalty: np.ndarray
    penalty: float
    gae_lambda: float
    value_whitening: ValueWhitening
    rewards: np.ndarray | None
    group: np.ndarray

    @cached_property
    def position(self) -> np.ndarray:
        """Position of each response token in the batch, int64 [n]. The position before it is in the same row."""
        return np.flatnonzero(self.batch.response_mask)

    @property
    def value_before(self) -> np.ndarray:
        """v[t-1] of each response token, float64 [n]."""
        return self.values[self.position - 1]

    @property
    def value_after(self) -> np.ndarray:
        """v[t] of each response token, minus the truncation penalty, float64 [n]."""
        return self.values[self.position] - self.truncation_penalty

    @property
    def whitened_values(self) -> np.ndarray:
        """The values of every position, prompt included, whitened within their row or over the batch, float64 [N]."""
        if self.value_whitening == "batch":
            return whiten(self.values)
        whitened = np.empty_like(self.values)
        for r in range(self.batch.num_rows):
            row = self.batch.row(r)
            whitened[row] = whiten(self.values[row])
        return whitened

    @cached_property
    def is_last(self) -> np.ndarray:
        """True on the last token of each row, bool [n]."""
        return np.isin(self.position, self.batch.offsets[1:] - 1)

    @property
    def truncation_penalty(self) -> np.ndarray:
        """The penalty at the last token of each row that was cut off, 0 elsewhere, float64 [n]."""
        return self.penalty * (self.is_last & self.per_token(self.batch.truncated))

    def per_token(self, per_row: np.ndarray) -> np.ndarray:
        """The number of each row, [R], repeated for each of its response tokens, float64 [n]."""
        return np.repeat(per_row, self.batch.response_lengths)

    def to_go(self, per_token: np.ndarray, decay: float) -> np.ndarray:
        """Discounted sum from each response token to the end of its row, float64 [n]."""
        return discounted_to_go(per_token, self.batch.response_lengths, decay)


def discounted_to_go(per_token: np.ndarray, lengths: np.ndarray, decay: float) -> np.ndarray:
    """Sum over l >= 0 of decay^l * x_{t+l}, within each row.

    Args:
        per_token: float64 [n], row after row.
        lengths: int64 [R], length of each row; they sum to n, and a row may be empty.
        decay: 0 gives x itself, 1 the plain sum to the end of the row.

    Returns:
        float64 [n]. The result for a row does not depend on other rows.
    """
    longest_first = np.argsort(-lengths, kind="stable")
    last = np.cumsum(lengths)[longest_first] - 1
    steps = np.arange(lengths.max(initial=0))
    rows_reaching = np.searchsorted(-lengths[longest_first], -steps, side="left")  # number of rows with more than `step` tokens
    result = np.empty(len(per_token), dtype=np.float64)
    to_go = np.zeros(len(lengths), dtype=np.float64)
    for step, rows in zip(steps, rows_reaching, strict=True):
        at = last[:rows] - step
        to_go[:rows] = per_token[at] + decay * to_go[:rows]
        result[at] = to_go[:rows]
    return result


def mean_and_variance(values: np.ndarray) -> tuple[float, float]:
    """Mean and unbiased variance of a flat array.

    The numbers are summed in sorted order, so the result is the same to the last bit for every order of the rows.

    Args:
        values: float64 [n].

    Returns:
        (mean, variance); (0, 0) if n is 0, and variance 0 if n is 1.
    """
    if len(values) == 0:
        return 0.0, 0.0
    ordered = np.sort(values)
    mean = ordered.mean()
    variance = np.square(ordered - mean).sum() / max(len(values) - 1, 1)
    return float(mean), float(variance)


def whiten(values: np.ndarray) -> np.ndarray:
    """(x - mean) / sqrt(variance + 1e-8) with the unbiased variance, float64 [n]. Float32 numbers that are all equal become 0."""
    mean, variance = mean_and_variance(values)
    return (values - mean) / np.sqrt(variance + VARIANCE_EPSILON)


def masked_whiten(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Whiten the numbers under a mask, as TRL's `masked_whiten` does.

    Args:
        values: float [N]; numbers outside the mask are not read.
        mask: bool [N].

    Returns:
        float64 [N], 0 outside the mask.
    """
    whitened = np.zeros(len(values), dtype=np.float64)
    whitened[mask] = whiten(values[mask].astype(np.float64))
    return whitened
